// 32-bit lanes of AVX2 for the int8 and sparse kernels. Everything has internal linkage.
#pragma once

// gcc 12 takes its own _mm512_undefined_ps() for a mistake of ours (gcc bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "cpu/simd/vec_avx2.h"

namespace bigops {
namespace {

template <class L, int G>
struct GatherTable;  // sparse_words.inl

struct Avx2Lanes {
  using V = Avx2;
  using ireg = __m256i;
  struct pair {
    __m256i even, odd;
  };
  using xreg = pair;
  using wreg = pair;
  static constexpr int width = 8;
  static constexpr int max_vectors = 2;
  static constexpr int grad_vectors = 2;
  static constexpr int sparse_sums = 8;
  static constexpr bool native_bf16 = false;
  static constexpr int packed_rows = 6, packed_vectors = 2;  // register block, packed_linear

  static ireg izero() { return _mm256_setzero_si256(); }
  static ireg iset1(int32_t v) { return _mm256_set1_epi32(v); }
  static ireg iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  struct four {
    __m256i words;
    explicit four(const void* p)
        : words(_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)))) {}
    template <int i>
    ireg word() const {
      return _mm256_shuffle_epi32(words, i * 0x55);
    }
  };
  static ireg iload_n(const void* p, int n) {
    return _mm256_maskload_epi32(static_cast<const int*>(p), Avx2::first(n));
  }
  static void istore(void* p, ireg v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static void istore_n(void* p, ireg v, int n) {
    _mm256_maskstore_epi32(static_cast<int*>(p), Avx2::first(n), v);
  }
  static ireg iadd(ireg a, ireg b) { return _mm256_add_epi32(a, b); }
  static ireg isub(ireg a, ireg b) { return _mm256_sub_epi32(a, b); }
  static ireg imul(ireg a, ireg b) { return _mm256_mullo_epi32(a, b); }
  static __m256 to_float(ireg v) { return _mm256_cvtepi32_ps(v); }
  static ireg to_int(__m256 v) { return _mm256_cvtps_epi32(v); }  // half to even
  // acc + the dot product of two pairs of int16
  static ireg dot16(ireg acc, ireg a, ireg b) { return iadd(acc, _mm256_madd_epi16(a, b)); }
  // 4 vectors of int32 as bytes, what lies outside at 0 or 255
  static ireg pack_u8(ireg a, ireg b, ireg c, ireg d) {
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static ireg max_u8(ireg a, ireg b) { return _mm256_max_epu8(a, b); }

  // vpmaddubsw saturates (255 * 127 * 2 > 32767), so bytes are widened to 16 bits first.
  static xreg x_of(ireg v) {
    return {_mm256_and_si256(v, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(v, 8)};
  }
  static wreg w_of(ireg v) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
  static ireg dot(ireg acc, xreg x, wreg w) {
    return iadd(iadd(acc, _mm256_madd_epi16(x.even, w.even)), _mm256_madd_epi16(x.odd, w.odd));
  }

  static __m256 as_float(ireg v) { return _mm256_castsi256_ps(v); }
  static ireg as_words(__m256 v) { return _mm256_castps_si256(v); }
  // Pairs of bf16 in each lane, low half first.
  static __m256 dot_bf16(__m256 acc, ireg x, ireg w) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    acc = V::fma(as_float(_mm256_slli_epi32(x, 16)), as_float(_mm256_slli_epi32(w, 16)), acc);
    return V::fma(as_float(_mm256_and_si256(x, high)), as_float(_mm256_and_si256(w, high)), acc);
  }
  // out[i] = sum of the lanes of v[i]
  static void reduce4(const __m256 (&v)[4], float* out) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
  template <int G>
  using Table = GatherTable<Avx2Lanes, G>;

  static void store_u8(uint8_t* p, __m256 v, int n) {
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    uint8_t out[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(h, h));
    memcpy(p, out, static_cast<size_t>(n));
  }

  static void transpose(ireg (&r)[8]) {
    ireg t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int b = 0; b < 4; ++b) {
      t[b] = _mm256_permute2x128_si256(r[b], r[4 + b], 0x20);
      t[4 + b] = _mm256_permute2x128_si256(r[b], r[4 + b], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace bigops
