// Products of float matrices by another library, where no own kernel is quicker: torch's own or
// oneDNN's (common/crossover.h says which).
#pragma once

#include "common/crossover.h"
#include "common/tensor.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr,
    const double** scalars, int64_t scalars_len, const char** algorithm, AtenTensorHandle* result);

namespace bigops {

inline bool has_onednn_linear() { return aoti_torch_cpu__linear_pointwise != nullptr; }

// x W^T + bias by oneDNN, matrices of any strides. By the shim of torch's private op and not by the
// dispatcher, which would keep a copy of each of its strings (common/codes.h). A torch without
// oneDNN has no such shim: the Python side asks before it lets this be called (backend/machine.py).
inline Tensor onednn_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  AtenTensorHandle added = bias.has_value() ? bias->get() : nullptr, result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), bias.has_value() ? &added : nullptr,
                                       "none", nullptr, 0, nullptr, &result));
  return Tensor(result);
}

// a [M, K] times b [K, N]. oneDNN is not asked for products without elements.
inline Tensor library_mm(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != ScalarType::Float || !onednn_floats() || a.numel() == 0 || b.numel() == 0)
    return torch_mm(a, b);
  return onednn_linear(a, torch::stable::transpose(b, 0, 1), OptTensor());
}

}  // namespace bigops
