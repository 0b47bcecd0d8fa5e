// For python.cpp.
#pragma once

#include <string>

namespace bigops {

// The name of the kernel that `explain` gives for a dtype of x (f32, bf16, f16).
std::string choose_rotary(const std::string& dtype);

}  // namespace bigops
