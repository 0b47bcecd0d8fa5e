// What the instruction-set files offer to csrc/cpu/packed_linear.cpp.
// Plain pointers and sizes; no torch header, no STL.
//
// A dense weight [N, K] lies in panels of kPackedColumns rows, a panel word by word along K: one
// float, one half or two bf16 neighbours of each of its rows. So a panel is one stream from memory,
// a lane is a row of W, and a word of x is broadcast.
#pragma once

#include <stdint.h>

namespace bigops {

constexpr int64_t kPackedColumns = 64;  // of y, rows of W
// Of a block along K, whose sums are added to the total: 32 KB of floats stay in the L1 cache.
constexpr int64_t kPackedWords = 128;

// One block of a panel times some rows of x.
struct PackedTask {
  const void* x;     // [rows][words]: floats, or pairs of bf16
  int64_t x_stride;  // bytes
  int64_t rows;
  const void* panel;  // [words][kPackedColumns]
  int64_t words;
  int64_t columns;  // of the panel that are there, at most kPackedColumns; the others are zero
  float* out;       // [rows][kPackedColumns]
  bool first;       // the first block of K: out holds nothing yet
};

struct PackedKernels {
  void (*f32)(const PackedTask&);
  void (*f16)(const PackedTask&);  // x in floats
  void (*bf16)(const PackedTask&);
};

extern const PackedKernels portable_packed, avx2_packed, avx512_packed;
extern void (*const avx512bf16_packed)(const PackedTask&);
// Reads kStepBytes of a row of x at a time, which are zero past K.
extern void (*const amx_packed)(const PackedTask&);

}  // namespace bigops
