// The dynamic quantisation map of 8-bit optimiser states (arXiv 2110.02861, section 2.2).
#pragma once

#include "cpu/simd/fused_optimizer.h"

namespace bigops {

const StateMaps& state_maps();  // built once

}  // namespace bigops
