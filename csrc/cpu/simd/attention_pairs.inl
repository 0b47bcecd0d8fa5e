// attention in bfloat16 by pairs: of columns of q and k, of keys behind them.
// Include where AVX512-BF16 is there. Internal linkage throughout.

#include "cpu/simd/lanes_bf16.h"
// after it
#include "cpu/simd/attention.inl"

namespace bigops {
namespace {

struct PairWords : PackedBf16<Bf16Lanes> {
  using L = Bf16Lanes;
  using V = Avx512;
  static constexpr int pair = 2;
  static constexpr int step = 1;
  static constexpr bool tiles = false;
  // In place of the scores, in half their room: behind what is still to be read.
  static void probabilities(float* row, int64_t i, __m512 p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<bf16*>(row) + i),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(p)));
  }
};

// Q: PairWords, or the same in tiles.
template <class Q_>
struct ToPairs {
  using L = Bf16Lanes;
  using T = bf16;
  using V = Avx512;
  using Q = Q_;
  static __m512i words(const bf16* p, int64_t n) {
    if (n >= 32) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16(_cvtu32_mask32((1u << n) - 1u), p);
  }
  static void queries(const bf16* q, int64_t d, char* to) {
    for (int64_t i = 0; i < d; i += 32) _mm512_storeu_si512(to + i * 2, words(q + i, d - i));
  }
  static __m512i value(const bf16* v, const bf16* next, int64_t n) {
    const __m512i low = _mm512_srli_epi32(L::as_words(load_some<V>(v, n)), 16);
    return next == nullptr ? low : _mm512_or_si512(low, L::as_words(load_some<V>(next, n)));
  }
};

// Floats that become pairs where they are laid out.
template <class Q_>
struct FloatsToPairs {
  using L = Bf16Lanes;
  using T = float;
  using V = Avx512;
  using Q = Q_;
  static __m512i words(const float* p, int64_t n) {
    const __m512 low = load_some<V>(p, n);
    const __m512 high = n > 16 ? load_some<V>(p + 16, n - 16) : V::zero();
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  }
  static void queries(const float* q, int64_t d, char* to) {
    for (int64_t i = 0; i < d; i += 32) _mm512_storeu_si512(to + i * 2, words(q + i, d - i));
  }
  static __m512i half(const float* v, int64_t n) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load_some<V>(v, n))));
  }
  static __m512i value(const float* v, const float* next, int64_t n) {
    const __m512i low = half(v, n);
    return next == nullptr ? low : _mm512_or_si512(low, _mm512_slli_epi32(half(next, n), 16));
  }
};

}  // namespace
}  // namespace bigops
