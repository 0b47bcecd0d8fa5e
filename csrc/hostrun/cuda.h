// CUDA's names on top of block.h: keywords, built-in variables, barriers, warp functions, 16-bit
// floats. A kernel finds here what it uses and no more; a name that is missing is added here.
#pragma once

#include <math.h>

#include "hostrun/block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (hostrun::self->index)
#define blockIdx (hostrun::self->block->index)
#define blockDim (hostrun::self->block->size)
#define gridDim (hostrun::self->block->grid)

#define __syncthreads() hostrun::sync_block(__LINE__)

#define __syncthreads_or(predicate) hostrun::any_of_block(predicate, __LINE__)

using cudaStream_t = void*;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) hostrun::fail("only warp functions of all 32 lanes are served");
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  check_mask(mask);
  hostrun::sync_warp("__syncwarp", line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int line = __builtin_LINE()) {
  check_mask(mask);
  return hostrun::exchange("__shfl_sync", line, value, [&](auto at) { return at(from); });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, hostrun::self->lane ^ bits, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
  const int from = hostrun::self->lane + by;
  return __shfl_sync(mask, value, from < hostrun::kWarp ? from : hostrun::self->lane, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
  const int from = hostrun::self->lane - by;
  return __shfl_sync(mask, value, from >= 0 ? from : hostrun::self->lane, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  check_mask(mask);
  return hostrun::exchange("__ballot_sync", line, predicate, [](auto at) {
    unsigned bits = 0;
    for (int lane = 0; lane < hostrun::kWarp; ++lane) bits |= (at(lane) ? 1u : 0u) << lane;
    return bits;
  });
}

template <class T>
T atomicAdd(T* address, T value) {
  static_assert(sizeof(T) == 4, "32 bits are served");
  uint32_t old, next;
  uint32_t* word = reinterpret_cast<uint32_t*>(address);
  __atomic_load(word, &old, __ATOMIC_RELAXED);
  T before;
  do {
    memcpy(&before, &old, 4);
    const T after = before + value;
    memcpy(&next, &after, 4);
  } while (
      !__atomic_compare_exchange(word, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

// sum + the four products of signed bytes.
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i)
    sum += static_cast<int>(static_cast<int8_t>(a >> 8 * i)) * static_cast<int8_t>(b >> 8 * i);
  return sum;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }

// Byte i of the result is byte (selector >> 4i) & 7 of the eight bytes y:x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<unsigned>(both >> 8 * ((selector >> 4 * i) & 7) & 0xff) << 8 * i;
  return result;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

// Each rounded by itself: g++ contracts nothing without a flag for fused instructions.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }

// Loads and stores of what is used once.
template <class T>
T __ldcs(const T* from) {
  hostrun::settings.streamed.fetch_add(sizeof(T), std::memory_order_relaxed);
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  hostrun::settings.stored.fetch_add(sizeof(T), std::memory_order_relaxed);
  *to = value;
}

inline float __uint_as_float(unsigned v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}

inline unsigned __float_as_uint(float f) {
  unsigned v;
  memcpy(&v, &f, 4);
  return v;
}

// 16-bit floats, rounded to nearest even as the hardware does. NaN becomes the hardware's NaN.
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  if (f != f) return {0x7fff};
  const unsigned v = __float_as_uint(f);
  return {static_cast<uint16_t>((v + 0x7fff + (v >> 16 & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

inline float __half2float(__half v) {
  const unsigned sign = (v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00)  // infinity, NaN
    return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  const float value = __uint_as_float(magnitude << 13) * 0x1p112f;  // subnormal halves as well
  return __uint_as_float(sign | __float_as_uint(value));
}

inline __half __float2half_rn(float f) {
  const unsigned v = __float_as_uint(f), sign = v >> 16 & 0x8000, magnitude = v & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds past 65504
  if (magnitude < 0x38800000) {  // subnormal: the fraction counts 2^-24
    const float whole = rintf(__uint_as_float(magnitude) * 0x1p24f);
    return {static_cast<uint16_t>(sign | static_cast<unsigned>(whole))};
  }
  const unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13)};
}
