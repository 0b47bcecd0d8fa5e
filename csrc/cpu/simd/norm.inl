// Layer norm and RMS norm, row by row: x is read from memory once, the passes after it find the row
// in L1. L: PortableLanes, Avx2Lanes or Avx512Lanes; T: of x; P: of weight and bias.
// Include after a lanes header and norm.h. Internal linkage throughout.

#include "cpu/simd/activation.inl"
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

template <class V, class T>
inline __attribute__((always_inline)) typename V::reg get(const T* p, int n) {
  return n == V::width ? V::load(p) : V::load_n(p, n);
}

template <class V, class T>
inline __attribute__((always_inline)) void put(T* p, typename V::reg v, int n) {
  if (n == V::width)
    V::store(p, v);
  else
    V::store_n(p, v, n);
}

template <class V>
inline float total(const typename V::reg (&sums)[kNormSums]) {
  return V::reduce(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
}

// A row is (v - mean) * factor + shift before weight and bias.
template <class V>
struct RowStatistics {
  typename V::reg mean = V::zero(), factor, shift = V::zero();
};

template <class V>
inline typename V::reg inverse_root(float mean_square, float eps) {
  return V::div(V::set1(1.0f), V::sqrt(V::set1(mean_square + eps)));
}

// The variance about a mean that float32 has rounded, and the mean of what that left: a row whose
// mean is 1e4 times its deviation loses nothing.
template <class V>
inline RowStatistics<V> moments(const float* v, int64_t k, float sum, float eps) {
  RowStatistics<V> s;
  const float count = static_cast<float>(k), mean = sum / count;
  float means[V::width];
  s.mean = V::set1(mean);
  V::store(means, s.mean);
  typename V::reg first[kNormSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
  typename V::reg second[kNormSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
  each_vector<V>(k, [&](int64_t i, int n, int a) __attribute__((always_inline)) {
    const auto d = V::sub(get<V>(v + i, n), get<V>(means, n));  // lanes past the row stay 0
    first[a] = V::add(first[a], d);
    second[a] = V::fma(d, d, second[a]);
  });
  const float left = total<V>(first) / count;
  const float variance = total<V>(second) / count - left * left;
  s.factor = inverse_root<V>(variance < 0.0f ? 0.0f : variance, eps);
  s.shift = V::mul(V::set1(-left), s.factor);
  return s;
}

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

// What is given and wanted: one loop each, without a branch in it.
template <class V, class T, class P, class Weight, class Bias, class Quantised>
inline void finish_row(const NormTask& t, const float* v, const RowStatistics<V>& s, T* y) {
  const P* weight = static_cast<const P*>(t.weight);
  const P* bias = static_cast<const P*>(t.bias);
  each_vector<V>(t.k, [&](int64_t i, int n, int) __attribute__((always_inline)) {
    auto z = V::fma(V::sub(get<V>(v + i, n), s.mean), s.factor, s.shift);
    if (Weight::value && Bias::value)
      z = V::fma(z, get<V>(weight + i, n), get<V>(bias + i, n));
    else if (Weight::value)
      z = V::mul(z, get<V>(weight + i, n));
    else if (Bias::value)
      z = V::add(z, get<V>(bias + i, n));
    if (Quantised::value) put<V>(t.row + i, z, n);
    if (!Quantised::value || y != nullptr) put<V>(y + i, z, n);
  });
}

template <class V, class T, class P, class Quantised>
inline void finish_row(const NormTask& t, const float* v, const RowStatistics<V>& s, T* y) {
  if (t.weight != nullptr && t.bias != nullptr)
    finish_row<V, T, P, Yes, Yes, Quantised>(t, v, s, y);
  else if (t.weight != nullptr)
    finish_row<V, T, P, Yes, No, Quantised>(t, v, s, y);
  else if (t.bias != nullptr)
    finish_row<V, T, P, No, Yes, Quantised>(t, v, s, y);
  else
    finish_row<V, T, P, No, No, Quantised>(t, v, s, y);
}

// x + residual in float32, kept in t.row where x alone is not that already; gives the sum of the
// row, for RMS norm that of its squares.
template <class V, class T, class Rms, class Residual>
inline float read_row(const NormTask& t, const T* x, const T* residual, T* sum) {
  typename V::reg sums[kNormSums] = {V::zero(), V::zero(), V::zero(), V::zero()};
  each_vector<V>(t.k, [&](int64_t i, int n, int a) __attribute__((always_inline)) {
    auto v = get<V>(x + i, n);
    if (Residual::value) {
      v = V::add(v, get<V>(residual + i, n));
      if (sum != nullptr) put<V>(sum + i, v, n);
    }
    if (Residual::value || sizeof(T) != sizeof(float)) put<V>(t.row + i, v, n);
    sums[a] = Rms::value ? V::fma(v, v, sums[a]) : V::add(sums[a], v);
  });
  return total<V>(sums);
}

template <class L, class T, class P, class Rms, class Residual>
void norm_rows(const NormTask& t) {
  using V = typename L::V;
  for (int64_t m = 0; m < t.rows; ++m) {
    const T* x = static_cast<const T*>(t.x) + m * t.x_stride;
    const T* residual =
        Residual::value ? static_cast<const T*>(t.residual) + m * t.residual_stride : nullptr;
    T* sum = t.sum != nullptr ? static_cast<T*>(t.sum) + m * t.k : nullptr;
    T* y = t.y != nullptr ? static_cast<T*>(t.y) + m * t.k : nullptr;
    const bool in_place = !Residual::value && sizeof(T) == sizeof(float);
    const float* v = in_place ? reinterpret_cast<const float*>(x) : t.row;
    const float all = read_row<V, T, Rms, Residual>(t, x, residual, sum);
    RowStatistics<V> s;
    if (Rms::value)
      s.factor = inverse_root<V>(all / static_cast<float>(t.k), t.eps);
    else
      s = moments<V>(v, t.k, all, t.eps);
    if (t.values == nullptr) {
      finish_row<V, T, P, No>(t, v, s, y);
      continue;
    }
    finish_row<V, T, P, Yes>(t, v, s, y);
    (t.symmetric
         ? quantize_symmetric<L, float>
         : quantize<L, float>)(t.row, t.k, t.values + m * t.k, t.scale + m, t.zero_point + m);
  }
}

template <class L, class T, class P>
void norm(const NormTask& t) {
  if (t.rms)
    (t.residual != nullptr ? norm_rows<L, T, P, Yes, Yes> : norm_rows<L, T, P, Yes, No>)(t);
  else
    (t.residual != nullptr ? norm_rows<L, T, P, No, Yes> : norm_rows<L, T, P, No, No>)(t);
}

template <class L>
constexpr NormKernels norm_table() {
  return {{{norm<L, float, float>, norm<L, float, float>},
           {norm<L, bf16, bf16>, norm<L, bf16, float>},
           {norm<L, f16, f16>, norm<L, f16, float>}}};
}

}  // namespace
}  // namespace bigops
