// What the instruction-set files offer to csrc/cpu/quantized_linear.cpp.
// Plain pointers and sizes; no torch header, no STL.
//
// A weight lies in tiles of kWeightTile rows, a tile in lines of 64 bytes, a line in 16 words of 32
// bits: word r holds the next columns of row r. So one load is an operand of vpdpbusd, a lane is
// a weight row, and nothing is packed or transposed at run time.
//   int8: 4 columns a line, byte c of a word is column c.
//   int4: 8 columns a line. A nibble holds q + 8; nibble j of the low half of a word is column 2j,
//   of the high half column 2j + 1: a shift by 4j gives the indices of a bf16 pair (vpermw), and
//   the low and high nibbles of all bytes are columns 0 4 1 5 and 2 6 3 7 (vpdpbusd).
#pragma once

#include <stdint.h>

#include "cpu/simd/compressed.h"

namespace bigops {

constexpr int64_t kWeightTile = 16;
constexpr int64_t kLineBytes = 64;

// Products of `rows` rows of x with `tiles` tiles. K is zero padded to whole lines in x.
struct QuantizedTask {
  const void* x;     // [rows][x_stride bytes]: u8, float or bf16; for w4a8 in the order above
  int64_t x_stride;  // a multiple of 4
  int64_t rows;
  const uint8_t* values;  // first line of the first tile
  int64_t tile_stride;    // bytes from tile to tile
  int64_t tiles;
  int64_t lines;     // of a tile, along K
  bool from_memory;  // the values are in no cache yet
  void* out;         // [rows][out_stride]: int32 for w8a8, else float
  int64_t out_stride;
  // groups along K (all but w8a8)
  float* totals;  // [rows][out_stride], memory for rows so long that `out` is filled several times
  int64_t group_lines;
  const float* scale;        // [groups][stride]
  const int8_t* zero_point;  // [groups][stride] or null; for w8a8 one group
  int64_t stride;            // of both, in elements
  // integer activations
  const float* x_scale;   // [rows], w4a8
  const int32_t* x_zero;  // [rows], w4a8
  const float* row_sum;   // sums of the dequantised weight rows, w4a8
  const int32_t* x_sum;   // [rows] sums of x - x_zero, w8a8 with a zero point
};

// Lines [first, first + lines) of one tile as floats: out[column][16], dequantised.
struct DecodeTask {
  const uint8_t* values;  // first of the lines
  int64_t first, lines, group_lines;
  const float* scale;        // [groups][stride] at the tile
  const int8_t* zero_point;  // the same, or null
  int64_t stride;
  float* out;
};

// out[m][..] (+)= sum_n grad[m][n] * weight[n][..] for up to kGradRows rows.
constexpr int64_t kGradRows = 6;
constexpr int64_t kGradColumns = 64;
struct FloatGradTask {
  const float* grad;  // [m][grad_stride]
  int64_t grad_stride;
  int64_t m, n;
  const float* weight;  // [n][kGradColumns]
  float* out;           // [m][kGradColumns]
  bool first;           // out starts at zero
};

struct IntegerProducts {  // x u8
  void (*w8a8)(const QuantizedTask&);
  void (*w4a8)(const QuantizedTask&);
};
struct FloatProducts {  // x float or bf16
  void (*w8)(const QuantizedTask&);
  void (*w4)(const QuantizedTask&);
};

struct QuantizedKernels {
  IntegerProducts integer;
  FloatProducts floats;
  void (*interleave)(uint8_t* q, int64_t n);  // columns 0..7 to 0 4 1 5 2 6 3 7; n % 8 == 0
  int32_t (*sum)(const uint8_t* q, int64_t n);
  void (*decode8)(const DecodeTask&);
  void (*decode4)(const DecodeTask&);
  void (*grad)(const FloatGradTask&);
};

extern const QuantizedKernels portable_quantized, avx2_quantized, avx512_quantized;
extern const IntegerProducts avx512vnni_quantized;
// Reads kStepBytes of a row of x at a time, as far past K as the last of them goes.
extern const IntegerProducts amx_quantized;
constexpr int64_t kStepBytes = 64;
extern const FloatProducts avx512bf16_quantized;

}  // namespace bigops
