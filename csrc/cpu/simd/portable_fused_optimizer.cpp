// Optimiser steps for any CPU; the only form of float64, and the one that defines the meaning.
#include "cpu/simd/vec_portable.h"
#include "cpu/simd/fused_optimizer.inl"

namespace bigops {

const OptimizerKernels portable_optimizer = {step<Scalar<float>, AdamW<Scalar<float>>>,
                                             step<Scalar<float>, Sgd<Scalar<float>>>,
                                             sum_squares<Scalar<float>>};
const OptimizerKernels portable_optimizer_f64 = {step<Scalar<double>, AdamW<Scalar<double>>>,
                                                 step<Scalar<double>, Sgd<Scalar<double>>>,
                                                 sum_squares<Scalar<double>>};

}  // namespace bigops
