#include "common/isa.h"

#ifdef BIGOPS_AMX
#include "cpu/simd/meter.h"
#include "cpu/simd/tiles_amx.h"

namespace bigops {
namespace {

// Four independent sums cover the latency of 52 cycles at one product every 16.
template <class F>
double full_tiles(int columns, const F& dot) {
  AmxTiles::configure(TileShape(16, 64));
  for (int r = 0; r < kMeterRounds; ++r) dot();
  AmxTiles::release();
  return 2.0 * 16 * 16 * columns * 4 * kMeterRounds;
}

}  // namespace

double amx_meter_s8() {
  return full_tiles(64, [] {
    AmxTiles::dot_u8s8<0, 4, 6>();
    AmxTiles::dot_u8s8<1, 4, 7>();
    AmxTiles::dot_u8s8<2, 5, 6>();
    AmxTiles::dot_u8s8<3, 5, 7>();
  });
}

double amx_meter_bf16() {
  return full_tiles(32, [] {
    AmxTiles::dot_bf16<0, 4, 6>();
    AmxTiles::dot_bf16<1, 4, 7>();
    AmxTiles::dot_bf16<2, 5, 6>();
    AmxTiles::dot_bf16<3, 5, 7>();
  });
}

}  // namespace bigops
#endif
