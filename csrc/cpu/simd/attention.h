// What the instruction-set files offer to csrc/cpu/attention.cpp.
// Plain pointers and sizes; no torch header, no STL.
//
// The heads of a group share their keys and values, so their queries are rows of one problem: row r
// is query r % t of head r / t in the group. Keys and values are taken a chunk at a time, laid out
// once for all rows of a task: keys in panels [word][kPanelKeys], so that a lane is a key and a
// word of q is broadcast; values [key][columns], so that a lane is a column and a probability is
// broadcast. A word is a float, or a pair of bf16. Few rows read both as they lie.
#pragma once

#include <stdint.h>

namespace bigops {

constexpr int64_t kPanelKeys = 64;
constexpr int64_t kChunkKeys = 256;  // of a chunk, whose sums are added to the state of a row
constexpr int64_t kFewRows = 4;      // up to so many rows nothing is laid out
constexpr int64_t kMostRows = 16;    // of a register block, of any instruction set

enum MaskKind : int { kNoMask = 0, kMaskBool, kMaskF32, kMaskBf16, kMaskF16, kMaskF64 };

// Some rows of one group times some keys. Strides in elements.
struct AttentionTask {
  const void *q, *k, *v;  // of the first head of the group, of its first query or key
  void* out;
  int64_t q_head, q_row, k_row, v_row, out_head, out_row;
  int64_t t;           // queries of a head
  int64_t row0, row1;  // of the group
  int64_t key0, key1;  // of s
  int64_t s;
  int64_t d, dv;  // columns of q and k, of v
  float scale;
  bool causal;       // query i attends to keys up to i
  const void* mask;  // of the first head of the group, or null
  int mask_kind;
  int64_t mask_head, mask_row, mask_key;  // 0 where it is broadcast
  char* scratch;                          // attention_scratch() bytes, this thread's own
  float* partial;  // [rows][partial_floats(dv)] where other tasks have the other keys, or null
};

// What is known of a row after some of the keys: maximum, sum of exponentials, and the values'
// sums, both for that maximum.
constexpr int64_t partial_floats(int64_t dv) { return dv + 2; }

// Puts the parts of rows together: part p of row r is partial[p * rows + r].
struct CombineTask {
  const float* partial;
  int64_t parts, rows;
  int64_t t, dv;
  void* out;
  int64_t out_head, out_row;
};

constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Bytes for rows x keys of a task.
constexpr int64_t attention_scratch(int64_t rows, int64_t keys, int64_t d, int64_t dv) {
  const int64_t chunk =
      keys < kChunkKeys ? (keys + kPanelKeys - 1) / kPanelKeys * kPanelKeys : kChunkKeys;
  return 4 * (chunk * (padded(d) + padded(dv)) + kMostRows * (padded(d) + 2 * chunk) +
              padded(rows) * (padded(dv) + 2));
}

struct AttentionKernels {
  void (*attend)(const AttentionTask&);
  void (*combine)(const CombineTask&);
};

extern const AttentionKernels portable_attention_f32, portable_attention_bf16,
    portable_attention_f16;
extern const AttentionKernels avx2_attention_f32, avx2_attention_bf16, avx2_attention_f16;
extern const AttentionKernels avx512_attention_f32, avx512_attention_bf16, avx512_attention_f16;
// f32: in pairs of bf16, for those who ask for it.
extern const AttentionKernels avx512bf16_attention_bf16, avx512bf16_attention_f32;
extern const AttentionKernels amx_attention_bf16, amx_attention_f32;

}  // namespace bigops
