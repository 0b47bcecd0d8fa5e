#include <immintrin.h>

#include "cpu/simd/meter.h"

namespace bigops {

double avx512vnni_meter_s8() {
  volatile int seed = 1;
  __m512i s[12];
  for (int i = 0; i < 12; ++i) s[i] = _mm512_set1_epi32(seed);
  const __m512i a = _mm512_set1_epi32(seed);
  for (int r = 0; r < kMeterRounds; ++r)
    for (int i = 0; i < 12; ++i) s[i] = _mm512_dpbusd_epi32(s[i], a, a);
  __m512i sum = s[0];
  for (int i = 1; i < 12; ++i) sum = _mm512_add_epi32(sum, s[i]);
  seed = _mm512_reduce_add_epi32(sum);
  return 2.0 * 64 * 12 * kMeterRounds;
}

}  // namespace bigops
