// What the instruction-set files offer to csrc/cpu/compressed_linear.cpp and sparse_linear.cpp.
// Plain pointers and sizes; no torch header, no STL.
#pragma once

#include <stdint.h>

namespace bigops {

// Positions of the per-dtype entries below.
enum FloatKind : int { kFloat32 = 0, kBFloat16, kFloat16, kFloatKinds };

constexpr int64_t kBlock = 4;    // columns of a sparse block, bytes of a group
constexpr int64_t kPanel = 512;  // columns of a sparse panel
constexpr int64_t kPanelBlocks = kPanel / kBlock;
constexpr int64_t kExactColumns = 65536;  // K whose int32 sums cannot overflow:
static_assert(kExactColumns * 255 * 128 < (int64_t(1) << 31), "int32 sums must be exact");

// "Columns" form: activations lie as [K / 4][lanes] groups of 4 bytes (u8), or [K][lanes] floats,
// so that one load holds the same columns of several rows of x. lanes = vectors * width.

// rows x columns 32-bit words, from row-major src to row-major dst, strides in words.
struct TransposeTask {
  const void* src;
  int64_t src_stride, rows, columns;
  void* dst;
  int64_t dst_stride;
};

// Blocks of rows [0, n) in one panel: acc += W x. acc is [n][lanes], int32 or float.
struct SparseTask {
  const int32_t* ptr;    // n + 1 entries
  const uint8_t* index;  // whole arrays
  const void* values;    // int8 or float [blocks][4]
  const void* x;         // the panel: [128][lanes][4] u8, or [512][lanes] float
  int vectors;
  int64_t n;
  void* acc;
  int32_t* sums;  // [n][width] partial sums of the values, or null (float values, later tiles)
  bool first;     // acc and sums start at zero
};

// gx^T += W^T gz^T for one panel: x_grad is [512][lanes], grad is [N][lanes], lanes = width.
struct SparseGradTask {
  const int32_t* ptr;  // n + 1 entries
  const uint8_t* index;
  const void* values;
  int64_t n;
  const float* grad;
  float* x_grad;
};

// y[m0:m1, n0:n1] = act(z + bias) + residual with z from a tile.
struct FinishTask {
  const void* tile;  // [m1 - m0][stride]: int32 sums when `scale` is set, else float z
  int64_t stride;
  const float* row_scale;     // [M]
  const int32_t* zero_point;  // [M]
  const float* scale;         // [N], or null
  const int32_t* sums;        // [n1 - n0]
  const void* bias;           // [N] or null
  const void* residual;       // [M, N] or null
  void* y;                    // [M, N], float when y_float
  bool y_float;
  int64_t m0, m1, n0, n1, n;
  int activation;
};

// Columns [n0, n1) of gz = grad * act'(z), scaled for the product, and their sum over rows.
struct GradTask {
  const void* grad;    // [M, N]
  const float* z;      // [M, N], or null when the activation is none
  const float* scale;  // [N] or null
  float* gz;           // [M, N] = grad * act'(z) * scale, or null
  void* bias_grad;     // [N] = sum of grad * act'(z), or null
  int64_t m, n, n0, n1;
  int activation;
};

struct CompressedKernels {
  int width;        // lanes of a vector
  int max_vectors;  // vectors of the widest tile
  void (*quantize[kFloatKinds])(const void* x, int64_t k, uint8_t* q, float* scale,
                                int32_t* zero_point);
  void (*widen[kFloatKinds])(const void* x, int64_t n, float* out);
  void (*finish[kFloatKinds])(const FinishTask&);
  void (*gradient[kFloatKinds])(const GradTask&);
  void (*transpose)(const TransposeTask&);
  int (*max_index)(const uint8_t* index, int64_t n);
  void (*reduce)(const int32_t* partial, int64_t n, int32_t* sums);  // [n][width] -> [n]
  void (*sparse_s8)(const SparseTask&);
  void (*sparse_f32)(const SparseTask&);
  void (*sparse_permute)(const SparseTask&);  // one row of x: acc is [n][width] partial sums; null
  void (*sparse_grad_s8)(const SparseGradTask&);
  void (*sparse_grad_f32)(const SparseGradTask&);
};

extern const CompressedKernels portable_compressed, avx2_compressed, avx512_compressed,
    avx512vnni_compressed;

}  // namespace bigops
