// fused_linear in bfloat16 with vdpbf16ps: 32 products an instruction, summed in float32. The
// instruction flushes subnormal inputs to zero (Intel SDM, VDPBF16PS), which is below the rule.
#include "cpu/simd/vec_avx512.h"
#include "cpu/simd/fused_linear.inl"

namespace bigops {
namespace {

struct MultiplyBf16 {
  using V = Avx512;
  using T = bf16;
  using in = __m512bh;
  static constexpr int step = 32;
  static in load(const T* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static in load_n(const T* p, int n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(_cvtu32_mask32((1u << n) - 1u), p);
  }
  static __m512 mac(__m512 sum, in a, in b) { return _mm512_dpbf16_ps(sum, a, b); }
};

}  // namespace

const FloatKernels avx512bf16_bf16 = {linear<MultiplyBf16, 4>, epilogue<Avx512, bf16>,
                                      backward<Avx512, bf16>};

}  // namespace bigops
