// Words that ops take as numbers. torch's stable ABI never frees the copy that it makes of a string
// (ToImpl<std::string>, torch 2.10 to 2.14: 48 bytes a string and call), so that no kernel takes
// one. The position of a word is its code, as in bigops/ops/codes.py. Append only: programs that
// were saved hold the codes.
#pragma once

#include <cstddef>

#include "common/activation.h"

namespace bigops {

template <size_t N>
using Words = const char* const[N];

constexpr Words<kActivationCount> kActivationWords = {"none",      "relu",  "relu2",      "gelu",
                                                      "gelu_tanh", "silu",  "sigmoid",    "tanh",
                                                      "swiglu",    "geglu", "geglu_tanh", "reglu"};

// What a quantised product does with x.
enum Activate : int { kFloating = 0, kDynamic, kSymmetric, kStatic, kActivateCount };
constexpr Words<kActivateCount> kActivateWords = {"none", "dynamic", "symmetric", "static"};

// What a 2:4 pack keeps, and in which dtype.
enum Choice : int { kGiven = 0, kLargest, kChoiceCount };
constexpr Words<kChoiceCount> kChoiceWords = {"given", "largest"};
enum Stored : int { kStoredBFloat16 = 0, kStoredHalf, kStoredCount };
constexpr Words<kStoredCount> kStoredWords = {"bf16", "f16"};

// What a norm takes off its rows and divides them by.
enum NormKind : int { kLayerNorm = 0, kRmsNorm, kNormKindCount };
constexpr Words<kNormKindCount> kNormWords = {"layer", "rms"};

}  // namespace bigops
