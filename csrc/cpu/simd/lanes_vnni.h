// AVX-512 with VNNI: four u8 times s8 products added to an int32 lane in one instruction.
#pragma once

#include "cpu/simd/lanes_avx512.h"

namespace bigops {
namespace {

struct VnniLanes : Avx512Lanes {
  using xreg = __m512i;
  using wreg = __m512i;
  static constexpr int dense_rows = 6;  // 24 accumulators, 4 vectors of x, one weight

  static xreg x_of(ireg v) { return v; }
  static wreg w_of(ireg v) { return v; }
  static ireg dot(ireg acc, xreg x, wreg w) { return _mm512_dpbusd_epi32(acc, x, w); }
};

}  // namespace
}  // namespace bigops
