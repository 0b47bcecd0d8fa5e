// The kernels of fused_adamw and fused_grad_norm: plain numbers and pointers, no torch, no CUDA.
#pragma once

#include <stdint.h>

namespace bigops {

enum StepType : uint8_t { kStepNone, kStepFloat, kStepBFloat16, kStepHalf, kStepDouble };

constexpr int kStepTensors = 256;    // of one launch: its table is a parameter, 32764 bytes at most
constexpr int64_t kStepBlock = 256;  // elements of a row that share an absmax: of a warp
constexpr int64_t kStepChunk = 32;   // blocks of a thread block

// One tensor, as kernels see it: element i means the same in all its pointers. Its rows begin a
// block each. It is a part of a whole tensor, of which runs of its rows follow each other.
struct StepTensor {
  void* param;
  const void* grad;
  void* first;  // float, or uint8 codes where first_scale is given
  void* second;
  float* first_scale;  // [rows, ceil(row / 256)], both or none
  float* second_scale;
  void* copy;          // or null
  const float* sizes;  // [2] on the device, or null: those below
  int64_t numel;
  int64_t start;    // index in the whole tensor of the first element
  int64_t stride;   // there, of one run to the next
  int64_t chunk;    // chunks of the tensors before it in the launch
  uint32_t row;     // elements, or 0: all of them
  uint32_t run;     // rows, or 0: all of them
  float size;       // lr / (1 - beta1^n)
  float inverse;    // 1 / sqrt(1 - beta2^n)
  uint32_t stream;  // of the random numbers
  StepType param_type, grad_type, copy_type;
};

struct AdamwRule {
  const double* norm;  // of all gradients, on the device, or null: no look at it
  double clip;         // largest norm of the gradients times factor
  double factor;       // of the gradients, negative to maximize
  double lr, beta1, beta2;
  float keep;   // 1 - lr * weight_decay, or 1
  float decay;  // of the parameter to the gradient: weight_decay, or 0
  float one_minus_beta1, beta2_float, one_minus_beta2, eps;
  bool stochastic;  // bfloat16 parameters are rounded by Philox of seed, stream, rounding_step
  uint32_t rounding_step;
  uint64_t seed;
  const float* signed_values;  // [256]; maps of 8-bit states, all or none
  const int32_t* signed_buckets;
  const float* unsigned_values;
  const int32_t* unsigned_buckets;
};

// Launch on `stream`, a cudaStream_t; give the text of an error, or null.

// step[i] += 1 and sizes[2 i], sizes[2 i + 1] of it; nothing where the norm is not finite.
const char* advance_steps(float* const* steps, int64_t count, float* sizes, const AdamwRule& rule,
                          void* stream);

// The step of all tensors, none of them empty; nothing where the norm is not finite.
const char* step_adamw(const StepTensor* tensors, int64_t count, const AdamwRule& rule,
                       void* stream);

// norm = Euclidean norm of the gradients; partial: [chunks_of(tensors)].
int64_t chunks_of(const StepTensor* tensors, int64_t count);
const char* norm_of_gradients(const StepTensor* tensors, int64_t count, double* partial,
                              double* norm, void* stream);

}  // namespace bigops
