// Optimiser steps and the sum of squares, block by block of kStateBlock elements. Included after
// the vectors of one instruction set. No fma and a fixed order of sums: every instruction set gives
// the same bits.
#include "cpu/simd/fused_optimizer.h"

namespace bigops {
namespace {

template <class real>
constexpr int type_of() {
  return sizeof(real) == 8 ? kF64 : kF32;
}

template <class V, class T>
void widen(const T* from, int64_t n, typename V::acc* to) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(to + i, V::load(from + i));
  if (i < n) V::store_n(to + i, V::load_n(from + i, static_cast<int>(n - i)), int(n - i));
}

template <class V, class T>
void narrow(const typename V::acc* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) V::store(to + i, V::load(from + i));
  if (i < n) V::store_n(to + i, V::load_n(from + i, static_cast<int>(n - i)), int(n - i));
}

// The block at `offset` as reals: in the tensor itself where it holds them, else in the buffer.
template <class V>
typename V::acc* block(void* tensor, int type, int64_t offset, int64_t n, typename V::acc* buffer) {
  using real = typename V::acc;
  if (type == type_of<real>()) return static_cast<real*>(tensor) + offset;
  if (type == kBf16)
    widen<V>(static_cast<const bf16*>(tensor) + offset, n, buffer);
  else
    widen<V>(static_cast<const f16*>(tensor) + offset, n, buffer);
  return buffer;
}

template <class V>
void put(const typename V::acc* from, int64_t n, void* tensor, int type, int64_t offset) {
  using real = typename V::acc;
  if (type == kBf16)
    narrow<V>(from, n, static_cast<bf16*>(tensor) + offset);
  else if (type == kF16)
    narrow<V>(from, n, static_cast<f16*>(tensor) + offset);
  else
    narrow<V>(from, n, static_cast<real*>(tensor) + offset);
}

// --- stochastic rounding ---------------------------------------------------------------------

// 16 random bits for each element of a block: element 32 j + lane takes half j % 2 of word j / 2 of
// counter (32 * block + lane, stream, step).
inline void random_bits(const Rounding& r, int64_t block_index, uint16_t* out) {
  constexpr int kLanes = 32;
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t counter = static_cast<uint64_t>(block_index) * kLanes + static_cast<uint64_t>(l);
    c0[l] = static_cast<uint32_t>(counter);
    c1[l] = static_cast<uint32_t>(counter >> 32);
    c2[l] = r.stream;
    c3[l] = r.step;
  }
  uint32_t k0 = static_cast<uint32_t>(r.seed), k1 = static_cast<uint32_t>(r.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t a = uint64_t(0xD2511F53u) * c0[l], b = uint64_t(0xCD9E8D57u) * c2[l];
      const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1[l] ^ k0;
      const uint32_t n2 = static_cast<uint32_t>(a >> 32) ^ c3[l] ^ k1;
      c1[l] = static_cast<uint32_t>(b);
      c3[l] = static_cast<uint32_t>(a);
      c0[l] = n0;
      c2[l] = n2;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t* words[4] = {c0, c1, c2, c3};
  for (int j = 0; j < 8; ++j)
    for (int l = 0; l < kLanes; ++l)
      out[j * kLanes + l] = static_cast<uint16_t>(words[j / 2][l] >> (16 * (j % 2)));
}

// Those of a run of elements, wherever it begins; what two runs share is made once.
class RandomBits {
 public:
  // Of n elements, kStateBlock at most, from element `at` of the whole tensor on.
  const uint16_t* of(const Rounding& r, int64_t at, int64_t n) {
    const int64_t block = at / kStateBlock, phase = at % kStateBlock;
    if (block != first_) {
      if (count_ == 2 && block == first_ + 1)
        memcpy(bits_, bits_ + kStateBlock, kStateBlock * sizeof(uint16_t));
      else
        random_bits(r, block, bits_);
      first_ = block;
      count_ = 1;
    }
    if (phase + n > kStateBlock && count_ == 1) {
      random_bits(r, block + 1, bits_ + kStateBlock);
      count_ = 2;
    }
    return bits_ + phase;
  }

 private:
  uint16_t bits_[2 * kStateBlock];
  int64_t first_ = -1;
  int count_ = 0;
};

// Up with a probability of what truncation would drop. Inf and NaN stay.
inline void narrow_stochastic(const float* __restrict from, int64_t n,
                              const uint16_t* __restrict random, bf16* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, from + i, 4);
    const bool special = (bits & 0x7f800000u) == 0x7f800000u;
    const uint32_t quiet = (bits & 0x7fffffu) != 0 ? 0x400000u : 0u;
    bits = special ? bits | quiet : bits + random[i];
    to[i].bits = static_cast<uint16_t>(bits >> 16);
  }
}

// --- 8-bit states ----------------------------------------------------------------------------

inline void decode(const uint8_t* __restrict codes, const float* __restrict value, float scale,
                   int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = value[codes[i]] * scale;
}

// Largest magnitude; NaN where one is NaN, so that a broken state stays visible.
inline float absmax(const float* x, int64_t n) {
  uint32_t top = 0;  // magnitudes order as their bits, NaN above inf
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  float f;
  memcpy(&f, &top, 4);
  return f;
}

// Index of the nearest magnitude. A bucket is narrower than any gap of the map: one compare tells.
inline int32_t nearest(float a, const MagnitudeMap& map) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  int32_t bucket = static_cast<int32_t>((bits & 0x7fffffffu) >> 16) - ((127 - 22) << 7);
  bucket = bucket < 0 ? -1 : bucket;
  bucket = bucket >= kMapBuckets ? kMapBuckets - 1 : bucket;
  const uint32_t found = map.bucket[bucket + 1];
  return static_cast<int32_t>(found & 0xff) + ((bits & 0x7fffffffu) > (found & ~0xffu) ? 1 : 0);
}

// Indices of the magnitudes of x / absmax; returns absmax. In an array of its own: stores of bytes
// may alias the map, which keeps the compiler from vectors.
inline float magnitudes(const float* __restrict x, int64_t n, const MagnitudeMap& map,
                        int32_t* __restrict index) {
  const float scale = absmax(x, n), divisor = scale > 0 ? scale : 1.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float q = x[i] / divisor;
    index[i] = nearest(q < 0 ? -q : q, map);
  }
  return scale;
}

inline float encode_signed(const float* __restrict x, int64_t n, const MagnitudeMap& map,
                           uint8_t* __restrict codes) {
  constexpr int32_t kZero = 127;  // 127 negative values, 0, 128 positive ones
  int32_t index[kStateBlock];
  const float scale = magnitudes(x, n, map, index);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t negative = index[i] < kZero ? kZero - index[i] : 0;
    codes[i] = static_cast<uint8_t>(x[i] < 0 ? negative : kZero + index[i]);
  }
  return scale;
}

// Above 0 never becomes code 0: a denominator of 0 beside a small exp_avg would be a leap.
inline float encode_unsigned(const float* __restrict x, int64_t n, const MagnitudeMap& map,
                             uint8_t* __restrict codes) {
  int32_t index[kStateBlock];
  const float scale = magnitudes(x, n, map, index);
  for (int64_t i = 0; i < n; ++i)
    codes[i] = static_cast<uint8_t>(index[i] == 0 && x[i] > 0 ? 1 : index[i]);
  return scale;
}

// --- update rules ----------------------------------------------------------------------------

template <class V>
struct AdamW {
  using real = typename V::acc;
  using reg = typename V::reg;
  static constexpr bool two_states = true;
  reg factor, decay, keep, w1, b2, w2, inv, eps, size;
  bool decays;
  explicit AdamW(const StepTask& t)
      : factor(V::set1(real(t.factor))),
        decay(V::set1(real(t.weight_decay))),
        keep(V::set1(real(t.keep))),
        w1(V::set1(real(1 - t.beta1))),
        b2(V::set1(real(t.beta2))),
        w2(V::set1(real(1 - t.beta2))),
        inv(V::set1(real(t.inv_sqrt_bias2))),
        eps(V::set1(real(t.eps))),
        size(V::set1(real(t.step_size))),
        decays(t.weight_decay != 0) {}
  void one(reg& p, reg g, reg& m, reg& v) const {
    g = V::mul(g, factor);
    if (decays) g = V::add(g, V::mul(decay, p));
    p = V::mul(p, keep);
    m = V::add(m, V::mul(w1, V::sub(g, m)));
    // Not w2 * (g * g), as torch: g * g is inf past 1.8e19, where v itself still has room.
    v = V::add(V::mul(v, b2), V::mul(V::mul(w2, g), g));
    p = V::sub(p, V::mul(size, V::div(m, V::add(V::mul(V::sqrt(v), inv), eps))));
  }
};

template <class V>
struct Sgd {
  using real = typename V::acc;
  using reg = typename V::reg;
  static constexpr bool two_states = false;
  reg factor, decay, momentum, fresh, lr;
  bool decays, nesterov, first_step, has_momentum;
  explicit Sgd(const StepTask& t)
      : factor(V::set1(real(t.factor))),
        decay(V::set1(real(t.weight_decay))),
        momentum(V::set1(real(t.momentum))),
        fresh(V::set1(real(1 - t.dampening))),
        lr(V::set1(real(t.lr))),
        decays(t.weight_decay != 0),
        nesterov(t.nesterov),
        first_step(t.first_step),
        has_momentum(t.has_momentum) {}
  void one(reg& p, reg g, reg& m, reg&) const {
    g = V::mul(g, factor);
    if (decays) g = V::add(g, V::mul(decay, p));
    if (has_momentum) {
      m = first_step ? g : V::add(V::mul(momentum, m), V::mul(fresh, g));
      g = nesterov ? V::add(g, V::mul(momentum, m)) : m;
    }
    p = V::sub(p, V::mul(lr, g));
  }
};

template <class V, class Rule>
void update(const Rule& rule, int64_t n, typename V::acc* p, const typename V::acc* g,
            typename V::acc* m, typename V::acc* v) {
  using reg = typename V::reg;
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    reg rp = V::load(p + i), rm = V::load(m + i), rv = rm;
    if (Rule::two_states) rv = V::load(v + i);
    rule.one(rp, V::load(g + i), rm, rv);
    V::store(p + i, rp);
    V::store(m + i, rm);
    if (Rule::two_states) V::store(v + i, rv);
  }
  const int left = static_cast<int>(n - i);
  if (left > 0) {
    reg rp = V::load_n(p + i, left), rm = V::load_n(m + i, left), rv = rm;
    if (Rule::two_states) rv = V::load_n(v + i, left);
    rule.one(rp, V::load_n(g + i, left), rm, rv);
    V::store_n(p + i, rp, left);
    V::store_n(m + i, rm, left);
    if (Rule::two_states) V::store_n(v + i, rv, left);
  }
}

template <class V, class Rule>
void step(const StepTask& t) {
  using real = typename V::acc;
  const Rule rule(t);
  const bool coded = t.first_scale != nullptr;  // only where real is float
  const bool stochastic = t.rounding != nullptr && t.param_type == kBf16;
  real p_buffer[kStateBlock], g_buffer[kStateBlock];
  float m_buffer[kStateBlock], v_buffer[kStateBlock];
  real nothing[kStateBlock] = {};  // SGD without momentum has no state
  RandomBits random;
  const int64_t per_row = (t.row + kStateBlock - 1) / kStateBlock;
  int64_t row = t.begin / per_row, in_row = t.begin % per_row * kStateBlock;
  for (int64_t index = t.begin; index < t.end; ++index) {
    const int64_t n = t.row - in_row < kStateBlock ? t.row - in_row : kStateBlock;
    const int64_t i = row * t.row + in_row;
    in_row += kStateBlock;
    if (in_row >= t.row) {
      in_row = 0;
      ++row;
    }
    real* p = block<V>(t.param, t.param_type, i, n, p_buffer);
    const real* g = block<V>(const_cast<void*>(t.grad), t.grad_type, i, n, g_buffer);
    real *m = nothing, *v = nothing;
    if (coded) {
      m = reinterpret_cast<real*>(m_buffer);
      v = reinterpret_cast<real*>(v_buffer);
      decode(static_cast<const uint8_t*>(t.first) + i, t.maps->signed_value, t.first_scale[index],
             n, m_buffer);
      if (Rule::two_states)
        decode(static_cast<const uint8_t*>(t.second) + i, t.maps->unsigned_value,
               t.second_scale[index], n, v_buffer);
    } else if (t.first != nullptr) {
      m = static_cast<real*>(t.first) + i;
      if (Rule::two_states) v = static_cast<real*>(t.second) + i;
    }
    update<V>(rule, n, p, g, m, v);
    if (coded) {
      t.first_scale[index] =
          encode_signed(m_buffer, n, t.maps->signed_half, static_cast<uint8_t*>(t.first) + i);
      if (Rule::two_states)
        t.second_scale[index] = encode_unsigned(v_buffer, n, t.maps->unsigned_half,
                                                static_cast<uint8_t*>(t.second) + i);
    }
    if (stochastic) {
      const Rounding& r = *t.rounding;
      // Two divisions take a tenth of the time of a block.
      const int64_t at = i < r.run ? i : i / r.run * r.stride + i % r.run;
      const uint16_t* bits = random.of(r, r.first + at, n);
      narrow_stochastic(reinterpret_cast<const float*>(p), n, bits,
                        static_cast<bf16*>(t.param) + i);
    } else if (t.param_type != type_of<real>()) {
      put<V>(p, n, t.param, t.param_type, i);
    }
    if (t.copy != nullptr) put<V>(p, n, t.copy, t.copy_type, i);
  }
}

// In double, 16 sums by element index modulo 16: the same order on every instruction set.
template <class V>
double sum_squares(const void* grad, int type, int64_t begin, int64_t end) {
  using real = typename V::acc;
  constexpr int kSums = 16;
  double sums[kSums] = {};
  real buffer[kStateBlock];
  for (int64_t i = begin; i < end; i += kStateBlock) {
    const int64_t n = end - i < kStateBlock ? end - i : kStateBlock;
    const real* g = block<V>(const_cast<void*>(grad), type, i, n, buffer);
    int64_t j = 0;
    for (; j + kSums <= n; j += kSums)
      for (int s = 0; s < kSums; ++s) {
        const double x = g[j + s];
        sums[s] += x * x;
      }
    for (int s = 0; j + s < n; ++s) {
      const double x = g[j + s];
      sums[s] += x * x;
    }
  }
  double total = 0;
  for (int s = 0; s < kSums; ++s) total += sums[s];
  return total;
}

}  // namespace
}  // namespace bigops
