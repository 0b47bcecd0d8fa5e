// Kernels by the name of their op, for callers that need no dispatcher.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <unordered_map>

namespace bigops {

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);

inline std::unordered_map<std::string, BoxedKernel>& cpu_kernels() {
  static std::unordered_map<std::string, BoxedKernel> kernels;
  return kernels;
}

// Registers a CPU kernel with torch and in the table.
inline void implement(torch::stable::detail::StableLibrary& library, const char* name,
                      BoxedKernel kernel) {
  library.impl(name, kernel);
  cpu_kernels()[name] = kernel;
}

}  // namespace bigops
