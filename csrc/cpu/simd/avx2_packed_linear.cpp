#include "cpu/simd/lanes_avx2.h"
#include "cpu/simd/packed_linear.inl"

namespace bigops {

const PackedKernels avx2_packed = packed_table<Avx2Lanes>();

}  // namespace bigops
