// The decode kernels of a bitmap weight: plain numbers and pointers, no torch, no CUDA.
#pragma once

#include <stdint.h>

namespace bigops {

constexpr int64_t kBitmapDecodeRows = 16;  // rows of x that one call takes at most
constexpr int kBitmapRows = 4;             // of W in a tile
constexpr int kBitmapColumns = 256;

enum BitmapType : int { kBitmapFloat, kBitmapBFloat16, kBitmapHalf };  // of x, values and y

// y = act(x W^T + bias) + residual, sums in float32. W: the storage of BitmapWeight, layout in
// bigops/formats/bitmap.py.
struct BitmapTask {
  const void* x;         // [M, K]
  const void* values;    // 16-byte aligned
  const uint32_t* bits;  // [groups, panels, 32], 16-byte aligned
  const int32_t* ptr;    // [groups * panels + 1], in 16 bytes of the values
  const void* bias;      // [N] or null
  const void* residual;  // [M, N] or null
  void* y;               // [M, N]
  float* partial;        // [splits, M, N] where splits > 1
  int64_t m, n, k;
  int64_t total;   // of the values, in 16 bytes
  int64_t panels;  // ceil(K / 256)
  int activation;
  int splits;  // blocks that share the panels of their rows; their sums are added in their order
};

// Launches on `stream`, a cudaStream_t; gives the text of an error, or null.
const char* decode_bitmap(const BitmapTask& task, BitmapType type, void* stream);

}  // namespace bigops
