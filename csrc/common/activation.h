// Codes of the activations: the positions of bigops/ops/_activation.py NAMES. No torch header
// here: the instruction-set files include it, and `static` keeps their copies to themselves.
#pragma once

#include <cstring>

namespace bigops {

enum Activation : int {
  kNone = 0,
  kRelu,
  kRelu2,
  kGelu,
  kGeluTanh,
  kSilu,
  kSigmoid,
  kTanh,
  kFirstGated,
  kSwiglu = kFirstGated,
  kGeglu,
  kGegluTanh,
  kReglu,
  kActivationCount
};

constexpr const char* kActivationNames[kActivationCount] = {
    "none",    "relu", "relu2",  "gelu",  "gelu_tanh",  "silu",
    "sigmoid", "tanh", "swiglu", "geglu", "geglu_tanh", "reglu"};

static constexpr bool is_gated(int activation) { return activation >= kFirstGated; }

// The activation of the gate half of a gated pair.
static constexpr int gate_activation(int activation) {
  return activation == kSwiglu      ? kSilu
         : activation == kGeglu     ? kGelu
         : activation == kGegluTanh ? kGeluTanh
                                    : kRelu;
}

static inline int activation_code(const char* name, size_t length) {
  for (int i = 0; i < kActivationCount; ++i)
    if (std::strlen(kActivationNames[i]) == length &&
        std::memcmp(name, kActivationNames[i], length) == 0)
      return i;
  return -1;
}

}  // namespace bigops
