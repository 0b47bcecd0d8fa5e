#include "common/isa.h"

#ifdef BIGOPS_AMX
#include "cpu/simd/lanes_vnni.h"
#include "cpu/simd/lines_avx512.h"
#include "cpu/simd/quantized_linear.inl"
#include "cpu/simd/tiles_amx.h"
// after them
#include "cpu/simd/quantized_tiles.inl"

namespace bigops {

const IntegerProducts amx_quantized = tile_products<AmxTiles, Avx512LinesOf<VnniLanes>>();

}  // namespace bigops
#endif
