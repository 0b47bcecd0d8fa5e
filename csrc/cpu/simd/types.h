// 16-bit floats as bits; the instruction-set files share these. No torch header, no STL.
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

}  // namespace bigops
