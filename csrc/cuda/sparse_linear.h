// The decode kernels of sparse_linear: plain numbers and pointers, no torch, no CUDA.
#pragma once

#include <stdint.h>

namespace bigops {

constexpr int64_t kSparseDecodeRows = 16;  // rows of x that one call takes at most

enum SparseDecodeType : int { kSparseFloat, kSparseBFloat16, kSparseHalf };  // of x and y
enum SparseDecodeWord : int { kSparseWordFloat, kSparseWordBFloat16, kSparseWordInt8 };

// y = act(x W^T + bias) + residual. W: the storage of SparseWeight, layout in
// bigops/formats/sparse_layout.py.
struct SparseDecodeTask {
  const void* x;         // [M, K]; with int8 words int8 [M, x_stride], quantised, 4-byte aligned
  const float* x_scale;  // [M], x_zero likewise: with int8 words
  const int32_t* x_zero;
  const uint32_t* values;  // [steps, 16] words
  const uint8_t* index;    // [steps, 16 / group_rows]
  const uint8_t* rows;     // [slices, 16 / group_rows]
  const int32_t* ptr;      // [slices + 1]
  const float* scale;      // [N], sums likewise: with int8 words
  const int32_t* sums;
  const void* bias;      // [N] or null
  const void* residual;  // [M, N] or null
  void* y;               // [M, N]
  void* partial;         // [splits, M, chunks * chunk] float, or int32 with int8 words
  int64_t m, n, k, x_stride;
  int64_t steps, panels, chunks;
  int chunk;       // rows
  int group_bits;  // 2^group_bits rows share an index: 0, 2 or 4
  int activation;
  int splits;  // blocks that share the panels of a chunk; their sums are added in their order
};

// Launches on `stream`, a cudaStream_t; gives the text of an error, or null.
const char* decode_sparse(const SparseDecodeTask& task, SparseDecodeType type,
                          SparseDecodeWord word, void* stream);

}  // namespace bigops
