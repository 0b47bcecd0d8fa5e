// Products of u8 activations with a quantised weight by tile registers.
// T: AmxTiles (tiles_amx.h). Q: the lines of an instruction set. Include after both.
// 16 lines of a weight tile are the operand of a tile register as they lie: row k holds, for each
// weight row, 4 columns. Internal linkage throughout.

#include "cpu/simd/quantized_linear.h"

namespace bigops {
namespace {

constexpr int64_t kStepLines = 16;                       // of a weight tile that a register holds
constexpr int64_t kTileBytes = kStepLines * kLineBytes;  // 1 KB
constexpr int kTileRows = 16;                            // of x that a register holds
// Of a part of K: two tiles of weights, 32 KB, stay in the L1 cache for all rows of x.
constexpr int64_t kPartSteps = 16;

// Registers of R tiles of rows of x by NV tiles of weights: sums 0-3, x from 4, weights after it.
template <int R>
struct Registers {
  static constexpr int x(int r) { return 4 + r; }
  static constexpr int w(int v) { return 4 + R + v % (4 - R); }
  static constexpr int sum(int r, int v) { return R == 1 ? v : 2 * r + v; }
};

template <int R>
TileShape shape_of(int64_t rows) {
  TileShape shape(kTileRows, kLineBytes);
  for (int i = 0; i < 4 + R; ++i) {
    const int64_t at = R == 1 || i == 4 || i < 2 ? 0 : kTileRows;  // first row of x
    const int64_t left = rows - at < kTileRows ? rows - at : kTileRows;
    shape.rows[i] = static_cast<uint8_t>(left);
  }
  return shape;
}

template <int N>
struct At {
  static constexpr int value = N;
};
// f(At<0>()), .., f(At<N - 1>())
template <int N, class F>
inline __attribute__((always_inline)) void each(const F& f) {
  if constexpr (N > 0) {
    each<N - 1>(f);
    f(At<N - 1>());
  }
}

// Steps of K: `full` of them from `w`, then perhaps one from `rest`.
struct TilePart {
  const uint8_t* x;  // [rows of the block][x_stride]
  int64_t x_stride;
  const uint8_t* w;  // first tile of weights
  int64_t tile_stride, full;
  const uint8_t* rest;  // [NV][kTileBytes], or null
  int32_t* out;         // [rows of the block][out_stride]
  int64_t out_stride;
  bool first;  // out holds nothing yet
};

template <class T, int R, int NV>
void tile_part(const TilePart& p) {
  using Is = Registers<R>;
  const auto each_sum = [&](const auto& f) {
    each<R>([&](auto r) { each<NV>([&](auto v) { f(r, v); }); });
  };
  const int64_t x_rows = kTileRows * p.x_stride, out_row = p.out_stride * 4;
  each_sum([&](auto r, auto v) {
    constexpr int at = Is::sum(r.value, v.value);
    if (p.first)
      T::template zero<at>();
    else
      T::template load<at>(p.out + r.value * kTileRows * p.out_stride + v.value * kWeightTile,
                           out_row);
  });
  const auto step = [&](const uint8_t* x, const uint8_t* w, int64_t wide) {
    each<NV>([&](auto v) {
      T::template load<Is::w(v.value)>(w + v.value * wide, kLineBytes);
      each<R>([&](auto r) {
        if (v.value == 0) T::template load<Is::x(r.value)>(x + r.value * x_rows, p.x_stride);
        T::template dot_u8s8<Is::sum(r.value, v.value), Is::x(r.value), Is::w(v.value)>();
      });
    });
  };
  for (int64_t s = 0; s < p.full; ++s)
    step(p.x + s * kStepBytes, p.w + s * kTileBytes, p.tile_stride);
  if (p.rest != nullptr) step(p.x + p.full * kStepBytes, p.rest, kTileBytes);
  each_sum([&](auto r, auto v) {
    T::template store<Is::sum(r.value, v.value)>(
        p.out + r.value * kTileRows * p.out_stride + v.value * kWeightTile, out_row);
  });
}

// out -= zero point * sum of x, for NV tiles from `tile`.
template <class Q, int NV>
void take_zero_points(const QuantizedTask& t, int64_t tile, int64_t row, int64_t rows) {
  int32_t* out = static_cast<int32_t*>(t.out) + row * t.out_stride + tile * kWeightTile;
  for (int v = 0; v < NV; ++v) {
    const auto zero = Q::iload_s8(t.zero_point + (tile + v) * kWeightTile);
    for (int64_t m = 0; m < rows; ++m) {
      int32_t* at = out + m * t.out_stride + v * kWeightTile;
      Q::istore(at, Q::isub(Q::iload(at), Q::imul(zero, Q::iset1(t.x_sum[row + m]))));
    }
  }
}

// `count` blocks of `rows` rows, R tiles of them, against all weights.
template <class T, class Q, int R>
struct W8A8Tiles {
  const QuantizedTask& t;
  int64_t row, rows, count;

  template <int NV>
  void part(int64_t tile, int64_t line) const {
    alignas(64) uint8_t rest[NV * kTileBytes];
    const int64_t left = t.lines - line;
    const bool last = left <= kPartSteps * kStepLines;
    TilePart p{};
    p.x_stride = t.x_stride;
    p.w = t.values + tile * t.tile_stride + line * kLineBytes;
    p.tile_stride = t.tile_stride;
    p.full = last ? left / kStepLines : kPartSteps;
    p.out_stride = t.out_stride;
    p.first = line == 0;
    if (const int64_t lines = left % kStepLines; last && lines > 0) {
      p.rest = rest;
      memset(rest, 0, sizeof(rest));
      for (int v = 0; v < NV; ++v)
        memcpy(rest + v * kTileBytes, p.w + v * t.tile_stride + p.full * kTileBytes,
               static_cast<size_t>(lines * kLineBytes));
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t m = row + i * rows;
      p.x = static_cast<const uint8_t*>(t.x) + m * t.x_stride + line * 4;
      p.out = static_cast<int32_t*>(t.out) + m * t.out_stride + tile * kWeightTile;
      tile_part<T, R, NV>(p);
      if (last && t.zero_point != nullptr) take_zero_points<Q, NV>(t, tile, m, rows);
    }
  }

  void run() const {
    constexpr int NV = R == 1 ? 4 : 2;
    T::configure(shape_of<R>(rows));
    for (int64_t line = 0; line == 0 || line < t.lines; line += kPartSteps * kStepLines) {
      int64_t tile = 0;
      for (; tile + NV <= t.tiles; tile += NV) part<NV>(tile, line);
      for (; tile < t.tiles; ++tile) part<1>(tile, line);
    }
  }
};

// Blocks of nearly the same number of rows, so that registers take two shapes at most.
template <class T, class Q>
void w8a8_tiles(const QuantizedTask& t) {
  constexpr int64_t most = 2 * kTileRows;
  const int64_t blocks = (t.rows + most - 1) / most, rows = t.rows / blocks;
  const int64_t larger = t.rows % blocks;
  const auto run = [&](int64_t row, int64_t each, int64_t count) {
    if (count == 0) return;
    if (each > kTileRows)
      W8A8Tiles<T, Q, 2>{t, row, each, count}.run();
    else
      W8A8Tiles<T, Q, 1>{t, row, each, count}.run();
  };
  run(0, rows + 1, larger);
  run(larger * (rows + 1), rows, blocks - larger);
  T::release();
}

}  // namespace
}  // namespace bigops
