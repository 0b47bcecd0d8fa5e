#include "cpu/state_maps.h"

#include <limits>

namespace bigops {
namespace {

// Magnitudes of the dynamic map: decade 10^(d - 6) holds the centres of `first << d` equal parts of
// [0.1, 1], d = 0 .. 6, with 0 below and 1 above.
void fill(MagnitudeMap& map, int first) {
  static constexpr double kDecade[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  map.count = 0;
  map.value[map.count++] = 0.0f;
  for (int d = 0; d < 7; ++d) {
    const int parts = first << d;
    for (int i = 0; i < parts; ++i)
      map.value[map.count++] = static_cast<float>(kDecade[d] * (0.1 + 0.9 * ((i + 0.5) / parts)));
  }
  map.value[map.count++] = 1.0f;
  for (int i = 0; i + 1 < map.count; ++i)
    map.middle[i] = static_cast<float>((double(map.value[i]) + double(map.value[i + 1])) / 2);
  for (int i = map.count - 1; i < 256; ++i) map.middle[i] = std::numeric_limits<float>::infinity();
  map.first[0] = 0;
  int k = 0;
  for (int bucket = 0; bucket < kMapBuckets; ++bucket) {
    const double octave = 1.0 / double(int64_t(1) << (22 - bucket / 128));
    const double low = octave * (1.0 + (bucket % 128) / 128.0);
    while (low > double(map.middle[k])) ++k;
    map.first[bucket + 1] = k;
  }
}

StateMaps build() {
  StateMaps maps;
  fill(maps.signed_half, 1);
  fill(maps.unsigned_half, 2);
  const MagnitudeMap& half = maps.signed_half;
  for (int code = 0; code < 256; ++code) {
    maps.unsigned_value[code] = maps.unsigned_half.value[code];
    maps.signed_value[code] = code < 127 ? -half.value[127 - code] : half.value[code - 127];
  }
  return maps;
}

}  // namespace

const StateMaps& state_maps() {
  static const StateMaps maps = build();
  return maps;
}

}  // namespace bigops
