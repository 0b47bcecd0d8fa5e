// fused_linear for AVX-512F: 4 x 4 sums.
#include "cpu/simd/vec_avx512.h"
#include "cpu/simd/fused_linear.inl"

namespace bigops {

#define BIGOPS_KERNELS(name, T)                                                   \
  const FloatKernels name = {linear<Multiply<Avx512, T>, 4>, epilogue<Avx512, T>, \
                             backward<Avx512, T>}
BIGOPS_KERNELS(avx512_f32, float);
BIGOPS_KERNELS(avx512_bf16, bf16);
BIGOPS_KERNELS(avx512_f16, f16);
#undef BIGOPS_KERNELS

}  // namespace bigops
