// fused_linear for any CPU; the only form of float64, and the one that defines the meaning.
#include "cpu/simd/vec_portable.h"
#include "cpu/simd/fused_linear.inl"

namespace bigops {

#define BIGOPS_KERNELS(name, Acc, T)                                                        \
  const FloatKernels name = {linear<Multiply<Scalar<Acc>, T>, 2>, epilogue<Scalar<Acc>, T>, \
                             backward<Scalar<Acc>, T>}
BIGOPS_KERNELS(portable_f32, float, float);
BIGOPS_KERNELS(portable_f64, double, double);
BIGOPS_KERNELS(portable_bf16, float, bf16);
BIGOPS_KERNELS(portable_f16, float, f16);
#undef BIGOPS_KERNELS

}  // namespace bigops
