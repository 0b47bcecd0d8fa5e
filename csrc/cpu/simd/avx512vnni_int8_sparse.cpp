#include "cpu/simd/compressed.h"
#include "cpu/simd/lanes_vnni.h"
#include "cpu/simd/compressed.inl"

namespace bigops {
namespace {

// One row of x: the 128 groups of a panel fill 8 registers, and vpermt2d looks 16 blocks up at
// once. A gather would go through memory for each lane.
void sparse_permute(const SparseTask& t) {
  using L = VnniLanes;
  __m512i table[8];
  for (int i = 0; i < 8; ++i) table[i] = L::iload(static_cast<const uint8_t*>(t.x) + 64 * i);
  const int8_t* values = static_cast<const int8_t*>(t.values);
  int32_t* out = static_cast<int32_t*>(t.acc);
  const __m512i ones = L::iset1(0x01010101);
  for (int64_t r = 0; r < t.n; ++r) {
    __m512i acc = t.first ? L::izero() : L::iload(out + r * 16);
    __m512i sum = t.first ? L::izero() : L::iload(t.sums + r * 16);
    const int64_t end = t.ptr[r + 1];
    for (int64_t i = t.ptr[r]; i < end; i += 16) {
      const __mmask16 mask = L::first(end - i < 16 ? static_cast<int>(end - i) : 16);
      const __m512i at = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, t.index + i));
      const __m512i w = _mm512_maskz_loadu_epi32(mask, values + 4 * i);
      const __mmask16 b5 = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
      const __mmask16 b6 = _mm512_test_epi32_mask(at, _mm512_set1_epi32(64));
      const __m512i q0 = _mm512_permutex2var_epi32(table[0], at, table[1]);
      const __m512i q1 = _mm512_permutex2var_epi32(table[2], at, table[3]);
      const __m512i q2 = _mm512_permutex2var_epi32(table[4], at, table[5]);
      const __m512i q3 = _mm512_permutex2var_epi32(table[6], at, table[7]);
      const __m512i low = _mm512_mask_mov_epi32(q0, b5, q1);
      const __m512i high = _mm512_mask_mov_epi32(q2, b5, q3);
      acc = L::dot(acc, _mm512_mask_mov_epi32(low, b6, high), w);
      sum = L::dot(sum, ones, w);
    }
    L::istore(out + r * 16, acc);
    L::istore(t.sums + r * 16, sum);
  }
}

}  // namespace

const CompressedKernels avx512vnni_compressed = compressed_table<VnniLanes>(sparse_permute);

}  // namespace bigops
