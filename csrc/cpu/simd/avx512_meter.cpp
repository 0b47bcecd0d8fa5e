#include <immintrin.h>

#include "cpu/simd/meter.h"

namespace bigops {

double avx512_meter_f32() {
  volatile float seed = 1.0f;
  __m512 s[12];
  for (int i = 0; i < 12; ++i) s[i] = _mm512_set1_ps(seed);
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
  for (int r = 0; r < kMeterRounds; ++r)
    for (int i = 0; i < 12; ++i) s[i] = _mm512_fmadd_ps(s[i], a, b);
  __m512 sum = s[0];
  for (int i = 1; i < 12; ++i) sum = _mm512_add_ps(sum, s[i]);
  seed = _mm512_reduce_add_ps(sum);
  return 2.0 * 16 * 12 * kMeterRounds;
}

uint64_t avx512_meter_read(const uint64_t* p, int64_t words) {
  __m512i s[4];
  for (int j = 0; j < 4; ++j) s[j] = _mm512_setzero_si512();
  for (int64_t i = 0; i + 32 <= words; i += 32)
    for (int j = 0; j < 4; ++j) s[j] = _mm512_xor_si512(s[j], _mm512_loadu_si512(p + i + 8 * j));
  const __m512i t = _mm512_xor_si512(_mm512_xor_si512(s[0], s[1]), _mm512_xor_si512(s[2], s[3]));
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(t));
}

}  // namespace bigops
