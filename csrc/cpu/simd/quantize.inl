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

constexpr float kTiny = 1.17549435e-38f;  // FLT_MIN

// One row of x to u8, exactly as act_quant in bigops/formats/quantize.py: every step in float,
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

// The largest magnitude of a row; NaN where the row holds NaN or inf.
template <class L, class T>
float magnitude(const T* x, int64_t k) {
  using V = typename L::V;
  constexpr int W = L::width;
  auto top = V::zero(), bad = V::zero();
  for (int64_t i = 0; i < k; i += W) {
    const auto a = V::load_n(x + i, static_cast<int>(k - i < W ? k - i : W));
    top = V::max(top, V::max(a, V::sub(V::zero(), a)));
    bad = V::fma(a, V::zero(), bad);  // x * 0 is NaN for NaN and inf
  }
  float tops[W], most = 0.0f;
  V::store(tops, top);
  for (int j = 0; j < W; ++j) most = tops[j] > most ? tops[j] : most;
  return V::reduce(bad) == 0.0f ? most : __builtin_nanf("");
}

template <class L, class T>
void round_row(const T* x, int64_t k, float inverse, float zero, float low, uint8_t* q) {
  using V = typename L::V;
  constexpr int W = L::width;
  const auto vi = V::set1(inverse), vz = V::set1(zero);
  const auto bottom = V::set1(low), top = V::set1(255.0f);
  for (int64_t i = 0; i < k; i += W) {
    const int n = static_cast<int>(k - i < W ? k - i : W);
    const auto r = V::add(V::round(V::mul(V::load_n(x + i, n), vi)), vz);
    L::store_u8(q + i, V::min(V::max(r, bottom), top), n);
  }
}

template <class L, class T>
void quantize_static(const void* xv, int64_t k, uint8_t* q, float x_scale, int32_t x_zero,
                     float* scale, int32_t* zero_point) {
  const T* x = static_cast<const T*>(xv);
  const float most = magnitude<L, T>(x, k);
  *zero_point = x_zero;
  *scale = most == most ? x_scale : most;
  if (most == most)
    round_row<L, T>(x, k, 1.0f / x_scale, static_cast<float>(x_zero), 0.0f, q);
  else
    memset(q, 0, static_cast<size_t>(k));
}

template <class L, class T>
void quantize_symmetric(const void* xv, int64_t k, uint8_t* q, float* scale, int32_t* zero_point) {
  const T* x = static_cast<const T*>(xv);
  const float most = magnitude<L, T>(x, k);
  *zero_point = 128;
  if (most == most) {
    *scale = most / 127.0f > kTiny ? most / 127.0f : kTiny;
    round_row<L, T>(x, k, 1.0f / *scale, 128.0f, 1.0f, q);
  } else {
    *scale = most;
    memset(q, 0, static_cast<size_t>(k));
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

// One vector of y: z from sums (or z itself), bias, activation, residual.
template <class L, bool kFull>
struct Finisher {
  using V = typename L::V;
  typename V::reg scale, bias;
  typename L::ireg sums;
  int c;                                    // columns of the vector
  mutable typename V::reg bad = V::zero();  // y * 0 summed: NaN once a y for u8 was NaN or inf

  template <class T>
  static typename V::reg get(const T* p, int c) {
    return kFull ? V::load(p) : V::load_n(p, c);
  }

  template <class T>
  void columns(const FinishTask& t, int64_t n, const T* b) {
    const int64_t left = t.n1 - n;
    c = static_cast<int>(left < L::width ? left : L::width);
    if (t.scale != nullptr) {
      scale = get(t.scale + n, c);
      sums = L::iload_n(t.sums + (n - t.n0), c);
    }
    if (b != nullptr) bias = get(b + n, c);
  }

  template <bool kPlain = false, class T, class O>
  void row(const FinishTask& t, int64_t m, int64_t n, typename L::ireg tile, bool has_bias,
           const T* residual, O* y) const {
    auto z = V::zero();
    if (t.scale != nullptr) {
      const auto total = L::isub(tile, L::imul(L::iset1(t.zero_point[m]), sums));
      z = V::mul(L::to_float(total), V::mul(V::set1(t.row_scale[m]), scale));
    } else {
      z = L::as_float(tile);
    }
    if (has_bias) z = V::add(z, bias);
    if (!kPlain) z = activate<V>(t.activation, z);
    if (residual != nullptr) z = V::add(z, get(residual + m * t.n + n, c));
    store(t, y + m * t.n + n, z);
  }

  template <class O>
  void store(const FinishTask&, O* y, typename V::reg z) const {
    if (kFull)
      V::store(y, z);
    else
      V::store_n(y, z, c);
  }

  // As round_row does it, so that a u8 result is what the next layer would make of a float one.
  void store(const FinishTask& t, uint8_t* y, typename V::reg z) const {
    bad = V::fma(z, V::zero(), bad);
    const auto r = V::add(V::round(V::mul(z, V::set1(t.y_inverse))), V::set1(t.y_zero));
    L::store_u8(y, V::min(V::max(r, V::zero()), V::set1(255.0f)), kFull ? L::width : c);
  }

  void report(const FinishTask& t, const uint8_t*) const {
    if (!(V::reduce(bad) == 0.0f)) __atomic_store_n(t.y_bad, 1, __ATOMIC_RELAXED);
  }
  template <class O>
  void report(const FinishTask&, const O*) const {}
};

// From a tile [m][stride], B vectors of a row one after the other. Without an activation (kPlain)
// they are unrolled, and all that is the same in every row stays in registers: `task` is copied,
// for a store of u8 might change it otherwise.
template <class L, bool kFull, int B, bool kPlain, class T, class O>
void finish_vectors(const FinishTask& task, int64_t n) {
  const FinishTask t = task;
  constexpr int W = L::width;
  const T* bias = static_cast<const T*>(t.bias);
  Finisher<L, kFull> f[B];
  for (int b = 0; b < B; ++b) f[b].columns(t, n + b * W, bias);
  const char* at = static_cast<const char*>(t.tile) + (n - t.n0) * 4;
  const auto vector = [&](int64_t m, int b) {
    f[b].template row<kPlain>(t, m, n + b * W,
                              kFull ? L::iload(at + b * W * 4) : L::iload_n(at + b * W * 4, f[b].c),
                              bias != nullptr, static_cast<const T*>(t.residual),
                              static_cast<O*>(t.y));
  };
  for (int64_t m = t.m0; m < t.m1; ++m, at += t.stride * 4) {
    if constexpr (kPlain) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) vector(m, b);
    } else {
      for (int b = 0; b < B; ++b) vector(m, b);
    }
  }
  for (int b = 0; b < B; ++b) f[b].report(t, static_cast<const O*>(t.y));
}

// From a tile [n][stride] whose lanes are rows of x: transposed in registers on the way. Rows of y
// lie N apart, often in one set of the caches, so B vectors of a row are written one after the
// other.
template <class L, bool kFull, int B, class T, class O>
void finish_block(const FinishTask& t, int64_t n) {
  constexpr int W = L::width, kAhead = 6;
  const T* bias = static_cast<const T*>(t.bias);
  Finisher<L, kFull> f[B];
  for (int b = 0; b < B; ++b) f[b].columns(t, n + b * W, bias);
  const char* tile = static_cast<const char*>(t.tile) + (n - t.n0) * t.stride * 4;
  O* y = static_cast<O*>(t.y);
  for (int64_t m = t.m0; m < t.m1; m += W) {
    const int rows = static_cast<int>(t.m1 - m < W ? t.m1 - m : W);
    for (int b = 0; b < B; ++b) {
      typename L::ireg block[W];
      for (int i = 0; i < W; ++i)
        block[i] = kFull || i < f[b].c ? L::iload(tile + ((b * W + i) * t.stride + m - t.m0) * 4)
                                       : L::izero();
      L::transpose(block);
      for (int j = 0; j < rows; ++j) {
        __builtin_prefetch(y + (m + j + kAhead) * t.n + n + b * W, 1);  // few rows, not all
        f[b].row(t, m + j, n + b * W, block[j], bias != nullptr, static_cast<const T*>(t.residual),
                 y);
      }
    }
  }
  for (int b = 0; b < B; ++b) f[b].report(t, y);
}

// One B vectors wide, or a last one that is not full, at column n.
template <class L, class T, class O, bool kColumns>
struct FinishAs {
  const FinishTask& t;

  template <bool kFull, int B>
  void at(int64_t n) const {
    if constexpr (kColumns)
      finish_block<L, kFull, B, T, O>(t, n);
    else if (t.activation == kNone)
      finish_vectors<L, kFull, B, true, T, O>(t, n);
    else
      finish_vectors<L, kFull, B, false, T, O>(t, n);
  }
};

template <class L, class T, class O, bool kColumns>
void finish_as(const FinishTask& t) {
  constexpr int kVectors = 4;
  const FinishAs<L, T, O, kColumns> finish{t};
  int64_t n = t.n0;
  for (; n + kVectors * L::width <= t.n1; n += kVectors * L::width)
    finish.template at<true, kVectors>(n);
  for (; n + L::width <= t.n1; n += L::width) finish.template at<true, 1>(n);
  if (n < t.n1) finish.template at<false, 1>(n);
}

template <class L, class T, bool kColumns = false>
void finish(const FinishTask& t) {
  switch (t.y_kind) {
    case kYFloat: return finish_as<L, T, float, kColumns>(t);
    case kYU8: return finish_as<L, T, uint8_t, kColumns>(t);
    default: return finish_as<L, T, T, kColumns>(t);
  }
}

template <class L, class T>
void gradient(const GradTask& t) {
  using V = typename L::V;
  constexpr int W = L::width;
  const T* grad = static_cast<const T*>(t.grad);
  for (int64_t n = t.n0; n < t.n1; n += W) {
    const int c = static_cast<int>(t.n1 - n < W ? t.n1 - n : W);
    const auto scale = t.scale != nullptr ? V::load_n(t.scale + n, c) : V::set1(1.0f);
    typename V::reg sums[kSumLevels] = {V::zero(), V::zero(), V::zero()};
    const auto go_up = [&](int level) {
      sums[level + 1] = V::add(sums[level + 1], sums[level]);
      sums[level] = V::zero();
    };
    for (int64_t m = 0; m < t.m; ++m) {
      auto g = V::load_n(grad + m * t.n + n, c);
      if (t.z != nullptr)
        g = V::mul(g, activate_derivative<V>(t.activation, V::load_n(t.z + m * t.n + n, c)));
      sums[0] = V::add(sums[0], g);
      if (t.gz != nullptr) V::store_n(t.gz + m * t.n + n, V::mul(g, scale), c);
      if ((m + 1) % kSumRows == 0) go_up(0);
      if ((m + 1) % (kSumRows * kSumRows) == 0) go_up(1);
    }
    go_up(0);
    go_up(1);
    if (t.bias_grad != nullptr)
      V::store_n(static_cast<T*>(t.bias_grad) + n, sums[kSumLevels - 1], c);
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

}  // namespace
}  // namespace bigops
