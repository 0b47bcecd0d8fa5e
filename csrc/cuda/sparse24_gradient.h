// The kernel of sparse24_gradient: plain numbers and pointers, no torch, no CUDA.
#pragma once

#include <stdint.h>

namespace bigops {

// The entries of gz^T x where a 2:4 weight [N, K] stores its values; sums in float32.
struct Sparse24GradientTask {
  const void* gz;        // [M, N], bfloat16 or half as all that follow
  const void* x;         // [M, K]
  const uint32_t* meta;  // [tiles, padded / 64, 32]; layout in bigops/formats/sparse24.py
  void* values;          // [N, padded / 2], the result, 16-byte aligned
  int64_t m, n, k;
  int64_t padded;  // K filled up to 64 columns
};

// half: float16, else bfloat16. Launches on `stream`, a cudaStream_t; gives the text of an error,
// or null.
const char* gradient_sparse24(const Sparse24GradientTask& task, bool half, void* stream);

}  // namespace bigops
