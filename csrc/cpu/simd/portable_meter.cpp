#include "cpu/simd/meter.h"

namespace bigops {

double portable_meter_f32() {
  volatile float seed = 1.0f;
  float s[12];
  for (int i = 0; i < 12; ++i) s[i] = seed;
  const float a = 0.999f, b = 1e-3f;
  for (int r = 0; r < kMeterRounds; ++r)
    for (int i = 0; i < 12; ++i) s[i] = s[i] * a + b;
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += s[i];
  seed = sum;
  return 2.0 * 12 * kMeterRounds;
}

uint64_t portable_meter_read(const uint64_t* p, int64_t words) {
  uint64_t s[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i + 4 <= words; i += 4)
    for (int j = 0; j < 4; ++j) s[j] ^= p[i + j];
  return s[0] ^ s[1] ^ s[2] ^ s[3];
}

}  // namespace bigops
