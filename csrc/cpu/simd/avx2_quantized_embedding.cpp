// Rows of a quantised weight for AVX2: 8 columns are 2 words of int8 or 1 of int4.
#include "cpu/simd/vec_avx2.h"
#include "cpu/simd/quantized_embedding.inl"

namespace bigops {
namespace {

struct EightColumns {
  template <int kBits>
  static __m256 columns(const uint8_t* line, int64_t) {
    const int first = static_cast<int>(word_at(line));
    if (kBits == 8) {
      const int second = static_cast<int>(word_at(line + kLineBytes));
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_setr_epi32(first, second, 0, 0)));
    }
    const __m256i shift = _mm256_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28);
    const __m256i nibbles =
        _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(first), shift), _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles, _mm256_set1_epi32(8)));
  }
};

}  // namespace

const RowKernels avx2_rows = row_kernels<Avx2, EightColumns>();

}  // namespace bigops
