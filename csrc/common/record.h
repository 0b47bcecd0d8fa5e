// Says which kernels ran: off by default, one relaxed load a call; tests and `explain` turn it on.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "common/isa.h"

namespace bigops {

extern std::atomic<int> g_recording;
void record_slow(Isa isa, const char* op, const char* dtype, const char* form);

// Notes "cpu.<isa>.<op>.<dtype>.<form>".
inline void record(Isa isa, const char* op, const char* dtype, const char* form) {
  if (g_recording.load(std::memory_order_relaxed) != 0) record_slow(isa, op, dtype, form);
}

// A product's form by itself, and with its result stored as u8.
inline std::string form_name(const std::string& form, bool y_u8) {
  return y_u8 ? form + "_u8" : form;
}
std::string kernel_name(Isa isa, const char* op, const char* dtype, const char* form);
void record_start();
std::vector<std::string> record_stop();

}  // namespace bigops
