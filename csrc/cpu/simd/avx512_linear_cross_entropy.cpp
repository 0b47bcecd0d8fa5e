// linear_cross_entropy's pass over the logits for AVX-512F.
#include "cpu/simd/vec_avx512.h"
#include "cpu/simd/linear_cross_entropy.inl"

namespace bigops {

const CrossEntropyKernel avx512_cross_entropy_f32 = cross_entropy<Avx512, float>;
const CrossEntropyKernel avx512_cross_entropy_bf16 = cross_entropy<Avx512, bf16>;
const CrossEntropyKernel avx512_cross_entropy_f16 = cross_entropy<Avx512, f16>;

}  // namespace bigops
