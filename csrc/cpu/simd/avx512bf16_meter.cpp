#include <immintrin.h>

#include "cpu/simd/meter.h"

namespace bigops {

double avx512bf16_meter_bf16() {
  volatile float seed = 1.0f;
  __m512 s[12];
  for (int i = 0; i < 12; ++i) s[i] = _mm512_set1_ps(seed);
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3a803a80);
  for (int r = 0; r < kMeterRounds; ++r)
    for (int i = 0; i < 12; ++i) s[i] = _mm512_dpbf16_ps(s[i], a, a);
  __m512 sum = s[0];
  for (int i = 1; i < 12; ++i) sum = _mm512_add_ps(sum, s[i]);
  seed = _mm512_reduce_add_ps(sum);
  return 2.0 * 32 * 12 * kMeterRounds;
}

}  // namespace bigops
