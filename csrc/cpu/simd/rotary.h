// What the instruction-set files offer to csrc/cpu/rotary.cpp. Plain pointers and sizes; no torch
// header, no STL.
#pragma once

#include "cpu/simd/compressed.h"

namespace bigops {

// The heads of one token: columns [0, R) of x rotated in pairs half of R apart, the others copied.
struct RotaryTask {
  const void* x;    // [heads, D], stride x_head elements between heads
  int64_t x_head;   //
  const void* cos;  // [R]
  const void* sin;  // [R]
  void* y;          // [heads, D] contiguous, in x's dtype
  int64_t heads, d, r;
};

enum RotaryTables : int { kLikeX = 0, kFloatTables, kRotaryTables };  // dtype of cos and sin

struct RotaryKernels {
  void (*rotate[kFloatKinds][kRotaryTables])(const RotaryTask&);  // by dtype of x
};

extern const RotaryKernels portable_rotary, avx2_rotary, avx512_rotary;

}  // namespace bigops
