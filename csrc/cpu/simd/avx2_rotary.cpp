// Rotary embeddings for AVX2 and FMA.
#include "cpu/simd/rotary.h"
#include "cpu/simd/lanes_avx2.h"
#include "cpu/simd/rotary.inl"

namespace bigops {

const RotaryKernels avx2_rotary = rotary_table<Avx2Lanes>();

}  // namespace bigops
