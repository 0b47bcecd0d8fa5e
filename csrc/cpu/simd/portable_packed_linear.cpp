#include "cpu/simd/lanes_portable.h"
#include "cpu/simd/packed_linear.inl"

namespace bigops {

const PackedKernels portable_packed = packed_table<PortableLanes>();

}  // namespace bigops
