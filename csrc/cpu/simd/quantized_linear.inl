// int8 products with a dense weight, and the product with its transpose.
// Include after a lanes header and compressed.h. Internal linkage throughout.

namespace bigops {
namespace {

template <class L>
inline typename L::wreg broadcast4(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return L::w_of(L::iset1(v));
}

// One step along K: R weight rows by MB rows of x; the sums of the weight rows where wanted.
template <class L, int R, int MB, bool kSums>
inline __attribute__((always_inline)) void dot_step(typename L::ireg (&acc)[R][MB],
                                                    typename L::ireg (&sum)[R],
                                                    const typename L::ireg (&weight)[R],
                                                    const uint8_t* x, int64_t stride) {
  typename L::wreg w[R];
  for (int r = 0; r < R; ++r) w[r] = L::w_of(weight[r]);
  for (int m = 0; m < MB; ++m) {
    const auto xv = L::x_of(L::iload(x + m * stride));
    for (int r = 0; r < R; ++r) acc[r][m] = L::dot(acc[r][m], xv, w[r]);
  }
  if (kSums) {
    const auto ones = L::x_of(L::iset1(0x01010101));
    for (int r = 0; r < R; ++r) sum[r] = L::dot(sum[r], ones, w[r]);
  }
}

// Few rows of x: both operands run along K, R weight rows by MB rows of x, one sum per lane.
template <class L, int MB, bool kSums>
void dot_block(const DenseTask& t, int64_t n0, int64_t m0) {
  constexpr int R = 4, B = 4 * L::width;
  const int8_t* w[R];
  typename L::ireg acc[R][MB], sum[R], weight[R];
  for (int r = 0; r < R; ++r) {  // rows past the end repeat the last one and are not stored
    w[r] = t.weight + (n0 + r < t.n ? n0 + r : t.n - 1) * t.weight_stride;
    sum[r] = L::izero();
    for (int m = 0; m < MB; ++m) acc[r][m] = L::izero();
  }
  const uint8_t* x = t.x + m0 * t.x_stride;
  const int64_t k = t.k, stride = t.x_stride;
  int64_t i = 0;
  for (; i + B <= k; i += B) {
    for (int r = 0; r < R; ++r) weight[r] = L::iload(w[r] + i);
    dot_step<L, R, MB, kSums>(acc, sum, weight, x + i, stride);
  }
  if (i < k) {  // x is padded, so a zero weight is enough
    for (int r = 0; r < R; ++r) weight[r] = L::iload_bytes(w[r] + i, static_cast<int>(k - i));
    dot_step<L, R, MB, kSums>(acc, sum, weight, x + i, stride);
  }
  int32_t total[R][MB], sums[R];  // all of them: a loop that may stop early keeps acc in memory
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < MB; ++m) total[r][m] = L::isum(acc[r][m]);
    sums[r] = kSums ? L::isum(sum[r]) : 0;
  }
  for (int r = 0; r < R && n0 + r < t.n; ++r) {
    for (int m = 0; m < MB; ++m) t.out[(m0 + m) * t.out_stride + n0 + r] = total[r][m];
    if (kSums) t.sums[n0 + r] = sums[r];
  }
}

template <class L, int MB>
void dot_rows(const DenseTask& t, int64_t n, int64_t m) {
  if (m == 0)
    dot_block<L, MB, true>(t, n, m);
  else
    dot_block<L, MB, false>(t, n, m);
}

template <class L>
void dense_dot(const DenseTask& t) {
  constexpr int MB = L::dot_rows;
  for (int64_t n = 0; n < t.n; n += 4) {
    int64_t m = 0;
    for (; m + MB <= t.m; m += MB) dot_rows<L, MB>(t, n, m);
    for (; m + 2 <= t.m; m += 2) dot_rows<L, 2>(t, n, m);
    if (m < t.m) dot_rows<L, 1>(t, n, m);
  }
}

// One group of 4 columns: R weight rows by VR vectors. A free function over named arrays: written
// as a lambda, gcc 12 stored every accumulator in every step.
template <class L, int R, int VR>
inline __attribute__((always_inline)) void dense_step(typename L::ireg (&acc)[R][VR],
                                                      const uint8_t* x, const int8_t* const (&w)[R],
                                                      int64_t at) {
  typename L::xreg xv[VR];
  for (int v = 0; v < VR; ++v) xv[v] = L::x_of(L::iload(x + v * L::width * 4));
  for (int r = 0; r < R; ++r) {
    const auto wv = broadcast4<L>(w[r] + at);
    for (int v = 0; v < VR; ++v) acc[r][v] = L::dot(acc[r][v], xv[v], wv);
  }
}

// Many rows of x: a lane is a row of x, dense_rows weight rows by VR vectors stay in registers.
template <class L, int VR>
void dense_columns_of(const DenseTask& t) {
  constexpr int R = L::dense_rows, W = L::width;
  constexpr int64_t lanes = VR * W;
  const int64_t whole = t.k / 4 * 4;
  for (int64_t n = 0; n < t.n; n += R) {
    const int8_t *w[R], *ends[R];
    int8_t tail[R][4] = {};
    typename L::ireg acc[R][VR];
    for (int r = 0; r < R; ++r) {  // rows past the end repeat the last one and are not used
      w[r] = t.weight + (n + r < t.n ? n + r : t.n - 1) * t.weight_stride;
      memcpy(tail[r], w[r] + whole, static_cast<size_t>(t.k - whole));
      ends[r] = tail[r];
      for (int v = 0; v < VR; ++v) acc[r][v] = L::izero();
    }
    const uint8_t* x = t.x;
    for (int64_t i = 0; i < whole; i += 4, x += lanes * 4) dense_step<L, R, VR>(acc, x, w, i);
    if (whole < t.k) dense_step<L, R, VR>(acc, x, ends, 0);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < VR; ++v) L::istore(t.out + (n + r) * lanes + v * W, acc[r][v]);
  }
}

template <class L>
void dense_columns(const DenseTask& t) {
  if (t.vectors == 1)
    dense_columns_of<L, 1>(t);
  else if (t.vectors == 2)
    dense_columns_of<L, 2>(t);
  else if (t.vectors == 3 && L::max_vectors > 2)
    dense_columns_of < L, L::max_vectors<3 ? 2 : 3>(t);
  else
    dense_columns_of<L, L::max_vectors>(t);
}

template <class L, int MR, bool kTail>
void dense_grad_of(const DenseGradTask& t) {
  using V = typename L::V;
  constexpr int KV = L::grad_vectors, W = L::width;
  typename V::reg acc[MR][KV];
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < KV; ++v) acc[m][v] = V::zero();
  for (int64_t n = 0; n < t.n; ++n) {
    const int8_t* at = t.weight + n * t.weight_stride;
    typename V::reg w[KV];
    for (int v = 0; v < KV; ++v) {
      const int64_t left = t.columns - v * W;
      if (!kTail)
        w[v] = L::load_s8(at + v * W);
      else
        w[v] = left > 0 ? L::load_s8(at + v * W, static_cast<int>(left < W ? left : W)) : V::zero();
    }
    for (int m = 0; m < MR; ++m) {
      const auto g = V::set1(t.grad[m * t.n + n]);
      for (int v = 0; v < KV; ++v) acc[m][v] = V::fma(g, w[v], acc[m][v]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < KV; ++v) V::store(t.out + (m * KV + v) * W, acc[m][v]);
}

template <class L, int MR>
void dense_grad_rows(const DenseGradTask& t) {
  if (t.columns == L::grad_vectors * L::width)
    dense_grad_of<L, MR, false>(t);
  else
    dense_grad_of<L, MR, true>(t);
}

template <class L>
void dense_grad(const DenseGradTask& t) {
  static_assert(kGradRows == 6, "one case per number of rows");
  switch (t.m) {
    case 1: return dense_grad_rows<L, 1>(t);
    case 2: return dense_grad_rows<L, 2>(t);
    case 3: return dense_grad_rows<L, 3>(t);
    case 4: return dense_grad_rows<L, 4>(t);
    case 5: return dense_grad_rows<L, 5>(t);
    default: return dense_grad_rows<L, 6>(t);
  }
}

}  // namespace
}  // namespace bigops
