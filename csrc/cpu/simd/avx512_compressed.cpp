#include "cpu/simd/compressed.h"
#include "cpu/simd/lanes_avx512.h"
#include "cpu/simd/compressed.inl"

namespace bigops {

const CompressedKernels avx512_compressed = compressed_table<Avx512Lanes>();

}  // namespace bigops
