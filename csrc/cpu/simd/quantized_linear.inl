// Products with a quantised weight in tiles and its decoder.
// Q: the lines of an instruction set (lines_*.h). Include after such a header.
// Internal linkage throughout.

#include "cpu/simd/quantized_linear.h"

namespace bigops {
namespace {

#define BIGOPS_INLINE inline __attribute__((always_inline))
// One loop over the sums that is left rolled keeps them all in memory (gcc 12: half the speed).
#define BIGOPS_UNROLL _Pragma("GCC unroll 8")

// --- int8 weight, u8 activations: exact int32 sums ----------------------------------------------

// A part of K: lines [first, first + lines). With every line, A lines of `ahead` are asked for, the
// one a tile after the other.
struct LinePart {
  int64_t first, lines;
  const uint8_t* ahead;
};

template <class Q, int MR, int NV, int U, int A>
BIGOPS_INLINE void w8a8_block(const QuantizedTask& t, int64_t tile, int64_t row,
                              const LinePart& part) {
  typename Q::I acc[U][MR][NV];
  int32_t* out = static_cast<int32_t*>(t.out) + row * t.out_stride + tile * kWeightTile;
  BIGOPS_UNROLL
  for (int u = 0; u < U; ++u) BIGOPS_UNROLL
  for (int m = 0; m < MR; ++m) BIGOPS_UNROLL
  for (int v = 0; v < NV; ++v)
    acc[u][m][v] =
        u == 0 && part.first > 0 ? Q::iload(out + m * t.out_stride + v * kWeightTile) : Q::izero();
  const uint8_t* w = t.values + tile * t.tile_stride + part.first * kLineBytes;
  const uint8_t* x = static_cast<const uint8_t*>(t.x) + row * t.x_stride + part.first * 4;
  const uint8_t* ahead = part.ahead;
  const int64_t wide = t.tile_stride, stride = t.x_stride, lines = part.lines;
  int64_t k = 0;
  for (; k + U <= lines; k += U) {
    BIGOPS_UNROLL
    for (int u = 0; u < U; ++u) {
      typename Q::W wv[NV];
      BIGOPS_UNROLL
      for (int a = 0; a < A; ++a) __builtin_prefetch(ahead + a * wide + (k + u) * kLineBytes, 0, 2);
      BIGOPS_UNROLL
      for (int v = 0; v < NV; ++v) {
        wv[v] = Q::bytes(Q::iload(w + v * wide + (k + u) * kLineBytes));
      }
      BIGOPS_UNROLL
      for (int m = 0; m < MR; ++m) {
        const auto xv = Q::word(x + m * stride + (k + u) * 4);
        BIGOPS_UNROLL
        for (int v = 0; v < NV; ++v) acc[u][m][v] = Q::dot(acc[u][m][v], xv, wv[v]);
      }
    }
  }
  if (U > 1)
    for (; k < lines; ++k) BIGOPS_UNROLL
  for (int v = 0; v < NV; ++v) {
    const auto wv = Q::bytes(Q::iload(w + v * wide + k * kLineBytes));
    BIGOPS_UNROLL
    for (int m = 0; m < MR; ++m)
      acc[0][m][v] = Q::dot(acc[0][m][v], Q::word(x + m * stride + k * 4), wv);
  }
  BIGOPS_UNROLL
  for (int m = 0; m < MR; ++m) BIGOPS_UNROLL
  for (int v = 0; v < NV; ++v) {
    auto sum = acc[0][m][v];
    BIGOPS_UNROLL
    for (int u = 1; u < U; ++u) sum = Q::iadd(sum, acc[u][m][v]);
    if (t.zero_point != nullptr &&
        part.first == 0) {  // sum (x - x_zero) (w - zero) = .. - zero * x_sum
      const auto zero = Q::iload_s8(t.zero_point + (tile + v) * kWeightTile);
      sum = Q::isub(sum, Q::imul(zero, Q::iset1(t.x_sum[row + m])));
    }
    Q::istore(out + m * t.out_stride + v * kWeightTile, sum);
  }
}

// Four tiles of a part of K fill 32 KB and stay in the L1 cache for all rows of x, while the next
// part is asked for, evenly over the blocks of rows: the processor's own prefetcher waits until
// the stream goes on. 4096 x 4096, two threads: 438 to 370 us at 16 rows, 589 to 474 at 24; weights
// that are cached already lose 4% by it.
constexpr int64_t kPartLines = 128;

template <class Q>
struct W8A8 {
  static constexpr int rows = Q::sum_rows, tiles = Q::sum_tiles;
  static constexpr bool parts = true;
  template <int MR, int NV>
  static void block(const QuantizedTask& t, int64_t tile, int64_t row) {
    // enough independent sums to cover the latency of vpdpbusd (4 cycles)
    w8a8_block < Q, MR, NV,
        MR* NV == 1 ? 4 : MR * NV<4 ? 2 : 1, 0>(t, tile, row, {0, t.lines, nullptr});
  }
  template <int MR, int NV, int A>
  static void part(const QuantizedTask& t, int64_t tile, int64_t row, const LinePart& part) {
    w8a8_block<Q, MR, NV, 1, A>(t, tile, row, part);
  }
};

// --- groups along K: the sums of a group, then total += scale * sum ------------------------------

// A page ahead of two streams: the processor's own prefetcher stops where a page ends. 4096 x 4096
// in int4 from memory, one core: 786 instead of 1050 us at 4 rows of bf16, 2591 instead of 2821 at
// 16. The four streams of w8a8 lose by it (900 instead of 775 us at 4 rows), as does one row.
constexpr int64_t kAhead = 4096;

// One sum along all of K would lose a digit at some thousands of columns. So a sum of floats ends
// after kTotalLines where its group goes on, or half of them where a line takes many steps: 256 or
// 512 columns. Whole numbers are exact. Totals over groups go to `out` after kTotalLines, and
// kTotals of those to `totals`.
constexpr int64_t kTotalLines = 128;
constexpr int64_t kTotals = 16;

// D says how a line becomes operands: D::steps of them, each against one word of x.
template <class Q, class D, int MR, int NV, int U>
BIGOPS_INLINE void group_block(const QuantizedTask& t, int64_t tile, int64_t row) {
  const D decode;
  const uint8_t* w = t.values + tile * t.tile_stride;
  const uint8_t* x = static_cast<const uint8_t*>(t.x) + row * t.x_stride;
  const int64_t wide = t.tile_stride, stride = t.x_stride;
  const float* scale = t.scale + tile * kWeightTile;
  const int8_t* zero = t.zero_point;
  if (zero != nullptr) zero += tile * kWeightTile;
  constexpr int64_t kSumLines = D::steps < 4 ? kTotalLines : kTotalLines / 2;
  const bool one_sum =
      D::integer && t.group_lines > kTotalLines && t.lines <= kExactColumns / (4 * D::steps);
  const int64_t part = one_sum ? t.lines : kTotalLines;
  int64_t k = 0, group_end = t.group_lines, done = 0;
  typename Q::F total[MR][NV];
  BIGOPS_UNROLL
  for (int m = 0; m < MR; ++m) BIGOPS_UNROLL
  for (int v = 0; v < NV; ++v) total[m][v] = Q::fzero();
  for (;;) {
    const int64_t stop = t.lines - k < part ? t.lines : k + part;
    while (k < stop) {
      int64_t end = group_end < stop ? group_end : stop;
      if (!D::integer) end = k + kSumLines < end ? k + kSumLines : end;
      typename D::Sum acc[U][MR][NV];
      BIGOPS_UNROLL
      for (int u = 0; u < U; ++u) BIGOPS_UNROLL
      for (int m = 0; m < MR; ++m) BIGOPS_UNROLL
      for (int v = 0; v < NV; ++v) acc[u][m][v] = D::nothing();
      typename D::Zero z[NV];
      BIGOPS_UNROLL
      for (int v = 0; v < NV; ++v)
        z[v] = D::zero(zero == nullptr ? nullptr : zero + v * kWeightTile);
      for (; k < end; ++k) {
        typename Q::I line[NV];
        BIGOPS_UNROLL
        for (int v = 0; v < NV; ++v) {
          const uint8_t* at = w + v * wide + k * kLineBytes;
          if (MR > 2) __builtin_prefetch(at + kAhead);
          line[v] = Q::iload(at);
        }
        const uint8_t* words = x + k * (D::steps * 4);
        D::each_step([&](auto step) __attribute__((always_inline)) {
          constexpr int s = decltype(step)::value;
          typename D::W wv[NV];
          BIGOPS_UNROLL
          for (int v = 0; v < NV; ++v) wv[v] = decode.template operand<s>(line[v], z[v]);
          BIGOPS_UNROLL
          for (int m = 0; m < MR; ++m) {
            const auto xv = D::word(words + m * stride + s * 4);
            BIGOPS_UNROLL
            for (int v = 0; v < NV; ++v) acc[s % U][m][v] = D::mac(acc[s % U][m][v], xv, wv[v]);
          }
        });
      }
      BIGOPS_UNROLL
      for (int v = 0; v < NV; ++v) {
        const auto by = Q::fload(scale + v * kWeightTile);
        BIGOPS_UNROLL
        for (int m = 0; m < MR; ++m) {
          auto sum = acc[0][m][v];
          BIGOPS_UNROLL
          for (int u = 1; u < U; ++u) sum = D::add(sum, acc[u][m][v]);
          total[m][v] = Q::fma(D::to_float(sum), by, total[m][v]);
        }
      }
      if (k == group_end) {
        group_end += t.group_lines;
        scale += t.stride;
        if (zero != nullptr) zero += t.stride;
      }
    }
    if (k == t.lines) break;
    ++done;
    const int64_t first = row * t.out_stride + tile * kWeightTile;
    BIGOPS_UNROLL
    for (int m = 0; m < MR; ++m) BIGOPS_UNROLL
    for (int v = 0; v < NV; ++v) {
      float* out = static_cast<float*>(t.out) + first + m * t.out_stride + v * kWeightTile;
      float* totals = t.totals + first + m * t.out_stride + v * kWeightTile;
      if (done % kTotals != 1) total[m][v] = Q::fadd(total[m][v], Q::fload(out));
      if (done % kTotals == 0 && done > kTotals)
        total[m][v] = Q::fadd(total[m][v], Q::fload(totals));
      Q::fstore(done % kTotals == 0 ? totals : out, total[m][v]);
      total[m][v] = Q::fzero();
    }
  }
  const int64_t first = row * t.out_stride + tile * kWeightTile;
  BIGOPS_UNROLL
  for (int m = 0; m < MR; ++m) BIGOPS_UNROLL
  for (int v = 0; v < NV; ++v) {
    float* out = static_cast<float*>(t.out) + first + m * t.out_stride + v * kWeightTile;
    auto y = total[m][v];
    if (done % kTotals != 0) y = Q::fadd(y, Q::fload(out));
    if (done >= kTotals)
      y = Q::fadd(y, Q::fload(t.totals + first + m * t.out_stride + v * kWeightTile));
    if (D::integer) {  // x = x_scale (u - x_zero)
      const auto sums = Q::fload(t.row_sum + (tile + v) * kWeightTile);
      y = Q::fsub(y, Q::fmul(Q::fset1(static_cast<float>(t.x_zero[row + m])), sums));
      y = Q::fmul(y, Q::fset1(t.x_scale[row + m]));
    }
    Q::fstore(out, y);
  }
}

template <int N>
struct Step {
  static constexpr int value = N;
};

template <class Q>
struct FloatSums {
  using Sum = typename Q::F;
  using W = typename Q::F;
  static constexpr bool integer = false;
  static Sum nothing() { return Q::fzero(); }
  static Sum add(Sum a, Sum b) { return Q::fadd(a, b); }
  static Sum to_float(Sum a) { return a; }
  static Sum word(const uint8_t* p) {
    float v;
    memcpy(&v, p, 4);
    return Q::fset1(v);
  }
  static Sum mac(Sum acc, Sum x, W w) { return Q::fma(x, w, acc); }
};

template <class Q, bool kZero>
struct NibblesToFloat : FloatSums<Q> {
  using F = typename Q::F;
  using Zero = F;
  static constexpr int steps = 8;
  F table = Q::table();
  static F zero(const int8_t* p) { return kZero ? Q::to_float(Q::iload_s8(p)) : Q::fzero(); }
  template <int s>
  BIGOPS_INLINE F operand(typename Q::I line, F zero) const {
    const F q = Q::template nibble_column<s>(line, table);
    return kZero ? Q::fsub(q, zero) : q;
  }
  template <class G>
  static BIGOPS_INLINE void each_step(const G& g) {
    g(Step<0>());
    g(Step<1>());
    g(Step<2>());
    g(Step<3>());
    g(Step<4>());
    g(Step<5>());
    g(Step<6>());
    g(Step<7>());
  }
};

template <class Q, bool kZero>
struct BytesToFloat : FloatSums<Q> {
  using F = typename Q::F;
  using Zero = F;
  static constexpr int steps = 4;
  static F zero(const int8_t* p) { return kZero ? Q::to_float(Q::iload_s8(p)) : Q::fzero(); }
  template <int s>
  BIGOPS_INLINE F operand(typename Q::I line, F zero) const {
    const F q = Q::template byte_column<s>(line);
    return kZero ? Q::fsub(q, zero) : q;
  }
  template <class G>
  static BIGOPS_INLINE void each_step(const G& g) {
    g(Step<0>());
    g(Step<1>());
    g(Step<2>());
    g(Step<3>());
  }
};

template <class Q>
struct NibblesToBytes {
  using Sum = typename Q::I;
  using W = typename Q::W;
  using Zero = typename Q::I;
  static constexpr bool integer = true;
  static constexpr int steps = 2;
  static Sum nothing() { return Q::izero(); }
  static Sum add(Sum a, Sum b) { return Q::iadd(a, b); }
  static typename Q::F to_float(Sum a) { return Q::to_float(a); }
  static typename Q::X word(const uint8_t* p) { return Q::word(p); }
  static Sum mac(Sum acc, typename Q::X x, W w) { return Q::dot(acc, x, w); }
  static Zero zero(const int8_t* p) {  // a nibble holds q + 8
    const auto eight = Q::iset1(8);
    return Q::spread(p == nullptr ? eight : Q::iadd(Q::iload_s8(p), eight));
  }
  template <int s>
  BIGOPS_INLINE W operand(typename Q::I line, Zero zero) const {
    return Q::bytes(Q::template nibbles<s>(line, zero));
  }
  template <class G>
  static BIGOPS_INLINE void each_step(const G& g) {
    g(Step<0>());
    g(Step<1>());
  }
};

template <class Q, class D>
struct Groups {
  static constexpr int rows = Q::total_rows, tiles = Q::total_tiles;
  static constexpr bool parts = false;
  template <int MR, int NV>
  static void block(const QuantizedTask& t, int64_t tile, int64_t row) {
    // as many sums as cover the latency (6 cycles for vdpbf16ps); a step has one of them
    constexpr int want = MR * NV == 1 ? 4 : MR * NV < 6 ? 2 : 1;
    group_block<Q, D, MR, NV, (want < D::steps ? want : D::steps)>(t, tile, row);
  }
};

// --- blocks of rows and tiles ------------------------------------------------------------------

template <class B, int MR, int NV, bool kFits = true>
struct Pick {
  static void run(int rows, const QuantizedTask& t, int64_t tile, int64_t row) {
    if (rows == MR)
      B::template block<MR, NV>(t, tile, row);
    else
      Pick<B, MR - 1, NV, (MR > 1)>::run(rows, t, tile, row);
  }
};
template <class B, int MR, int NV>
struct Pick<B, MR, NV, false> {
  static void run(int, const QuantizedTask&, int64_t, int64_t) {}
};

// The same for one part of K.
template <class B, int MR, int NV, int A, bool kFits = true>
struct PickPart {
  static void run(int rows, const QuantizedTask& t, int64_t tile, int64_t row,
                  const LinePart& part) {
    if (rows == MR)
      B::template part<MR, NV, A>(t, tile, row, part);
    else
      PickPart<B, MR - 1, NV, A, (MR > 1)>::run(rows, t, tile, row, part);
  }
};
template <class B, int MR, int NV, int A>
struct PickPart<B, MR, NV, A, false> {
  static void run(int, const QuantizedTask&, int64_t, int64_t, const LinePart&) {}
};

template <int MR, int NV>
struct Shape {
  static constexpr int rows = MR, tiles = NV;
};

// All rows of x against NV tiles, in blocks of at most MR rows of nearly the same size:
// f(rows, row, number of the block).
template <int MR, class F>
BIGOPS_INLINE void each_block(int64_t rows, const F& f) {
  const int64_t blocks = (rows + MR - 1) / MR;
  int64_t row = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t take = (rows - row + blocks - i - 1) / (blocks - i);
    f(static_cast<int>(take), row, i);
    row += take;
  }
}

template <class B, int MR, int NV>
void all_rows(const QuantizedTask& t, int64_t tile) {
  each_block<MR>(t.rows,
                 [&](int take, int64_t row, int64_t) { Pick<B, MR, NV>::run(take, t, tile, row); });
}

template <class B, int MR, int NV, int A>
void all_rows_in_parts(const QuantizedTask& t, int64_t tile) {
  const uint8_t* values = t.values + tile * t.tile_stride;
  for (int64_t line = 0; line == 0 || line < t.lines; line += kPartLines) {
    const int64_t left = t.lines - line;
    const bool last = left <= kPartLines;
    const uint8_t* next =
        last ? values + NV * t.tile_stride : values + (line + kPartLines) * kLineBytes;
    each_block<MR>(t.rows, [&](int take, int64_t row, int64_t i) {
      const uint8_t* ahead = next + i * A % NV * t.tile_stride;
      PickPart<B, MR, NV, A>::run(take, t, tile, row, {line, last ? left : kPartLines, ahead});
    });
  }
}

// One or two rows only wait for memory, and several streams of lines are read faster than one: 25
// against 17 GB/s a core (Zen 4). More rows compute: as many sums as fit the registers.
template <class Q, class B>
void product(const QuantizedTask& t) {
  int64_t tile = 0;
  const auto take = [&](auto shape) {
    constexpr int MR = decltype(shape)::rows, NV = decltype(shape)::tiles;
    for (; tile + NV <= t.tiles; tile += NV) {
      if constexpr (B::parts && MR == B::rows && NV == B::tiles) {
        const int64_t blocks = (t.rows + MR - 1) / MR;
        if (!t.from_memory || blocks == 1)  // one block goes no slower than the stream
          all_rows<B, MR, NV>(t, tile);
        else if (blocks < NV)
          all_rows_in_parts<B, MR, NV, (NV + 1) / 2>(t, tile);
        else
          all_rows_in_parts<B, MR, NV, 1>(t, tile);
      } else {
        all_rows<B, MR, NV>(t, tile);
      }
    }
  };
  if (t.rows == 1)
    take(Shape<1, Q::one_row_tiles>());
  else if (t.rows == 2)
    take(Shape<2, Q::two_row_tiles>());
  else
    take(Shape<B::rows, B::tiles>());
  take(Shape<Q::tail_rows, 1>());
}

template <class Q, template <class, bool> class D>
void group_product(const QuantizedTask& t) {
  if (t.zero_point != nullptr)
    product<Q, Groups<Q, D<Q, true>>>(t);
  else
    product<Q, Groups<Q, D<Q, false>>>(t);
}

}  // namespace
}  // namespace bigops

#include "cpu/simd/quantized_gradient.inl"

namespace bigops {
namespace {

// --- activations -------------------------------------------------------------------------------

template <class L>
void interleave(uint8_t* q, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    uint8_t to[8];
    for (int j = 0; j < 8; ++j) to[j] = q[i + j % 2 * 4 + j / 2];
    memcpy(q + i, to, 8);
  }
}

template <class L>
int32_t sum(const uint8_t* q, int64_t n) {
  int32_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += q[i];
  return total;
}

template <class Q>
constexpr IntegerProducts integer_products() {
  return {product<Q, W8A8<Q>>, product<Q, Groups<Q, NibblesToBytes<Q>>>};
}

template <class Q>
constexpr QuantizedKernels quantized_table() {
  using L = typename Q::L;
  return {integer_products<Q>(),
          {group_product<Q, BytesToFloat>, group_product<Q, NibblesToFloat>},
          interleave<L>,
          sum<L>,
          decode<Q, BytesToFloat>,
          decode<Q, NibblesToFloat>,
          float_grad<L>};
}

}  // namespace
}  // namespace bigops
