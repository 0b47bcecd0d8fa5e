// The backward of a quantised weight: its decoder, and the product of gradients with what it gave.
// Q: the lines of an instruction set (lines_*.h). Included by quantized_linear.inl.
// Internal linkage throughout.

namespace bigops {
namespace {

template <class Q, class D>
void decode_lines(const DecodeTask& t) {
  const D decode;
  float* out = t.out;
  for (int64_t i = 0; i < t.lines; ++i) {
    const int64_t group = (t.first + i) / t.group_lines;
    const auto scale = Q::fload(t.scale + group * t.stride);
    const auto zero = D::zero(t.zero_point == nullptr ? nullptr : t.zero_point + group * t.stride);
    const auto line = Q::iload(t.values + i * kLineBytes);
    D::each_step([&](auto step) __attribute__((always_inline)) {
      constexpr int s = decltype(step)::value;
      Q::fstore(out + s * kWeightTile, Q::fmul(decode.template operand<s>(line, zero), scale));
    });
    out += D::steps * kWeightTile;
  }
}

template <class Q, template <class, bool> class D>
void decode(const DecodeTask& t) {
  if (t.zero_point != nullptr)
    decode_lines<Q, D<Q, true>>(t);
  else
    decode_lines<Q, D<Q, false>>(t);
}

template <class L, int MR>
void float_grad_rows(const FloatGradTask& t) {
  using V = typename L::V;
  constexpr int KV = L::grad_vectors, W = L::width;
  for (int64_t c = 0; c < kGradColumns; c += KV * W) {
    typename V::reg acc[MR][KV];
    BIGOPS_UNROLL
    for (int m = 0; m < MR; ++m) BIGOPS_UNROLL
    for (int v = 0; v < KV; ++v) acc[m][v] = V::zero();
    for (int64_t n = 0; n < t.n; ++n) {
      typename V::reg w[KV];
      BIGOPS_UNROLL
      for (int v = 0; v < KV; ++v) w[v] = V::load(t.weight + n * kGradColumns + c + v * W);
      BIGOPS_UNROLL
      for (int m = 0; m < MR; ++m) {
        const auto g = V::set1(t.grad[m * t.grad_stride + n]);
        BIGOPS_UNROLL
        for (int v = 0; v < KV; ++v) acc[m][v] = V::fma(g, w[v], acc[m][v]);
      }
    }
    BIGOPS_UNROLL
    for (int m = 0; m < MR; ++m) BIGOPS_UNROLL
    for (int v = 0; v < KV; ++v) {
      float* to = t.out + m * kGradColumns + c + v * W;
      V::store(to, t.first ? acc[m][v] : V::add(acc[m][v], V::load(to)));
    }
  }
}

template <class L>
void float_grad(const FloatGradTask& t) {
  static_assert(kGradRows == 6, "one case per number of rows");
  switch (t.m) {
    case 1: return float_grad_rows<L, 1>(t);
    case 2: return float_grad_rows<L, 2>(t);
    case 3: return float_grad_rows<L, 3>(t);
    case 4: return float_grad_rows<L, 4>(t);
    case 5: return float_grad_rows<L, 5>(t);
    default: return float_grad_rows<L, 6>(t);
  }
}

}  // namespace
}  // namespace bigops
