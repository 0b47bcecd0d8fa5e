// What the instruction-set files offer to csrc/cpu/norm.cpp. Plain pointers and sizes; no torch
// header, no STL.
#pragma once

#include "cpu/simd/compressed.h"

namespace bigops {

// Rows [0, rows) of y = norm(x + residual) * weight + bias; K is contiguous everywhere.
struct NormTask {
  const void* x;  // [rows, K], row stride x_stride elements
  int64_t x_stride;
  const void* residual;  // likewise, in x's dtype, or null
  int64_t residual_stride;
  const float* weight;  // [K] or null
  const float* bias;    // [K] or null
  float* row;           // [K] scratch
  void* y;              // [rows, K] in x's dtype, or null
  void* sum;            // [rows, K] = x + residual in x's dtype, or null
  uint8_t* values;      // [rows, K]: y as u8, or null
  float* scale;         // [rows]
  int32_t* zero_point;  // [rows]
  int64_t rows, k;
  float eps;
  bool rms;        // no mean is taken off
  bool symmetric;  // of the u8: zero point 128
};

struct NormKernels {
  void (*norm[kFloatKinds])(const NormTask&);  // by dtype of x
};

extern const NormKernels portable_norm, avx2_norm, avx512_norm;

}  // namespace bigops
