#include "cpu/simd/compressed.h"
#include "cpu/simd/lanes_avx2.h"
#include "cpu/simd/compressed.inl"

namespace bigops {

const CompressedKernels avx2_compressed = compressed_table<Avx2Lanes>();

}  // namespace bigops
