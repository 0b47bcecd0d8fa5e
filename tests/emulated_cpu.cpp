// Runs under qemu-user as an older CPU (tests/test_emulated_cpu.py): all instruction-set files are
// linked in, only those that the CPU has may run. Prints the chosen level and the largest
// difference between its kernels and the portable ones, relative to the sum of magnitudes.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/activation.h"
#include "common/isa.h"
#include "cpu/simd/fused_linear.h"
#include "cpu/simd/types.h"

using namespace bigops;

namespace {

constexpr int64_t kM = 5, kN = 37, kK = 83;

uint16_t bf16_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return static_cast<uint16_t>(bits >> 16);
}

template <class T>
T element(float v);
template <>
float element<float>(float v) {
  return v;
}
template <>
bf16 element<bf16>(float v) {
  return bf16{bf16_bits(v)};
}
float value(float v) { return v; }
float value(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

template <class T>
std::vector<T> random(int64_t n) {
  std::vector<T> v(static_cast<size_t>(n));
  for (auto& e : v) e = element<T>(static_cast<float>(std::rand()) / RAND_MAX - 0.5f);
  return v;
}

template <class T>
double difference(const FloatKernels& kernels, const FloatKernels& portable, int activation) {
  const int64_t rows = is_gated(activation) ? 2 * kN : kN;
  const auto x = random<T>(kM * kK), w = random<T>(rows * kK), b = random<T>(rows);
  const auto r = random<T>(kM * kN);
  std::vector<T> y(kM * kN), want(kM * kN);
  LinearTask t{x.data(), w.data(), b.data(), r.data(), y.data(), nullptr,   kN,
               kK,       0,        kM,       0,        kN,       activation};
  kernels.linear(t);
  t.y = want.data();
  portable.linear(t);
  double worst = 0;
  for (size_t i = 0; i < y.size(); ++i)
    worst = std::fmax(worst, std::fabs(double(value(y[i])) - double(value(want[i]))));
  return worst;
}

}  // namespace

int main() {
  const Isa isa = best_isa();
  double f32 = 0, b16 = 0;
  for (int a = 0; a < kActivationCount; ++a) {
    const bool wide = isa >= Isa::avx512;
    const FloatKernels& k = wide ? avx512_f32 : isa >= Isa::avx2 ? avx2_f32 : portable_f32;
    const FloatKernels& h = isa == Isa::avx512bf16 ? avx512bf16_bf16
                            : wide                 ? avx512_bf16
                            : isa >= Isa::avx2     ? avx2_bf16
                                                   : portable_bf16;
    f32 = std::fmax(f32, difference<float>(k, portable_f32, a));
    b16 = std::fmax(b16, difference<bf16>(h, portable_bf16, a));
  }
  std::printf("%s f32 %.3g bf16 %.3g\n", isa_name(isa), f32, b16);
  return f32 < 1e-4 && b16 < 0.1 ? 0 : 1;
}
