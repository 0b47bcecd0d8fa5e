// The tile registers of AMX, eight of 16 rows of 64 bytes, in assembler: the compilers' intrinsics
// take no template argument, need a flag, and gcc's (12) do not say that they touch memory.
// Everything has internal linkage.
#pragma once

#include <stdint.h>

namespace bigops {
namespace {

// Rows and bytes of a row of each register: the operand of LDTILECFG.
struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  TileShape(int all_rows, int all_bytes) {
    for (int i = 0; i < 8; ++i) {
      rows[i] = static_cast<uint8_t>(all_rows);
      bytes[i] = static_cast<uint16_t>(all_bytes);
    }
  }
};

struct AmxTiles {
  // All registers become zero. 240 cycles.
  static void configure(const TileShape& shape) {
    asm volatile("ldtilecfg %0" : : "m"(shape) : "memory");
  }
  // Leaves nothing to save at a context switch, and no shape to whoever uses tiles next.
  static void release() { asm volatile("tilerelease" : : : "memory"); }

  template <int t>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(t));
  }
  // Rows `stride` bytes apart.
  template <int t>
  static void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(t) : "memory");
  }
  // c[m][n] += sum of a[m][4k + i] * b[k][4n + i]: a u8, b s8, c int32.
  template <int c, int a, int b>
  static void dot_u8s8() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
  // The same of pairs of bf16, float sums.
  template <int c, int a, int b>
  static void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};

}  // namespace
}  // namespace bigops
