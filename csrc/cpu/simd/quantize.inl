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

// A row of x rounded to u8: rint(x * inverse) + zero, held in low..255. kInside: the first two
// never leave it by more than int16 takes, so that the bytes alone need holding.
template <class L, bool kInside, class T>
void round_row(const T* x, int64_t k, float inverse, float zero, float low, uint8_t* q) {
  using V = typename L::V;
  constexpr int W = L::width;
  const auto vi = V::set1(inverse), vz = V::set1(zero);
  const auto bottom = V::set1(low - zero), top = V::set1(255.0f - zero);
  const auto offset = L::iset1(static_cast<int32_t>(zero));
  int64_t i = 0;
  for (; i + 4 * W <= k; i += 4 * W) {
    typename L::ireg r[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      auto v = V::mul(V::load(x + i + j * W), vi);
      if (!kInside) v = V::min(V::max(v, bottom), top);
      r[j] = L::iadd(L::to_int(v), offset);
    }
    L::istore(q + i, L::pack_u8(r[0], r[1], r[2], r[3]));
  }
  for (; i < k; i += W) {
    const int n = static_cast<int>(k - i < W ? k - i : W);
    const auto r = V::round(V::mul(V::load_n(x + i, n), vi));
    L::store_u8(q + i, V::add(V::min(V::max(r, bottom), top), vz), n);
  }
}

// The ends of the range of a row, 0 in it. False where the row holds NaN or inf.
template <class L, class T>
bool range(const T* x, int64_t k, float* lo, float* hi) {
  using V = typename L::V;
  constexpr int W = L::width, B = 4;  // chains that do not wait for each other
  typename V::reg low[B], high[B],
      bad[B];  // x * 0 is NaN for NaN and inf, and stays so when summed
  for (int j = 0; j < B; ++j) low[j] = high[j] = bad[j] = V::zero();
  const auto take = [&](int j, typename V::reg v) {
    low[j] = V::min(low[j], v);
    high[j] = V::max(high[j], v);
    bad[j] = V::fma(v, V::zero(), bad[j]);
  };
  int64_t i = 0;
  for (; i + B * W <= k; i += B * W)
#pragma GCC unroll 4
    for (int j = 0; j < B; ++j) take(j, V::load(x + i + j * W));
  for (; i < k; i += W)  // missing lanes read as 0, which is inside every range
    take(0, V::load_n(x + i, static_cast<int>(k - i < W ? k - i : W)));
  const auto least = V::min(V::min(low[0], low[1]), V::min(low[2], low[3]));
  *lo = -V::reduce_max(V::sub(V::zero(), least));
  *hi = V::reduce_max(V::max(V::max(high[0], high[1]), V::max(high[2], high[3])));
  return V::reduce(V::add(V::add(bad[0], bad[1]), V::add(bad[2], bad[3]))) == 0.0f;
}

// By what a row becomes u8.
struct Rounding {
  QuantizeMode mode;
  bool finite;  // no NaN or inf in the row
  float scale, inverse, zero;

  // Of the ends of the range, 0 in it; x_scale and x_zero where they are given.
  Rounding(QuantizeMode mode_, bool finite_, float lo, float hi, float x_scale = 0.0f,
           int32_t x_zero = 0)
      : mode(mode_), finite(finite_), scale(x_scale), zero(static_cast<float>(x_zero)) {
    if (mode == kDynamicRows) {
      scale = hi / 255.0f - lo / 255.0f;
    } else if (mode == kSymmetricRows) {
      scale = (-lo > hi ? -lo : hi) / 127.0f;
      zero = 128.0f;
    }
    scale = scale > kTiny ? scale : kTiny;
    inverse = 1.0f / scale;
    if (mode == kDynamicRows) {
      zero = __builtin_rintf(-lo * inverse);
      zero = !finite || zero < 0.0f ? 0.0f : zero > 255.0f ? 255.0f : zero;
    }
    if (!finite) scale = __builtin_nanf("");
  }
  Rounding() = default;

  template <class L, class T>
  void write(const T* x, int64_t k, uint8_t* q, int64_t q_stride) const {
    const int64_t used = finite ? k : 0;
    memset(q + used, 0, static_cast<size_t>(q_stride - used));
    if (!finite) return;
    if (mode == kDynamicRows)
      round_row<L, true>(x, k, inverse, zero, 0.0f, q);
    else
      round_row<L, false>(x, k, inverse, zero, mode == kSymmetricRows ? 1.0f : 0.0f, q);
  }
};

// Rows of x to u8, exactly as act_quant in bigops/formats/quantize.py: every step in float, true
// divisions, rounding half to even. Ranges of some rows first: the divisions of one row would wait
// for its range (384 columns: 2.8 against 2.0 ns a vector).
template <class L, class T>
void quantize(const QuantizeTask& t) {
  constexpr int R = 4;
  const auto row = [&](int64_t i) { return static_cast<const T*>(t.x) + i * t.k; };
  for (int64_t i0 = 0; i0 < t.rows; i0 += R) {
    const int count = static_cast<int>(t.rows - i0 < R ? t.rows - i0 : R);
    Rounding by[R];
    for (int r = 0; r < count; ++r) {
      float lo, hi;
      const bool finite = range<L>(row(i0 + r), t.k, &lo, &hi);
      by[r] = Rounding(t.mode, finite, lo, hi, t.x_scale, t.x_zero);
      t.scale[i0 + r] = by[r].scale;
      t.zero_point[i0 + r] = static_cast<int32_t>(by[r].zero);
    }
    for (int r = 0; r < count; ++r)
      by[r].template write<L>(row(i0 + r), t.k, t.q + (i0 + r) * t.q_stride, t.q_stride);
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

// zero_point * sum is taken off a total in one instruction, exactly: both as pairs of int16 whose
// dot product is -zero_point * sum (a product of int32 takes two, and 40% longer).
// |sum| < 2^22 where sums of u8 are exact (kExactColumns).
inline int32_t zero_pair(int32_t zero) {  // zero, 128 zero
  return static_cast<int32_t>(static_cast<uint32_t>(zero) * 0x800001u);
}
inline int32_t sum_pair(int32_t sum) {
  const uint32_t less = 0u - static_cast<uint32_t>(sum);
  return static_cast<int32_t>((less & 127) | (less << 9 & 0xffff0000u));  // low 7 bits, the others
}

// A total of u8 times s8 as z. The arguments are vectors along the columns or along the rows.
template <class L, class R = typename L::V::reg>
inline R scaled(typename L::ireg total, typename L::ireg zero, typename L::ireg sum, R row_scale,
                R scale, R bias) {
  using V = typename L::V;
  const auto whole = L::to_float(L::dot16(total, zero, sum));
  return V::fma(whole, V::mul(row_scale, scale), bias);
}

// One vector of y along its columns: activation, residual, and the store.
template <class L, bool kFull>
struct Finisher {
  using V = typename L::V;
  using reg = typename V::reg;
  int c;                        // columns of the vector
  mutable reg bad = V::zero();  // y * 0 summed: NaN once a y for u8 was NaN or inf

  explicit Finisher(int64_t left) : c(static_cast<int>(left < L::width ? left : L::width)) {}

  template <class T>
  reg get(const T* p) const {
    return kFull ? V::load(p) : V::load_n(p, c);
  }

  template <class T, class O>
  void put(const FinishTask& t, int64_t at, reg z, const T* residual, O* y) const {
    if (t.activation != kNone) z = activate<V>(t.activation, z);
    if (residual != nullptr) z = V::add(z, get(residual + at));
    store(t, y + at, z);
  }

  template <class O>
  void store(const FinishTask&, O* y, reg z) const {
    if (kFull)
      V::store(y, z);
    else
      V::store_n(y, z, c);
  }

  // As round_row does it, so that a u8 result is what the next layer would make of a float one.
  void store(const FinishTask& t, uint8_t* y, reg z) const {
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

// What each of N columns adds to z.
template <class L, int N>
struct FinishColumns {
  int32_t sum[N];
  float scale[N], bias[N];

  template <class T>
  FinishColumns(const FinishTask& t, int64_t n, const T* b) {
    const int count = static_cast<int>(t.n1 - n < N ? t.n1 - n : N);
    for (int i = 0; i < N; ++i) {
      const bool scaled = i < count && t.scale != nullptr;
      sum[i] = scaled ? sum_pair(t.sums[n - t.n0 + i]) : 0;
      scale[i] = scaled ? t.scale[n + i] : 0.0f;
      bias[i] = 0.0f;
    }
    using V = typename L::V;
    for (int i = 0; b != nullptr && i < count; i += L::width) {
      const int c = count - i < L::width ? count - i : L::width;
      V::store_n(bias + i, V::load_n(b + n + i, c), c);
    }
  }
};

// From a tile [m][stride], B vectors of a row one after the other.
template <class L, bool kFull, int B, class T, class O>
void finish_vectors(const FinishTask& task, int64_t n) {
  using V = typename L::V;
  constexpr int W = L::width;
  const FinishTask t = task;  // no store through y changes it
  const FinishColumns<L, B * W> by(t, n, static_cast<const T*>(t.bias));
  const Finisher<L, kFull> f(t.n1 - n);
  O* y = static_cast<O*>(t.y);
  typename L::ireg sum[B];
  typename V::reg scale[B], bias[B];
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) {
    sum[b] = L::iload(by.sum + b * W);
    scale[b] = V::load(by.scale + b * W);
    bias[b] = V::load(by.bias + b * W);
  }
  const char* tile = static_cast<const char*>(t.tile) + (n - t.n0) * 4;
  for (int64_t m = t.m0; m < t.m1; ++m, tile += t.stride * 4) {
    auto zero = L::izero();
    auto row_scale = V::zero();
    if (t.scale != nullptr) {
      zero = L::iset1(zero_pair(t.zero_point[m]));
      row_scale = V::set1(t.row_scale[m]);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const char* at = tile + b * W * 4;
      const auto total = kFull ? L::iload(at) : L::iload_n(at, f.c);
      const auto z = t.scale == nullptr
                         ? V::add(L::as_float(total), bias[b])
                         : scaled<L>(total, zero, sum[b], row_scale, scale[b], bias[b]);
      f.put(t, m * t.n + n + b * W, z, static_cast<const T*>(t.residual), y);
    }
  }
  f.report(t, y);
}

// From a tile [n][stride] whose lanes are rows of x: what a column adds is added ahead of the
// transpose in registers, where it is one number for all lanes. Rows of y lie N apart, often in one
// set of the caches, so B vectors of a row are written one after the other.
template <class L, bool kFull, int B, class T, class O>
void finish_block(const FinishTask& task, int64_t n) {
  using V = typename L::V;
  constexpr int W = L::width, kAhead = 6;
  const FinishTask t = task;  // no store through y changes it
  const FinishColumns<L, B * W> by(t, n, static_cast<const T*>(t.bias));
  const Finisher<L, kFull> f(t.n1 - n);
  const char* tile = static_cast<const char*>(t.tile) + (n - t.n0) * t.stride * 4;
  O* y = static_cast<O*>(t.y);
  for (int64_t m = t.m0; m < t.m1; m += W, tile += W * 4) {
    const int rows = static_cast<int>(t.m1 - m < W ? t.m1 - m : W);
    auto zero = L::izero();
    auto row_scale = V::zero();
    if (t.scale != nullptr) {
      zero = L::imul(L::iload_n(t.zero_point + m, rows), L::iset1(zero_pair(1)));
      row_scale = V::load_n(t.row_scale + m, rows);
    }
    for (int b = 0; b < B; ++b) {
      typename L::ireg block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const int column = b * W + i;
        const auto total = kFull || i < f.c ? L::iload(tile + column * t.stride * 4) : L::izero();
        const auto bias = V::set1(by.bias[column]);
        block[i] =
            L::as_words(t.scale == nullptr ? V::add(L::as_float(total), bias)
                                           : scaled<L>(total, zero, L::iset1(by.sum[column]),
                                                       row_scale, V::set1(by.scale[column]), bias));
      }
      L::transpose(block);
      const int64_t at = m * t.n + n + b * W;
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j)
        if (j < rows) {
          __builtin_prefetch(y + at + (j + kAhead) * t.n, 1);  // few rows, not all
          f.put(t, at + j * t.n, L::as_float(block[j]), static_cast<const T*>(t.residual), y);
        }
    }
  }
  f.report(t, y);
}

template <class L, class T, class O, bool kColumns>
void finish_as(const FinishTask& t) {
  constexpr int kVectors = 4;
  int64_t n = t.n0;
  for (; n + kVectors * L::width <= t.n1; n += kVectors * L::width)
    if (kColumns)
      finish_block<L, true, kVectors, T, O>(t, n);
    else
      finish_vectors<L, true, kVectors, T, O>(t, n);
  for (; n + L::width <= t.n1; n += L::width)
    if (kColumns)
      finish_block<L, true, 1, T, O>(t, n);
    else
      finish_vectors<L, true, 1, T, O>(t, n);
  if (n < t.n1) {
    if (kColumns)
      finish_block<L, false, 1, T, O>(t, n);
    else
      finish_vectors<L, false, 1, T, O>(t, n);
  }
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
