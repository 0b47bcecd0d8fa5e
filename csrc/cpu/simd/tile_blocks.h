// Products by tile registers: blocks of rows of x against 16 columns of y and more.
// T: AmxTiles (tiles_amx.h). Internal linkage throughout.
#pragma once

#include "cpu/simd/compressed.h"
#include "cpu/simd/tiles_amx.h"

namespace bigops {
namespace {

constexpr int kTileRows = 16;     // of x, or words along K of a weight, that a register holds
constexpr int kTileColumns = 16;  // of y
constexpr int64_t kTileBytes = kTileRows * kStepBytes;

// Registers of R tiles of rows of x by NV tiles of weights: sums 0-3, x from 4, weights after it.
template <int R>
struct Registers {
  static constexpr int x(int r) { return 4 + r; }
  static constexpr int w(int v) { return 4 + R + v % (4 - R); }
  static constexpr int sum(int r, int v) { return R == 1 ? v : 2 * r + v; }
};

template <int R>
TileShape shape_of(int64_t rows) {
  TileShape shape(kTileRows, kStepBytes);
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

// How bytes of x meet those of a weight.
template <class T>
struct BytesDot {
  template <int c, int a, int b>
  static void add() {
    T::template dot_u8s8<c, a, b>();
  }
};
template <class T>
struct Bf16Dot {
  template <int c, int a, int b>
  static void add() {
    T::template dot_bf16<c, a, b>();
  }
};

// Rows of x, at most R registers of them, against NV registers of a weight, whose row is a word
// along K of each column of y.
struct TileBlock {
  const void* x;     // [rows][x_stride]
  int64_t x_stride;  // these and the next are in bytes
  const void* w;
  int64_t w_row, w_step, w_next;  // from row to row of a register, along K, to the next columns
  int64_t steps;                  // whole registers along K
  const uint8_t* rest;            // [NV][kTileBytes] for one more, or null
  void* out;                      // [rows][out_stride] words of 4 bytes
  int64_t out_stride;
};

template <class T, class Dot, int R, int NV>
void multiply(const TileBlock& b) {
  using Is = Registers<R>;
  const auto each_sum = [](const auto& f) {
    each<R>([&](auto r) { each<NV>([&](auto v) { f(r, v); }); });
  };
  each_sum([](auto r, auto v) { T::template zero<Is::sum(r.value, v.value)>(); });
  const int64_t next_rows = kTileRows * b.x_stride;
  const auto step = [&](const uint8_t* x, const uint8_t* w, int64_t row, int64_t next) {
    each<NV>([&](auto v) {
      T::template load<Is::w(v.value)>(w + v.value * next, row);
      each<R>([&](auto r) {
        if (v.value == 0) T::template load<Is::x(r.value)>(x + r.value * next_rows, b.x_stride);
        Dot::template add<Is::sum(r.value, v.value), Is::x(r.value), Is::w(v.value)>();
      });
    });
  };
  const uint8_t* x = static_cast<const uint8_t*>(b.x);
  const uint8_t* w = static_cast<const uint8_t*>(b.w);
  for (int64_t s = 0; s < b.steps; ++s, x += kStepBytes, w += b.w_step)
    step(x, w, b.w_row, b.w_next);
  if (b.rest != nullptr) step(x, b.rest, kStepBytes, kTileBytes);
  each_sum([&](auto r, auto v) {
    char* out = static_cast<char*>(b.out) + r.value * kTileRows * b.out_stride * 4;
    T::template store<Is::sum(r.value, v.value)>(out + v.value * kStepBytes, b.out_stride * 4);
  });
}

// `count` blocks of `rows` rows from `row`.
struct RowBlocks {
  int64_t row, rows, count;
};

// f(At<R>(), blocks) with registers of that shape. All blocks have nearly the same number of rows,
// so that registers take two shapes at most.
template <class T, class F>
void over_rows(int64_t rows, const F& f) {
  constexpr int64_t most = 2 * kTileRows;
  const int64_t blocks = (rows + most - 1) / most, each = rows / blocks, larger = rows % blocks;
  const auto take = [&](const RowBlocks& some) {
    if (some.count == 0) return;
    if (some.rows > kTileRows) {
      T::configure(shape_of<2>(some.rows));
      f(At<2>(), some);
    } else {
      T::configure(shape_of<1>(some.rows));
      f(At<1>(), some);
    }
  };
  take({0, each + 1, larger});
  take({larger * (each + 1), each, blocks - larger});
  T::release();
}

}  // namespace
}  // namespace bigops
