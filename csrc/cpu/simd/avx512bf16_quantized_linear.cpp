// bf16 activations: vdpbf16ps on the whole numbers q - zero_point, which bf16 holds exactly.

#include "cpu/simd/lines_avx512.h"
#include "cpu/simd/quantized_linear.inl"

namespace bigops {
namespace {

using Lines = Avx512LinesOf<Avx512Lanes>;

struct PairSums {
  using Sum = __m512;
  using W = __m512i;
  static constexpr bool integer = false;
  static Sum nothing() { return _mm512_setzero_ps(); }
  static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static Sum to_float(Sum a) { return a; }
  static __m512i word(const uint8_t* p) {
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
  }
  static Sum mac(Sum acc, __m512i x, W w) {
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w);
  }
};

// bf16 of the whole numbers -16..15 in two's complement of 5 bits, or of u - 8 for 4 bits twice.
alignas(64) constexpr uint16_t kSigned[32] = {
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
    0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130,
    0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
alignas(64) constexpr uint16_t kBiased[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

// vpermw looks up by 5 bits. Without a zero point the table repeats, so nothing is masked.
template <class Q, bool kZero>
struct NibblesToPairs : PairSums {
  using Zero = __m512i;
  static constexpr int steps = 4;
  __m512i table = _mm512_load_si512(kZero ? kSigned : kBiased);
  static Zero zero(const int8_t* p) {
    if (!kZero) return _mm512_setzero_si512();
    const __m512i z = _mm512_add_epi32(Lines::iload_s8(p), _mm512_set1_epi32(8));
    return _mm512_or_si512(z, _mm512_slli_epi32(z, 16));
  }
  template <int s>
  BIGOPS_INLINE W operand(__m512i line, Zero zero) const {
    __m512i at = s == 0 ? line : _mm512_srli_epi32(line, 4 * s);
    if (kZero) at = _mm512_sub_epi16(_mm512_and_si512(at, _mm512_set1_epi16(15)), zero);
    return _mm512_permutexvar_epi16(at, table);
  }
  template <class G>
  static BIGOPS_INLINE void each_step(const G& g) {
    g(Step<0>());
    g(Step<1>());
    g(Step<2>());
    g(Step<3>());
  }
};

// The upper half of a float that is a small whole number is that number in bf16.
template <class Q, bool kZero>
struct BytesToPairs : PairSums {
  using Zero = __m512;
  static constexpr int steps = 2;
  static Zero zero(const int8_t* p) {
    return kZero ? Lines::to_float(Lines::iload_s8(p)) : _mm512_setzero_ps();
  }
  template <int s>
  BIGOPS_INLINE W operand(__m512i line, Zero zero) const {
    __m512 low = Lines::byte_column<2 * s>(line), high = Lines::byte_column<2 * s + 1>(line);
    if (kZero) {
      low = _mm512_sub_ps(low, zero);
      high = _mm512_sub_ps(high, zero);
    }
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                   _mm512_castps_si512(high));
  }
  template <class G>
  static BIGOPS_INLINE void each_step(const G& g) {
    g(Step<0>());
    g(Step<1>());
  }
};

}  // namespace

const FloatProducts avx512bf16_quantized = {group_product<Lines, BytesToPairs>,
                                            group_product<Lines, NibblesToPairs>};

}  // namespace bigops
