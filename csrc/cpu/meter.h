// The machine's limits, measured: what benches divide by.
#pragma once

#include <cstdint>
#include <string>

namespace bigops {

double measure_peak(const std::string& kind, int threads, double seconds);
double measure_bandwidth(int64_t bytes, int threads, double seconds);

}  // namespace bigops
