// Rotary embeddings of the heads of a token. V: a vec header's vector of float32; T: of x; C: of
// cos and sin, which a vector of columns loads once for all heads.
// Include after a lanes header and rotary.h. Internal linkage throughout.

#include "cpu/simd/columns.inl"

namespace bigops {
namespace {

template <class V, class T, class C>
inline __attribute__((always_inline)) void rotate_columns(const RotaryTask& t, int64_t i, int n) {
  const int64_t half = t.r / 2, d = t.d, step = t.x_head;
  const C *cos = static_cast<const C*>(t.cos) + i, *sin = static_cast<const C*>(t.sin) + i;
  const auto cos_a = get<V>(cos, n), cos_b = get<V>(cos + half, n);
  const auto minus_a = V::sub(V::zero(), get<V>(sin, n)), sin_b = get<V>(sin + half, n);
  const T* x = static_cast<const T*>(t.x) + i;
  T* y = static_cast<T*>(t.y) + i;
  for (int64_t h = t.heads; h > 0; --h, x += step, y += d) {
    const auto a = get<V>(x, n), b = get<V>(x + half, n);
    put<V>(y, V::fma(b, minus_a, V::mul(a, cos_a)), n);
    put<V>(y + half, V::fma(a, sin_b, V::mul(b, cos_b)), n);
  }
}

template <class V, class T, class C>
void rotate(const RotaryTask& t) {
  for_columns<V>(t.r / 2, [&](int64_t i, int n)
                              __attribute__((always_inline)) { rotate_columns<V, T, C>(t, i, n); });
  if (t.r == t.d) return;
  const T* x = static_cast<const T*>(t.x) + t.r;
  T* y = static_cast<T*>(t.y) + t.r;
  const auto bytes = static_cast<size_t>(t.d - t.r) * sizeof(T);
  for (int64_t h = 0; h < t.heads; ++h) memcpy(y + h * t.d, x + h * t.x_head, bytes);
}

template <class L>
constexpr RotaryKernels rotary_table() {
  using V = typename L::V;
  return {{{rotate<V, float, float>, rotate<V, float, float>},
           {rotate<V, bf16, bf16>, rotate<V, bf16, float>},
           {rotate<V, f16, f16>, rotate<V, f16, float>}}};
}

}  // namespace
}  // namespace bigops
