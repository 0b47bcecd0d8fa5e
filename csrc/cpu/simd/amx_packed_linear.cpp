#include "common/isa.h"

#ifdef BIGOPS_AMX
#include "cpu/simd/packed_tiles.inl"
#include "cpu/simd/vec_avx512.h"

namespace bigops {

void (*const amx_packed)(const PackedTask&) = packed_tiles<AmxTiles, Avx512>;

}  // namespace bigops
#endif
