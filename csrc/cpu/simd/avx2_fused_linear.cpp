// fused_linear for AVX2 + FMA + F16C: 2 x 4 sums, so that 16 registers hold them and the operands.
#include "cpu/simd/vec_avx2.h"
#include "cpu/simd/fused_linear.inl"

namespace bigops {

#define BIGOPS_KERNELS(name, T) \
  const FloatKernels name = {linear<Multiply<Avx2, T>, 2>, epilogue<Avx2, T>, backward<Avx2, T>}
BIGOPS_KERNELS(avx2_f32, float);
BIGOPS_KERNELS(avx2_bf16, bf16);
BIGOPS_KERNELS(avx2_f16, f16);
#undef BIGOPS_KERNELS

}  // namespace bigops
