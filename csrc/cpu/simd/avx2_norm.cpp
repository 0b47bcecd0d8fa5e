// Layer norm and RMS norm for AVX2 and FMA.
#include "cpu/simd/norm.h"
#include "cpu/simd/lanes_avx2.h"
#include "cpu/simd/norm.inl"

namespace bigops {

const NormKernels avx2_norm = norm_table<Avx2Lanes>();

}  // namespace bigops
