// Rows of queries against a chunk of keys and values that were laid out: masks, scores,
// probabilities, sums (layout: attention.h). Nothing in here knows the dtype of q, k and v.
// Include after a lanes header. Internal linkage throughout.

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
  typename V::reg low = V::set1(-126.0f), least = V::exp2_normal(low);
  typename V::reg operator()(typename V::reg x) const {
    const auto t = V::mul(x, V::set1(1.44269504088896341f));
    return V::sub(V::exp2_normal(V::max(low, t)), least);
  }
};

template <class V>
inline float exp_one(float x) {
  float lanes[V::width];
  V::store(lanes, Softener<V>()(V::set1(x)));
  return lanes[0];
}

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

// Words that are floats.
template <class L_>
struct FloatWords : PackedF32<L_> {
  using L = L_;
  using V = typename L::V;
  static constexpr int pair = 1;  // elements of a word
  static constexpr int step = 1;  // words that a product takes at once
  static constexpr bool tiles = false;
  static void probabilities(float* row, int64_t i, typename V::reg p) { V::store(row + i, p); }
};

// Q: what a word is, such as FloatWords.
template <class Q>
struct AttentionRows {
  using L = typename Q::L;
  using V = typename Q::V;
  using reg = typename V::reg;
  static constexpr int W = L::width;
  static constexpr int64_t kPanels = kChunkKeys / kPanelKeys;

  const AttentionTask& t;
  const int64_t keys;      // of a chunk, in the scratch
  const int64_t d_words;   // of a row of q and k
  const int64_t q_bytes;   // from one row of q to the next
  const int64_t dv_words;  // of a row of values: columns, padded
  char *const panels, *const values, *const queries;
  float *const scores, *const bias, *const sums, *const maxima, *const totals;
  // of the chunk at hand
  int64_t s0 = 0, n = 0;
  bool first = true, last = true;
  Open shared[kPanels];
  int64_t open_key = 0;  // the first that a shared mask opens for sure

  explicit AttentionRows(const AttentionTask& task)
      : t(task),
        keys(task.key1 - task.key0 < kChunkKeys
                 ? (task.key1 - task.key0 + kPanelKeys - 1) / kPanelKeys * kPanelKeys
                 : kChunkKeys),
        d_words((task.d + Q::pair * Q::step - 1) / (Q::pair * Q::step) * Q::step),
        q_bytes(padded(task.d) * 4),
        dv_words((task.dv + W - 1) / W * W),
        panels(task.scratch),
        values(panels + keys * d_words * 4),
        queries(values + keys / Q::pair * dv_words * 4),
        scores(reinterpret_cast<float*>(queries + kMostRows * q_bytes)),
        bias(scores + kMostRows * keys),
        sums(bias + kMostRows * keys),
        maxima(sums + padded(task.row1 - task.row0) * dv_words),
        totals(maxima + padded(task.row1 - task.row0)) {}

  int64_t panel_keys(int64_t panel) const {
    const int64_t left = n - panel * kPanelKeys;
    return left < kPanelKeys ? left : kPanelKeys;
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
    int64_t row;  // the first, of the group
    int size;
    int64_t stop;              // keys of the chunk that some row attends to
    int64_t query[kMostRows];  // of its head
    const float* bias;         // or null
    int64_t bias_stride;
    Run runs[kPanels];
    int count = 0;  // of runs
  };

  // Which keys of the chunk the rows attend to.
  void find_runs(Rows& rows) const {
    Open open[kPanels];
    for (Open& o : open) o = kSomewhere;
    rows.stop = 0;
    for (int m = 0; m < rows.size; ++m) {
      rows.query[m] = (rows.row + m) % t.t;
      const int64_t stop = t.causal ? rows.query[m] + 1 - s0 : n;
      rows.stop = stop > rows.stop ? stop : rows.stop;
    }
    rows.stop = rows.stop < n ? rows.stop : n;
    rows.bias = nullptr;
    rows.bias_stride = 0;
    if (masked()) {
      Open of[kMostRows][kPanels];
      rows.bias = bias;
      if (!is_shared()) rows.bias_stride = keys;
      for (int m = 0; m < rows.size; ++m) {
        if (!is_shared()) {
          read_mask(rows.row + m, bias + m * keys, of[m]);
          continue;
        }
        for (int64_t i = 0; i < kPanels; ++i) of[m][i] = shared[i];
      }
      const int64_t used = (rows.stop + kPanelKeys - 1) / kPanelKeys;
      Open needed = kSomewhere;  // unless a row has no key that is open for sure
      for (int m = 0; m < rows.size; ++m) {
        const int64_t least = is_shared() ? open_key : t.s;
        bool somewhere = least < (t.causal && rows.query[m] + 1 < t.s ? rows.query[m] + 1 : t.s) ||
                         (!first && maxima[rows.row - t.row0 + m] > kNearlyShut);
        const int64_t own = t.causal ? (rows.query[m] + 1 - s0) / kPanelKeys : used;
        for (int64_t i = 0; i < own && i < used; ++i) somewhere |= of[m][i] == kSomewhere;
        if (!somewhere) needed = kBarely;
      }
      for (int64_t i = 0; i < used; ++i) {
        bool any = false;
        for (int m = 0; m < rows.size; ++m) any |= of[m][i] >= needed;
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
  template <class O, int MR, int NV>
  static inline __attribute__((always_inline)) void multiply(const char* x, int64_t x_stride,
                                                             const char* panel, int64_t stride,
                                                             int64_t words, reg (&sum)[MR][NV]) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < words; ++k) {
      typename O::operand w[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) w[v] = O::load(panel + k * stride + v * W * O::bytes);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const auto xv = O::word(x + m * x_stride + k * 4);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[m][v] = O::mac(sum[m][v], xv, w[v]);
      }
    }
  }

  template <int MR, int NV>
  void score(const Rows& rows, int64_t key) const {
    reg sum[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[m][v] = V::zero();
    const char* panel = panels + (key / kPanelKeys * d_words * kPanelKeys + key % kPanelKeys) * 4;
    multiply<Q, MR, NV>(queries, q_bytes, panel, kPanelKeys * 4, d_words, sum);
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

  template <int MR>
  void score_runs(const Rows& rows) const {
    constexpr int NV = L::packed_vectors;
    for (int i = 0; i < rows.count; ++i)
      for (int64_t key = rows.runs[i].begin; key < rows.runs[i].end;)
        key += W * vectors<NV>((rows.runs[i].end - key + W - 1) / W,
                               [&](auto v) { score<MR, v.value>(rows, key); });
  }

  template <int N>
  struct Count {
    static constexpr int value = N;
  };
  // f(Count<v>()) for the v = min(left, N) vectors that a register block takes next; gives v.
  template <int N, class F>
  static int vectors(int64_t left, const F& f) {
    if constexpr (N > 1)
      if (left < N) return vectors<N - 1>(left, f);
    f(Count<N>());
    return N;
  }

  // Scores to probabilities times their sum; old sums of row m count `correction[m]` times. One
  // step for all rows before the next: what reduces a vector waits for itself alone.
  template <int MR>
  void soften(const Rows& rows, float (&correction)[MR]) {
    const int size = Q::tiles ? rows.size : MR;
    const int64_t end = (rows.stop + W - 1) / W * W;
    for (int m = 0; m < size; ++m) {
      int64_t open = rows.stop;
      if (t.causal && rows.query[m] + 1 - s0 < open)
        open = rows.query[m] + 1 > s0 ? rows.query[m] + 1 - s0 : 0;
      for (int64_t i = open; i < end; ++i) scores[m * keys + i] = kShut;
    }
    reg tops[MR];
    for (int m = 0; m < size; ++m) {
      tops[m] = V::set1(kShut);
      for (int i = 0; i < rows.count; ++i)
        for (int64_t s = rows.runs[i].begin; s < rows.runs[i].end; s += W)
          tops[m] = V::max(V::load(scores + m * keys + s), tops[m]);
    }
    const int64_t r = rows.row - t.row0;
    float base[MR];
    for (int m = 0; m < size; ++m) {
      const float before = first ? kShut : maxima[r + m];
      float top = V::reduce_max(tops[m]);
      top = top > before ? top : before;
      maxima[r + m] = top;
      base[m] = top > kShut ? top : 0;  // a row that is shut: exp(-inf - 0) is 0
      correction[m] = before > kShut ? exp_one<V>(before - base[m]) : 0;
    }
    const Softener<V> soft;
    reg sum[MR];
    for (int m = 0; m < size; ++m) {
      float* const row = scores + m * keys;
      const reg shift = V::set1(base[m]);
      sum[m] = V::zero();
      for (int i = 0; i < rows.count; ++i)
        for (int64_t s = rows.runs[i].begin; s < rows.runs[i].end; s += W) {
          const reg p = soft(V::sub(V::load(row + s), shift));
          sum[m] = V::add(sum[m], p);
          Q::probabilities(row, s, p);
        }
    }
    for (int m = 0; m < size; ++m)
      totals[r + m] = (first ? 0 : totals[r + m] * correction[m]) + V::reduce(sum[m]);
  }

  // Adds the values of the runs, times their probabilities, to the sums of MR rows by NV vectors of
  // columns. O: the operand that values are; `at`: the first key's, at this column.
  template <class O, int MR, int NV>
  void weigh(const Rows& rows, int64_t column, const float* correction, const char* at,
             int64_t stride) {
    reg sum[MR][NV];
    float* const own = sums + (rows.row - t.row0) * dv_words + column;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        sum[m][v] =
            first ? V::zero() : V::mul(V::load(own + m * dv_words + v * W), V::set1(correction[m]));
    for (int i = 0; i < rows.count; ++i) {
      const int64_t begin = rows.runs[i].begin / Q::pair;
      const int64_t words = (rows.runs[i].end - rows.runs[i].begin + Q::pair - 1) / Q::pair;
      multiply<O, MR, NV>(reinterpret_cast<const char*>(scores) + begin * 4, keys * 4,
                          at + begin * stride, stride, words, sum);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) V::store(own + m * dv_words + v * W, sum[m][v]);
  }

  // `from`: the values of the chunk's first key.
  template <class O, int MR>
  void weigh_runs(const Rows& rows, const float* correction, const char* from, int64_t stride) {
    constexpr int NV = L::packed_vectors;
    for (int64_t column = 0; column < dv_words;)
      column += W * vectors<NV>((dv_words - column) / W, [&](auto v) {
                  weigh<O, MR, v.value>(rows, column, correction, from + column * O::bytes, stride);
                });
  }
};

}  // namespace
}  // namespace bigops
