// softmax(q k^T scale + mask) v for some rows (layout: attention.h).
// Include after a lanes header. Internal linkage throughout.
//
// A block of rows meets all keys of a chunk before the next block: its scores stay in the L1 cache
// (6 KB), and so many exponentials at once hide each other's latency. The maximum of a row is known
// before its first exponential, so values are rescaled once a chunk, not once a panel.

#include "cpu/simd/attention_rows.inl"

namespace bigops {
namespace {

// How q, k and v of a dtype become words that are floats.
template <class L_, class T_>
struct ToFloats {
  using L = L_;
  using T = T_;
  using V = typename L::V;
  using Q = FloatWords<L>;
  static typename L::ireg words(const T* p, int64_t n) { return L::as_words(load_some<V>(p, n)); }
  static void queries(const T* q, int64_t d, char* to) {
    for (int64_t i = 0; i < d; i += V::width)
      V::store(reinterpret_cast<float*>(to) + i, load_some<V>(q + i, d - i));
  }
  // One vector of columns of the values of a key, and of the next key's in a pair.
  static typename L::ireg value(const T* v, const T*, int64_t n) { return words(v, n); }
};

// Values that were not laid out.
template <class L, class T>
struct AsTheyLie : PackedF32<L> {
  using V = typename L::V;
  static constexpr int bytes = sizeof(T);
  static typename V::reg load(const char* p) { return V::load(reinterpret_cast<const T*>(p)); }
};

// P: such as ToFloats. kFew: keys and values are read as they lie.
template <class P, bool kFew>
struct Attention : AttentionRows<typename P::Q> {
  using Q = typename P::Q;
  using L = typename P::L;
  using V = typename P::V;
  using T = typename P::T;
  using reg = typename V::reg;
  using Base = AttentionRows<Q>;
  using Rows = typename Base::Rows;
  using Base::queries, Base::scores, Base::bias, Base::sums, Base::maxima, Base::totals;
  using Base::s0, Base::n, Base::first, Base::last, Base::shared;
  using Base::t, Base::keys, Base::d_words, Base::dv_words, Base::panels, Base::values;
  static constexpr int W = L::width;
  bool ready[Base::kPanels];

  using Base::Base;

  // --- layouts -----------------------------------------------------------------------------

  const T* key_at(int64_t s) const { return static_cast<const T*>(t.k) + (s0 + s) * t.k_row; }
  const T* value_at(int64_t s) const { return static_cast<const T*>(t.v) + (s0 + s) * t.v_row; }
  bool lays_out_values() const { return !kFew || t.dv % W != 0; }

  void lay_out(int64_t panel) {
    if (ready[panel]) return;
    ready[panel] = true;
    const int64_t key = panel * kPanelKeys, count = this->panel_keys(panel);
    if (!kFew) lay_out_keys(key_at(key), count, panels + key * d_words * 4);
    if (!lays_out_values()) return;
    const T* v = value_at(key);
    char* to = values + panel * (kPanelKeys / Q::pair) * dv_words * 4;
    for (int64_t s = 0; s < count; s += Q::pair, to += dv_words * 4)
      for (int64_t c = 0; c < t.dv; c += W) {
        const T* at = v + s * t.v_row + c;
        L::istore(to + c * 4, P::value(at, s + 1 < count ? at + t.v_row : nullptr, t.dv - c));
      }
    if (!Q::tiles) return;
    // a step of words reaches beyond the last key: probabilities of 0 times what is no NaN
    const int64_t end = (count + Q::pair - 1) / Q::pair;
    const int64_t whole = (end + Q::step - 1) / Q::step * Q::step;
    memset(to, 0, static_cast<size_t>((whole - end) * dv_words * 4));
  }

  void lay_out_keys(const T* k, int64_t count, char* panel) const {
    for (int64_t s = 0; s < count; s += W)
      for (int64_t w = 0; w < d_words; w += W) {
        typename L::ireg block[W];
        for (int i = 0; i < W; ++i)
          block[i] = s + i < count
                         ? P::words(k + (s + i) * t.k_row + w * Q::pair, t.d - w * Q::pair)
                         : L::izero();
        L::transpose(block);
        const int64_t some = d_words - w < W ? d_words - w : W;
        for (int j = 0; j < W; ++j)
          if (j < some) L::istore(panel + ((w + j) * kPanelKeys + s) * 4, block[j]);
      }
  }

  // --- a block of rows ---------------------------------------------------------------------

  // Four keys at a time, lanes along the columns.
  template <int MR>
  void score_few(const Rows& rows, const Run& run) const {
    const float* const q = reinterpret_cast<const float*>(queries);
    for (int64_t s = run.begin; s < run.end; s += 4) {
      const T* key[4];
      reg sum[MR][4];
      for (int i = 0; i < 4; ++i) {
        key[i] = key_at(s + i < run.end ? s + i : run.end - 1);
        for (int m = 0; m < MR; ++m) sum[m][i] = V::zero();
      }
      for (int64_t c = 0; c < t.d; c += W) {
        reg k[4];
        for (int i = 0; i < 4; ++i) k[i] = load_some<V>(key[i] + c, t.d - c);
        for (int m = 0; m < MR; ++m) {
          const reg x = V::load(q + m * padded(t.d) + c);
          for (int i = 0; i < 4; ++i) sum[m][i] = V::fma(x, k[i], sum[m][i]);
        }
      }
      for (int m = 0; m < MR; ++m) {
        float* const to = scores + m * keys + s;
        L::reduce4(sum[m], to);
        for (int i = 0; i < 4; ++i)
          to[i] = to[i] * t.scale +
                  (rows.bias == nullptr ? 0 : rows.bias[m * rows.bias_stride + s + i]);
      }
    }
  }

  const T* query_at(int64_t row) const {
    return static_cast<const T*>(t.q) + row / t.t * t.q_head + row % t.t * t.q_row;
  }
  T* out_at(int64_t row) const {
    return static_cast<T*>(t.out) + row / t.t * t.out_head + row % t.t * t.out_row;
  }

  template <int MR>
  void block(int64_t row) {
    Rows rows;
    rows.row = row;
    rows.size = static_cast<int>(t.row1 - row < MR ? t.row1 - row : MR);
    this->find_runs(rows);
    if (rows.count == 0 && !first && !last) return;
    for (int m = 0; m < rows.size; ++m)
      P::queries(query_at(row + m), t.d, queries + m * this->q_bytes);
    if (!kFew || lays_out_values())
      for (int i = 0; i < rows.count; ++i)
        for (int64_t key = rows.runs[i].begin; key < rows.runs[i].end; key += kPanelKeys)
          lay_out(key / kPanelKeys);
    if constexpr (kFew) {
      for (int i = 0; i < rows.count; ++i) score_few<MR>(rows, rows.runs[i]);
    } else if constexpr (Q::tiles) {
      Q::score_runs(*this, rows);
    } else {
      this->template score_runs<MR>(rows);
    }
    float correction[MR];
    this->template soften<MR>(rows, correction);
    if constexpr (Q::tiles)
      Q::weigh_runs(*this, rows, correction);
    else if (lays_out_values())
      this->template weigh_runs<Q, MR>(rows, correction, values, dv_words * 4);
    else
      this->template weigh_runs<AsTheyLie<L, T>, MR>(rows, correction,
                                                     reinterpret_cast<const char*>(value_at(0)),
                                                     t.v_row * static_cast<int64_t>(sizeof(T)));
    if (last && t.partial == nullptr)
      for (int m = 0; m < rows.size; ++m) finish(row + m);
  }

  void finish(int64_t row) const {
    const float total = totals[row - t.row0];
    const reg factor = V::set1(total == 0 ? 0 : 1 / total);
    const float* from = sums + (row - t.row0) * dv_words;
    T* out = out_at(row);
    for (int64_t c = 0; c < t.dv; c += W)
      store_some<V>(out + c, V::mul(V::load(from + c), factor), t.dv - c);
  }

  // All rows from `row` on, MR at a time, the rest in smaller blocks: few sizes, since each is
  // code.
  template <int MR>
  void blocks(int64_t row) {
    for (; row + (Q::tiles ? 1 : MR) <= t.row1; row += MR) block<MR>(row);
    constexpr int kNext = Q::tiles ? 0 : MR > 4 ? 4 : kFew ? MR - 1 : MR / 2;
    if constexpr (kNext > 0)
      if (row < t.row1) blocks<kNext>(row);
  }

  void chunk() {
    for (bool& r : ready) r = false;
    if (this->masked() && this->is_shared()) this->read_mask(t.row0, bias, shared);
    blocks<kFew ? kFewRows : Q::tiles ? int(kMostRows) : L::packed_rows>(t.row0);
  }

  void run() {
    int64_t end = t.key1;
    if (t.causal && t.row1 <= t.t && end > t.row1) end = t.row1 > t.key0 ? t.row1 : t.key0;
    s0 = t.key0;
    if (this->masked() && this->is_shared()) this->find_open_key();
    do {
      first = s0 == t.key0;
      n = end - s0 < keys ? end - s0 : keys;
      last = s0 + n >= end;
      chunk();
      s0 += n;
    } while (s0 < end);
    if (t.partial == nullptr) return;
    for (int64_t r = 0; r < t.row1 - t.row0; ++r) {
      float* to = t.partial + r * partial_floats(t.dv);
      to[0] = maxima[r];
      to[1] = totals[r];
      memcpy(to + 2, sums + r * dv_words, static_cast<size_t>(t.dv) * 4);
    }
  }
};

template <class P>
void attend(const AttentionTask& t) {
  if (t.row1 - t.row0 <= kFewRows)
    Attention<ToFloats<typename P::L, typename P::T>, true>(t).run();
  else
    Attention<P, false>(t).run();
}

template <class V, class T>
void combine(const CombineTask& t) {
  const int64_t step = partial_floats(t.dv);
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* own = t.partial + r * step;
    float top = kShut;
    for (int64_t p = 0; p < t.parts; ++p) {
      const float of = own[p * t.rows * step];
      top = of > top ? of : top;
    }
    const float base = top > kShut ? top : 0;
    float total = 0;
    for (int64_t p = 0; p < t.parts; ++p) {
      const float* part = own + p * t.rows * step;
      total += exp_one<V>(part[0] - base) * part[1];
    }
    const float factor = total == 0 ? 0 : 1 / total;
    T* out = static_cast<T*>(t.out) + r / t.t * t.out_head + r % t.t * t.out_row;
    for (int64_t c = 0; c < t.dv; c += V::width) {
      typename V::reg sum = V::zero();
      for (int64_t p = 0; p < t.parts; ++p) {
        const float* part = own + p * t.rows * step;
        const float weight = exp_one<V>(part[0] - base) * factor;
        sum = V::fma(V::set1(weight), load_some<V>(part + 2 + c, t.dv - c), sum);
      }
      store_some<V>(out + c, sum, t.dv - c);
    }
  }
}

template <class L, class T>
constexpr AttentionKernels attention_table() {
  return {attend<ToFloats<L, T>>, combine<typename L::V, T>};
}

}  // namespace
}  // namespace bigops
