// For python.cpp.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace bigops {

// The kernel that a call of this shape takes and why; dtype: f32, bf16, f16, f64. `items`: heads of
// k and v of all batch items; `group`: heads of q to each of them.
std::pair<std::string, std::string> choose_attention(int64_t items, int64_t group, int64_t t,
                                                     int64_t s, int64_t d, int64_t dv,
                                                     const std::string& dtype, bool bf16);

}  // namespace bigops
