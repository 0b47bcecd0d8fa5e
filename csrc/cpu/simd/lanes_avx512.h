// 32-bit lanes of AVX-512 for the int8 and sparse kernels. Everything has internal linkage.
#pragma once

// gcc 12 takes its own _mm512_undefined_ps() for a mistake of ours (gcc bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "cpu/simd/vec_avx512.h"

namespace bigops {
namespace {

// Groups of 4 u8 times 4 s8 added to an int32 lane, without VNNI: even and odd bytes widened to
// 16 bits and multiplied by vpmaddwd. Exact; vpmaddubsw would saturate at 255 * 127 * 2.
struct Avx512Lanes {
  using V = Avx512;
  using ireg = __m512i;
  struct pair {
    __m512i even, odd;
  };
  using xreg = pair;
  using wreg = pair;
  static constexpr int width = 16;
  static constexpr int max_vectors = 4;
  static constexpr int grad_vectors = 4;

  static __mmask16 first(int n) { return Avx512::first(n); }
  static __mmask64 bytes(int n) { return n >= 64 ? ~0ull : (1ull << n) - 1ull; }

  static ireg izero() { return _mm512_setzero_si512(); }
  static ireg iset1(int32_t v) { return _mm512_set1_epi32(v); }
  static ireg iload(const void* p) { return _mm512_loadu_si512(p); }
  static ireg iload_n(const void* p, int n) { return _mm512_maskz_loadu_epi32(first(n), p); }
  static void istore(void* p, ireg v) { _mm512_storeu_si512(p, v); }
  static void istore_n(void* p, ireg v, int n) { _mm512_mask_storeu_epi32(p, first(n), v); }
  static ireg iload_bytes(const void* p, int n) { return _mm512_maskz_loadu_epi8(bytes(n), p); }
  static ireg iadd(ireg a, ireg b) { return _mm512_add_epi32(a, b); }
  static ireg isub(ireg a, ireg b) { return _mm512_sub_epi32(a, b); }
  static ireg imul(ireg a, ireg b) { return _mm512_mullo_epi32(a, b); }
  static int32_t isum(ireg v) { return _mm512_reduce_add_epi32(v); }
  static __m512 to_float(ireg v) { return _mm512_cvtepi32_ps(v); }
  static ireg max_u8(ireg a, ireg b) { return _mm512_max_epu8(a, b); }

  static xreg x_of(ireg v) {
    const __m512i low = _mm512_set1_epi16(0xff);
    return {_mm512_and_si512(v, low), _mm512_srli_epi16(v, 8)};
  }
  static wreg w_of(ireg v) {
    return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), _mm512_srai_epi16(v, 8)};
  }
  static ireg dot(ireg acc, xreg x, wreg w) {
    return iadd(iadd(acc, _mm512_madd_epi16(x.even, w.even)), _mm512_madd_epi16(x.odd, w.odd));
  }

  // 8 bits per lane, already within 0..255.
  static void store_u8(uint8_t* p, __m512 v, int n) {
    _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  static __m512 load_s8(const int8_t* p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
  }
  static __m512 load_s8(const int8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  static void transpose(ireg (&r)[16]) {
    ireg t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4a + b] holds, in 128-bit part c, rows 4a..4a+3 of column 4c + b
    for (int b = 0; b < 4; ++b) {
      t[b] = _mm512_shuffle_i32x4(r[b], r[4 + b], 0x88);      // parts 0, 2 of a = 0, 1
      t[4 + b] = _mm512_shuffle_i32x4(r[b], r[4 + b], 0xdd);  // parts 1, 3
      t[8 + b] = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0x88);
      t[12 + b] = _mm512_shuffle_i32x4(r[8 + b], r[12 + b], 0xdd);
    }
    for (int b = 0; b < 4; ++b) {
      r[b] = _mm512_shuffle_i32x4(t[b], t[8 + b], 0x88);
      r[8 + b] = _mm512_shuffle_i32x4(t[b], t[8 + b], 0xdd);
      r[4 + b] = _mm512_shuffle_i32x4(t[4 + b], t[12 + b], 0x88);
      r[12 + b] = _mm512_shuffle_i32x4(t[4 + b], t[12 + b], 0xdd);
    }
  }
};

}  // namespace
}  // namespace bigops
