// Rotary embeddings for AVX-512.
#include "cpu/simd/rotary.h"
#include "cpu/simd/lanes_avx512.h"
#include "cpu/simd/rotary.inl"

namespace bigops {

const RotaryKernels avx512_rotary = rotary_table<Avx512Lanes>();

}  // namespace bigops
