// 32-bit lanes of AVX-512 with VNNI for the int8 and sparse kernels. Internal linkage.
#pragma once

#include "cpu/simd/lanes_avx512.h"

namespace bigops {
namespace {

struct VnniLanes : Avx512Lanes {
  using xreg = __m512i;
  using wreg = __m512i;

  static xreg x_of(ireg v) { return v; }
  static wreg w_of(ireg v) { return v; }
  static ireg dot(ireg acc, xreg x, wreg w) { return _mm512_dpbusd_epi32(acc, x, w); }
  static ireg dot16(ireg acc, ireg a, ireg b) { return _mm512_dpwssd_epi32(acc, a, b); }
};

}  // namespace
}  // namespace bigops
