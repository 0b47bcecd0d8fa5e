// The instruction set that kernels use: what the CPU has, capped by BIGOPS_ISA or set_isa().
#pragma once

// The tiles of AMX are written in assembler; a compiler that has their header brings one that knows
// them (gcc 11, clang 12). Without it there is no level amx.
#if defined(__x86_64__) && defined(__linux__)
#if __has_include(<amxtileintrin.h>)
#define BIGOPS_AMX
#endif
#endif

namespace bigops {

// Each level contains the ones before it. VNNI exists without BF16 (Ice Lake), never the reverse;
// AMX comes with both, and where the operating system lets this process have its tiles.
enum class Isa : int {
  portable = 0,
  avx2 = 1,
  avx512 = 2,
  avx512vnni = 3,
  avx512bf16 = 4,
  amx = 5
};
constexpr int kIsaCount = 6;

const char* isa_name(Isa isa);
const char* isa_names();         // all of them, as an error message lists them
Isa best_isa();                  // what this CPU has
Isa active_isa();                // what kernels use now
bool set_isa(const char* name);  // false: unknown name, or this CPU lacks it
const char* cpu_features();      // space separated, read-only string
const char* cpu_vendor();        // amd, intel or other

// Whether vdpbf16ps is worth it where floats would do as well: it has twice the rate of a float fma
// on AMD's Zen 4 and 5, half of it on Intel's Sapphire Rapids
// (bigops/backend/configs/crossover_cpu.json).
bool bf16_dot_pays();
void set_bf16_dot(bool pays);

}  // namespace bigops
