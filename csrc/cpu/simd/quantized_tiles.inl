// Products of u8 activations with a quantised weight by tile registers.
// T: AmxTiles (tiles_amx.h). Q: the lines of an instruction set. Include after these and
// quantized_linear.inl.
// 16 lines of a weight tile are the operand of a tile register as they lie: row k holds, for each
// weight row, 4 columns. Internal linkage throughout.

#include "cpu/simd/tile_blocks.h"

namespace bigops {
namespace {

static_assert(kTileColumns == kWeightTile && kStepBytes == kLineBytes);

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

template <class T, class Q, int R>
struct W8A8Tiles {
  static constexpr int most_tiles = R == 1 ? 4 : 2;

  template <int NV>
  static void run(const QuantizedTask& t, const RowBlocks& blocks, int64_t tile) {
    alignas(64) uint8_t rest[NV * kTileBytes];
    TileBlock b{};
    b.x_stride = t.x_stride;
    const uint8_t* const w = t.values + tile * t.tile_stride;
    b.w = w;
    b.w_row = kLineBytes;
    b.w_step = kTileBytes;
    b.w_next = t.tile_stride;
    b.steps = t.lines / kTileRows;
    b.out_stride = t.out_stride;
    if (const int64_t lines = t.lines % kTileRows; lines > 0) {
      b.rest = rest;
      memset(rest, 0, sizeof(rest));
      for (int v = 0; v < NV; ++v)
        memcpy(rest + v * kTileBytes, w + v * t.tile_stride + b.steps * kTileBytes,
               static_cast<size_t>(lines * kLineBytes));
    }
    for (int64_t i = 0; i < blocks.count; ++i) {
      const int64_t m = blocks.row + i * blocks.rows;
      b.x = static_cast<const uint8_t*>(t.x) + m * t.x_stride;
      b.out = static_cast<int32_t*>(t.out) + m * t.out_stride + tile * kWeightTile;
      multiply<T, BytesDot<T>, R, NV>(b);
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
  static constexpr int64_t kLines = kTileRows / Nibbles::steps;  // of nibbles in a register
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
    b.w_row = kLineBytes;
    b.w_step = kTileBytes;
    b.w_next = kMostBytes;
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
        multiply<T, BytesDot<T>, R, NV>(b);
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

template <class T, class Q, template <class, class, int> class Form>
void tile_product(const QuantizedTask& t) {
  over_rows<T>(t.rows, [&](auto registers, const RowBlocks& blocks) {
    using Of = Form<T, Q, decltype(registers)::value>;
    int64_t tile = 0;
    for (; tile + Of::most_tiles <= t.tiles; tile += Of::most_tiles)
      Of::template run<Of::most_tiles>(t, blocks, tile);
    for (; tile < t.tiles; ++tile) Of::template run<1>(t, blocks, tile);
  });
}

template <class T, class Q>
constexpr IntegerProducts tile_products() {
  return {tile_product<T, Q, W8A8Tiles>, tile_product<T, Q, W4A8Tiles>};
}

}  // namespace
}  // namespace bigops
