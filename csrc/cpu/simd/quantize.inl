// What the compressed linear ops share: the activation quantiser, the epilogue and its gradient,
// the transpose. L: PortableLanes, Avx2Lanes, Avx512Lanes or VnniLanes.
// Include after a lanes header and compressed.h. Internal linkage throughout.

namespace bigops {
namespace {

template <class L>
inline typename L::wreg broadcast4(const void* p) {
  int32_t v;
  memcpy(&v, p, 4);
  return L::w_of(L::iset1(v));
}

// One row of x to u8, exactly as quantize_rows in bigops/ops/_quantize.py: every step in float,
// two true divisions, rounding half to even. `q` is written for k entries.
template <class L, class T>
void quantize(const void* xv, int64_t k, uint8_t* q, float* scale, int32_t* zero_point) {
  using V = typename L::V;
  constexpr int W = L::width;
  const T* x = static_cast<const T*>(xv);
  auto lo0 = V::zero(), hi0 = V::zero(), lo1 = V::zero(), hi1 = V::zero();
  auto bad = V::zero();  // x * 0 is NaN for NaN and inf, and stays so when summed
  int64_t i = 0;
  for (; i + 2 * W <= k; i += 2 * W) {
    const auto a = V::load(x + i), b = V::load(x + i + W);
    lo0 = V::min(lo0, a);
    hi0 = V::max(hi0, a);
    lo1 = V::min(lo1, b);
    hi1 = V::max(hi1, b);
    bad = V::fma(a, V::zero(), bad);
    bad = V::fma(b, V::zero(), bad);
  }
  for (; i < k; i += W) {  // missing lanes read as 0, which is inside every range
    const auto a = V::load_n(x + i, static_cast<int>(k - i < W ? k - i : W));
    lo0 = V::min(lo0, a);
    hi0 = V::max(hi0, a);
    bad = V::fma(a, V::zero(), bad);
  }
  float lows[W], highs[W];
  V::store(lows, V::min(lo0, lo1));
  V::store(highs, V::max(hi0, hi1));
  float lo = 0.0f, hi = 0.0f;
  for (int j = 0; j < W; ++j) {
    lo = lows[j] < lo ? lows[j] : lo;
    hi = highs[j] > hi ? highs[j] : hi;
  }
  if (!(V::reduce(bad) == 0.0f)) {
    memset(q, 0, static_cast<size_t>(k));
    *scale = __builtin_nanf("");
    *zero_point = 0;
    return;
  }
  constexpr float kTiny = 1.17549435e-38f;  // FLT_MIN
  float s = hi / 255.0f - lo / 255.0f;
  s = s > kTiny ? s : kTiny;
  const float inverse = 1.0f / s;
  float z = __builtin_rintf(-lo * inverse);
  z = z < 0.0f ? 0.0f : z > 255.0f ? 255.0f : z;
  *scale = s;
  *zero_point = static_cast<int32_t>(z);
  const auto vi = V::set1(inverse), vz = V::set1(z), top = V::set1(255.0f);
  for (i = 0; i < k; i += W) {
    const int n = static_cast<int>(k - i < W ? k - i : W);
    const auto a = n == W ? V::load(x + i) : V::load_n(x + i, n);
    const auto r = V::add(V::round(V::mul(a, vi)), vz);
    L::store_u8(q + i, V::min(V::max(r, V::zero()), top), n);
  }
}

template <class L, class T>
void widen(const void* xv, int64_t n, float* out) {
  using V = typename L::V;
  constexpr int W = L::width;
  const T* x = static_cast<const T*>(xv);
  int64_t i = 0;
  for (; i + W <= n; i += W) V::store(out + i, V::load(x + i));
  if (i < n)
    V::store_n(out + i, V::load_n(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

template <class L, class T, class O>
void finish_as(const FinishTask& t) {
  using V = typename L::V;
  constexpr int W = L::width;
  const T* bias = static_cast<const T*>(t.bias);
  const T* residual = static_cast<const T*>(t.residual);
  O* y = static_cast<O*>(t.y);
  for (int64_t m = t.m0; m < t.m1; ++m) {
    const char* tile = static_cast<const char*>(t.tile) + (m - t.m0) * t.stride * 4;
    for (int64_t n = t.n0; n < t.n1; n += W) {
      const int c = static_cast<int>(t.n1 - n < W ? t.n1 - n : W);
      const char* at = tile + (n - t.n0) * 4;
      auto z = V::zero();
      if (t.scale != nullptr) {
        const auto sums = L::iload_n(t.sums + (n - t.n0), c);
        const auto total = L::isub(L::iload_n(at, c), L::imul(L::iset1(t.zero_point[m]), sums));
        const auto scale = V::mul(V::set1(t.row_scale[m]), V::load_n(t.scale + n, c));
        z = V::mul(L::to_float(total), scale);
      } else {
        z = V::load_n(reinterpret_cast<const float*>(at), c);
      }
      if (bias != nullptr) z = V::add(z, V::load_n(bias + n, c));
      z = activate<V>(t.activation, z);
      if (residual != nullptr) z = V::add(z, V::load_n(residual + m * t.n + n, c));
      V::store_n(y + m * t.n + n, z, c);
    }
  }
}

template <class L, class T>
void finish(const FinishTask& t) {
  if (t.y_float)
    finish_as<L, T, float>(t);
  else
    finish_as<L, T, T>(t);
}

template <class L, class T>
void gradient(const GradTask& t) {
  using V = typename L::V;
  constexpr int W = L::width;
  const T* grad = static_cast<const T*>(t.grad);
  for (int64_t n = t.n0; n < t.n1; n += W) {
    const int c = static_cast<int>(t.n1 - n < W ? t.n1 - n : W);
    const auto scale = t.scale != nullptr ? V::load_n(t.scale + n, c) : V::set1(1.0f);
    auto sum = V::zero();
    for (int64_t m = 0; m < t.m; ++m) {
      auto g = V::load_n(grad + m * t.n + n, c);
      if (t.z != nullptr)
        g = V::mul(g, activate_derivative<V>(t.activation, V::load_n(t.z + m * t.n + n, c)));
      sum = V::add(sum, g);
      if (t.gz != nullptr) V::store_n(t.gz + m * t.n + n, V::mul(g, scale), c);
    }
    if (t.bias_grad != nullptr) V::store_n(static_cast<T*>(t.bias_grad) + n, sum, c);
  }
}

template <class L>
void transpose(const TransposeTask& t) {
  constexpr int W = L::width;
  const int32_t* src = static_cast<const int32_t*>(t.src);
  int32_t* dst = static_cast<int32_t*>(t.dst);
  for (int64_t r = 0; r < t.rows; r += W) {
    const int rows = static_cast<int>(t.rows - r < W ? t.rows - r : W);
    for (int64_t c = 0; c < t.columns; c += W) {
      const int columns = static_cast<int>(t.columns - c < W ? t.columns - c : W);
      typename L::ireg block[W];
      for (int i = 0; i < W; ++i)
        block[i] = i < rows ? L::iload_n(src + (r + i) * t.src_stride + c, columns) : L::izero();
      L::transpose(block);
      for (int j = 0; j < W; ++j)
        if (j < columns) L::istore_n(dst + (c + j) * t.dst_stride + r, block[j], rows);
    }
  }
}

template <class L>
int max_index(const uint8_t* index, int64_t n) {
  constexpr int B = 4 * L::width;
  auto top = L::izero();
  int64_t i = 0;
  for (; i + B <= n; i += B) top = L::max_u8(top, L::iload(index + i));
  uint8_t bytes[B];
  L::istore(bytes, top);
  int best = 0;
  for (int j = 0; j < B; ++j) best = bytes[j] > best ? bytes[j] : best;
  for (; i < n; ++i) best = index[i] > best ? index[i] : best;
  return best;
}

template <class L>
void reduce(const int32_t* partial, int64_t n, int32_t* sums) {
  for (int64_t r = 0; r < n; ++r) sums[r] = L::isum(L::iload(partial + r * L::width));
}

}  // namespace
}  // namespace bigops
