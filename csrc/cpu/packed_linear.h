// What csrc/python.cpp asks of csrc/cpu/packed_linear.cpp.
#pragma once

#include <string>
#include <utility>

namespace bigops {

// The kernel that serves m rows of a dtype, and why (bigops.explain).
std::pair<std::string, std::string> choose_packed_linear(int64_t m, const std::string& dtype);

}  // namespace bigops
