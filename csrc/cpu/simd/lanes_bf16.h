// 32-bit lanes of AVX-512 with BF16 for the kernels that multiply pairs. Internal linkage.
#pragma once

#include "cpu/simd/lanes_avx512.h"

namespace bigops {
namespace {

struct Bf16Lanes : Avx512Lanes {
  static constexpr bool native_bf16 = true;

  static __m512 dot_bf16(__m512 acc, ireg x, ireg w) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

}  // namespace
}  // namespace bigops
