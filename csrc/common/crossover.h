// Where an own kernel hands over to torch's product: data from bigops/configs/crossover_cpu.json.
#pragma once

#include <cstdint>
#include <string>

namespace bigops {

struct Crossover {
  int64_t max_rows = 4;           // own kernel up to this many rows of x ...
  int64_t max_flops = 1'000'000;  // ... or up to this many operations in all
};

// Of an op's dtype; what is not set keeps the values above.
Crossover crossover(const char* op, const char* dtype);
void set_crossover(const std::string& op, const std::string& dtype, Crossover value);

}  // namespace bigops
