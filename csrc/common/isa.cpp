#include "common/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef BIGOPS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bigops {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable",   "avx2",       "avx512",
                                           "avx512vnni", "avx512bf16", "amx"};

#ifdef BIGOPS_AMX
// Intel's manual, volume 1, 13.2 and volume 2, CPUID: leaf 1 ECX, leaf 7 EDX, XCR0.
constexpr unsigned kOsXsave = 1u << 27;
constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
constexpr unsigned kTileState = 1u << 17 | 1u << 18;  // XTILECFG and XTILEDATA
// Linux, Documentation/arch/x86/xstate.rst: tiles are given to a process that asks.
constexpr long kRequestPermission = 0x1023, kTileData = 18;

bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || (c & kOsXsave) == 0) return false;
  constexpr unsigned wanted = kAmxBf16 | kAmxTile | kAmxInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & wanted) != wanted) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool has_tiles() { return false; }
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512vnni;
  return has_tiles() ? Isa::amx : Isa::avx512bf16;
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
                 "bigops: BIGOPS_ISA: expected %s, at most %s on this CPU; got %s (ignored)\n",
                 isa_names(), kNames[static_cast<int>(best)], forced);
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

const char* isa_names() { return "portable, avx2, avx512, avx512vnni, avx512bf16 or amx"; }

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

namespace {
std::atomic<bool> g_bf16_dot{true};
}

bool bf16_dot_pays() { return g_bf16_dot.load(std::memory_order_relaxed); }

void set_bf16_dot(bool pays) { g_bf16_dot.store(pays, std::memory_order_relaxed); }

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
    BIGOPS_FEATURE("amx-bf16");
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
