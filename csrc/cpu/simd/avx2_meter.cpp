#include <immintrin.h>

#include "cpu/simd/meter.h"

namespace bigops {

double avx2_meter_f32() {
  volatile float seed = 1.0f;
  __m256 s[12];
  for (int i = 0; i < 12; ++i) s[i] = _mm256_set1_ps(seed);
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
  for (int r = 0; r < kMeterRounds; ++r)
    for (int i = 0; i < 12; ++i) s[i] = _mm256_fmadd_ps(s[i], a, b);
  __m256 sum = s[0];
  for (int i = 1; i < 12; ++i) sum = _mm256_add_ps(sum, s[i]);
  seed = _mm256_cvtss_f32(sum);
  return 2.0 * 8 * 12 * kMeterRounds;
}

uint64_t avx2_meter_read(const uint64_t* p, int64_t words) {
  __m256i s[4];
  for (int j = 0; j < 4; ++j) s[j] = _mm256_setzero_si256();
  const __m256i* v = reinterpret_cast<const __m256i*>(p);
  for (int64_t i = 0; i + 4 <= words / 4; i += 4)
    for (int j = 0; j < 4; ++j) s[j] = _mm256_xor_si256(s[j], _mm256_loadu_si256(v + i + j));
  const __m256i t = _mm256_xor_si256(_mm256_xor_si256(s[0], s[1]), _mm256_xor_si256(s[2], s[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(t, 0));
}

}  // namespace bigops
