// Picks the table of an instruction set and dtype: the best one at or below the active level.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "common/isa.h"
#include "cpu/simd/fused_linear.h"

namespace bigops {

struct Selected {
  const FloatKernels* kernels;
  Isa isa;
};

inline Selected select_float_kernels(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Double) return {&portable_f64, Isa::portable};
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (isa >= Isa::avx512bf16 && dtype == ScalarType::BFloat16)
    return {&avx512bf16_bf16, Isa::avx512bf16};
  const bool wide = isa >= Isa::avx512;
  if (isa >= Isa::avx2) {
    const Isa level = wide ? Isa::avx512 : Isa::avx2;
    if (dtype == ScalarType::BFloat16) return {wide ? &avx512_bf16 : &avx2_bf16, level};
    if (dtype == ScalarType::Half) return {wide ? &avx512_f16 : &avx2_f16, level};
    return {wide ? &avx512_f32 : &avx2_f32, level};
  }
#endif
  if (dtype == ScalarType::BFloat16) return {&portable_bf16, Isa::portable};
  if (dtype == ScalarType::Half) return {&portable_f16, Isa::portable};
  return {&portable_f32, Isa::portable};
}

}  // namespace bigops
