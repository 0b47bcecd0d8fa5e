// A line of a quantised weight (simd/quantized_linear.h) in two AVX2 registers.
// Everything has internal linkage.
#pragma once

#include "cpu/simd/lanes_avx2.h"

namespace bigops {
namespace {

struct Avx2Lines {
  using L = Avx2Lanes;
  using V = Avx2;
  struct I {
    __m256i a, b;
  };
  struct F {
    __m256 a, b;
  };
  using X = L::xreg;
  struct W {
    L::wreg a, b;
  };
  static constexpr int sum_rows = 2, sum_tiles = 1;
  static constexpr int total_rows = 2, total_tiles = 1;
  static constexpr int one_row_tiles = 2, two_row_tiles = 1, tail_rows = 2;

  static I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I iload(const void* p) {
    return {L::iload(p), L::iload(static_cast<const uint8_t*>(p) + 32)};
  }
  static void istore(int32_t* p, I v) {
    L::istore(p, v.a);
    L::istore(p + 8, v.b);
  }
  static I iset1(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static I iadd(I x, I y) { return {L::iadd(x.a, y.a), L::iadd(x.b, y.b)}; }
  static I isub(I x, I y) { return {L::isub(x.a, y.a), L::isub(x.b, y.b)}; }
  static I imul(I x, I y) { return {L::imul(x.a, y.a), L::imul(x.b, y.b)}; }
  static __m256i load_s8x8(const int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I iload_s8(const int8_t* p) { return {load_s8x8(p), load_s8x8(p + 8)}; }
  static F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }

  static F fzero() { return {V::zero(), V::zero()}; }
  static F fload(const float* p) { return {V::load(p), V::load(p + 8)}; }
  static void fstore(float* p, F v) {
    V::store(p, v.a);
    V::store(p + 8, v.b);
  }
  static F fset1(float v) { return {V::set1(v), V::set1(v)}; }
  static F fadd(F x, F y) { return {V::add(x.a, y.a), V::add(x.b, y.b)}; }
  static F fsub(F x, F y) { return {V::sub(x.a, y.a), V::sub(x.b, y.b)}; }
  static F fmul(F x, F y) { return {V::mul(x.a, y.a), V::mul(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {V::fma(x.a, y.a, z.a), V::fma(x.b, y.b, z.b)}; }

  static X word(const void* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return L::x_of(_mm256_set1_epi32(v));
  }
  static W bytes(I line) { return {L::w_of(line.a), L::w_of(line.b)}; }
  static I dot(I acc, X x, W w) { return {L::dot(acc.a, x, w.a), L::dot(acc.b, x, w.b)}; }

  static I spread(I words) { return imul(words, iset1(0x01010101)); }
  template <int kHigh>
  static __m256i half(__m256i line, __m256i zero) {
    if (kHigh) line = _mm256_srli_epi16(line, 4);
    return _mm256_sub_epi8(_mm256_and_si256(line, _mm256_set1_epi8(15)), zero);
  }
  template <int kHigh>
  static I nibbles(I line, I zero) {
    return {half<kHigh>(line.a, zero.a), half<kHigh>(line.b, zero.b)};
  }

  static F table() { return fzero(); }
  template <int c>
  static __m256 nibble_half(__m256i line) {  // the nibble to the top, then down with its sign
    constexpr int left = 28 - (c / 2 * 4 + c % 2 * 16);
    line = _mm256_xor_si256(_mm256_slli_epi32(line, left), _mm256_set1_epi32(int(0x80000000)));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(line, 28));
  }
  template <int c>
  static F nibble_column(I line, F) {
    return {nibble_half<c>(line.a), nibble_half<c>(line.b)};
  }
  template <int c>
  static __m256 byte_half(__m256i line) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(line, 24 - 8 * c), 24));
  }
  template <int c>
  static F byte_column(I line) {
    return {byte_half<c>(line.a), byte_half<c>(line.b)};
  }
};

}  // namespace
}  // namespace bigops
