// Codes of the activations, whose words are in common/codes.h. No torch header here: the
// instruction-set files include it, and `static` keeps their copies to themselves.
#pragma once

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

static constexpr bool is_gated(int activation) {
  return activation >= kFirstGated && activation <= kReglu;
}

// The activation of the gate half of a gated pair.
static constexpr int gate_activation(int activation) {
  return activation == kSwiglu      ? kSilu
         : activation == kGeglu     ? kGelu
         : activation == kGegluTanh ? kGeluTanh
                                    : kRelu;
}

}  // namespace bigops
