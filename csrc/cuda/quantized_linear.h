// The decode kernels of quantized_linear: plain numbers and pointers, no torch, no CUDA.
#pragma once

#include <stdint.h>

namespace bigops {

constexpr int64_t kDecodeRows = 16;  // rows of x that one call takes at most

enum DecodeType : int { kDecodeFloat, kDecodeBFloat16, kDecodeHalf };

// y = act(x W^T + bias) + residual, sums in float32. W: the storage of QuantizedWeight.
struct DecodeTask {
  const void* x;             // [M, K]
  const uint8_t* values;     // [tiles, lines, 16, 4], 16-byte aligned
  const float* scale;        // [groups, 16 tiles], 16-byte aligned
  const int8_t* zero_point;  // the same shape, 16-byte aligned, or null
  const void* bias;          // [N] or null
  const void* residual;      // [M, N] or null
  void* y;                   // [M, N]
  float* partial;            // [splits, M, 16 tiles], where splits > 1
  int64_t m, n, k;
  int64_t tiles, lines;
  int64_t group;  // columns that share a scale: 32, 64, 128, or 0 for all
  int bits;       // 8 or 4
  int activation;
  int splits;  // blocks that share K; their sums are added in their order
};

// Launches on `stream`, a cudaStream_t; gives the text of an error, or null.
const char* decode(const DecodeTask& task, DecodeType type, void* stream);

}  // namespace bigops
