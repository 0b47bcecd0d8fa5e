// 16 floats of AVX-512. Everything has internal linkage: this code must not leak into other files.
#pragma once

#include <immintrin.h>

#include "cpu/simd/types.h"

namespace bigops {
namespace {

#include "cpu/simd/vec_math.inl"

struct Avx512 {
  using acc = float;
  using reg = __m512;
  static constexpr int width = 16;
  using math = VecMath<Avx512>;

  static __mmask16 first(int n) { return static_cast<__mmask16>(_cvtu32_mask16((1u << n) - 1u)); }

  static reg zero() { return _mm512_setzero_ps(); }
  static reg set1(float v) { return _mm512_set1_ps(v); }

  static reg widen(__m256i bits, bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static reg widen(__m256i bits, f16) { return _mm512_cvtph_ps(bits); }
  static __m256i narrow(reg v, f16) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static __m256i narrow(reg v, bf16) {  // nearest even; NaN stays NaN, quieted
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
  }

  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static reg load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static void store_n(float* p, reg v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  template <class T>
  static reg load(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
  }
  template <class T>
  static reg load_n(const T* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
  }
  template <class T>
  static void store(T* p, reg v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{}));
  }
  template <class T>
  static void store_n(T* p, reg v, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(v, T{}));
  }

  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
  static reg sqrt(reg v) { return _mm512_sqrt_ps(v); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static reg min(reg a, reg b) { return _mm512_min_ps(a, b); }
  static reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
  static reg abs(reg v) { return _mm512_abs_ps(v); }
  static reg round(reg v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static reg scale2(reg v, reg n) { return _mm512_scalef_ps(v, n); }
  // v times 2 to what stands in the lowest bits of n; the result is a normal number.
  static reg add_exponent(reg v, reg n) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
  }
  static __mmask16 less(reg a, reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static reg select(__mmask16 m, reg yes, reg no) { return _mm512_mask_blend_ps(m, no, yes); }
  static reg copysign(reg magnitude, reg sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
  }
  static float reduce(reg v) { return _mm512_reduce_add_ps(v); }
  static float reduce_max(reg v) { return _mm512_reduce_max_ps(v); }

  static reg relu(reg v) { return max(zero(), v); }
  static reg step(reg v) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(v, zero(), _CMP_LE_OQ), set1(1.0f), zero());
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
