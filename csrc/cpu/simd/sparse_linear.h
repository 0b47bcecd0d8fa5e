// What the instruction-set files offer to csrc/cpu/sparse_linear*.cpp. The storage is that of
// bigops/formats/sparse_layout.py. Plain pointers and sizes; no torch header, no STL.
#pragma once

#include <stdint.h>

namespace bigops {

// A word is 4 bytes: one float, two bf16 or four int8 neighbours of one row of W.
enum WordKind : int { kWordF32 = 0, kWordBf16, kWordS8, kWordKinds };
constexpr int64_t kWordColumns[kWordKinds] = {1, 2, 4};

constexpr int64_t kPanelWords = 64;  // x of 64 rows for one panel takes 16 KB of the L1 cache
constexpr int64_t kSliceRows = 16;   // rows of W that lie side by side
constexpr int kRowsAtOnce = 4;       // rows of x that the rows form takes in one pass

// Rows that share an index: 1, 4 or 16. Positions of the entries in a table.
enum GroupKind : int { kGroup1 = 0, kGroup4, kGroup16, kGroupKinds };

// One panel of one chunk of rows.
struct SparseTask {
  const int32_t* ptr;    // slices + 1 entries: first step of each slice
  const uint8_t* index;  // whole array [steps][16 / group]
  const uint8_t* rows;   // of these slices [slices][16 / group]: group of rows within the chunk
  const void* words;     // whole array [steps][16] words
  int64_t slices;
  // rows form: `m` (at most kRowsAtOnce) rows of 64 words, x_stride bytes apart;
  // columns form: [64][vectors * width] words
  const void* x;
  int64_t x_stride;
  int m;
  int vectors;
  // rows form: [m][acc_stride] sums, added to; columns form: [chunk][vectors * width], added to or,
  // where `fresh`, begun
  void* acc;
  int64_t acc_stride;
  bool fresh;
};

// The product of gz^T and x at the stored positions of one panel of one chunk. A lane is a row of
// x as a float, or with `grad_pairs` two neighbouring rows as bf16, the earlier in the low half.
struct SampleTask {
  const int32_t* ptr;
  const uint8_t* index;
  const uint8_t* rows;
  int64_t slices;
  int vectors;
  const int32_t* grad;  // [chunk][vectors * width]
  const int32_t* x;     // [64 * columns of a word][vectors * width]
  float* out;           // [steps from ptr[0]][16][columns of a word], added to
};

struct SparseKernels {
  int width;         // lanes of a vector
  int max_vectors;   // vectors of the widest tile of x, columns form
  int grad_vectors;  // the same for sample
  bool grad_pairs;   // sample takes pairs of bf16
  void (*rows[kGroupKinds])(const SparseTask&);
  void (*columns[kGroupKinds])(const SparseTask&);
  void (*sample[kGroupKinds])(const SampleTask&);
};

// One table per instruction set and kind of word; none where that set has nothing of its own.
extern const SparseKernels portable_sparse_f32, portable_sparse_bf16, portable_sparse_s8;
extern const SparseKernels avx2_sparse_f32, avx2_sparse_bf16, avx2_sparse_s8;
extern const SparseKernels avx512_sparse_f32, avx512_sparse_bf16, avx512_sparse_s8;
extern const SparseKernels avx512vnni_sparse_s8, avx512bf16_sparse_bf16;

}  // namespace bigops
