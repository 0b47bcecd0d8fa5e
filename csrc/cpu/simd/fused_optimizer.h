// What the instruction-set files offer to csrc/cpu/fused_adamw.cpp. Plain pointers and sizes.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace bigops {

constexpr int64_t kStateBlock = 256;   // elements of a row that share one absmax of an 8-bit state
constexpr int kMapBuckets = 22 * 128;  // [2^-22, 1) by exponent and 7 bits of mantissa

enum FloatType : int { kF32 = 0, kBf16 = 1, kF16 = 2, kF64 = 3, kNoType = 4 };

// One half of the dynamic map (Dettmers et al. 2021): magnitudes in [0, 1], ascending, 0 first.
struct MagnitudeMap {
  float value[256];
  // By bucket, the first below all others: in the low 8 bits the index of the value nearest to the
  // bucket's lower end, above them the float past which the next value is nearer.
  uint32_t bucket[kMapBuckets + 1];
  int32_t count;
};

// Codes 0..255 in ascending order of what they mean.
struct StateMaps {
  float signed_value[256], unsigned_value[256];
  MagnitudeMap signed_half, unsigned_half;
};

// Stochastic rounding to bf16: Philox4x32-10 (Salmon et al. 2011), a function of seed, step, stream
// (which tensor) and element alone. Of a part of a tensor, element i is element
// first + i / run * stride + i % run of the whole.
struct Rounding {
  uint64_t seed;
  uint32_t stream, step;
  int64_t first, run, stride;
};

// Blocks [begin, end) of one tensor of rows of `row` elements, each of which begins a block anew;
// all pointers to element 0.
struct StepTask {
  void* param;
  const void* grad;
  void* first;          // exp_avg or momentum buffer: float, double for kF64, or codes
  void* second;         // exp_avg_sq, likewise
  float* first_scale;   // absmax per block where the states are codes, else null
  float* second_scale;  // likewise
  void* copy;           // low-precision copy of the parameter or null
  int param_type, grad_type, copy_type;
  int64_t row, begin, end;
  const Rounding* rounding;  // null: to nearest
  const StateMaps* maps;
  double factor;  // of the gradient: unscaling, clipping, and -1 to maximize
  // AdamW
  double keep, beta1, beta2, eps, step_size, inv_sqrt_bias2;
  // SGD
  double lr, momentum, dampening;
  // Both: what of the parameter is added to the gradient
  double weight_decay;
  bool nesterov, first_step, has_momentum;
};

struct OptimizerKernels {
  void (*adamw)(const StepTask&);
  void (*sgd)(const StepTask&);
  double (*sum_squares)(const void* grad, int type, int64_t begin, int64_t end);
};

extern const OptimizerKernels portable_optimizer, portable_optimizer_f64;
extern const OptimizerKernels avx2_optimizer, avx512_optimizer;

}  // namespace bigops
