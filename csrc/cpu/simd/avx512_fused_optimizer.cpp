// Optimiser steps for AVX-512.
#include "cpu/simd/vec_avx512.h"
#include "cpu/simd/fused_optimizer.inl"

namespace bigops {

const OptimizerKernels avx512_optimizer = {step<Avx512, AdamW<Avx512>>, step<Avx512, Sgd<Avx512>>,
                                           sum_squares<Avx512>};

}  // namespace bigops
