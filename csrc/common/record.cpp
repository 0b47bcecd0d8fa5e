#include "common/record.h"

#include <mutex>

namespace bigops {

std::atomic<int> g_recording{0};

namespace {
std::mutex g_mutex;
std::vector<std::string> g_names;  // kernels since the outermost record_start
std::vector<size_t> g_starts;      // one per nested recorder
}  // namespace

std::string kernel_name(Isa isa, const char* op, const char* dtype, const char* form) {
  return std::string("cpu.") + isa_name(isa) + "." + op + "." + dtype + "." + form;
}

void record_slow(Isa isa, const char* op, const char* dtype, const char* form) {
  std::string name = kernel_name(isa, op, dtype, form);
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (!g_starts.empty()) g_names.push_back(std::move(name));
}

void record_start() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_starts.push_back(g_names.size());
  g_recording.store(static_cast<int>(g_starts.size()), std::memory_order_relaxed);
}

std::vector<std::string> record_stop() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (g_starts.empty()) return {};
  std::vector<std::string> out(g_names.begin() + static_cast<std::ptrdiff_t>(g_starts.back()),
                               g_names.end());
  g_starts.pop_back();
  if (g_starts.empty()) g_names.clear();
  g_recording.store(static_cast<int>(g_starts.size()), std::memory_order_relaxed);
  return out;
}

}  // namespace bigops
