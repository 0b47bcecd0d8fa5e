// The kernel that a look-up of rows takes and why (bigops.explain asks through python.cpp).
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace bigops {

std::pair<std::string, std::string> choose_quantized_embedding(int64_t bits,
                                                               const std::string& dtype);

}  // namespace bigops
