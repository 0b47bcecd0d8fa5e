#include "common/isa.h"

#ifdef BIGOPS_AMX
#include "cpu/simd/meter.h"
#include "cpu/simd/tiles_amx.h"

namespace bigops {
namespace {

// Four independent sums cover the latency of 52 cycles at one product every 16. The numbers differ:
// at zeros, which cost less power, the clock was a quarter higher.
template <class F>
double full_tiles(int columns, const F& dot) {
  uint16_t numbers[16 * 32];  // bf16 of about 0.001
  for (int i = 0; i < 16 * 32; ++i) numbers[i] = static_cast<uint16_t>(0x3a80 ^ (i * 37 & 0x7f));
  AmxTiles::configure(TileShape(16, 64));
  AmxTiles::load<4>(numbers, 64);
  AmxTiles::load<5>(numbers, 64);
  AmxTiles::load<6>(numbers, 64);
  AmxTiles::load<7>(numbers, 64);
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
