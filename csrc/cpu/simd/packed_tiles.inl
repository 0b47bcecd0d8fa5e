// Products of bf16 with a dense weight in panels (layout: packed_linear.h) by tile registers: 16
// words of 16 columns of a panel are an operand as they lie.
// T: AmxTiles (tiles_amx.h). V: floats of an instruction set. Include after these.
// Internal linkage throughout.

#include <string.h>

#include "cpu/simd/packed_linear.h"
#include "cpu/simd/tile_blocks.h"

namespace bigops {
namespace {

constexpr int64_t kWordBytes = kPackedColumns * 4;  // of a panel

template <class T, class V, int R, int NV>
void packed_columns(const PackedTask& t, const RowBlocks& blocks, int64_t column) {
  alignas(64) uint8_t rest[NV * kTileBytes];
  alignas(64) float sums[R * kTileRows * NV * kTileColumns];
  const char* const panel = static_cast<const char*>(t.panel) + column * 4;
  TileBlock b{};
  b.x_stride = t.x_stride;
  b.w = panel;
  b.w_row = kWordBytes;
  b.w_step = kTileRows * kWordBytes;
  b.w_next = kStepBytes;
  b.steps = t.words / kTileRows;
  if (const int64_t words = t.words % kTileRows; words > 0) {
    b.rest = rest;
    memset(rest, 0, sizeof(rest));
    for (int v = 0; v < NV; ++v)
      for (int64_t i = 0; i < words; ++i)
        memcpy(rest + v * kTileBytes + i * kStepBytes,
               panel + b.steps * b.w_step + i * kWordBytes + v * kStepBytes, kStepBytes);
  }
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t row = blocks.row + i * blocks.rows;
    float* const out = t.out + row * kPackedColumns + column;
    b.x = static_cast<const char*>(t.x) + row * t.x_stride;
    b.out = t.first ? out : sums;
    b.out_stride = t.first ? kPackedColumns : NV * kTileColumns;
    multiply<T, Bf16Dot<T>, R, NV>(b);
    if (t.first) continue;
    for (int64_t m = 0; m < blocks.rows; ++m)
      for (int n = 0; n < NV * kTileColumns; n += V::width) {
        float* const to = out + m * kPackedColumns + n;
        V::store(to, V::add(V::load(to), V::load(sums + m * b.out_stride + n)));
      }
  }
}

template <class T, class V>
void packed_tiles(const PackedTask& t) {
  over_rows<T>(t.rows, [&](auto registers, const RowBlocks& blocks) {
    constexpr int R = decltype(registers)::value, NV = R == 1 ? 4 : 2;
    int64_t column = 0;
    for (; column < t.columns - (NV - 1) * kTileColumns; column += NV * kTileColumns)
      packed_columns<T, V, R, NV>(t, blocks, column);
    for (; column < t.columns; column += kTileColumns)
      packed_columns<T, V, R, 1>(t, blocks, column);
  });
}

}  // namespace
}  // namespace bigops
