// Layer norm and RMS norm, row by row: x is read from memory once, the passes after it find the row
// in L1. L: PortableLanes, Avx2Lanes or Avx512Lanes; T: of x.
// Include after a lanes header and norm.h. Internal linkage throughout.

#include "cpu/simd/activation.inl"
#include "cpu/simd/columns.inl"
#include "cpu/simd/quantize.inl"

namespace bigops {
namespace {

constexpr int kNormSums = 4;  // independent sums: an addition takes four cycles

// f(first column, columns, which of the sums) for each vector of a row.
template <class V, class F>
inline __attribute__((always_inline)) void each_vector(int64_t k, const F& f) {
  constexpr int W = V::width;
  static_assert(kNormSums == 4, "unrolled below");
  int64_t i = 0;
  for (; i + kNormSums * W <= k; i += kNormSums * W) {
    f(i, W, 0);
    f(i + W, W, 1);
    f(i + 2 * W, W, 2);
    f(i + 3 * W, W, 3);
  }
  for (; i + W <= k; i += W) f(i, W, 0);
  if (i < k) f(i, static_cast<int>(k - i), 1);
}

// v in the first n lanes, 0 in the others.
template <class V>
inline __attribute__((always_inline)) typename V::reg first_lanes(typename V::reg v, int n) {
  if (n == V::width) return v;
  float lanes[V::width];
  V::store(lanes, v);
  return V::load_n(lanes, n);
}

template <class V>
inline __attribute__((always_inline)) float total(const typename V::reg (&sums)[kNormSums]) {
  return V::reduce(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
}

// A row is v * factor + shift before weight and bias.
template <class V>
struct RowStatistics {
  const float* v;  // [K]
  typename V::reg factor, shift;

  inline __attribute__((always_inline)) RowStatistics(const float* row, float mean,
                                                      float mean_square, float eps)
      : v(row) {
    factor = V::div(V::set1(1.0f), V::sqrt(V::set1(mean_square + eps)));
    shift = V::mul(V::set1(-mean), factor);
  }
};

// Sums over a row of its numbers and of their squares, and what these say.
template <class V>
struct Sums {
  typename V::reg first[kNormSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
  typename V::reg second[kNormSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
  float mean = 0.0f, variance = 0.0f;

  inline __attribute__((always_inline)) void add(int a, typename V::reg v) {
    first[a] = V::add(first[a], v);
    second[a] = V::fma(v, v, second[a]);
  }

  inline __attribute__((always_inline)) void divide(int64_t k) {
    const float count = static_cast<float>(k);
    mean = total<V>(first) / count;
    variance = total<V>(second) / count - mean * mean;
  }
};

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// The range of a row, 0 included, lane by lane; bad is NaN in some lane where it holds NaN or inf.
template <class V>
struct Range {
  typename V::reg lo = V::zero(), hi = V::zero(), bad = V::zero();

  inline __attribute__((always_inline)) void take(typename V::reg z) {
    lo = V::min(lo, z);
    hi = V::max(hi, z);
    bad = V::fma(z, V::zero(), bad);
  }
};

// What is given and wanted: one loop each, without a branch in it. What the loop reads is copied
// first: to the compiler a store of floats may change what a pointer leads to.
template <class V, class T, class Weight, class Bias, class Quantised>
inline Range<V> finish_row(const NormTask& t, RowStatistics<V> s, T* y) {
  const float *weight = t.weight, *bias = t.bias;
  const auto normed = [=](int64_t i, int n) __attribute__((always_inline)) {
    const auto z = V::fma(get<V>(s.v + i, n), s.factor, s.shift);
    if (Weight::value && Bias::value) return V::fma(z, get<V>(weight + i, n), get<V>(bias + i, n));
    if (Weight::value) return V::mul(z, get<V>(weight + i, n));
    return Bias::value ? V::add(z, get<V>(bias + i, n)) : z;
  };
  if constexpr (!Quantised::value) {
    each_vector<V>(t.k, [=](int64_t i, int n, int)
                            __attribute__((always_inline)) { put<V>(y + i, normed(i, n), n); });
    return {};
  } else {
    Range<V> range[kNormSums];
    float* row = t.row;
    each_vector<V>(t.k, [&, row](int64_t i, int n, int a) __attribute__((always_inline)) {
      const auto z = normed(i, n);
      put<V>(row + i, z, n);
      if (y != nullptr) put<V>(y + i, z, n);
      range[a].take(first_lanes<V>(z, n));
    });
    for (int a = 1; a < kNormSums; ++a) {
      range[0].lo = V::min(range[0].lo, range[a].lo);
      range[0].hi = V::max(range[0].hi, range[a].hi);
      range[0].bad = V::add(range[0].bad, range[a].bad);
    }
    return range[0];
  }
}

template <class V, class T, class Quantised>
inline Range<V> finish_row(const NormTask& t, const RowStatistics<V>& s, T* y) {
  if (t.weight != nullptr && t.bias != nullptr)
    return finish_row<V, T, Yes, Yes, Quantised>(t, s, y);
  if (t.weight != nullptr) return finish_row<V, T, Yes, No, Quantised>(t, s, y);
  if (t.bias != nullptr) return finish_row<V, T, No, Yes, Quantised>(t, s, y);
  return finish_row<V, T, No, No, Quantised>(t, s, y);
}

// A row of one call: x + residual in float32, kept in `row` where x alone is not that already.
template <class V, class T, class Residual>
struct Row {
  const T *x, *residual;
  T* sum;
  float* row;
  int64_t k;
  float eps;
  static constexpr bool kInPlace = !Residual::value && sizeof(T) == sizeof(float);

  Row(const NormTask& t, int64_t m)
      : x(static_cast<const T*>(t.x) + m * t.x_stride),
        residual(Residual::value ? static_cast<const T*>(t.residual) + m * t.residual_stride
                                 : nullptr),
        sum(t.sum != nullptr ? static_cast<T*>(t.sum) + m * t.k : nullptr),
        row(t.row),
        k(t.k),
        eps(t.eps) {}

  const float* floats() const { return kInPlace ? reinterpret_cast<const float*>(x) : row; }

  inline __attribute__((always_inline)) typename V::reg read(int64_t i, int n) const {
    auto v = get<V>(x + i, n);
    if (Residual::value) {
      v = V::add(v, get<V>(residual + i, n));
      if (sum != nullptr) put<V>(sum + i, v, n);
    }
    if (!kInPlace) put<V>(row + i, v, n);
    return v;
  }

  inline __attribute__((always_inline)) RowStatistics<V> rms() const {
    typename V::reg squares[kNormSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
    each_vector<V>(k, [&, own = *this](int64_t i, int n, int a) __attribute__((always_inline)) {
      const auto v = own.read(i, n);
      squares[a] = V::fma(v, v, squares[a]);
    });
    return {floats(), 0.0f, total<V>(squares) / static_cast<float>(k), eps};
  }

  // One pass where the mean is below the deviation, as in most rows: the difference of squares
  // costs a bit at most. Else a second pass over the row, in L1, takes the mean off first, and the
  // rest of it that float32 left in: a mean of 1e4 deviations costs no digit.
  inline __attribute__((always_inline)) RowStatistics<V> layer() const {
    Sums<V> sums;
    each_vector<V>(k, [&, own = *this](int64_t i, int n, int a)
                          __attribute__((always_inline)) { sums.add(a, own.read(i, n)); });
    sums.divide(k);
    if (sums.mean * sums.mean <= sums.variance) return {floats(), sums.mean, sums.variance, eps};
    return without(sums.mean);
  }

  __attribute__((noinline)) RowStatistics<V> without(float mean) const {
    const float* v = floats();
    float* d_row = row;
    Sums<V> sums;
    float means[V::width];
    V::store(means, V::set1(mean));
    each_vector<V>(k, [&, v, d_row](int64_t i, int n, int a) __attribute__((always_inline)) {
      const auto d = V::sub(get<V>(v + i, n), get<V>(means, n));  // lanes past the row stay 0
      sums.add(a, d);
      put<V>(d_row + i, d, n);
    });
    sums.divide(k);
    return {row, sums.mean, sums.variance < 0.0f ? 0.0f : sums.variance, eps};  // NaN stays
  }
};

template <class L, class T, class Rms, class Residual>
void norm_rows(const NormTask& t) {
  using V = typename L::V;
  for (int64_t m = 0; m < t.rows; ++m) {
    const Row<V, T, Residual> row(t, m);
    const auto s = Rms::value ? row.rms() : row.layer();
    T* y = t.y != nullptr ? static_cast<T*>(t.y) + m * t.k : nullptr;
    if (t.values == nullptr) {
      finish_row<V, T, No>(t, s, y);
      continue;
    }
    const auto range = finish_row<V, T, Yes>(t, s, y);
    const float lo = -V::reduce_max(V::sub(V::zero(), range.lo)), hi = V::reduce_max(range.hi);
    const Rounding by(t.symmetric ? kSymmetricRows : kDynamicRows, V::reduce(range.bad) == 0.0f, lo,
                      hi);
    by.write<L>(t.row, t.k, t.values + m * t.k, t.k);
    t.scale[m] = by.scale;
    t.zero_point[m] = static_cast<int32_t>(by.zero);
  }
}

template <class L, class T>
void norm(const NormTask& t) {
  if (t.rms)
    (t.residual != nullptr ? norm_rows<L, T, Yes, Yes> : norm_rows<L, T, Yes, No>)(t);
  else
    (t.residual != nullptr ? norm_rows<L, T, No, Yes> : norm_rows<L, T, No, No>)(t);
}

template <class L>
constexpr NormKernels norm_table() {
  return {{norm<L, float>, norm<L, bf16>, norm<L, f16>}};
}

}  // namespace
}  // namespace bigops
