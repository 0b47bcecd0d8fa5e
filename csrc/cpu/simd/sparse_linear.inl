// Products with 1x4 blocks in panels (layout: bigops/ops/sparse_linear.py). The panel of x stays
// in the L1 cache while weight rows stream past; a lane is a row of x.
// Include after a lanes header and compressed.h. Internal linkage throughout.

namespace bigops {
namespace {

// U blocks at a time, each with sums of its own: one chain of additions would wait for itself.
template <class L, int VR, int U>
void sparse_s8_of(const SparseTask& t) {
  constexpr int W = L::width, B = 4 * W;
  constexpr int64_t lanes = VR * W;
  const int8_t* values = static_cast<const int8_t*>(t.values);
  const uint8_t* x = static_cast<const uint8_t*>(t.x);
  int32_t* out = static_cast<int32_t*>(t.acc);
  const auto ones = L::x_of(L::iset1(0x01010101));
  for (int64_t r = 0; r < t.n; ++r, out += lanes) {
    const int64_t begin = t.ptr[r], end = t.ptr[r + 1];
    typename L::ireg acc[U][VR];
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < VR; ++v)
        acc[u][v] = u == 0 && !t.first ? L::iload(out + v * W) : L::izero();
    int64_t i = begin;
    for (; i + U <= end; i += U)
      for (int u = 0; u < U; ++u) {
        const auto w = broadcast4<L>(values + 4 * (i + u));
        const uint8_t* at = x + t.index[i + u] * (4 * lanes);
        for (int v = 0; v < VR; ++v)
          acc[u][v] = L::dot(acc[u][v], L::x_of(L::iload(at + v * W * 4)), w);
      }
    for (; i < end; ++i) {
      const auto w = broadcast4<L>(values + 4 * i);
      const uint8_t* at = x + t.index[i] * (4 * lanes);
      for (int v = 0; v < VR; ++v)
        acc[0][v] = L::dot(acc[0][v], L::x_of(L::iload(at + v * W * 4)), w);
    }
    for (int v = 0; v < VR; ++v) {
      for (int u = 1; u < U; ++u) acc[0][v] = L::iadd(acc[0][v], acc[u][v]);
      L::istore(out + v * W, acc[0][v]);
    }
    if (t.sums != nullptr) {  // W blocks a step: a sixteenth of the work above
      auto sum = t.first ? L::izero() : L::iload(t.sums + r * W);
      const int8_t *at = values + 4 * begin, *stop = values + 4 * end;
      for (; at + B <= stop; at += B) sum = L::dot(sum, ones, L::w_of(L::iload(at)));
      if (at < stop)
        sum = L::dot(sum, ones, L::w_of(L::iload_bytes(at, static_cast<int>(stop - at))));
      L::istore(t.sums + r * W, sum);
    }
  }
}

template <class L>
void sparse_s8(const SparseTask& t) {
  if (t.vectors == 1)
    sparse_s8_of<L, 1, 4>(t);
  else if (t.vectors == 2)
    sparse_s8_of<L, 2, 2>(t);
  else if (t.vectors == 3 && L::max_vectors > 2)
    sparse_s8_of < L, L::max_vectors<3 ? 2 : 3, 2>(t);
  else
    sparse_s8_of<L, L::max_vectors, 2>(t);
}

// acc += one block: 4 columns, VR vectors of rows of x.
template <class L, int VR>
inline __attribute__((always_inline)) void float_block(typename L::V::reg (&acc)[VR],
                                                       const float* values, const float* x) {
  using V = typename L::V;
  constexpr int W = L::width;
  for (int c = 0; c < 4; ++c) {
    const auto w = V::set1(values[c]);
    for (int v = 0; v < VR; ++v) acc[v] = V::fma(w, V::load(x + (c * VR + v) * W), acc[v]);
  }
}

template <class L, int VR, int U>
void sparse_f32_of(const SparseTask& t) {
  using V = typename L::V;
  constexpr int W = L::width;
  constexpr int64_t lanes = VR * W;
  const float* values = static_cast<const float*>(t.values);
  const float* x = static_cast<const float*>(t.x);
  float* out = static_cast<float*>(t.acc);
  for (int64_t r = 0; r < t.n; ++r, out += lanes) {
    const int64_t begin = t.ptr[r], end = t.ptr[r + 1];
    typename V::reg acc[U][VR];
    for (int u = 0; u < U; ++u)
      for (int v = 0; v < VR; ++v)
        acc[u][v] = u == 0 && !t.first ? V::load(out + v * W) : V::zero();
    int64_t i = begin;
    for (; i + U <= end; i += U)
      for (int u = 0; u < U; ++u)
        float_block<L, VR>(acc[u], values + 4 * (i + u), x + t.index[i + u] * (4 * lanes));
    for (; i < end; ++i) float_block<L, VR>(acc[0], values + 4 * i, x + t.index[i] * (4 * lanes));
    for (int v = 0; v < VR; ++v) {
      for (int u = 1; u < U; ++u) acc[0][v] = V::add(acc[0][v], acc[u][v]);
      V::store(out + v * W, acc[0][v]);
    }
  }
}

template <class L>
void sparse_f32(const SparseTask& t) {
  if (t.vectors == 1)
    sparse_f32_of<L, 1, 4>(t);
  else if (t.vectors == 2)
    sparse_f32_of<L, 2, 4>(t);
  else if (t.vectors == 3 && L::max_vectors > 2)
    sparse_f32_of < L, L::max_vectors<3 ? 2 : 3, 2>(t);
  else
    sparse_f32_of<L, L::max_vectors, 2>(t);
}

// The transposed product, one vector of rows of x: each block adds to its 4 columns.
template <class L, class Value>
void sparse_grad(const SparseGradTask& t) {
  using V = typename L::V;
  constexpr int W = L::width;
  const Value* values = static_cast<const Value*>(t.values);
  for (int64_t r = 0; r < t.n; ++r) {
    const auto g = V::load(t.grad + r * W);
    for (int64_t i = t.ptr[r]; i < t.ptr[r + 1]; ++i) {
      float* at = t.x_grad + t.index[i] * (4 * W);
      for (int c = 0; c < 4; ++c)
        V::store(at + c * W,
                 V::fma(V::set1(static_cast<float>(values[4 * i + c])), g, V::load(at + c * W)));
    }
  }
}

}  // namespace
}  // namespace bigops
