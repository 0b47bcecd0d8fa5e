// Products of float matrices by another library, where no own kernel is quicker: torch's own or
// oneDNN's (common/crossover.h says which).
#pragma once

#include "common/crossover.h"
#include "common/tensor.h"

namespace bigops {

// x W^T + bias by oneDNN, matrices of any strides. The op is torch's own but private: the Python
// side looks for it before it lets this be called (backend.py).
inline Tensor onednn_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(x),
                                    from(weight),
                                    from(bias),
                                    from(std::string("none")),
                                    from(std::vector<int64_t>()),
                                    from(std::optional<std::string>(""))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// a [M, K] times b [K, N]. oneDNN is not asked for products without elements.
inline Tensor library_mm(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != ScalarType::Float || !onednn_floats() || a.numel() == 0 || b.numel() == 0)
    return torch_mm(a, b);
  return onednn_linear(a, torch::stable::transpose(b, 0, 1), OptTensor());
}

}  // namespace bigops
