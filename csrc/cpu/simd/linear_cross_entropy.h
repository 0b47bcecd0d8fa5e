// What the instruction-set files offer to csrc/cpu/linear_cross_entropy.cpp.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace bigops {

// Rows [m0, m1) of a chunk of logits: the loss of each, and in place of the logits its gradient.
// `Acc` is the type that sums are held in: float, or double where the logits are double.
struct CrossEntropyTask {
  void* logits;           // [M, V], without the bias
  const int64_t* target;  // [M]
  const void* bias;       // [V] in the dtype of the logits, or null
  const void* weight;     // class weights [V] in Acc, or null
  const void* scale;      // factor of each row's gradient, [M] in Acc, or null: 1
  void* losses;           // [M] in Acc
  void* lse;              // log of the sum of exponentials of each row, [M] in Acc
  int64_t* predictions;   // the class of the largest logit, [M], or null
  void* scratch;          // V of Acc, this thread's own
  int64_t v;
  int64_t m0, m1;
  int64_t ignore_index;
  double weight_sum;  // of the class weights, or V
  double smoothing;
  double z_loss;
  double softcap;  // 0: none
  bool gradient;   // else the logits stay as they are
};

using CrossEntropyKernel = void (*)(const CrossEntropyTask&);

extern const CrossEntropyKernel portable_cross_entropy_f32, portable_cross_entropy_f64,
    portable_cross_entropy_bf16, portable_cross_entropy_f16;
extern const CrossEntropyKernel avx2_cross_entropy_f32, avx2_cross_entropy_bf16,
    avx2_cross_entropy_f16;
extern const CrossEntropyKernel avx512_cross_entropy_f32, avx512_cross_entropy_bf16,
    avx512_cross_entropy_f16;

}  // namespace bigops
