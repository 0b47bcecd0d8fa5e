// What csrc/python.cpp asks of the op besides the dispatcher.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace bigops {

// The kernel that a call of this shape takes and why; n counts the rows of the weight.
std::pair<std::string, std::string> choose_fused_linear(int64_t m, int64_t n, int64_t k,
                                                        const std::string& dtype);

}  // namespace bigops
