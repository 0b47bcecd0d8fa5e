// What the instruction-set files offer to csrc/cpu/compressed_linear.cpp and sparse_linear.cpp.
// Plain pointers and sizes; no torch header, no STL.
#pragma once

#include <stdint.h>

namespace bigops {

// Positions of the per-dtype entries below.
enum FloatKind : int { kFloat32 = 0, kBFloat16, kFloat16, kFloatKinds };

// K whose int32 sums cannot overflow, and sums of weights fit 22 bits and their sign (sum_pair)
constexpr int64_t kExactColumns = 32512;
static_assert(kExactColumns * 255 * 128 < (int64_t(1) << 31), "int32 sums must be exact");
static_assert(kExactColumns * 128 < (int64_t(1) << 22), "sums of weights must fit");

// Of a row of x that a tile register of AMX holds: products by these read so many at a time.
constexpr int64_t kStepBytes = 64;

// "Columns" form: activations lie as [K / 4][lanes] groups of 4 bytes (u8), or [K][lanes] floats,
// so that one load holds the same columns of several rows of x. lanes = vectors * width.

// rows x columns 32-bit words, from row-major src to row-major dst, strides in words.
struct TransposeTask {
  const void* src;
  int64_t src_stride, rows, columns;
  void* dst;
  int64_t dst_stride;
};

// By what rows of x become u8: the range of each, with a zero point; the largest magnitude of each,
// zero point 128; or x_scale and x_zero for all.
enum QuantizeMode : int { kDynamicRows = 0, kSymmetricRows, kStaticRows };

struct QuantizeTask {
  const void* x;  // [rows][k]
  int64_t rows, k;
  QuantizeMode mode;
  float x_scale;
  int32_t x_zero;
  uint8_t* q;  // [rows][q_stride], zero from k on
  int64_t q_stride;
  float* scale;  // [rows]; NaN for a row that holds NaN or inf, whose q are zero
  int32_t* zero_point;
};

// What y is stored as: the dtype of bias and residual (that of x, where it is floating), or u8 on
// the qparams y_inverse, y_zero.
enum YKind : int { kYLikeX = 0, kYFloat, kYU8 };

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
  void* y;                    // [M, N]
  YKind y_kind;
  float y_inverse, y_zero;  // 1 / scale and zero point
  int32_t* y_bad;           // u8: set to 1 where a y is NaN or inf, which u8 cannot hold
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
  void (*quantize[kFloatKinds])(const QuantizeTask&);
  void (*widen[kFloatKinds])(const void* x, int64_t n, float* out);
  void (*finish[kFloatKinds])(const FinishTask&);
  void (*finish_columns[kFloatKinds])(const FinishTask&);
  void (*gradient[kFloatKinds])(const GradTask&);
  void (*transpose)(const TransposeTask&);
  int (*max_index)(const uint8_t* index, int64_t n);
};

extern const CompressedKernels portable_compressed, avx2_compressed, avx512_compressed,
    avx512vnni_compressed;

}  // namespace bigops
