// What the instruction-set files offer to csrc/cpu/quantized_linear.cpp and sparse_linear.cpp.
// Plain pointers and sizes; no torch header, no STL.
#pragma once

#include <stdint.h>

namespace bigops {

// Positions of the per-dtype entries below.
enum FloatKind : int { kFloat32 = 0, kBFloat16, kFloat16, kFloatKinds };

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

// Products of weight rows [0, n) and `m` rows of x.
struct DenseTask {
  const uint8_t* x;  // dot: [m][x_stride]; columns: [K / 4][lanes][4]
  int64_t x_stride;  // dot form only; a multiple of 64, readable to its end
  int vectors;       // columns form only
  int64_t m;
  const int8_t* weight;  // [n][weight_stride]
  int64_t weight_stride, n, k;
  int32_t* out;  // dot: [m][out_stride]; columns: [n rounded up to kRowBlock][lanes]
  int64_t out_stride;
  int32_t* sums;  // [n] sums of the weight rows
};
constexpr int64_t kRowBlock = 24;  // a multiple of every kernel's rows per register block

// out[m][0:width of the block] = sum_n grad[m][n] * weight[n][..] for up to kGradRows rows.
constexpr int64_t kGradRows = 6;
struct DenseGradTask {
  const float* grad;  // [m][N], already scaled
  int64_t m, n;
  const int8_t* weight;  // at the first column of the block
  int64_t weight_stride;
  int64_t columns;  // at most grad_columns of the table
  float* out;       // [m][grad_columns]
};

// y[m0:m1, n0:n1] = act(z + bias) + residual with z from a tile.
struct FinishTask {
  // finish: [m1 - m0][stride]; finish_columns: [n1 - n0][stride], a lane is a row of x.
  // int32 sums when `scale` is set, else float z
  const void* tile;
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
  int width;         // lanes of a vector
  int max_vectors;   // vectors of the widest tile
  int grad_columns;  // columns of a block of dense_grad
  void (*quantize[kFloatKinds])(const void* x, int64_t k, uint8_t* q, float* scale,
                                int32_t* zero_point);
  void (*widen[kFloatKinds])(const void* x, int64_t n, float* out);
  void (*finish[kFloatKinds])(const FinishTask&);
  void (*finish_columns[kFloatKinds])(const FinishTask&);
  void (*gradient[kFloatKinds])(const GradTask&);
  void (*transpose)(const TransposeTask&);
  int (*max_index)(const uint8_t* index, int64_t n);
  void (*row_sums)(const int8_t* weight, int64_t stride, int64_t n, int64_t k, int32_t* sums);
  void (*reduce)(const int32_t* partial, int64_t n, int32_t* sums);  // [n][width] -> [n]
  void (*dense_dot)(const DenseTask&);
  void (*dense_columns)(const DenseTask&);
  void (*dense_grad)(const DenseGradTask&);
};

extern const CompressedKernels portable_compressed, avx2_compressed, avx512_compressed,
    avx512vnni_compressed;

}  // namespace bigops
