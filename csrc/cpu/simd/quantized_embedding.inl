// A row of a quantised weight as floats. V: a vec_*.h; D: how it takes V::width columns from the
// lines of a tile. Include after such a header. Internal linkage throughout.

#include "cpu/simd/quantized_embedding.h"

namespace bigops {
namespace {

inline uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  memcpy(&word, p, 4);
  return word;
}

// The number q of one column: this form defines the meaning.
template <int kBits>
float one_column(const uint8_t* values, int64_t column) {
  constexpr int64_t kColumns = kBits == 8 ? 4 : 8;
  const uint32_t word = word_at(values + column / kColumns * kLineBytes);
  const int c = static_cast<int>(column % kColumns);
  if (kBits == 8) return static_cast<float>(static_cast<int8_t>(word >> (8 * c)));
  return static_cast<float>(static_cast<int>(word >> (c / 2 * 4 + c % 2 * 16) & 15) - 8);
}

template <class V, class D, int kBits, class T>
void decode_row(const RowTask& t) {
  constexpr int64_t kLineColumns = kBits == 8 ? 4 : 8, kStep = V::width;
  T* out = static_cast<T*>(t.out);
  int64_t column = 0;
  for (int64_t g = 0; column < t.k; ++g) {
    const int64_t left = t.k - column, end = left < t.group ? t.k : column + t.group;
    const float zero_point = t.zero_point == nullptr ? 0.0f : t.zero_point[g * t.stride];
    const auto scale = V::set1(t.scale[g * t.stride]), zero = V::set1(zero_point);
    for (; column + kStep <= end; column += kStep) {
      const auto q =
          D::template columns<kBits>(t.values + column / kLineColumns * kLineBytes, column);
      V::store(out + column, V::mul(scale, V::sub(q, zero)));
    }
    for (; column < end; ++column) {
      const float q = one_column<kBits>(t.values, column) - zero_point;
      V::store_n(out + column, V::mul(scale, V::set1(q)), 1);
    }
  }
}

template <class V, class D>
constexpr RowKernels row_kernels() {
  return {{decode_row<V, D, 8, float>, decode_row<V, D, 8, bf16>, decode_row<V, D, 8, f16>},
          {decode_row<V, D, 4, float>, decode_row<V, D, 4, bf16>, decode_row<V, D, 4, f16>}};
}

}  // namespace
}  // namespace bigops
