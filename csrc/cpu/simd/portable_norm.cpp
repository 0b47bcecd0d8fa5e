// Layer norm and RMS norm for any CPU.
#include "cpu/simd/norm.h"
#include "cpu/simd/lanes_portable.h"
#include "cpu/simd/norm.inl"

namespace bigops {

const NormKernels portable_norm = norm_table<PortableLanes>();

}  // namespace bigops
