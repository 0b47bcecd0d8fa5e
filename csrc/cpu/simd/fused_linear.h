// What the instruction-set files offer to csrc/cpu/fused_linear.cpp. Plain pointers and sizes.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace bigops {

constexpr int64_t kTileRows = 64;     // rows of x that share one pass over a block of W
constexpr int64_t kTileColumns = 64;  // columns of y per task; its fp32 tile stays in L1

// y[m0:m1, n0:n1] = act(x W^T + bias) + residual for one tile of at most kTileRows x kTileColumns.
struct LinearTask {
  const void* x;         // [M, K]
  const void* weight;    // [N, K], or [2N, K] when gated: rows 0:N gate, N:2N up
  const void* bias;      // [N] ([2N]) or null
  const void* residual;  // [M, N] or null
  void* y;               // [M, N]
  void* preact;          // [M, N] ([M, 2N]) or null
  int64_t n, k;
  int64_t m0, m1, n0, n1;
  int activation;
};

// Rows [m0, m1) of y = act(z + bias) + residual, z from torch's own product.
struct EpilogueTask {
  const void* z;  // [M, N] ([M, 2N]) in the kernel's dtype, or float when z_float
  bool z_float;
  const void* bias;      // or null (already added)
  const void* residual;  // or null
  void* y;               // may alias z unless gated or z_float
  void* preact;          // or null
  int64_t n;
  int64_t m0, m1;
  int activation;
};

// Columns [n0, n1) of gz = grad * act'(z), all M rows, and of their sum over rows.
constexpr int64_t kGradColumns = 512;  // of a task's inner block: whole pages, not single lines

struct BackwardTask {
  const void* grad;    // [M, N]
  const void* preact;  // [M, N] ([M, 2N]); null when activation is none
  void* gz;            // [M, N] ([M, 2N]) or null
  void* bias_grad;     // [N] ([2N]) or null
  int64_t m, n;
  int64_t n0, n1;  // columns of grad
  int activation;
};

struct FloatKernels {
  void (*linear)(const LinearTask&);
  void (*epilogue)(const EpilogueTask&);
  void (*backward)(const BackwardTask&);
};

// One table per instruction set and dtype; null where that set has no kernel of its own.
extern const FloatKernels portable_f32, portable_f64, portable_bf16, portable_f16;
extern const FloatKernels avx2_f32, avx2_bf16, avx2_f16;
extern const FloatKernels avx512_f32, avx512_bf16, avx512_f16;
extern const FloatKernels avx512bf16_bf16;

}  // namespace bigops
