// Host twins of the warp-wide matrix instructions, from the fragment layouts of NVIDIA's PTX ISA
// (those that csrc/cuda/ptx.cuh names). A lane is 4 * group + member.
#pragma once

#include "hostrun/cuda.h"

namespace hostrun {

// ldmatrix: lanes 8 i .. 8 i + 7 name the rows of matrix i, 8 numbers of 16 bits each. Lane
// 4 g + t receives numbers 2 t and 2 t + 1 of row g; transposed, number g of rows 2 t and 2 t + 1.
template <int Count>
void load_matrices(uint32_t (&r)[Count], const void* row, bool transposed, int line) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "ldmatrix x1, x2, x4");
  if (self->lane < 8 * Count && reinterpret_cast<uintptr_t>(row) % 16 != 0)
    fail("ldmatrix from a misaligned address");
  struct Words {
    uint32_t r[Count];
  };
  const int group = self->lane / 4, member = self->lane % 4;
  const Words words = exchange("ldmatrix", line, row, [&](auto at) {
    Words out;
    for (int i = 0; i < Count; ++i) {
      uint16_t pair[2];
      for (int h = 0; h < 2; ++h) {  // plain loads: the sanitizers see them
        const int from = transposed ? 2 * member + h : group;
        const int number = transposed ? group : 2 * member + h;
        pair[h] = static_cast<const uint16_t*>(at(8 * i + from))[number];
      }
      out.r[i] = static_cast<uint32_t>(pair[1]) << 16 | pair[0];
    }
    return out;
  });
  for (int i = 0; i < Count; ++i) r[i] = words.r[i];
}

inline float element(__nv_bfloat16, uint32_t word, int half) {
  return __bfloat162float({static_cast<uint16_t>(word >> 16 * half)});
}
inline float element(__half, uint32_t word, int half) {
  return __half2float({static_cast<uint16_t>(word >> 16 * half)});
}
inline int32_t element(int8_t, uint32_t word, int byte) {
  return static_cast<int8_t>(word >> 8 * byte);
}

inline uint16_t rounded(__nv_bfloat16, float v) { return __float2bfloat16_rn(v).bits; }
inline uint16_t rounded(__half, float v) { return __float2half_rn(v).bits; }

// c [16, 8] += a [16, K] b [K, 8], two registers of b for K = 4 * 2 * `per` numbers.
// a: register i holds row group + 8 (i % 2), columns per * (member + 4 (i / 2)) onwards;
// b: register i holds column group, rows per * (member + 4 i) onwards;
// c: element i is row group + 8 (i / 2), column 2 member + i % 2.
template <class Element, class Sum>
void multiply(const char* what, Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              int line) {
  constexpr int per = 4 / static_cast<int>(sizeof(Element)), depth = 8 * per;
  struct Operands {
    uint32_t a[4], b[2];
  };
  struct Sums {
    Sum c[4];
  };
  Operands mine;
  memcpy(mine.a, a, sizeof(a));
  memcpy(mine.b, b, sizeof(b));
  const int group = self->lane / 4, member = self->lane % 4;
  const Sums sums = exchange(what, line, mine, [&](auto at) {
    Sums out;
    for (int i = 0; i < 4; ++i) {
      const int row = group + 8 * (i / 2), column = 2 * member + i % 2;
      Sum sum = c[i];
      for (int k = 0; k < depth; ++k) {
        const int of = k / per % 4, high = k / per / 4;
        const uint32_t left = at(4 * (row % 8) + of).a[row / 8 + 2 * high];
        const uint32_t right = at(4 * column + of).b[high];
        sum += static_cast<Sum>(element(Element{}, left, k % per)) *
               static_cast<Sum>(element(Element{}, right, k % per));
      }
      out.c[i] = sum;
    }
    return out;
  });
  memcpy(c, sums.c, sizeof(c));
}

// The same where a [16, K] is 2:4 sparse, K = 32 of 16 bits or 64 of 8, four registers of b. meta
// by "Sparse matrix storage" and the figures of the metadata of sparse mma.m16n8k32 (.f16, .bf16)
// and mma.m16n8k64 (.s8): four bits for each four columns. A lane that contributes holds, for 16
// bits, 16 columns of row group and of row group + 8; for 8 bits, 32 columns of one of the two.
template <class Element, int Selector, class Sum>
void multiply_sparse(const char* what, Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                     uint32_t meta, int line) {
  constexpr int per = 4 / static_cast<int>(sizeof(Element)), fours = 4 * per;
  constexpr bool bytes = sizeof(Element) == 1;
  struct Operands {
    uint32_t a[4], b[4], meta;
  };
  struct Sums {
    Sum c[4];
  };
  Operands mine;
  memcpy(mine.a, a, sizeof(a));
  memcpy(mine.b, b, sizeof(b));
  mine.meta = meta;
  const int group = self->lane / 4, member = self->lane % 4;
  const Sums sums = exchange(what, line, mine, [&](auto at) {
    Sums out;
    for (int i = 0; i < 4; ++i) out.c[i] = c[i];
    for (int half = 0; half < 2; ++half) {  // rows group and group + 8
      for (int four = 0; four < fours; ++four) {
        const int lane = bytes ? half + 2 * (four / 8) : 2 * Selector + four / 4;
        const int bit = bytes ? 4 * (four % 8) : 16 * half + 4 * (four % 4);
        const int places = at(4 * group + lane).meta >> bit & 15;
        if (places % 4 >= places / 4) fail(what, ": metadata whose places do not rise");
        for (int j = 2 * four; j < 2 * four + 2; ++j) {
          const uint32_t left = at(4 * group + j / per % 4).a[half + 2 * (j / per / 4)];
          const int k = 4 * four + (places >> 2 * (j % 2) & 3);
          for (int i = 0; i < 2; ++i) {
            const uint32_t right = at(4 * (2 * member + i) + k / per % 4).b[k / per / 4];
            out.c[2 * half + i] += static_cast<Sum>(element(Element{}, left, j % per)) *
                                   static_cast<Sum>(element(Element{}, right, k % per));
          }
        }
      }
    }
    return out;
  });
  memcpy(c, sums.c, sizeof(c));
}

// Two 16-bit floats in a word, low half first, by a function of two floats.
template <class Element, class F>
uint32_t of_pairs(uint32_t a, uint32_t b, F f) {
  uint32_t out = 0;
  for (int h = 0; h < 2; ++h) {
    const float v = f(element(Element{}, a, h), element(Element{}, b, h));
    out |= static_cast<uint32_t>(rounded(Element{}, v)) << 16 * h;
  }
  return out;
}

}  // namespace hostrun
