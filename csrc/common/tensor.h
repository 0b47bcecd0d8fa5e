// Tensors of torch's stable ABI: checks that name argument, expected and got; cheap allocation;
// calls into torch's own ops.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "common/codes.h"

namespace bigops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline const char* short_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "f32";
    case ScalarType::Double: return "f64";
    case ScalarType::BFloat16: return "bf16";
    case ScalarType::Half: return "f16";
    case ScalarType::Char: return "s8";
    case ScalarType::Byte: return "u8";
    case ScalarType::Int: return "s32";
    default: return "an unsupported dtype";
  }
}

[[noreturn]] inline void fail(const char* argument, const std::string& expected,
                              const std::string& got) {
  STD_TORCH_CHECK(false, argument, ": expected ", expected, "; got ", got);
  __builtin_unreachable();
}

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline void check_cpu(const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(name, "a CPU tensor", "another device");
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType expected) {
  if (t.scalar_type() != expected)
    fail(name, std::string("dtype ") + short_name(expected), short_name(t.scalar_type()));
}

inline void check_vector(const char* name, const Tensor& t, int64_t n) {
  if (t.dim() != 1 || t.size(0) != n) fail(name, "shape [" + std::to_string(n) + "]", shape_of(t));
}

template <size_t N>
int check_code(const char* argument, int64_t code, const Words<N>& words) {
  if (code < 0 || code >= static_cast<int64_t>(N))
    fail(
        argument,
        "a code from 0 to " + std::to_string(N - 1) + " (" + words[0] + " to " + words[N - 1] + ")",
        std::to_string(code));
  return static_cast<int>(code);
}

inline int check_activation(int64_t code) {
  return check_code("activation", code, kActivationWords);
}

inline int check_plain_activation(int64_t code) {
  const int activation = check_activation(code);
  if (is_gated(activation))
    fail("activation", "one that is no gated pair", kActivationWords[activation]);
  return activation;
}

// Contiguous form; no copy (and no dispatcher) where it already is.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// As it lies where its last dimension is contiguous.
inline Tensor rows_as_they_lie(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : dense(t);
}

inline OptTensor dense(const OptTensor& t) {
  return t.has_value() ? OptTensor(dense(*t)) : OptTensor();
}

inline const void* data(const OptTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

inline int32_t dtype_code(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Char: return aoti_torch_dtype_int8();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    case ScalarType::Bool: return aoti_torch_dtype_bool();
    default: fail("dtype", "a served dtype", "another");
  }
}

// Contiguous, uninitialised, on the CPU. The direct shim: torch::stable::empty goes through the
// dispatcher by name, which costs about a microsecond.
inline Tensor empty(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  int64_t strides[16];
  STD_TORCH_CHECK(dim <= 16, "at most 16 dimensions are served; got ", dim);
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype_code(dtype),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The shape of x with its last dimension replaced by n.
inline Tensor empty_rows_like(const Tensor& x, int64_t n, ScalarType dtype) {
  int64_t sizes[16];
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim <= 16, "x: at most 16 dimensions are served; got ", dim);
  for (int64_t i = 0; i + 1 < dim; ++i) sizes[i] = x.size(i);
  sizes[dim - 1] = n;
  return empty(sizes, dim, dtype);
}

inline Tensor view_matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return torch::stable::view(t, {rows, columns});
}

// torch's own products, for what is better served there (recorded as such).
inline Tensor torch_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor torch_mm(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Parallel over [0, tasks) where the work is worth waking threads for, else inline.
template <class F>
void for_tasks(int64_t tasks, bool worth_it, const F& f) {
  if (tasks > 1 && worth_it)
    torch::stable::parallel_for(0, tasks, 1, f);
  else
    f(0, tasks);
}

}  // namespace bigops
