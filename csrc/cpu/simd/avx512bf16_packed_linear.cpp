#include "cpu/simd/lanes_bf16.h"
#include "cpu/simd/packed_linear.inl"

namespace bigops {

void (*const avx512bf16_packed)(const PackedTask&) = packed<PackedBf16<Bf16Lanes>>;

}  // namespace bigops
