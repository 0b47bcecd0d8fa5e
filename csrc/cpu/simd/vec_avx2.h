// 8 floats of AVX2 + FMA + F16C. Everything has internal linkage.
#pragma once

#include <immintrin.h>

#include "cpu/simd/types.h"

namespace bigops {
namespace {

#include "cpu/simd/vec_math.inl"

struct Avx2 {
  using acc = float;
  using reg = __m256;
  static constexpr int width = 8;
  using math = VecMath<Avx2>;

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static reg zero() { return _mm256_setzero_ps(); }
  static reg set1(float v) { return _mm256_set1_ps(v); }

  static reg widen(__m128i bits, bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static reg widen(__m128i bits, f16) { return _mm256_cvtph_ps(bits); }
  static __m128i narrow(reg v, f16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static __m128i narrow(reg v, bf16) {  // nearest even; NaN stays NaN, quieted
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i r =
        _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                                               _mm256_castsi256_ps(quiet), nan)),
                          16);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }

  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static reg load_n(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static void store(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static void store_n(float* p, reg v, int n) { _mm256_maskstore_ps(p, first(n), v); }
  template <class T>
  static reg load(const T* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
  }
  template <class T>
  static reg load_n(const T* p, int n) {  // AVX2 has no masked 16-bit load
    T tail[8] = {};
    memcpy(tail, p, static_cast<size_t>(n) * sizeof(T));
    return load(tail);
  }
  template <class T>
  static void store(T* p, reg v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, T{}));
  }
  template <class T>
  static void store_n(T* p, reg v, int n) {
    T tail[8];
    store(tail, v);
    memcpy(p, tail, static_cast<size_t>(n) * sizeof(T));
  }

  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
  static reg sqrt(reg v) { return _mm256_sqrt_ps(v); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static reg min(reg a, reg b) { return _mm256_min_ps(a, b); }
  static reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
  static reg abs(reg v) { return _mm256_andnot_ps(set1(-0.0f), v); }
  static reg round(reg v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // v * 2^n in two steps: 2^n itself need not be a normal number for n in [-150, 128].
  static reg scale2(reg v, reg n) {
    const __m256i i = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(i, 1);
    const __m256i rest = _mm256_sub_epi32(i, half);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
    return mul(mul(v, a), b);
  }
  // v times 2 to what stands in the lowest bits of n; the result is a normal number.
  static reg add_exponent(reg v, reg n) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
  }
  static reg less(reg a, reg b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static reg select(reg m, reg yes, reg no) { return _mm256_blendv_ps(no, yes, m); }
  static reg copysign(reg magnitude, reg sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, set1(-0.0f)));
  }
  static float reduce(reg v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static float reduce_max(reg v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

  static reg relu(reg v) { return max(zero(), v); }
  static reg step(reg v) {
    return select(_mm256_cmp_ps(v, zero(), _CMP_LE_OQ), zero(), set1(1.0f));
  }
  static reg exp_(reg v) { return math::exp(v); }
  static reg exp2_normal(reg v) { return math::exp2_normal(v); }
  static reg tanh_(reg v) { return math::tanh(v); }
  static reg sigmoid(reg v) { return math::sigmoid(v); }
  static reg normal_cdf(reg v) { return math::normal_cdf(v); }
  static reg normal_pdf(reg v) { return math::normal_pdf(v); }
};

}  // namespace
}  // namespace bigops
