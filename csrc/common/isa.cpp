#include "common/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace bigops {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512", "avx512vnni",
                                           "avx512bf16"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512vnni;
  return Isa::avx512bf16;
#else
  return Isa::portable;
#endif
}

int parse(const char* name) {
  for (int i = 0; i < kIsaCount; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return i;
  return -1;
}

// BIGOPS_ISA lowers the level at load. A name that is unknown or above this CPU is a user's
// mistake that must not crash later with SIGILL: it is said once and ignored.
Isa initial() {
  const Isa best = detect();
  const char* forced = std::getenv("BIGOPS_ISA");
  if (forced == nullptr || *forced == '\0') return best;
  const int level = parse(forced);
  if (level < 0 || level > static_cast<int>(best)) {
    std::fprintf(stderr,
                 "bigops: BIGOPS_ISA: expected portable, avx2, avx512, avx512vnni or avx512bf16, "
                 "at most %s on this CPU; got %s (ignored)\n",
                 kNames[static_cast<int>(best)], forced);
    return best;
  }
  return static_cast<Isa>(level);
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> value{initial()};
  return value;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

bool set_isa(const char* name) {
  const int level = parse(name);
  if (level < 0 || level > static_cast<int>(best_isa())) return false;
  active().store(static_cast<Isa>(level), std::memory_order_relaxed);
  return true;
}

const char* cpu_vendor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}

const char* cpu_features() {
#if defined(__x86_64__)
  static char text[256] = "";
  if (text[0] == '\0') {
    char* end = text;
#define BIGOPS_FEATURE(name)        \
  if (__builtin_cpu_supports(name)) \
  end += std::snprintf(end, 24, "%s%s", end == text ? "" : " ", name)
    BIGOPS_FEATURE("sse4.2");
    BIGOPS_FEATURE("avx");
    BIGOPS_FEATURE("avx2");
    BIGOPS_FEATURE("fma");
    BIGOPS_FEATURE("avx512f");
    BIGOPS_FEATURE("avx512bw");
    BIGOPS_FEATURE("avx512vl");
    BIGOPS_FEATURE("avx512dq");
    BIGOPS_FEATURE("avx512vnni");
    BIGOPS_FEATURE("avx512bf16");
#if defined(__GNUC__) && !defined(__clang__)
    BIGOPS_FEATURE("amx-bf16");  // no kernel of ours; oneDNN's products use it
    BIGOPS_FEATURE("amx-int8");
#endif
#undef BIGOPS_FEATURE
  }
  return text;
#else
  return "";
#endif
}

}  // namespace bigops
