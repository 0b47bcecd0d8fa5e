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
  static constexpr int sparse_sums = 16;  // registers of sums of the sparse columns form
  static constexpr bool native_bf16 = false;
  static constexpr int packed_rows = 6, packed_vectors = 4;  // register block, packed_linear

  static __mmask16 first(int n) { return Avx512::first(n); }

  static ireg izero() { return _mm512_setzero_si512(); }
  static ireg iset1(int32_t v) { return _mm512_set1_epi32(v); }
  static ireg iload(const void* p) { return _mm512_loadu_si512(p); }
  // Four words, and one of them in all lanes: a load and 4 shuffles instead of 4 loads.
  struct four {
    __m512i words;
    explicit four(const void* p)
        : words(_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)))) {}
    template <int i>
    ireg word() const {
      return _mm512_shuffle_epi32(words, static_cast<_MM_PERM_ENUM>(i * 0x55));
    }
  };
  static ireg iload_n(const void* p, int n) { return _mm512_maskz_loadu_epi32(first(n), p); }
  static void istore(void* p, ireg v) { _mm512_storeu_si512(p, v); }
  static void istore_n(void* p, ireg v, int n) { _mm512_mask_storeu_epi32(p, first(n), v); }
  static ireg iadd(ireg a, ireg b) { return _mm512_add_epi32(a, b); }
  static ireg isub(ireg a, ireg b) { return _mm512_sub_epi32(a, b); }
  static ireg imul(ireg a, ireg b) { return _mm512_mullo_epi32(a, b); }
  static __m512 to_float(ireg v) { return _mm512_cvtepi32_ps(v); }
  static ireg to_int(__m512 v) { return _mm512_cvtps_epi32(v); }  // half to even
  // acc + the dot product of two pairs of int16
  static ireg dot16(ireg acc, ireg a, ireg b) { return iadd(acc, _mm512_madd_epi16(a, b)); }
  // 4 vectors of int32 as bytes, what lies outside at 0 or 255
  static ireg pack_u8(ireg a, ireg b, ireg c, ireg d) {
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, bytes);
  }
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

  static __m512 as_float(ireg v) { return _mm512_castsi512_ps(v); }
  static ireg as_words(__m512 v) { return _mm512_castps_si512(v); }
  // Pairs of bf16 in each lane, low half first.
  static __m512 dot_bf16(__m512 acc, ireg x, ireg w) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    acc = V::fma(as_float(_mm512_slli_epi32(x, 16)), as_float(_mm512_slli_epi32(w, 16)), acc);
    return V::fma(as_float(_mm512_and_si512(x, high)), as_float(_mm512_and_si512(w, high)), acc);
  }
  // out[i] = sum of the lanes of v[i]
  static void reduce4(const __m512 (&v)[4], float* out) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1)));
  }

  // The 64 words of a panel in 4 registers; vpermt2d looks 16 of them up at once, where a gather
  // would go through memory for each lane. Indices past 63 wrap: nothing is read outside.
  template <int G>
  struct Table {
    __m512i words[4];
    struct Place {
      __m512i at;
      __mmask16 upper;
    };

    void load(const char* p) {
      for (int i = 0; i < 4; ++i) words[i] = iload(p + 64 * i);
    }
    static Place place(const uint8_t* index) {
      __m512i at;
      if (G == 1) {
        at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
      } else if (G == 4) {
        const __m128i four = _mm_cvtsi32_si128(static_cast<int>(load32(index)));
        at = _mm512_cvtepu8_epi32(
            _mm_shuffle_epi8(four, _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)));
      } else {
        at = _mm512_set1_epi32(*index);
      }
      return {at, _mm512_test_epi32_mask(at, _mm512_set1_epi32(32))};
    }
    ireg find(const Place& p, int) const {
      const __m512i low = _mm512_permutex2var_epi32(words[0], p.at, words[1]);
      const __m512i high = _mm512_permutex2var_epi32(words[2], p.at, words[3]);
      return _mm512_mask_mov_epi32(low, p.upper, high);
    }
  };
  static uint32_t load32(const uint8_t* p) {
    uint32_t v;
    memcpy(&v, p, 4);
    return v;
  }

  // 8 bits per lane, already within 0..255.
  static void store_u8(uint8_t* p, __m512 v, int n) {
    _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
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
