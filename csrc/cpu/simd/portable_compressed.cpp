#include "cpu/simd/compressed.h"
#include "cpu/simd/lanes_portable.h"
#include "cpu/simd/compressed.inl"

namespace bigops {

const CompressedKernels portable_compressed = compressed_table<PortableLanes>();

}  // namespace bigops
