// Cross entropy of rows of logits and its gradient in place, once for every instruction set.
// Include after a vector header. Internal linkage throughout.
//
// A row is read once: with bias and soft cap applied it stays in a scratch row of Acc (128 KB at
// V = 32000, in L2) for the sum of exponentials and the gradient.

#include "cpu/simd/columns.inl"
#include "cpu/simd/linear_cross_entropy.h"

namespace bigops {
namespace {

// Columns whose sums are added up before they enter the total: one sum over 100,000 of them loses a
// digit where a vector has few lanes.
constexpr int64_t kSumColumns = 2048;

// Where the largest of a row first stands; as torch.argmax has it, a NaN is larger than all.
template <class Acc>
inline int64_t first_largest(const Acc* row, int64_t v, Acc highest, bool finite) {
  for (int64_t i = 0; !finite && i < v; ++i)
    if (row[i] != row[i]) return i;
  for (int64_t i = 0; i < v; ++i)
    if (row[i] == highest) return i;
  return 0;
}

template <class V, class T>
void cross_entropy(const CrossEntropyTask& t) {
  using Acc = typename V::acc;
  using reg = typename V::reg;
  const int64_t v = t.v;
  Acc* const row = static_cast<Acc*>(t.scratch);
  const T* const bias = static_cast<const T*>(t.bias);
  const Acc* const weight = static_cast<const Acc*>(t.weight);
  Acc* const losses = static_cast<Acc*>(t.losses);
  Acc* const lses = static_cast<Acc*>(t.lse);
  const Acc cap = static_cast<Acc>(t.softcap);
  const Acc smoothing = static_cast<Acc>(t.smoothing);
  const Acc weight_sum = static_cast<Acc>(t.weight_sum);
  const Acc z_loss = static_cast<Acc>(t.z_loss);
  const bool smooths = t.smoothing != 0 && v > 0;
  const Acc even = smooths ? smoothing / static_cast<Acc>(v) : 0;  // weight of each class

  for (int64_t m = t.m0; m < t.m1; ++m) {
    T* const logits = static_cast<T*>(t.logits) + m * v;
    const int64_t y = t.target[m];
    auto nothing = [&] {
      losses[m] = lses[m] = 0;
      if (t.gradient && v > 0)
        memset(static_cast<void*>(logits), 0, static_cast<size_t>(v) * sizeof(T));
    };
    if (y == t.ignore_index && t.predictions == nullptr) {
      nothing();
      continue;
    }

    // bias and soft cap; the maximum
    reg top = V::set1(-static_cast<Acc>(__builtin_inf()));
    reg weighted = V::zero(), weighted_part = V::zero();
    for_columns<V>(v, [&](int64_t i, int n) {
      reg z = get<V>(logits + i, n);
      if (bias != nullptr) z = V::add(z, get<V>(bias + i, n));
      if (cap != 0) z = V::mul(V::set1(cap), V::tanh_(V::mul(z, V::set1(1 / cap))));
      if (smooths)
        weighted_part = weight != nullptr ? V::fma(get<V>(weight + i, n), z, weighted_part)
                                          : V::add(weighted_part, z);
      if (smooths && (i + n) % kSumColumns == 0) {
        weighted = V::add(weighted, weighted_part);
        weighted_part = V::zero();
      }
      put<V>(row + i, z, n);
      if (n == V::width) top = V::max(z, top);
    });
    weighted = V::add(weighted, weighted_part);
    Acc lanes[V::width];
    V::store(lanes, top);
    Acc highest = lanes[0];
    for (int i = 1; i < V::width; ++i) highest = lanes[i] > highest ? lanes[i] : highest;
    for (int64_t i = v - v % V::width; i < v; ++i) highest = row[i] > highest ? row[i] : highest;

    // log of the sum of exponentials; lanes past the end are cut off
    reg total = V::zero();
    const reg shift = V::set1(highest);
    int64_t i = 0;
    while (i + V::width <= v) {
      reg sums[2] = {V::zero(), V::zero()};
      const int64_t end = i + kSumColumns < v ? i + kSumColumns : v;
      for (; i + 2 * V::width <= end; i += 2 * V::width) {
        sums[0] = V::add(sums[0], V::exp_(V::sub(V::load(row + i), shift)));
        sums[1] = V::add(sums[1], V::exp_(V::sub(V::load(row + i + V::width), shift)));
      }
      for (; i + V::width <= end; i += V::width)
        sums[0] = V::add(sums[0], V::exp_(V::sub(V::load(row + i), shift)));
      total = V::add(total, V::add(sums[0], sums[1]));
    }
    Acc sum = V::reduce(total);
    if (i < v) {
      V::store_n(lanes, V::exp_(V::sub(V::load_n(row + i, static_cast<int>(v - i)), shift)),
                 V::width);
      for (int64_t j = i; j < v; ++j) sum += lanes[j - i];
    }
    const Acc lse = highest + static_cast<Acc>(__builtin_log(static_cast<double>(sum)));
    if (t.predictions != nullptr) t.predictions[m] = first_largest(row, v, highest, sum - sum == 0);
    if (y == t.ignore_index) {
      nothing();
      continue;
    }
    lses[m] = lse;

    const Acc own = weight != nullptr ? weight[y] : Acc(1);
    Acc loss = own * (lse - row[y]);
    if (smooths) loss = (1 - smoothing) * loss + even * (weight_sum * lse - V::reduce(weighted));
    if (z_loss != 0) loss += z_loss * own * lse * lse;
    losses[m] = loss;
    if (!t.gradient) continue;

    // d loss / d t = p * (sum of what the classes weigh + z-loss) - what the class weighs; by the
    // soft cap's slope 1 - (t / cap)^2
    const Acc scale = t.scale != nullptr ? static_cast<const Acc*>(t.scale)[m] : Acc(1);
    Acc mass = (1 - (smooths ? smoothing : 0)) * own;
    const Acc on_target = scale * mass;
    if (smooths) mass += even * weight_sum;
    if (z_loss != 0) mass += 2 * z_loss * own * lse;
    const Acc share = scale * even;
    const reg factor = V::set1(scale * mass / sum);
    auto gradient_at = [&](int64_t at, int n) {
      const reg z = get<V>(row + at, n);
      reg g = V::mul(factor, V::exp_(V::sub(z, shift)));
      if (smooths)
        g = V::sub(
            g, weight != nullptr ? V::mul(V::set1(share), get<V>(weight + at, n)) : V::set1(share));
      return g;
    };
    auto slope_at = [&](reg z) {
      const reg u = V::mul(z, V::set1(1 / cap));
      return V::sub(V::set1(1), V::mul(u, u));
    };
    V::store_n(lanes, gradient_at(y, 1), V::width);
    Acc at_target = lanes[0] - on_target;
    if (cap != 0) at_target *= 1 - (row[y] / cap) * (row[y] / cap);
    for_columns<V>(v, [&](int64_t at, int n) {
      reg g = gradient_at(at, n);
      if (cap != 0) g = V::mul(g, slope_at(get<V>(row + at, n)));
      put<V>(logits + at, g, n);
    });
    V::store_n(logits + y, V::set1(at_target), 1);
  }
}

}  // namespace
}  // namespace bigops
