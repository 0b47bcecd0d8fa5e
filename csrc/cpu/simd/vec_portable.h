// Scalar "vectors": this form defines the meaning, the others are held against it.
// Float math comes from the C library here. Everything has internal linkage on purpose.
#pragma once

#include <math.h>

#include "cpu/simd/types.h"

namespace bigops {
namespace {

inline float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline bf16 to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};  // quiet the NaN
  bits += 0x7fff + ((bits >> 16) & 1);                                  // nearest even
  return bf16{static_cast<uint16_t>(bits >> 16)};
}

inline float to_float(f16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t exponent = (v.bits >> 10) & 0x1f;
  uint32_t mantissa = v.bits & 0x3ff;
  float f;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact
    f = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
    return sign ? -f : f;
  }
  const uint32_t bits = exponent == 31 ? sign | 0x7f800000u | (mantissa << 13)
                                       : sign | ((exponent + 112) << 23) | (mantissa << 13);
  memcpy(&f, &bits, 4);
  return f;
}

inline f16 to_f16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return f16{static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x47800000) return f16{static_cast<uint16_t>(sign | 0x7c00)};  // >= 65536
  if (bits < 0x38800000) {  // below 2^-14: subnormal, a multiple of 2^-24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    return f16{static_cast<uint16_t>(sign | static_cast<uint16_t>(rintf(magnitude * 16777216.0f)))};
  }
  bits += 0xfff + ((bits >> 13) & 1);  // nearest even; a carry runs into the exponent as it should
  return f16{static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13))};
}

// Acc is float or double: the type that sums and the epilogue are held in.
template <class Acc>
struct Scalar {
  using acc = Acc;
  using reg = Acc;
  using mask = bool;
  static constexpr int width = 1;

  static reg zero() { return 0; }
  static reg set1(Acc v) { return v; }
  static reg load(const double* p) { return static_cast<Acc>(*p); }
  static reg load(const float* p) { return *p; }
  static reg load(const bf16* p) { return to_float(*p); }
  static reg load(const f16* p) { return to_float(*p); }
  template <class T>
  static reg load_n(const T* p, int n) {
    return n > 0 ? load(p) : 0;
  }
  static void store(double* p, reg v) { *p = v; }
  static void store(float* p, reg v) { *p = static_cast<float>(v); }
  static void store(bf16* p, reg v) { *p = to_bf16(static_cast<float>(v)); }
  static void store(f16* p, reg v) { *p = to_f16(static_cast<float>(v)); }
  template <class T>
  static void store_n(T* p, reg v, int n) {
    if (n > 0) store(p, v);
  }
  static reg add(reg a, reg b) { return a + b; }
  static reg sub(reg a, reg b) { return a - b; }
  static reg mul(reg a, reg b) { return a * b; }
  static reg div(reg a, reg b) { return a / b; }
  static reg sqrt(reg v) { return sizeof(Acc) == 8 ? ::sqrt(v) : ::sqrtf(static_cast<float>(v)); }
  static reg fma(reg a, reg b, reg c) { return a * b + c; }
  static reg min(reg a, reg b) { return a < b ? a : b; }  // b where one is NaN
  static reg max(reg a, reg b) { return a > b ? a : b; }
  static Acc reduce(reg v) { return v; }
  static Acc reduce_max(reg v) { return v; }
  // Keeps NaN in v.
  static reg relu(reg v) { return v < 0 ? 0 : v; }
  static reg step(reg v) { return v <= 0 ? Acc(0) : Acc(1); }  // derivative of relu, 1 at NaN
  static reg exp_(reg v) { return ::exp(v); }
  static reg exp2_normal(reg v) { return ::exp2(v); }  // -126 <= v <= 126
  static reg tanh_(reg v) { return ::tanh(v); }
  static reg sigmoid(reg v) { return 1 / (1 + ::exp(-v)); }
  // Phi(v) = erfc(-v / sqrt 2) / 2, the standard normal distribution, and its density.
  static reg normal_cdf(reg v) { return Acc(0.5) * ::erfc(v * Acc(-0.70710678118654752440)); }
  static reg normal_pdf(reg v) { return Acc(0.39894228040143267794) * ::exp(Acc(-0.5) * v * v); }
};

}  // namespace
}  // namespace bigops
