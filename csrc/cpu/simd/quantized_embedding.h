// What the instruction-set files offer to csrc/cpu/quantized_embedding.cpp.
// Plain pointers and sizes; no torch header, no STL.
#pragma once

#include <stdint.h>

#include "cpu/simd/compressed.h"
#include "cpu/simd/quantized_linear.h"

namespace bigops {

// One row of a quantised weight (simd/quantized_linear.h), dequantised: scale * (q - zero point).
struct RowTask {
  const uint8_t* values;  // the word of the row in the first line of its tile; lines follow
  int64_t k;
  int64_t group;             // columns that share a scale: a multiple of 16, or at least k
  const float* scale;        // of the row and its first group
  const int8_t* zero_point;  // the same, or null
  int64_t stride;            // from group to group, in elements of both
  void* out;                 // [k]
};

using RowKernel = void (*)(const RowTask&);

struct RowKernels {
  RowKernel bits8[kFloatKinds], bits4[kFloatKinds];
};

extern const RowKernels portable_rows, avx2_rows, avx512_rows;

}  // namespace bigops
