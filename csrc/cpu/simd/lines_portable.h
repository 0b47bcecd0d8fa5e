// A line of a quantised weight (simd/quantized_linear.h) in plain C++: this form defines the
// meaning. Everything has internal linkage.
#pragma once

#include "cpu/simd/lanes_portable.h"

namespace bigops {
namespace {

struct PortableLines {
  using L = PortableLanes;
  using V = PortableVec;
  struct I {
    int32_t v[16];
  };
  struct F {
    float v[16];
  };
  struct X {
    int32_t v[4];
  };
  struct W {
    int32_t v[4][16];  // widened: [column][row]
  };
  static constexpr int sum_rows = 2, sum_tiles = 1;
  static constexpr int total_rows = 2, total_tiles = 1;
  static constexpr int one_row_tiles = 1, two_row_tiles = 1, tail_rows = 2;

  template <class G>
  static I each(const G& g) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = g(i);
    return r;
  }
  template <class G>
  static F each_float(const G& g) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = g(i);
    return r;
  }

  static I izero() { return iset1(0); }
  static I iload(const void* p) {
    I r;
    memcpy(r.v, p, 64);
    return r;
  }
  static void istore(int32_t* p, I v) { memcpy(p, v.v, 64); }
  static I iset1(int32_t s) {
    return each([&](int) { return s; });
  }
  static I iadd(I a, I b) {
    return each([&](int i) { return L::iadd(a.v[i], b.v[i]); });
  }
  static I isub(I a, I b) {
    return each([&](int i) { return L::isub(a.v[i], b.v[i]); });
  }
  static I imul(I a, I b) {
    return each([&](int i) { return L::imul(a.v[i], b.v[i]); });
  }
  static I iload_s8(const int8_t* p) {
    return each([&](int i) { return int32_t(p[i]); });
  }
  static F to_float(I a) {
    return each_float([&](int i) { return static_cast<float>(a.v[i]); });
  }

  static F fzero() { return fset1(0.0f); }
  static F fload(const float* p) {
    F r;
    memcpy(r.v, p, 64);
    return r;
  }
  static void fstore(float* p, F v) { memcpy(p, v.v, 64); }
  static F fset1(float s) {
    return each_float([&](int) { return s; });
  }
  static F fadd(F a, F b) {
    return each_float([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F fsub(F a, F b) {
    return each_float([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F fmul(F a, F b) {
    return each_float([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F fma(F a, F b, F c) {
    return each_float([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }

  static int32_t byte(int32_t word, int c) {
    return static_cast<int8_t>(static_cast<uint32_t>(word) >> (8 * c));
  }
  static X word(const void* p) {
    uint8_t b[4];
    memcpy(b, p, 4);
    return {{b[0], b[1], b[2], b[3]}};
  }
  static W bytes(I line) {
    W w;
    for (int c = 0; c < 4; ++c)
      for (int i = 0; i < 16; ++i) w.v[c][i] = byte(line.v[i], c);
    return w;
  }
  static I dot(I acc, X x, W w) {
    for (int c = 0; c < 4; ++c)
      for (int i = 0; i < 16; ++i) acc.v[i] = L::iadd(acc.v[i], x.v[c] * w.v[c][i]);
    return acc;
  }

  static I spread(I words) { return imul(words, iset1(0x01010101)); }
  template <int kHigh>
  static I nibbles(I line, I zero) {
    uint8_t from[64], minus[64];
    memcpy(from, line.v, 64);
    memcpy(minus, zero.v, 64);
    for (int i = 0; i < 64; ++i)
      from[i] = static_cast<uint8_t>((from[i] >> (4 * kHigh) & 15) - minus[i]);
    return iload(from);
  }

  static F table() { return fzero(); }
  template <int c>
  static F nibble_column(I line, F) {
    return each_float([&](int i) {
      const uint32_t u = static_cast<uint32_t>(line.v[i]) >> (c / 2 * 4 + c % 2 * 16) & 15;
      return static_cast<float>(static_cast<int32_t>(u) - 8);
    });
  }
  template <int c>
  static F byte_column(I line) {
    return each_float([&](int i) { return static_cast<float>(byte(line.v[i], c)); });
  }
};

}  // namespace
}  // namespace bigops
