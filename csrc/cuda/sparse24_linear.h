// The kernels of sparse24_linear: plain numbers and pointers, no torch, no CUDA.
#pragma once

#include <stdint.h>

namespace bigops {

enum Sparse24Type : int { kSparse24Float, kSparse24BFloat16, kSparse24Half };  // of y

// y = act(x W^T + bias) + residual, sums in float32 or, of int8, exact. W: the storage of
// Sparse24Weight, layout in bigops/formats/sparse24.py.
struct Sparse24Task {
  const void* x;         // [M, x_stride], K of them in a row; the type of the values
  const float* x_scale;  // [M], x_zero likewise: with int8 values
  const int32_t* x_zero;
  const void* values;    // [N, padded / 2], 16-byte aligned; y's type or int8,
                         // with a float32 y bfloat16 or half as well
  const uint32_t* meta;  // [tiles, padded / 64, 32], 16-byte aligned
  const float* scale;    // [N], sums likewise: with int8 values
  const int32_t* sums;
  const void* bias;      // [N] or null
  const void* residual;  // [M, N] or null
  void* y;               // [M, N]
  int64_t m, n, k, x_stride;
  int64_t padded;  // K filled up to 64 columns, with int8 values to 128
  int64_t tiles;   // of 16 rows of W
  int activation;
  bool whole;  // int8 values
  bool half;   // of a float32 y: the values are half, else bfloat16
};

// Launches on `stream`, a cudaStream_t; gives the text of an error, or null.
const char* multiply_sparse24(const Sparse24Task& task, Sparse24Type type, void* stream);

}  // namespace bigops
