// Products with a sparse weight in slices (layout: bigops/formats/sparse_layout.py).
// Include after a lanes header and sparse_linear.h. Internal linkage throughout.

#include "cpu/simd/sparse_words.inl"

namespace bigops {
namespace {

// Bytes of words that are asked for ahead, since the processor stops prefetching at each page
// (4096 x 4096 int8 from memory, 16 rows: 445 to 379 us at 80%, 308 to 233 us at 90%).
constexpr int64_t kAhead = 2048;

// Row U of one step: sum[U] += its word * x at its index.
template <class W, int G, int VR, int U>
inline __attribute__((always_inline)) void columns_row(const typename W::L::four& words,
                                                       uint32_t indices, const char* x,
                                                       typename W::x (&xv)[VR],
                                                       typename W::acc (*sum)[VR]) {
  using L = typename W::L;
  if (U % G == 0) {
    const int64_t index = G == 1 ? indices >> (U % 4 * 8) & 255 : indices;
    const char* from = x + index * (int64_t(VR) * L::width * 4);
#pragma GCC unroll 4
    for (int v = 0; v < VR; ++v) xv[v] = W::load_x(from + v * L::width * 4);
  }
  const auto wv = W::pick(words.template word<U % 4>());
#pragma GCC unroll 4
  for (int v = 0; v < VR; ++v) sum[U][v] = W::mac(sum[U][v], xv[v], wv);
}

// Rows U .. R - 1 of one step.
template <class W, int G, int VR, int R, int U = 0>
inline __attribute__((always_inline)) void columns_step(const char* w, const uint8_t* index,
                                                        const char* x, typename W::x (&xv)[VR],
                                                        typename W::acc (*sum)[VR]) {
  if constexpr (U < R) {
    const typename W::L::four words(w + 4 * U);
    uint32_t indices = index[U / G];
    if (G == 1) memcpy(&indices, index + U, 4);
    columns_row<W, G, VR, U>(words, indices, x, xv, sum);
    columns_row<W, G, VR, U + 1>(words, indices, x, xv, sum);
    columns_row<W, G, VR, U + 2>(words, indices, x, xv, sum);
    columns_row<W, G, VR, U + 3>(words, indices, x, xv, sum);
    columns_step<W, G, VR, R, U + 4>(w, index, x, xv, sum);
  }
}

// Columns form: a lane is a row of x, the panel of x stays in the L1 cache. R rows of W at a time:
// all rows of a slice have the same number of steps, so the loop's end is guessed wrong once in R
// rows and not once a row, and R * VR chains of additions hide the latency of each. Loads are what
// limits it (2 vectors a cycle on Zen 4 and 5), so words and indices are loaded four at a time.
// Float sums of a panel start at zero and are added to the chunk's: one sum along all of K would
// lose a digit at some thousands of columns.
template <class W, int G, int VR, int R>
void sparse_columns_of(const SparseTask& t) {
  using L = typename W::L;
  constexpr int64_t lanes = int64_t(VR) * L::width;
  constexpr int kIndices = 16 / G;  // of one step
  static_assert(R % 4 == 0, "words are loaded four at a time");
  const char* x = static_cast<const char*>(t.x);
  int32_t* out = static_cast<int32_t*>(t.acc);
  for (int64_t s = 0; s < t.slices; ++s) {
    const int64_t steps = t.ptr[s + 1] - t.ptr[s];
    if (steps == 0 && !t.fresh) continue;
    const uint8_t* rows = t.rows + s * kIndices;
    for (int i = 0; i < 16; i += R) {
      const char* w = static_cast<const char*>(t.words) + (int64_t(t.ptr[s]) * 16 + i) * 4;
      const uint8_t* index = t.index + int64_t(t.ptr[s]) * kIndices + i / G;
      int32_t* at[R];
      typename W::acc sum[R][VR];
#pragma GCC unroll 16
      for (int u = 0; u < R; ++u) {
        at[u] = out + (int64_t(rows[(i + u) / G]) * G + (i + u) % G) * lanes;
        for (int v = 0; v < VR; ++v)
          sum[u][v] = W::exact && !t.fresh ? W::load_acc(at[u] + v * L::width) : W::zero_acc();
      }
      for (int64_t j = 0; j < steps; ++j, w += 64, index += kIndices) {
        if (i == 0) __builtin_prefetch(w + kAhead);
        typename W::x xv[VR];
        columns_step<W, G, VR, R>(w, index, x, xv, sum);
      }
#pragma GCC unroll 16
      for (int u = 0; u < R; ++u)
        for (int v = 0; v < VR; ++v) {
          if constexpr (!W::exact)
            if (!t.fresh) sum[u][v] = W::V::add(sum[u][v], W::load_acc(at[u] + v * L::width));
          W::store_acc(at[u] + v * L::width, sum[u][v]);
        }
    }
  }
}

template <class W, int G>
void sparse_columns(const SparseTask& t) {
  using L = typename W::L;
  constexpr int R = L::sparse_sums;  // sums in registers: rows times vectors
  constexpr int most = L::max_vectors;
  if (t.vectors == 1)
    sparse_columns_of<W, G, 1, R>(t);
  else if (t.vectors == 2)
    sparse_columns_of<W, G, 2, R / 2>(t);
  else if (t.vectors == 3 && most > 2)
    sparse_columns_of < W, G, most<3 ? most : 3, R / most>(t);
  else
    sparse_columns_of<W, G, most, R / most>(t);
}

// Rows form, for few rows of x: a lane is a row of W, and the words of x are looked up in the
// panel, which fills 4 registers of AVX-512. Nothing is padded to a tile of x.
template <class W, int G, int M>
void sparse_rows_of(const SparseTask& t) {
  using L = typename W::L;
  constexpr int V = 16 / L::width;  // vectors of a slice
  constexpr int kIndices = 16 / G;
  typename L::template Table<G> table[M];
  for (int m = 0; m < M; ++m) table[m].load(static_cast<const char*>(t.x) + m * t.x_stride);
  for (int64_t s = 0; s < t.slices; ++s) {
    const int64_t begin = t.ptr[s], end = t.ptr[s + 1];
    if (begin == end) continue;
    typename W::acc sum[M][V];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) sum[m][v] = W::zero_acc();
    const char* w = static_cast<const char*>(t.words) + begin * 64;
    const uint8_t* index = t.index + begin * kIndices;
    for (int64_t j = begin; j < end; ++j, w += 64, index += kIndices) {
      __builtin_prefetch(w + kAhead);
      const auto where = L::template Table<G>::place(index);
      for (int v = 0; v < V; ++v) {
        const auto wv = W::load_w(w + v * L::width * 4);
        for (int m = 0; m < M; ++m)
          sum[m][v] = W::mac(sum[m][v], W::x_of(table[m].find(where, v)), wv);
      }
    }
    const uint8_t* rows = t.rows + s * kIndices;
    for (int m = 0; m < M; ++m) {
      typename W::scalar part[16];
      for (int v = 0; v < V; ++v)
        W::store_acc(reinterpret_cast<int32_t*>(part + v * L::width), sum[m][v]);
      typename W::scalar* out = static_cast<typename W::scalar*>(t.acc) + m * t.acc_stride;
      for (int i = 0; i < 16; ++i) {
        typename W::scalar& to = out[int64_t(rows[i / G]) * G + i % G];
        to = W::add_scalar(to, part[i]);
      }
    }
  }
}

template <class W, int G>
void sparse_rows(const SparseTask& t) {
  if (t.m == 4)
    sparse_rows_of<W, G, 4>(t);
  else if (t.m == 3)
    sparse_rows_of<W, G, 3>(t);
  else if (t.m == 2)
    sparse_rows_of<W, G, 2>(t);
  else
    sparse_rows_of<W, G, 1>(t);
}

// The sampled product: rows i .. i + 3 of a slice at a time, since their 4 sums of one step lie
// side by side.
template <class W, int G, int VR>
void sparse_sample_of(const SampleTask& t) {
  using L = typename W::L;
  using V = typename L::V;
  using Rows = typename W::rows;
  constexpr int kIndices = 16 / G, C = W::columns;
  constexpr int64_t lanes = int64_t(VR) * L::width;
  float* out = t.out;
  for (int64_t s = 0; s < t.slices; ++s) {
    const int64_t steps = t.ptr[s + 1] - t.ptr[s];
    const uint8_t* rows = t.rows + s * kIndices;
    for (int i = 0; i < 16; i += 4) {
      const uint8_t* index = t.index + int64_t(t.ptr[s]) * kIndices + i / G;
      typename Rows::reg g[4][VR];
      for (int u = 0; u < 4; ++u)
        for (int v = 0; v < VR; ++v)
          g[u][v] = Rows::load(t.grad + (int64_t(rows[(i + u) / G]) * G + (i + u) % G) * lanes +
                               v * L::width);
      float* to = out + i * C;
      for (int64_t j = 0; j < steps; ++j, to += 16 * C, index += kIndices)
        for (int c = 0; c < C; ++c) {
          typename V::reg sum[4];
          for (int u = 0; u < 4; ++u) {
            const int32_t* x = t.x + (int64_t(index[G == 1 ? u : 0]) * C + c) * lanes;
            sum[u] = V::zero();
            for (int v = 0; v < VR; ++v)
              sum[u] = Rows::mac(sum[u], g[u][v], Rows::load(x + v * L::width));
          }
          float four[4];
          L::reduce4(sum, four);
          for (int u = 0; u < 4; ++u) to[u * C + c] += four[u];
        }
    }
    out += steps * 16 * C;
  }
}

// Vectors of rows of x of the sampled product: 64 words of floats fill 16 KB with AVX-512. Pairs
// take 32 KB: summing lanes costs more than the cache does (4096 x 4096 at 80%, M = 256, one core:
// 12.0 ms against 14.5 with half of it).
template <class W>
constexpr int kGradVectors = W::rows::pairs                       ? W::L::max_vectors
                             : W::L::max_vectors / W::columns > 0 ? W::L::max_vectors / W::columns
                                                                  : 1;

template <class W, int G>
void sparse_sample(const SampleTask& t) {
  constexpr int most = kGradVectors<W>;
  if (t.vectors == 1)
    sparse_sample_of<W, G, 1>(t);
  else if (t.vectors == 2 || most < 3)
    sparse_sample_of < W, G, most<2 ? 1 : 2>(t);
  else if (t.vectors == 3)
    sparse_sample_of < W, G, most<3 ? 1 : 3>(t);
  else
    sparse_sample_of<W, G, most>(t);
}

template <class W>
constexpr SparseKernels sparse_table() {
  using L = typename W::L;
  return {L::width,
          L::max_vectors,
          kGradVectors<W>,
          W::rows::pairs,
          {sparse_rows<W, 1>, sparse_rows<W, 4>, sparse_rows<W, 16>},
          {sparse_columns<W, 1>, sparse_columns<W, 4>, sparse_columns<W, 16>},
          {sparse_sample<W, 1>, sparse_sample<W, 4>, sparse_sample<W, 16>}};
}

}  // namespace
}  // namespace bigops
