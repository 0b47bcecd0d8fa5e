// attention in bfloat16 by the tile registers of AMX: 16 rows of queries, 16 keys or columns, 16
// words at once. Keys and values lie as for vdpbf16ps.
#include "common/isa.h"

#ifdef BIGOPS_AMX
#include "cpu/simd/attention_pairs.inl"
#include "cpu/simd/tile_blocks.h"
#include "cpu/simd/tiles_amx.h"

namespace bigops {
namespace {

struct TileWords : PairWords {
  static constexpr int step = 16;
  static constexpr bool tiles = true;

  // The sums of NV tiles of columns, in registers 0 .. NV - 1, with x in 4 and w behind it.
  template <int NV>
  static void multiply(const char* x, int64_t x_stride, const char* w, int64_t stride,
                       int64_t words) {
    for (int64_t k = 0; k < words; k += step) {
      AmxTiles::load<4>(x + k * 4, x_stride);
      each<NV>([&](auto v) {
        constexpr int kW = 5 + v.value % 3;
        AmxTiles::load<kW>(w + k * stride + v.value * 64, stride);
        AmxTiles::dot_bf16<v.value, 4, kW>();
      });
    }
  }

  // f(At<v>()) for the v = min(left, 4) tiles that are taken at once.
  template <class F>
  static int tiles_of(int64_t left, const F& f) {
    switch (left) {
      case 1: f(At<1>()); return 1;
      case 2: f(At<2>()); return 2;
      case 3: f(At<3>()); return 3;
      default: f(At<4>()); return 4;
    }
  }

  template <class A>
  static void score_runs(A& a, const typename A::Rows& rows) {
    const __m512 scale = _mm512_set1_ps(a.t.scale);
    const int64_t stride = a.keys * 4;
    for (int i = 0; i < rows.count; ++i)
      for (int64_t key = rows.runs[i].begin; key < rows.runs[i].end;) {
        const char* panel = a.panels + key * a.d_words * 4;
        float* const to = a.scores + key;
        const int count = tiles_of((rows.runs[i].end - key + 15) / 16, [&](auto n) {
          each<n.value>([](auto v) { AmxTiles::zero<v.value>(); });
          multiply<n.value>(a.queries, a.q_bytes, panel, kPanelKeys * 4, a.d_words);
          each<n.value>([&](auto v) { AmxTiles::store<v.value>(to + v.value * 16, stride); });
        });
        for (int m = 0; m < rows.size; ++m)
          for (int v = 0; v < count; ++v) {
            float* const at = to + m * a.keys + v * 16;
            const __m512 x = _mm512_loadu_ps(at);
            _mm512_storeu_ps(
                at, rows.bias == nullptr
                        ? _mm512_mul_ps(x, scale)
                        : _mm512_fmadd_ps(
                              x, scale,
                              _mm512_loadu_ps(rows.bias + m * rows.bias_stride + key + v * 16)));
          }
        key += count * 16;
      }
  }

  template <class A>
  static void weigh_runs(A& a, const typename A::Rows& rows, const float* correction) {
    float* const sums = a.sums + (rows.row - a.t.row0) * a.dv_words;
    if (!a.first)
      for (int m = 0; m < rows.size; ++m)
        for (int64_t c = 0; c < a.dv_words; c += 16) {
          float* const at = sums + m * a.dv_words + c;
          _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(correction[m])));
        }
    char* const scores = reinterpret_cast<char*>(a.scores);
    for (int i = 0; i < rows.count; ++i) {  // the last step of a run reaches beyond its vectors
      const int64_t end = (rows.runs[i].end + 15) / 16 * 16;
      if (end % 32 != 0)
        for (int m = 0; m < rows.size; ++m) memset(scores + m * a.keys * 4 + end * 2, 0, 32);
    }
    const int64_t stride = a.dv_words * 4;
    for (int64_t column = 0; column < a.dv_words;)
      column +=
          16 * tiles_of((a.dv_words - column) / 16, [&](auto n) {
            float* const own = sums + column;
            each<n.value>([&](auto v) {
              if (a.first)
                AmxTiles::zero<v.value>();
              else
                AmxTiles::load<v.value>(own + v.value * 16, stride);
            });
            for (int i = 0; i < rows.count; ++i) {
              const int64_t begin = rows.runs[i].begin / 2;
              multiply<n.value>(scores + begin * 4, a.keys * 4,
                                a.values + (begin * a.dv_words + column) * 4, stride,
                                (rows.runs[i].end - rows.runs[i].begin + 1) / 2);
            }
            each<n.value>([&](auto v) { AmxTiles::store<v.value>(own + v.value * 16, stride); });
          });
  }
};

template <template <class> class To>
void attend_by_tiles(const AttentionTask& t) {
  if (t.row1 - t.row0 <= kFewRows) return attend<To<PairWords>>(t);
  AmxTiles::configure(TileShape(16, 64));
  Attention<To<TileWords>, false>(t).run();
  AmxTiles::release();
}

}  // namespace

const AttentionKernels amx_attention_bf16 = {attend_by_tiles<ToPairs>, combine<Avx512, bf16>};
const AttentionKernels amx_attention_f32 = {attend_by_tiles<FloatsToPairs>, combine<Avx512, float>};

}  // namespace bigops
#endif
