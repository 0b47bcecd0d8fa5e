#include "cpu/state_maps.h"

#include <cstring>

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
  // Above middle[i] value[i + 1] is nearer than value[i]; the low 8 bits make room for an index.
  uint32_t middle[256];
  for (int i = 0; i + 1 < map.count; ++i) {
    const float m = static_cast<float>((double(map.value[i]) + double(map.value[i + 1])) / 2);
    std::memcpy(&middle[i], &m, 4);
    middle[i] &= ~0xffu;
  }
  middle[map.count - 1] = 0x7f800000;  // infinity
  map.bucket[0] = middle[0];
  uint32_t k = 0;
  for (int bucket = 0; bucket < kMapBuckets; ++bucket) {
    const float low = static_cast<float>((1.0 + (bucket % 128) / 128.0) /
                                         double(int64_t(1) << (22 - bucket / 128)));
    uint32_t bits;
    std::memcpy(&bits, &low, 4);
    while (bits > middle[k]) ++k;
    map.bucket[bucket + 1] = middle[k] | k;
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
