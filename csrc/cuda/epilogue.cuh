// The epilogue of the linear ops on the device: activations by their code in common/activation.h.
#pragma once

#include "common/activation.h"
#include "cuda/device.cuh"

namespace bigops {

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// Codes below kFirstGated. NaN stays NaN.
__device__ __forceinline__ float activate(int activation, float z) {
  switch (activation) {
    case kRelu: return z < 0.0f ? 0.0f : z;
    case kRelu2: return z < 0.0f ? 0.0f : z * z;
    case kGelu: return 0.5f * z * erfcf(-0.70710678f * z);
    case kGeluTanh:  // tanh(u) = 2 sigmoid(2 u) - 1, u = sqrt(2 / pi) (z + 0.044715 z^3)
      return z * sigmoid(z * (1.5957691f + 0.071354816f * z * z));
    case kSilu: return z * sigmoid(z);
    case kSigmoid: return sigmoid(z);
    case kTanh: return tanhf(z);
    default: return z;
  }
}

// act(z + bias[n]) + residual[m, n], n of N columns; bias and residual may be null.
template <class T>
__device__ __forceinline__ T finish(float z, int activation, const T* bias, const T* residual,
                                    int64_t m, int64_t n, int64_t columns) {
  if (bias != nullptr) z += to_float(bias[n]);
  float y = activate(activation, z);
  if (residual != nullptr) y += to_float(residual[m * columns + n]);
  return from_float<T>(y);
}

}  // namespace bigops
