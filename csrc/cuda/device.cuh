// What every source in csrc/cuda includes first: CUDA under nvcc; under g++, for tests, the same
// names from csrc/hostrun. A kernel takes its shared memory and is launched by the macros below.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// T name[count] in shared memory; uninitialised.
#define BIGOPS_SHARED(T, name, count) __shared__ T name[count]
// The dynamic shared memory as T*; aligned to 128 bytes.
#define BIGOPS_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(128) unsigned char dynamic_bytes[]; \
  T* const name = reinterpret_cast<T*>(dynamic_bytes)
// kernel: in parentheses where it is a template with several arguments.
#define BIGOPS_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)

#else
#include "hostrun/cuda.h"

#define BIGOPS_SHARED(T, name, count) \
  static const char name##_tag = 0;   \
  T* const name = static_cast<T*>(hostrun::shared_array(&name##_tag, sizeof(T) * (count)))
#define BIGOPS_DYNAMIC_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(hostrun::self->block->dynamic)
#define BIGOPS_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), hostrun::launch(kernel, grid, block, bytes, __VA_ARGS__))
#endif

namespace bigops {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  return __float2half_rn(v);
}

}  // namespace bigops
