#include "common/isa.h"

#ifdef BIGOPS_AMX
#include "cpu/simd/lanes_vnni.h"
#include "cpu/simd/lines_avx512.h"
#include "cpu/simd/tiles_amx.h"
#include "cpu/simd/quantized_tiles.inl"

namespace bigops {

const IntegerProducts amx_quantized = {w8a8_tiles<AmxTiles, Avx512LinesOf<VnniLanes>>, nullptr};

}  // namespace bigops
#endif
