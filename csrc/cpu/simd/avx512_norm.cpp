// Layer norm and RMS norm for AVX-512.
#include "cpu/simd/norm.h"
#include "cpu/simd/lanes_avx512.h"
#include "cpu/simd/norm.inl"

namespace bigops {

const NormKernels avx512_norm = norm_table<Avx512Lanes>();

}  // namespace bigops
