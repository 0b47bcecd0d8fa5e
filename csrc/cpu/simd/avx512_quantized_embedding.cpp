// Rows of a quantised weight for AVX-512F: 16 columns are 4 words of int8 or 2 of int4.
#include "cpu/simd/vec_avx512.h"
#include "cpu/simd/quantized_embedding.inl"

namespace bigops {
namespace {

struct SixteenColumns {
  template <int kBits>
  static __m512 columns(const uint8_t* line, int64_t) {
    const auto word = [&](int i) { return static_cast<int>(word_at(line + i * kLineBytes)); };
    if (kBits == 8)
      return _mm512_cvtepi32_ps(
          _mm512_cvtepi8_epi32(_mm_setr_epi32(word(0), word(1), word(2), word(3))));
    const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi32(word(0))),
                                             _mm256_set1_epi32(word(1)), 1);
    const __m512i shift =
        _mm512_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28, 0, 16, 4, 20, 8, 24, 12, 28);
    const __m512i nibbles =
        _mm512_and_si512(_mm512_srlv_epi32(words, shift), _mm512_set1_epi32(15));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(nibbles, _mm512_set1_epi32(8)));
  }
};

}  // namespace

const RowKernels avx512_rows = row_kernels<Avx512, SixteenColumns>();

}  // namespace bigops
