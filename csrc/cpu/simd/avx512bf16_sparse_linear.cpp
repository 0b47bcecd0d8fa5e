#include "cpu/simd/lanes_avx512.h"
#include "cpu/simd/sparse_linear.h"
#include "cpu/simd/sparse_linear.inl"

namespace bigops {
namespace {

struct Bf16Lanes : Avx512Lanes {
  static constexpr bool native_bf16 = true;

  static __m512 dot_bf16(__m512 acc, ireg x, ireg w) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

}  // namespace

const SparseKernels avx512bf16_sparse_bf16 = sparse_table<WordBf16<Bf16Lanes>>();

}  // namespace bigops
