// The dense linear kernels, written once for every instruction set.
// Include after a vector header. Internal linkage throughout.
//
// Dot form: x [M, K] and W [N, K] both run along K, so nothing is packed and a weight that changes
// each step costs nothing extra. A tile of MR x NR sums stays in registers, a block of K columns of
// the x tile in L2, the matching block of NR weight rows in L1.

#include "cpu/simd/activation.inl"
#include "cpu/simd/fused_linear.h"

namespace bigops {
namespace {

// How elements are loaded and multiplied. P::step elements at a time, one V::reg of sums.
template <class V_, class T_>
struct Multiply {
  using V = V_;
  using T = T_;
  using in = typename V::reg;
  static constexpr int step = V::width;
  static in load(const T* p) { return V::load(p); }
  static in load_n(const T* p, int n) { return V::load_n(p, n); }
  static typename V::reg mac(typename V::reg sum, in a, in b) { return V::fma(a, b, sum); }
};

template <class P, int MR, int NR>
inline void dot_tile(const typename P::T* x, const typename P::T* w, int64_t ld, int64_t k,
                     typename P::V::acc* z, bool first) {
  using V = typename P::V;
  typename V::reg sum[MR][NR];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) sum[i][j] = V::zero();
  int64_t p = 0;
  for (; p + P::step <= k; p += P::step) {
    typename P::in b[NR];
    for (int j = 0; j < NR; ++j) b[j] = P::load(w + j * ld + p);
    for (int i = 0; i < MR; ++i) {
      const auto a = P::load(x + i * ld + p);
      for (int j = 0; j < NR; ++j) sum[i][j] = P::mac(sum[i][j], a, b[j]);
    }
  }
  if (p < k) {
    const int rest = static_cast<int>(k - p);
    typename P::in b[NR];
    for (int j = 0; j < NR; ++j) b[j] = P::load_n(w + j * ld + p, rest);
    for (int i = 0; i < MR; ++i) {
      const auto a = P::load_n(x + i * ld + p, rest);
      for (int j = 0; j < NR; ++j) sum[i][j] = P::mac(sum[i][j], a, b[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) {
      const auto s = V::reduce(sum[i][j]);
      z[i * kTileColumns + j] = first ? s : z[i * kTileColumns + j] + s;
    }
}

// NR columns of z for all rows of the tile.
template <class P, int MR, int NR>
inline void dot_rows(const typename P::T* x, const typename P::T* w, int64_t ld, int64_t k,
                     typename P::V::acc* z, int64_t rows, bool first) {
  int64_t m = 0;
  for (; m + MR <= rows; m += MR)
    dot_tile<P, MR, NR>(x + m * ld, w, ld, k, z + m * kTileColumns, first);
  if constexpr (MR > 2)
    for (; m + 2 <= rows; m += 2)
      dot_tile<P, 2, NR>(x + m * ld, w, ld, k, z + m * kTileColumns, first);
  for (; m < rows; ++m) dot_tile<P, 1, NR>(x + m * ld, w, ld, k, z + m * kTileColumns, first);
}

template <class P, int MR>
inline void dot_block(const typename P::T* x, const typename P::T* w, int64_t ld, int64_t k,
                      typename P::V::acc* z, int64_t rows, int64_t columns, bool first) {
  int64_t n = 0;
  if (rows == 1)  // four sums would wait for the latency of fma; eight do not
    for (; n + 8 <= columns; n += 8) dot_tile<P, 1, 8>(x, w + n * ld, ld, k, z + n, first);
  for (; n + 4 <= columns; n += 4) dot_rows<P, MR, 4>(x, w + n * ld, ld, k, z + n, rows, first);
  for (; n < columns; ++n) dot_rows<P, MR, 1>(x, w + n * ld, ld, k, z + n, rows, first);
}

// Where the epilogue of one row segment reads and writes; up is null unless gated.
template <class T, class Z>
struct RowSegment {
  const Z* z;
  const Z* up;
  const T* bias;
  const T* up_bias;
  const T* residual;
  T* preact;
  T* up_preact;
  T* y;
};

template <class V, class T, class Z>
inline void epilogue_step(const RowSegment<T, Z>& r, int64_t i, int n, int activation) {
  auto z = V::load_n(r.z + i, n);
  if (r.bias != nullptr) z = V::add(z, V::load_n(r.bias + i, n));
  if (r.preact != nullptr) V::store_n(r.preact + i, z, n);
  auto y = activate<V>(r.up != nullptr ? gate_activation(activation) : activation, z);
  if (r.up != nullptr) {
    auto u = V::load_n(r.up + i, n);
    if (r.up_bias != nullptr) u = V::add(u, V::load_n(r.up_bias + i, n));
    if (r.up_preact != nullptr) V::store_n(r.up_preact + i, u, n);
    y = V::mul(y, u);
  }
  if (r.residual != nullptr) y = V::add(y, V::load_n(r.residual + i, n));
  V::store_n(r.y + i, y, n);
}

template <class V, class T, class Z>
inline void epilogue_row(const RowSegment<T, Z>& r, int64_t n, int activation) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) epilogue_step<V>(r, i, V::width, activation);
  if (i < n) epilogue_step<V>(r, i, static_cast<int>(n - i), activation);
}

template <class T>
inline const T* at(const void* base, int64_t offset) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + offset;
}
template <class T>
inline T* at(void* base, int64_t offset) {
  return base == nullptr ? nullptr : static_cast<T*>(base) + offset;
}

template <class T, class Z>
inline RowSegment<T, Z> segment(const Z* z, const Z* up, const void* bias, const void* residual,
                                void* preact, void* y, int64_t m, int64_t n0, int64_t n) {
  const bool gated = up != nullptr;
  const int64_t width = gated ? 2 * n : n;
  return {z,
          up,
          at<T>(bias, n0),
          gated ? at<T>(bias, n + n0) : nullptr,
          at<T>(residual, m * n + n0),
          at<T>(preact, m * width + n0),
          gated ? at<T>(preact, m * width + n + n0) : nullptr,
          at<T>(y, m * n + n0)};
}

template <class P, int MR>
void linear(const LinearTask& t) {
  using V = typename P::V;
  using T = typename P::T;
  using Acc = typename V::acc;
  constexpr int64_t kBlock = 4096 / static_cast<int64_t>(sizeof(T));  // 256 KB of 64 rows of x
  alignas(64) Acc z[2][kTileRows * kTileColumns];
  const bool gated = is_gated(t.activation);
  const int64_t rows = t.m1 - t.m0, columns = t.n1 - t.n0;
  for (int half = 0; half < (gated ? 2 : 1); ++half) {
    const T* x = static_cast<const T*>(t.x) + t.m0 * t.k;
    const T* w = static_cast<const T*>(t.weight) + (half * t.n + t.n0) * t.k;
    if (t.k == 0) memset(z[half], 0, sizeof z[half]);
    for (int64_t k0 = 0; k0 < t.k; k0 += kBlock) {
      const int64_t k = t.k - k0 < kBlock ? t.k - k0 : kBlock;
      dot_block<P, MR>(x + k0, w + k0, t.k, k, z[half], rows, columns, k0 == 0);
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    const Acc* up = gated ? z[1] + m * kTileColumns : nullptr;
    epilogue_row<V>(segment<T>(z[0] + m * kTileColumns, up, t.bias, t.residual, t.preact, t.y,
                               t.m0 + m, t.n0, t.n),
                    columns, t.activation);
  }
}

template <class V, class T, class Z>
void epilogue_rows(const EpilogueTask& t) {
  const bool gated = is_gated(t.activation);
  const int64_t width = gated ? 2 * t.n : t.n;
  for (int64_t m = t.m0; m < t.m1; ++m) {
    const Z* z = static_cast<const Z*>(t.z) + m * width;
    epilogue_row<V>(
        segment<T>(z, gated ? z + t.n : nullptr, t.bias, t.residual, t.preact, t.y, m, 0, t.n), t.n,
        t.activation);
  }
}

template <class V, class T>
void epilogue(const EpilogueTask& t) {
  if (t.z_float)
    epilogue_rows<V, T, float>(t);
  else
    epilogue_rows<V, T, T>(t);
}

// gz = grad act'(z) and its column sums, kept in Acc until all rows are in: no atomics, and the
// same order whatever the number of threads.
template <class V, class T>
void backward(const BackwardTask& t) {
  using Acc = typename V::acc;
  constexpr int64_t kColumns = kGradColumns;
  const bool gated = is_gated(t.activation);
  const int inner = gated ? gate_activation(t.activation) : t.activation;
  const int64_t width = gated ? 2 * t.n : t.n;
  for (int64_t c0 = t.n0; c0 < t.n1; c0 += kColumns) {
    const int64_t columns = t.n1 - c0 < kColumns ? t.n1 - c0 : kColumns;
    alignas(64) Acc levels[kSumLevels][2][kColumns] = {};
    auto& sums = levels[0];
    const auto go_up = [&](int level) {
      for (int half = 0; half < (gated ? 2 : 1); ++half) {
        Acc *from = levels[level][half], *to = levels[level + 1][half];
        for (int64_t i = 0; i < columns; i += V::width) {  // the arrays are of whole vectors
          V::store(to + i, V::add(V::load(to + i), V::load(from + i)));
          V::store(from + i, V::zero());
        }
      }
    };
    for (int64_t m = 0; m < t.m; ++m) {
      const T* grad = static_cast<const T*>(t.grad) + m * t.n + c0;
      const T* z = at<T>(t.preact, m * width + c0);
      T* gz = at<T>(t.gz, m * width + c0);
      for (int64_t i = 0; i < columns; i += V::width) {
        const int64_t left = columns - i;
        const int n = left < V::width ? static_cast<int>(left) : V::width;
        const bool full = n == V::width;  // masks cost, and hold up the sums of the next row
        auto g = full ? V::load(grad + i) : V::load_n(grad + i, n);
        if (gated) {
          const auto gate = V::load_n(z + i, n);
          const auto up = V::load_n(z + t.n + i, n);
          const auto gu = V::mul(g, activate<V>(inner, gate));
          if (gz != nullptr) V::store_n(gz + t.n + i, gu, n);
          V::store_n(sums[1] + i, V::add(V::load_n(sums[1] + i, n), gu), n);
          g = V::mul(V::mul(g, up), activate_derivative<V>(inner, gate));
        } else if (z != nullptr) {
          const auto zv = full ? V::load(z + i) : V::load_n(z + i, n);
          g = V::mul(g, activate_derivative<V>(inner, zv));
        }
        if (full) {
          if (gz != nullptr) V::store(gz + i, g);
          V::store(sums[0] + i, V::add(V::load(sums[0] + i), g));
        } else {
          if (gz != nullptr) V::store_n(gz + i, g, n);
          V::store_n(sums[0] + i, V::add(V::load_n(sums[0] + i, n), g), n);
        }
      }
      if ((m + 1) % kSumRows == 0) go_up(0);
      if ((m + 1) % (kSumRows * kSumRows) == 0) go_up(1);
    }
    if (t.bias_grad == nullptr) continue;
    go_up(0);
    go_up(1);
    for (int half = 0; half < (gated ? 2 : 1); ++half) {
      T* out = static_cast<T*>(t.bias_grad) + half * t.n + c0;
      for (int64_t i = 0; i < columns; i += V::width) {
        const int64_t left = columns - i;
        const int n = left < V::width ? static_cast<int>(left) : V::width;
        V::store_n(out + i, V::load_n(levels[kSumLevels - 1][half] + i, n), n);
      }
    }
  }
}

}  // namespace
}  // namespace bigops
