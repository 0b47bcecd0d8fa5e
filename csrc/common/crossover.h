// Where an own kernel hands over to torch's product: data from
// bigops/backend/configs/crossover_cpu.json.
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

// Whose product of float matrices is called, where it is not ours: torch's own (aten) or oneDNN's.
// torch's is MKL, which takes twice oneDNN's time on AMD
// (bigops/backend/configs/crossover_cpu.json).
bool onednn_floats();
void set_float_product(const std::string& library);  // "aten" or "onednn"

}  // namespace bigops
