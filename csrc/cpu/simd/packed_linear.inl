// Products with a dense weight in panels (layout: packed_linear.h).
// Include after a lanes header. Internal linkage throughout.

#include "cpu/simd/packed_linear.h"

namespace bigops {
namespace {

// How a vector of words of W meets a word of x, and the bytes of one word.
template <class L_>
struct PackedF32 {
  using L = L_;
  using V = typename L::V;
  using operand = typename V::reg;
  static constexpr int bytes = 4;
  static operand load(const char* p) { return V::load(reinterpret_cast<const float*>(p)); }
  static operand word(const char* p) {
    float v;
    memcpy(&v, p, 4);
    return V::set1(v);
  }
  static typename V::reg mac(typename V::reg sum, operand x, operand w) {
    return V::fma(x, w, sum);
  }
};

template <class L>
struct PackedF16 : PackedF32<L> {
  using V = typename L::V;
  static constexpr int bytes = 2;
  static typename V::reg load(const char* p) { return V::load(reinterpret_cast<const f16*>(p)); }
};

template <class L_>
struct PackedBf16 {
  using L = L_;
  using V = typename L::V;
  using operand = typename L::ireg;
  static constexpr int bytes = 4;
  static operand load(const char* p) { return L::iload(p); }
  static operand word(const char* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return L::iset1(v);
  }
  static typename V::reg mac(typename V::reg sum, operand x, operand w) {
    return L::dot_bf16(sum, x, w);
  }
};

// MR rows of x by NV vectors of the panel, U independent sums of each. They start at zero and are
// added to `out` at the end: one sum along all of K would lose a digit at some thousands of
// columns. With every word, A lines of `ahead` are asked for.
template <class P, int MR, int NV, int U, int A>
inline __attribute__((always_inline)) void packed_block(const PackedTask& t, int64_t row,
                                                        int64_t column, const char* ahead) {
  using L = typename P::L;
  using V = typename L::V;
  constexpr int64_t kWord = kPackedColumns * P::bytes;
  typename V::reg sum[U][MR][NV];
  const char* w = static_cast<const char*>(t.panel) + column * P::bytes;
  const char* x = static_cast<const char*>(t.x) + row * t.x_stride;
  float* out = t.out + row * kPackedColumns + column;
  const int64_t stride = t.x_stride, words = t.words;
#pragma GCC unroll 2
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[u][m][v] = V::zero();
  int64_t k = 0;
  for (; k + U <= words; k += U) {
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      typename P::operand wv[NV];
#pragma GCC unroll 4
      for (int a = 0; a < A; ++a) __builtin_prefetch(ahead + ((k + u) * A + a) * 64, 0, 2);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) wv[v] = P::load(w + (k + u) * kWord + v * L::width * P::bytes);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const auto xv = P::word(x + m * stride + (k + u) * 4);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[u][m][v] = P::mac(sum[u][m][v], xv, wv[v]);
      }
    }
  }
  if (U > 1 && k < words)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const auto wv = P::load(w + k * kWord + v * L::width * P::bytes);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m)
        sum[0][m][v] = P::mac(sum[0][m][v], P::word(x + m * stride + k * 4), wv);
    }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      auto total = sum[0][m][v];
      if (U > 1) total = V::add(total, sum[U - 1][m][v]);
      float* to = out + m * kPackedColumns + v * L::width;
      if (!t.first) total = V::add(total, V::load(to));
      V::store(to, total);
    }
}

// All rows for NV vectors of the panel: MR at a time, the rest in one smaller block.
template <class P, int MR, int NV, int A>
inline void packed_rows(const PackedTask& t, int64_t column, const char* ahead) {
  constexpr int U = NV == 1 ? 2 : 1;  // MR sums of one vector would wait for one another
  int64_t m = 0;
  for (; m + MR <= t.rows; m += MR, ahead += t.words * A * 64)
    packed_block<P, MR, NV, U, A>(t, m, column, ahead);
  switch (t.rows - m) {
    case 1: return packed_block<P, 1, NV, 2, A>(t, m, column, ahead);  // fma's latency would show
    case 2: return packed_block<P, 2, NV, 1, A>(t, m, column, ahead);
    case 3:
      if constexpr (MR > 3) packed_block<P, 3, NV, 1, A>(t, m, column, ahead);
      return;
    case 4:
      if constexpr (MR > 4) packed_block<P, 4, NV, 1, A>(t, m, column, ahead);
      return;
    case 5:
      if constexpr (MR > 5) packed_block<P, 5, NV, 1, A>(t, m, column, ahead);
      return;
    default: return;
  }
}

// The next block is asked for while this one is multiplied, evenly over the blocks of rows: the
// processor's own prefetcher waits until the stream goes on. One or two rows go no slower than it.
template <class P>
void packed(const PackedTask& t) {
  using L = typename P::L;
  constexpr int MR = L::packed_rows, NV = L::packed_vectors;
  constexpr int kLines = kPackedColumns * P::bytes / 64;  // of a word of the panel
  const char* ahead = static_cast<const char*>(t.panel) + t.words * kPackedColumns * P::bytes;
  const int64_t blocks = (t.rows + MR - 1) / MR;
  int64_t column = 0;
  for (; column < t.columns - (NV - 1) * L::width; column += NV * L::width) {
    if (column > 0 || t.rows <= 2)
      packed_rows<P, MR, NV, 0>(t, column, ahead);
    else if (blocks == 1)
      packed_rows<P, MR, NV, kLines>(t, column, ahead);
    else if (blocks < kLines)
      packed_rows<P, MR, NV, kLines / 2>(t, column, ahead);
    else
      packed_rows<P, MR, NV, 1>(t, column, ahead);
  }
  // the last panel's rest in one pass: a vector by itself would read x as often as NV of them
  const int64_t left = t.columns - column;
  if constexpr (NV > 3)
    if (left > 2 * L::width) return packed_rows<P, MR, 3, 0>(t, column, ahead);
  if constexpr (NV > 2)
    if (left > L::width) return packed_rows<P, MR, 2, 0>(t, column, ahead);
  if (left > 0) packed_rows<P, MR, 1, 0>(t, column, ahead);
}

template <class L>
constexpr PackedKernels packed_table() {
  return {packed<PackedF32<L>>, packed<PackedF16<L>>, packed<PackedBf16<L>>};
}

}  // namespace
}  // namespace bigops
