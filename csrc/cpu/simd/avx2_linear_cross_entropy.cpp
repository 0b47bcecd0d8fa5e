// linear_cross_entropy's pass over the logits for AVX2 + FMA + F16C.
#include "cpu/simd/vec_avx2.h"
#include "cpu/simd/linear_cross_entropy.inl"

namespace bigops {

const CrossEntropyKernel avx2_cross_entropy_f32 = cross_entropy<Avx2, float>;
const CrossEntropyKernel avx2_cross_entropy_bf16 = cross_entropy<Avx2, bf16>;
const CrossEntropyKernel avx2_cross_entropy_f16 = cross_entropy<Avx2, f16>;

}  // namespace bigops
