#include "cpu/simd/lanes_avx512.h"
#include "cpu/simd/packed_linear.inl"

namespace bigops {

const PackedKernels avx512_packed = packed_table<Avx512Lanes>();

}  // namespace bigops
