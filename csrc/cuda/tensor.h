// What the registrations in csrc/cuda share: checks for CUDA tensors, allocation, the stream.
// For .cpp files; a kernel's .cu knows nothing of torch.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "common/tensor.h"

namespace bigops {

#if defined(BIGOPS_HOSTRUN)
// In tests the kernels run on the CPU (csrc/hostrun), and so do the registrations.
#define BIGOPS_DEVICE CPU
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
inline void* stream_of(const Tensor&) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};
#else
#define BIGOPS_DEVICE CUDA
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
// The stream on which torch works now on the device of t.
inline void* stream_of(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}
struct DeviceGuard : torch::stable::accelerator::DeviceGuard {
  explicit DeviceGuard(const Tensor& t)
      : torch::stable::accelerator::DeviceGuard(t.get_device_index()) {}
};
#endif

// Fails unless t is on x's device, of the dtype and the sizes.
inline void check_on(const char* name, const Tensor& t, const Tensor& x, ScalarType dtype,
                     std::initializer_list<int64_t> sizes) {
  if (!on_device(t) || t.get_device_index() != x.get_device_index())
    fail(name, "the device of x", "another");
  check_dtype(name, t, dtype);
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  std::string text = "[";
  for (const int64_t size : sizes) {
    text += (i ? ", " : "") + std::to_string(size);
    same = same && t.size(i) == size;
    ++i;
  }
  if (!same) fail(name, "shape " + text + "]", shape_of(t));
}

inline void check_on(const char* name, const OptTensor& t, const Tensor& x, ScalarType dtype,
                     std::initializer_list<int64_t> sizes) {
  if (t.has_value()) check_on(name, *t, x, dtype, sizes);
}

// What a product of whole numbers needs besides: scale and zero point of the rows of x [m], scale
// and sums of the rows of W [n]; none of them where the product is not whole.
inline void check_whole(bool whole, const Tensor& x, int64_t m, int64_t n, const OptTensor& x_scale,
                        const OptTensor& x_zero, const OptTensor& scale, const OptTensor& sums) {
  for (const bool given :
       {x_scale.has_value(), x_zero.has_value(), scale.has_value(), sums.has_value()})
    if (given != whole)
      fail("x_scale, x_zero, scale, sums", whole ? "tensors with int8 values" : "None",
           whole ? "None" : "a tensor");
  check_on("x_scale", x_scale, x, ScalarType::Float, {m});
  check_on("x_zero", x_zero, x, ScalarType::Int, {m});
  check_on("scale", scale, x, ScalarType::Float, {n});
  check_on("sums", sums, x, ScalarType::Int, {n});
}

// Bias [n] and residual [m, n] in y's dtype; the code of the activation, which is not gated.
inline int check_epilogue(const Tensor& x, ScalarType dtype, int64_t m, int64_t n,
                          const OptTensor& bias, const OptTensor& residual, int64_t activation) {
  check_on("bias", bias, x, dtype, {n});
  check_on("residual", residual, x, dtype, {m, n});
  return check_plain_activation(activation);
}

// Contiguous at an address that divides by 16, as cp.async of 16 bytes wants it.
inline Tensor dense_16(const Tensor& t) {
  const Tensor whole = dense(t);
  const bool aligned = reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0;
  return aligned ? whole : torch::stable::clone(whole);
}

inline OptTensor dense_16(const OptTensor& t) {
  return t.has_value() ? OptTensor(dense_16(*t)) : OptTensor();
}

}  // namespace bigops
