#include "cpu/simd/compressed.h"
#include "cpu/simd/lanes_vnni.h"
#include "cpu/simd/compressed.inl"

namespace bigops {

const CompressedKernels avx512vnni_compressed = compressed_table<VnniLanes>();

}  // namespace bigops
