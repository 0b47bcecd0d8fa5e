// Optimiser steps for AVX2 + F16C.
#include "cpu/simd/vec_avx2.h"
#include "cpu/simd/fused_optimizer.inl"

namespace bigops {

const OptimizerKernels avx2_optimizer = {step<Avx2, AdamW<Avx2>>, step<Avx2, Sgd<Avx2>>,
                                         sum_squares<Avx2>};

}  // namespace bigops
