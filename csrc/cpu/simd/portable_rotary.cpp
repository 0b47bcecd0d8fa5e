// Rotary embeddings for any CPU.
#include "cpu/simd/rotary.h"
#include "cpu/simd/lanes_portable.h"
#include "cpu/simd/rotary.inl"

namespace bigops {

const RotaryKernels portable_rotary = rotary_table<PortableLanes>();

}  // namespace bigops
