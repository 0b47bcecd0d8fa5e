// linear_cross_entropy's pass over the logits for any CPU; the only form of float64.
#include "cpu/simd/vec_portable.h"
#include "cpu/simd/linear_cross_entropy.inl"

namespace bigops {

const CrossEntropyKernel portable_cross_entropy_f32 = cross_entropy<Scalar<float>, float>;
const CrossEntropyKernel portable_cross_entropy_f64 = cross_entropy<Scalar<double>, double>;
const CrossEntropyKernel portable_cross_entropy_bf16 = cross_entropy<Scalar<float>, bf16>;
const CrossEntropyKernel portable_cross_entropy_f16 = cross_entropy<Scalar<float>, f16>;

}  // namespace bigops
