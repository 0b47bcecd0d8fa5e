// One 32-bit lane in plain C++: this form defines the meaning. Everything has internal linkage.
#pragma once

#include "cpu/simd/vec_portable.h"

namespace bigops {
namespace {

struct PortableVec : Scalar<float> {
  static reg round(reg v) { return rintf(v); }
};

template <class L, int G>
struct GatherTable;  // sparse_words.inl

struct PortableLanes {
  using V = PortableVec;
  using ireg = int32_t;
  struct xreg {
    int32_t v[4];
  };
  using wreg = xreg;
  static constexpr int width = 1;
  static constexpr int max_vectors = 4;
  static constexpr int grad_vectors = 4;
  static constexpr int sparse_sums = 16;
  static constexpr bool native_bf16 = false;
  static constexpr int packed_rows = 2, packed_vectors = 4;  // register block, packed_linear

  static ireg izero() { return 0; }
  static ireg iset1(int32_t v) { return v; }
  static ireg iload(const void* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return v;
  }
  struct four {
    const char* words;
    explicit four(const void* p) : words(static_cast<const char*>(p)) {}
    template <int i>
    ireg word() const {
      return iload(words + 4 * i);
    }
  };
  static ireg iload_n(const void* p, int n) { return n > 0 ? iload(p) : 0; }
  static void istore(void* p, ireg v) { memcpy(p, &v, 4); }
  static void istore_n(void* p, ireg v, int n) {
    if (n > 0) istore(p, v);
  }
  // wraps like the vector forms: acc - zero_point * sum fits although its parts need not
  static ireg iadd(ireg a, ireg b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
  static ireg isub(ireg a, ireg b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b));
  }
  static ireg imul(ireg a, ireg b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
  }
  static float to_float(ireg v) { return static_cast<float>(v); }
  static ireg to_int(float v) { return static_cast<ireg>(rintf(v)); }  // half to even
  // acc + the dot product of two pairs of int16
  static ireg dot16(ireg acc, ireg a, ireg b) {
    int16_t x[2], y[2];
    memcpy(x, &a, 4);
    memcpy(y, &b, 4);
    return iadd(iadd(acc, x[0] * y[0]), x[1] * y[1]);
  }
  // 4 vectors of int32 as bytes, what lies outside at 0 or 255
  static ireg pack_u8(ireg a, ireg b, ireg c, ireg d) {
    const ireg v[4] = {a, b, c, d};
    uint8_t bytes[4];
    for (int i = 0; i < 4; ++i)
      bytes[i] = static_cast<uint8_t>(v[i] < 0 ? 0 : v[i] > 255 ? 255 : v[i]);
    return iload(bytes);
  }
  static ireg max_u8(ireg a, ireg b) {
    uint8_t x[4], y[4];
    memcpy(x, &a, 4);
    memcpy(y, &b, 4);
    for (int i = 0; i < 4; ++i) x[i] = x[i] > y[i] ? x[i] : y[i];
    return iload(x);
  }

  static xreg x_of(ireg v) {
    uint8_t b[4];
    memcpy(b, &v, 4);
    return {{b[0], b[1], b[2], b[3]}};
  }
  static wreg w_of(ireg v) {
    int8_t b[4];
    memcpy(b, &v, 4);
    return {{b[0], b[1], b[2], b[3]}};
  }
  static ireg dot(ireg acc, xreg x, wreg w) {
    return iadd(acc, x.v[0] * w.v[0] + x.v[1] * w.v[1] + x.v[2] * w.v[2] + x.v[3] * w.v[3]);
  }

  static float as_float(ireg v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
  }
  static ireg as_words(float f) { return iload(&f); }
  // A pair of bf16, low half first.
  static float dot_bf16(float acc, ireg x, ireg w) {
    const uint32_t xv = static_cast<uint32_t>(x), wv = static_cast<uint32_t>(w);
    acc = V::fma(as_float(static_cast<ireg>(xv << 16)), as_float(static_cast<ireg>(wv << 16)), acc);
    return V::fma(as_float(static_cast<ireg>(xv & 0xffff0000u)),
                  as_float(static_cast<ireg>(wv & 0xffff0000u)), acc);
  }
  static void reduce4(const float (&v)[4], float* out) {
    for (int i = 0; i < 4; ++i) out[i] = v[i];
  }
  template <int G>
  using Table = GatherTable<PortableLanes, G>;

  static void store_u8(uint8_t* p, float v, int n) {
    if (n > 0) *p = static_cast<uint8_t>(v);
  }

  static void transpose(ireg (&)[1]) {}
};

}  // namespace
}  // namespace bigops
