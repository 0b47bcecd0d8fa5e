// For python.cpp.
#pragma once

#include <string>

namespace bigops {

// The name of the kernel that `explain` gives for a dtype (f32, bf16, f16, f64).
std::string choose_linear_cross_entropy(const std::string& dtype);

}  // namespace bigops
