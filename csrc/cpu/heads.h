// Tensors by head: [B, H, length, columns], read in any strides, written as the next product of
// rows wants them.
#pragma once

#include "common/tensor.h"

namespace bigops {

// [B, H, T, D] in the memory of [B, T, H, D].
inline Tensor empty_heads(int64_t b, int64_t h, int64_t t, int64_t d, ScalarType dtype) {
  const auto step = [](int64_t n) { return n > 0 ? n : 1; };
  const int64_t sizes[] = {b, h, t, d};
  const int64_t strides[] = {step(t) * step(h) * step(d), step(d), step(h) * step(d), 1};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, dtype_code(dtype),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace bigops
