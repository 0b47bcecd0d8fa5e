// Products of u8 activations with a quantised weight by tile registers.
// T: AmxTiles (tiles_amx.h). Q: the lines of an instruction set. Include after both and after
// quantized_linear.inl.
// 16 lines of a weight tile are the operand of a tile register as they lie: row k holds, for each
// weight row, 4 columns. Internal linkage throughout.

namespace bigops {
namespace {

constexpr int64_t kStepLines = 16;                       // of a weight tile that a register holds
constexpr int64_t kTileBytes = kStepLines * kLineBytes;  // 1 KB
constexpr int kTileRows = 16;                            // of x that a register holds

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

// Rows of x, at most R registers of them, against NV tiles of weights.
struct TileBlock {
  const uint8_t* x;  // [rows][x_stride]
  int64_t x_stride;
  const uint8_t* w;  // first tile
  int64_t tile_stride;
  int64_t steps;        // whole ones along K
  const uint8_t* rest;  // [NV][kTileBytes] for one more, or null
  int32_t* out;         // [rows][out_stride]
  int64_t out_stride;
};

template <class T, int R, int NV>
void multiply(const TileBlock& b) {
  using Is = Registers<R>;
  const auto each_sum = [](const auto& f) {
    each<R>([&](auto r) { each<NV>([&](auto v) { f(r, v); }); });
  };
  each_sum([](auto r, auto v) { T::template zero<Is::sum(r.value, v.value)>(); });
  const int64_t next_rows = kTileRows * b.x_stride;
  const auto step = [&](const uint8_t* x, const uint8_t* w, int64_t tile_stride) {
    each<NV>([&](auto v) {
      T::template load<Is::w(v.value)>(w + v.value * tile_stride, kLineBytes);
      each<R>([&](auto r) {
        if (v.value == 0) T::template load<Is::x(r.value)>(x + r.value * next_rows, b.x_stride);
        T::template dot_u8s8<Is::sum(r.value, v.value), Is::x(r.value), Is::w(v.value)>();
      });
    });
  };
  for (int64_t s = 0; s < b.steps; ++s)
    step(b.x + s * kStepBytes, b.w + s * kTileBytes, b.tile_stride);
  if (b.rest != nullptr) step(b.x + b.steps * kStepBytes, b.rest, kTileBytes);
  each_sum([&](auto r, auto v) {
    int32_t* out = b.out + r.value * kTileRows * b.out_stride + v.value * kWeightTile;
    T::template store<Is::sum(r.value, v.value)>(out, b.out_stride * 4);
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

// `count` blocks of `rows` rows, R registers of them, from `row`.
struct RowBlocks {
  int64_t row, rows, count;
};

template <class T, class Q, int R>
struct W8A8Tiles {
  static constexpr int most_tiles = R == 1 ? 4 : 2;

  template <int NV>
  static void run(const QuantizedTask& t, const RowBlocks& blocks, int64_t tile) {
    alignas(64) uint8_t rest[NV * kTileBytes];
    TileBlock b{};
    b.x_stride = t.x_stride;
    b.w = t.values + tile * t.tile_stride;
    b.tile_stride = t.tile_stride;
    b.steps = t.lines / kStepLines;
    b.out_stride = t.out_stride;
    if (const int64_t lines = t.lines % kStepLines; lines > 0) {
      b.rest = rest;
      memset(rest, 0, sizeof(rest));
      for (int v = 0; v < NV; ++v)
        memcpy(rest + v * kTileBytes, b.w + v * t.tile_stride + b.steps * kTileBytes,
               static_cast<size_t>(lines * kLineBytes));
    }
    for (int64_t i = 0; i < blocks.count; ++i) {
      const int64_t m = blocks.row + i * blocks.rows;
      b.x = static_cast<const uint8_t*>(t.x) + m * t.x_stride;
      b.out = static_cast<int32_t*>(t.out) + m * t.out_stride + tile * kWeightTile;
      multiply<T, R, NV>(b);
      if (t.zero_point != nullptr) take_zero_points<Q, NV>(t, tile, m, blocks.rows);
    }
  }
};

// The nibbles of a part of a group become bytes once for all rows; its sums, times the scale, are
// added up in `out`, and those of kTotalLines in `totals`: one sum along all of K would lose a
// digit at some thousands of columns.
template <class T, class Q, int R>
struct W4A8Tiles {
  static constexpr int most_tiles = 2;
  using Nibbles = NibblesToBytes<Q>;
  static constexpr int64_t kLines = kStepLines / Nibbles::steps;  // of nibbles in a register
  static constexpr int64_t kMostBytes = kTotalLines / kLines * kTileBytes;  // of a part

  // Lines [k, end) of a tile to whole registers.
  static void widen(const uint8_t* line, const int8_t* zero_point, int64_t lines, uint8_t* to) {
    const auto zero = Nibbles::zero(zero_point);
    const auto put = [&](int64_t row, typename Q::I bytes) {
      Q::istore(reinterpret_cast<int32_t*>(to + row * kLineBytes), bytes);
    };
    for (int64_t l = 0; l < lines; ++l) {
      const auto both = Q::iload(line + l * kLineBytes);
      put(2 * l, Q::template nibbles<0>(both, zero));
      put(2 * l + 1, Q::template nibbles<1>(both, zero));
    }
    for (int64_t l = lines; l % kLines != 0; ++l) {
      put(2 * l, Q::izero());
      put(2 * l + 1, Q::izero());
    }
  }

  template <int NV>
  static void run(const QuantizedTask& t, const RowBlocks& blocks, int64_t tile) {
    alignas(64) uint8_t bytes[NV * kMostBytes];
    alignas(64) int32_t sums[R * kTileRows * NV * kWeightTile];
    const uint8_t* w = t.values + tile * t.tile_stride;
    const float* scale = t.scale + tile * kWeightTile;
    const int8_t* zero = t.zero_point == nullptr ? nullptr : t.zero_point + tile * kWeightTile;
    const int64_t first = blocks.row * t.out_stride + tile * kWeightTile;
    float* const out = static_cast<float*>(t.out) + first;
    float* const totals = t.totals + first;
    // f(row, vector, where it stands in out and totals)
    const auto each_vector = [&](int64_t row, int64_t rows, const auto& f) {
      for (int64_t m = row; m < row + rows; ++m)
        for (int v = 0; v < NV; ++v) f(m, v, m * t.out_stride + v * kWeightTile);
    };
    const int64_t all = blocks.rows * blocks.count;
    TileBlock b{};
    b.x_stride = t.x_stride;
    b.w = bytes;
    b.tile_stride = kMostBytes;
    b.out = sums;
    b.out_stride = NV * kWeightTile;
    int64_t group_end = t.group_lines;
    for (int64_t k = 0; k < t.lines;) {
      const int64_t part_end = (k / kTotalLines + 1) * kTotalLines;
      int64_t end = group_end < part_end ? group_end : part_end;
      end = end < t.lines ? end : t.lines;
      b.steps = (end - k + kLines - 1) / kLines;
      for (int v = 0; v < NV; ++v)
        widen(w + v * t.tile_stride + k * kLineBytes,
              zero == nullptr ? nullptr : zero + v * kWeightTile, end - k, bytes + v * kMostBytes);
      typename Q::F by[NV];
      for (int v = 0; v < NV; ++v) by[v] = Q::fload(scale + v * kWeightTile);
      const bool opens = k % kTotalLines == 0;
      for (int64_t i = 0; i < blocks.count; ++i) {
        const int64_t row = i * blocks.rows;
        b.x = static_cast<const uint8_t*>(t.x) + (blocks.row + row) * t.x_stride +
              k * Nibbles::steps * 4;
        multiply<T, R, NV>(b);
        each_vector(row, blocks.rows, [&](int64_t m, int v, int64_t at) {
          const auto sum = Q::iload(sums + (m - row) * b.out_stride + v * kWeightTile);
          const auto before = opens ? Q::fzero() : Q::fload(out + at);
          Q::fstore(out + at, Q::fma(Q::to_float(sum), by[v], before));
        });
      }
      k = end;
      if (k == group_end) {
        group_end += t.group_lines;
        scale += t.stride;
        if (zero != nullptr) zero += t.stride;
      }
      if (t.lines > kTotalLines && (k == part_end || k == t.lines))
        each_vector(0, all, [&](int64_t, int, int64_t at) {
          const auto sum = Q::fload(out + at);
          Q::fstore(totals + at,
                    part_end == kTotalLines ? sum : Q::fadd(sum, Q::fload(totals + at)));
        });
    }
    const float* const sum = t.lines > kTotalLines ? totals : out;
    each_vector(0, all, [&](int64_t m, int v, int64_t at) {  // x = x_scale (u - x_zero)
      const auto sums_of_w = Q::fload(t.row_sum + (tile + v) * kWeightTile);
      const auto x_zero = Q::fset1(static_cast<float>(t.x_zero[blocks.row + m]));
      const auto z = t.lines > 0 ? Q::fload(sum + at) : Q::fzero();
      Q::fstore(out + at, Q::fmul(Q::fsub(z, Q::fmul(x_zero, sums_of_w)),
                                  Q::fset1(t.x_scale[blocks.row + m])));
    });
  }
};

template <class T, class Form, int R>
void all_tiles(const QuantizedTask& t, const RowBlocks& blocks) {
  constexpr int NV = Form::most_tiles;
  T::configure(shape_of<R>(blocks.rows));
  int64_t tile = 0;
  for (; tile + NV <= t.tiles; tile += NV) Form::template run<NV>(t, blocks, tile);
  for (; tile < t.tiles; ++tile) Form::template run<1>(t, blocks, tile);
}

// Blocks of nearly the same number of rows, so that registers take two shapes at most.
template <class T, class Q, template <class, class, int> class Form>
void tile_product(const QuantizedTask& t) {
  constexpr int64_t most = 2 * kTileRows;
  const int64_t blocks = (t.rows + most - 1) / most, rows = t.rows / blocks;
  const int64_t larger = t.rows % blocks;
  const auto run = [&](const RowBlocks& some) {
    if (some.count == 0) return;
    if (some.rows > kTileRows)
      all_tiles<T, Form<T, Q, 2>, 2>(t, some);
    else
      all_tiles<T, Form<T, Q, 1>, 1>(t, some);
  };
  run({0, rows + 1, larger});
  run({larger * (rows + 1), rows, blocks - larger});
  T::release();
}

template <class T, class Q>
constexpr IntegerProducts tile_products() {
  return {tile_product<T, Q, W8A8Tiles>, tile_product<T, Q, W4A8Tiles>};
}

}  // namespace
}  // namespace bigops
