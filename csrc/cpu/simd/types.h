// What the instruction-set files share: 16-bit floats as bits, and the order of sums over rows.
// No torch header, no STL.
#pragma once

#include <stdint.h>
#include <string.h>

namespace bigops {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The sums of kSumRows rows are added up, and kSumRows of those, before they enter the total: one
// sum over all rows would lose a digit at some thousands of them, where torch's sum loses none.
constexpr int64_t kSumRows = 32;
constexpr int kSumLevels = 3;

}  // namespace bigops
