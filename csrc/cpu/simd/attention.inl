// softmax(q k^T scale + mask) v for some rows (layout: attention.h).
// Include after a lanes header. Internal linkage throughout.
//
// A block of rows meets all keys of a chunk before the next block: its scores stay in the L1 cache
// (6 KB), and so many exponentials at once hide each other's latency. The maximum of a row is known
// before its first exponential, so values are rescaled once a chunk, not once a panel.

#include "cpu/simd/attention.h"
#include "cpu/simd/packed_linear.inl"

namespace bigops {
namespace {

constexpr float kShut = -__builtin_inff();
// Masks with the lowest float in place of -inf: added to it, no score counts any more, so that the
// key's exponential is exactly 0 beside any other key.
constexpr float kNearlyShut = -1e30f;

template <class V, class T>
inline typename V::reg load_some(const T* p, int64_t n) {
  return n >= V::width ? V::load(p) : V::load_n(p, static_cast<int>(n));
}

template <class V, class T>
inline void store_some(T* p, typename V::reg v, int64_t n) {
  if (n >= V::width)
    V::store(p, v);
  else
    V::store_n(p, v, static_cast<int>(n));
}

// e^x for x <= 0, and 0 below -87: what a shut key has must be exactly 0, and a result that is no
// normal number costs 150 cycles.
template <class V>
struct Softener {
  typename V::reg low = V::set1(-87.0f), least = V::exp_normal(low);
  typename V::reg operator()(typename V::reg x) const {
    return V::sub(V::exp_normal(V::max(low, x)), least);
  }
};

template <class V>
inline float exp_one(float x) {
  float lanes[V::width];
  V::store(lanes, Softener<V>()(V::set1(x)));
  return lanes[0];
}

// Words that are floats.
template <class L_, class T_>
struct AttendF32 : PackedF32<L_> {
  using L = L_;
  using T = T_;
  using V = typename L::V;
  static constexpr int pair = 1;  // elements of a word

  static typename L::ireg words(const T* p, int64_t n) { return L::as_words(load_some<V>(p, n)); }
  static void queries(const T* q, int64_t d, char* to) {
    for (int64_t i = 0; i < d; i += V::width)
      V::store(reinterpret_cast<float*>(to) + i, load_some<V>(q + i, d - i));
  }
  // One vector of columns of the values of a key, then of its neighbour.
  static typename L::ireg value(const T* v, const T*, int64_t n) { return words(v, n); }
  static void probabilities(float* row, int64_t i, typename V::reg p) { V::store(row + i, p); }
};

// Where a mask lets attend: nowhere, only by a number that shuts a key out beside any other, or
// somewhere.
enum Open : uint8_t { kNowhere = 0, kBarely, kSomewhere };

inline Open open_of(float top) {
  return !(top <= kNearlyShut) ? kSomewhere : top > kShut ? kBarely : kNowhere;
}

// A run of keys [begin, end) of a chunk.
struct Run {
  int64_t begin, end;
};

// Values that were not laid out.
template <class L, class T>
struct AsTheyLie : PackedF32<L> {
  using V = typename L::V;
  static constexpr int bytes = sizeof(T);
  static typename V::reg load(const char* p) { return V::load(reinterpret_cast<const T*>(p)); }
};

// kFew: keys and values are read as they lie.
template <class P, bool kFew>
struct Attention {
  using L = typename P::L;
  using V = typename P::V;
  using T = typename P::T;
  using reg = typename V::reg;
  static constexpr int W = L::width;
  static constexpr int R = L::packed_rows;
  static constexpr int64_t kPanels = kChunkKeys / kPanelKeys;

  const AttentionTask& t;
  const int64_t keys;      // of a chunk, in the scratch
  const int64_t d_words;   // of a row of q and k
  const int64_t dv_words;  // of a row of values: columns, padded
  char *const panels, *const values, *const queries;
  float *const scores, *const bias, *const sums, *const maxima, *const totals;
  // of the chunk at hand
  int64_t s0 = 0, n = 0;
  bool first = true, last = true;
  bool ready[kPanels];
  Open shared[kPanels];
  int64_t open_key = 0;  // the first that a shared mask opens for sure

  explicit Attention(const AttentionTask& task)
      : t(task),
        keys(task.key1 - task.key0 < kChunkKeys
                 ? (task.key1 - task.key0 + kPanelKeys - 1) / kPanelKeys * kPanelKeys
                 : kChunkKeys),
        d_words((task.d + P::pair - 1) / P::pair),
        dv_words((task.dv + W - 1) / W * W),
        panels(task.scratch),
        values(panels + keys * d_words * 4),
        queries(values + keys / P::pair * dv_words * 4),
        scores(reinterpret_cast<float*>(queries + kMostRows * padded(task.d) * 4)),
        bias(scores + kMostRows * keys),
        sums(bias + kMostRows * keys),
        maxima(sums + (task.row1 - task.row0) * dv_words),
        totals(maxima + (task.row1 - task.row0)) {}

  // --- layouts -----------------------------------------------------------------------------

  int64_t panel_keys(int64_t panel) const {
    const int64_t left = n - panel * kPanelKeys;
    return left < kPanelKeys ? left : kPanelKeys;
  }

  const T* key_at(int64_t s) const { return static_cast<const T*>(t.k) + (s0 + s) * t.k_row; }
  const T* value_at(int64_t s) const { return static_cast<const T*>(t.v) + (s0 + s) * t.v_row; }
  bool lays_out_values() const { return !kFew || t.dv % W != 0; }

  void lay_out(int64_t panel) {
    if (ready[panel]) return;
    ready[panel] = true;
    const int64_t key = panel * kPanelKeys, count = panel_keys(panel);
    if (!kFew) lay_out_keys(key_at(key), count, panels + key * d_words * 4);
    if (!lays_out_values()) return;
    const T* v = value_at(key);
    char* to = values + panel * (kPanelKeys / P::pair) * dv_words * 4;
    for (int64_t s = 0; s < count; s += P::pair, to += dv_words * 4)
      for (int64_t c = 0; c < t.dv; c += W) {
        const T* at = v + s * t.v_row + c;
        L::istore(to + c * 4, P::value(at, s + 1 < count ? at + t.v_row : nullptr, t.dv - c));
      }
  }

  void lay_out_keys(const T* k, int64_t count, char* panel) const {
    for (int64_t s = 0; s < count; s += W)
      for (int64_t w = 0; w < d_words; w += W) {
        typename L::ireg block[W];
        for (int i = 0; i < W; ++i)
          block[i] = s + i < count
                         ? P::words(k + (s + i) * t.k_row + w * P::pair, t.d - w * P::pair)
                         : L::izero();
        L::transpose(block);
        const int64_t some = d_words - w < W ? d_words - w : W;
        for (int j = 0; j < W; ++j)
          if (j < some) L::istore(panel + ((w + j) * kPanelKeys + s) * 4, block[j]);
      }
  }

  // --- mask --------------------------------------------------------------------------------

  bool masked() const { return t.mask_kind != kNoMask; }
  // Whether all rows have the same mask.
  bool is_shared() const { return t.mask_row == 0 && (t.mask_head == 0 || t.row1 <= t.t); }

  // f(a pointer to the mask of a row in its own dtype)
  template <class F>
  void with_mask(int64_t row, const F& f) const {
    const int64_t at = row / t.t * t.mask_head + row % t.t * t.mask_row;
    switch (t.mask_kind) {
      case kMaskBool: return f(static_cast<const uint8_t*>(t.mask) + at);
      case kMaskF32: return f(static_cast<const float*>(t.mask) + at);
      case kMaskBf16: return f(static_cast<const bf16*>(t.mask) + at);
      case kMaskF16: return f(static_cast<const f16*>(t.mask) + at);
      default: return f(static_cast<const double*>(t.mask) + at);
    }
  }

  static float as_added(uint8_t m) { return m ? 0.0f : kShut; }
  static float as_added(double m) { return static_cast<float>(m); }
  template <class M>
  static float as_added(const M* m) {
    float lanes[W];
    V::store(lanes, V::load_n(m, 1));
    return lanes[0];
  }
  static float as_added(const uint8_t* m) { return as_added(*m); }
  static float as_added(const double* m) { return as_added(*m); }

  static void convert(const uint8_t* m, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = as_added(m[i]);
  }
  static void convert(const double* m, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = as_added(m[i]);
  }
  template <class M>
  static void convert(const M* m, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += W)
      store_some<V>(to + i, load_some<V>(m + i, count - i), count - i);
  }

  // One row of the mask as floats to add, shut beyond the chunk; what each panel of it lets attend.
  void read_mask(int64_t row, float* to, Open (&open)[kPanels]) const {
    with_mask(row, [&](const auto* m) {
      if (t.mask_key == 1)
        convert(m + s0, n, to);
      else
        for (int64_t i = 0; i < n; ++i) to[i] = as_added(m + (s0 + i) * t.mask_key);
    });
    const int64_t end = (n + W - 1) / W * W;
    for (int64_t i = n; i < end; ++i) to[i] = kShut;
    for (int64_t panel = 0; panel * kPanelKeys < n; ++panel) {
      reg top = V::set1(kShut);
      const int64_t stop = panel * kPanelKeys + (panel_keys(panel) + W - 1) / W * W;
      for (int64_t i = panel * kPanelKeys; i < stop; i += W) top = V::max(top, V::load(to + i));
      open[panel] = open_of(V::reduce_max(top));
    }
  }

  void find_open_key() {
    with_mask(t.row0, [&](const auto* m) {
      while (open_key < t.s && open_of(as_added(m + open_key * t.mask_key)) != kSomewhere)
        ++open_key;
    });
  }

  // --- a block of rows ---------------------------------------------------------------------

  struct Rows {
    int64_t row;               // of the group
    int64_t stop;              // keys of the chunk that some row attends to
    int64_t query[kMostRows];  // of its head
    const float* bias;         // or null
    int64_t bias_stride;
    Run runs[kPanels];
    int count = 0;  // of runs
  };

  // Which keys of the chunk the rows attend to.
  template <int MR>
  void find_runs(Rows& rows) const {
    Open open[kPanels];
    for (Open& o : open) o = kSomewhere;
    rows.stop = 0;
    for (int m = 0; m < MR; ++m) {
      rows.query[m] = (rows.row + m) % t.t;
      const int64_t stop = t.causal ? rows.query[m] + 1 - s0 : n;
      rows.stop = stop > rows.stop ? stop : rows.stop;
    }
    rows.stop = rows.stop < n ? rows.stop : n;
    rows.bias = nullptr;
    rows.bias_stride = 0;
    if (masked()) {
      Open of[MR][kPanels];
      rows.bias = bias;
      if (!is_shared()) rows.bias_stride = keys;
      for (int m = 0; m < MR; ++m) {
        if (!is_shared()) {
          read_mask(rows.row + m, bias + m * keys, of[m]);
          continue;
        }
        for (int64_t i = 0; i < kPanels; ++i) of[m][i] = shared[i];
      }
      const int64_t used = (rows.stop + kPanelKeys - 1) / kPanelKeys;
      Open needed = kSomewhere;  // unless a row has no key that is open for sure
      for (int m = 0; m < MR; ++m) {
        const int64_t least = is_shared() ? open_key : t.s;
        bool somewhere = least < (t.causal && rows.query[m] + 1 < t.s ? rows.query[m] + 1 : t.s) ||
                         (!first && maxima[rows.row - t.row0 + m] > kNearlyShut);
        const int64_t own = t.causal ? (rows.query[m] + 1 - s0) / kPanelKeys : used;
        for (int64_t i = 0; i < own && i < used; ++i) somewhere |= of[m][i] == kSomewhere;
        if (!somewhere) needed = kBarely;
      }
      for (int64_t i = 0; i < used; ++i) {
        bool any = false;
        for (int m = 0; m < MR; ++m) any |= of[m][i] >= needed;
        if (!any) open[i] = kNowhere;
      }
    }
    for (int64_t i = 0; i * kPanelKeys < rows.stop; ++i) {
      if (open[i] == kNowhere) continue;
      const int64_t begin = i * kPanelKeys;
      const int64_t end = begin + kPanelKeys < rows.stop ? begin + kPanelKeys : rows.stop;
      if (rows.count > 0 && rows.runs[rows.count - 1].end == begin)
        rows.runs[rows.count - 1].end = end;
      else
        rows.runs[rows.count++] = {begin, end};
    }
  }

  // sum[m][v] += x[m][word] * panel[word][v] over all words.
  template <class Q, int MR, int NV>
  static inline __attribute__((always_inline)) void multiply(const char* x, int64_t x_stride,
                                                             const char* panel, int64_t stride,
                                                             int64_t words, reg (&sum)[MR][NV]) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < words; ++k) {
      typename Q::operand w[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) w[v] = Q::load(panel + k * stride + v * W * Q::bytes);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const auto xv = Q::word(x + m * x_stride + k * 4);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[m][v] = Q::mac(sum[m][v], xv, w[v]);
      }
    }
  }

  template <int MR, int NV>
  inline void score(const Rows& rows, int64_t key) const {
    reg sum[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[m][v] = V::zero();
    const char* panel = panels + (key / kPanelKeys * d_words * kPanelKeys + key % kPanelKeys) * 4;
    multiply<P, MR, NV>(queries, padded(t.d) * 4, panel, kPanelKeys * 4, d_words, sum);
    const reg scale = V::set1(t.scale);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const int64_t at = key + v * W;
        V::store(scores + m * keys + at,
                 rows.bias == nullptr
                     ? V::mul(sum[m][v], scale)
                     : V::fma(sum[m][v], scale, V::load(rows.bias + m * rows.bias_stride + at)));
      }
  }

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

  template <int MR>
  void score_runs(const Rows& rows) {
    constexpr int NV = L::packed_vectors;
    if constexpr (kFew) {
      for (int i = 0; i < rows.count; ++i) {
        if (lays_out_values())
          for (int64_t key = rows.runs[i].begin; key < rows.runs[i].end; key += kPanelKeys)
            lay_out(key / kPanelKeys);
        score_few<MR>(rows, rows.runs[i]);
      }
      return;
    }
    for (int i = 0; i < rows.count; ++i)
      for (int64_t key = rows.runs[i].begin; key < rows.runs[i].end;) {
        lay_out(key / kPanelKeys);
        const int64_t left = rows.runs[i].end - key;
        if (left > (NV - 1) * W) {
          score<MR, NV>(rows, key);
          key += NV * W;
          continue;
        }
        if constexpr (NV > 3) {
          if (left > 2 * W) {
            score<MR, 3>(rows, key);
            break;
          }
        }
        if constexpr (NV > 2) {
          if (left > W) {
            score<MR, 2>(rows, key);
            break;
          }
        }
        score<MR, 1>(rows, key);
        break;
      }
  }

  // Scores to probabilities times their sum; old sums of row m count `correction[m]` times. One
  // step for all rows before the next: what reduces a vector waits for itself alone.
  template <int MR>
  void soften(const Rows& rows, float (&correction)[MR]) {
    const int64_t end = (rows.stop + W - 1) / W * W;
    for (int m = 0; m < MR; ++m) {
      int64_t open = rows.stop;
      if (t.causal && rows.query[m] + 1 - s0 < open)
        open = rows.query[m] + 1 > s0 ? rows.query[m] + 1 - s0 : 0;
      for (int64_t i = open; i < end; ++i) scores[m * keys + i] = kShut;
    }
    reg tops[MR];
    for (int m = 0; m < MR; ++m) {
      tops[m] = V::set1(kShut);
      for (int i = 0; i < rows.count; ++i)
        for (int64_t s = rows.runs[i].begin; s < rows.runs[i].end; s += W)
          tops[m] = V::max(V::load(scores + m * keys + s), tops[m]);
    }
    const int64_t r = rows.row - t.row0;
    float base[MR];
    for (int m = 0; m < MR; ++m) {
      const float before = first ? kShut : maxima[r + m];
      float top = V::reduce_max(tops[m]);
      top = top > before ? top : before;
      maxima[r + m] = top;
      base[m] = top > kShut ? top : 0;  // a row that is shut: exp(-inf - 0) is 0
      correction[m] = before > kShut ? exp_one<V>(before - base[m]) : 0;
    }
    const Softener<V> soft;
    reg sum[MR];
    for (int m = 0; m < MR; ++m) {
      float* const row = scores + m * keys;
      const reg shift = V::set1(base[m]);
      sum[m] = V::zero();
      for (int i = 0; i < rows.count; ++i)
        for (int64_t s = rows.runs[i].begin; s < rows.runs[i].end; s += W) {
          const reg p = soft(V::sub(V::load(row + s), shift));
          sum[m] = V::add(sum[m], p);
          P::probabilities(row, s, p);
        }
    }
    for (int m = 0; m < MR; ++m)
      totals[r + m] = (first ? 0 : totals[r + m] * correction[m]) + V::reduce(sum[m]);
  }

  template <int MR, int NV>
  inline void weigh(const Rows& rows, int64_t column, const float* correction) {
    reg sum[MR][NV];
    float* const own = sums + (rows.row - t.row0) * dv_words + column;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        sum[m][v] =
            first ? V::zero() : V::mul(V::load(own + m * dv_words + v * W), V::set1(correction[m]));
    for (int i = 0; i < rows.count; ++i) {
      const int64_t begin = rows.runs[i].begin / P::pair;
      const int64_t words = (rows.runs[i].end - rows.runs[i].begin + P::pair - 1) / P::pair;
      const char* p = reinterpret_cast<const char*>(scores) + begin * 4;
      if (lays_out_values())
        multiply<P, MR, NV>(p, keys * 4, values + (begin * dv_words + column) * 4, dv_words * 4,
                            words, sum);
      else
        multiply<AsTheyLie<L, T>, MR, NV>(p, keys * 4,
                                          reinterpret_cast<const char*>(value_at(begin) + column),
                                          t.v_row * static_cast<int64_t>(sizeof(T)), words, sum);
    }
    if (!last || t.partial != nullptr) {
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) V::store(own + m * dv_words + v * W, sum[m][v]);
      return;
    }
    for (int m = 0; m < MR; ++m) {
      const float total = totals[rows.row - t.row0 + m];
      const reg factor = V::set1(total == 0 ? 0 : 1 / total);
      T* out = out_at(rows.row + m) + column;
      for (int v = 0; v < NV; ++v)
        store_some<V>(out + v * W, V::mul(sum[m][v], factor), t.dv - column - v * W);
    }
  }

  T* out_at(int64_t row) const {
    return static_cast<T*>(t.out) + row / t.t * t.out_head + row % t.t * t.out_row;
  }

  template <int MR>
  void weigh_runs(const Rows& rows, const float* correction) {
    constexpr int NV = L::packed_vectors;
    int64_t column = 0;
    for (; column + NV * W <= dv_words; column += NV * W) weigh<MR, NV>(rows, column, correction);
    const int64_t left = (dv_words - column) / W;
    if constexpr (NV > 3)
      if (left == 3) return weigh<MR, 3>(rows, column, correction);
    if constexpr (NV > 2)
      if (left == 2) return weigh<MR, 2>(rows, column, correction);
    if (left == 1) weigh<MR, 1>(rows, column, correction);
  }

  const T* query_at(int64_t row) const {
    return static_cast<const T*>(t.q) + row / t.t * t.q_head + row % t.t * t.q_row;
  }

  template <int MR>
  void block(int64_t row) {
    Rows rows;
    rows.row = row;
    find_runs<MR>(rows);
    if (rows.count == 0 && !first && !last) return;
    for (int m = 0; m < MR; ++m) P::queries(query_at(row + m), t.d, queries + m * padded(t.d) * 4);
    score_runs<MR>(rows);
    float correction[MR];
    soften(rows, correction);
    weigh_runs<MR>(rows, correction);
  }

  // All rows from `row` on, MR at a time, the rest in one smaller block.
  template <int MR>
  void blocks(int64_t row) {
    for (; row + MR <= t.row1; row += MR) block<MR>(row);
    if constexpr (MR > 1)
      if (row < t.row1) blocks<MR - 1>(row);
  }

  void chunk() {
    for (bool& r : ready) r = false;
    if (masked() && is_shared()) read_mask(t.row0, bias, shared);
    blocks<kFew ? kFewRows : R>(t.row0);
  }

  void run() {
    int64_t end = t.key1;
    if (t.causal && t.row1 <= t.t && end > t.row1) end = t.row1 > t.key0 ? t.row1 : t.key0;
    s0 = t.key0;
    if (masked() && is_shared()) find_open_key();
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
    Attention<AttendF32<typename P::L, typename P::T>, true>(t).run();
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
  return {attend<AttendF32<L, T>>, combine<typename L::V, T>};
}

}  // namespace
}  // namespace bigops
