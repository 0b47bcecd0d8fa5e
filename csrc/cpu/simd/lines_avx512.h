// A line of a quantised weight (simd/quantized_linear.h) in one AVX-512 register: 16 lanes, a lane
// a weight row. Everything has internal linkage.
#pragma once

#include "cpu/simd/lanes_avx512.h"

namespace bigops {
namespace {

template <class Lanes>
struct Avx512LinesOf {
  using L = Lanes;
  using V = Avx512;
  using I = __m512i;
  using F = __m512;
  using X = typename L::xreg;
  using W = typename L::wreg;
  // Register blocks, rows of x by tiles. 24 sums, or 12 and as many totals over the groups.
  static constexpr int sum_rows = 6, sum_tiles = 4;
  static constexpr int total_rows = 6, total_tiles = 2;
  static constexpr int one_row_tiles = 8, two_row_tiles = 4, tail_rows = 8;

  static I izero() { return _mm512_setzero_si512(); }
  static I iload(const void* p) { return _mm512_loadu_si512(p); }
  static void istore(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I iset1(int32_t v) { return _mm512_set1_epi32(v); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I iload_s8(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }

  static F fzero() { return _mm512_setzero_ps(); }
  static F fload(const float* p) { return _mm512_loadu_ps(p); }
  static void fstore(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F fset1(float v) { return _mm512_set1_ps(v); }
  static F fadd(F a, F b) { return _mm512_add_ps(a, b); }
  static F fsub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  static X word(const void* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return L::x_of(_mm512_set1_epi32(v));
  }
  static W bytes(I line) { return L::w_of(line); }
  static I dot(I acc, X x, W w) { return L::dot(acc, x, w); }

  // Byte v of each word of a small vector in all four bytes.
  static I spread(I words) { return _mm512_mullo_epi32(words, _mm512_set1_epi32(0x01010101)); }
  // The low (0) or high (1) nibbles of all bytes, minus `zero` bytes.
  template <int kHigh>
  static I nibbles(I line, I zero) {
    if (kHigh) line = _mm512_srli_epi16(line, 4);
    return _mm512_sub_epi8(_mm512_and_si512(line, _mm512_set1_epi8(15)), zero);
  }

  // Column c of the words as floats. vpermps looks up by 4 bits, so nothing is masked.
  static F table() {
    return _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  }
  template <int c>
  static F nibble_column(I line, F table) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(line, c / 2 * 4 + c % 2 * 16), table);
  }
  template <int c>
  static F byte_column(I line) {
    if (c < 3) line = _mm512_slli_epi32(line, 24 - 8 * c);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(line, 24));
  }
};

}  // namespace
}  // namespace bigops
