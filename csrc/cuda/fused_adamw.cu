// fused_adamw and fused_grad_norm over many tensors of any dtypes in one launch.
//
// The table of the tensors is a parameter of the kernel, so that a launch reads nothing from the
// host afterwards and can be captured in a CUDA graph. A thread block has a chunk of one tensor and
// finds it by halving. A warp takes up to 256 elements of a row at a time, lane l those at 32 j +
// l: they share the absmax of an 8-bit state and a draw or two of the random generator a lane,
// every load is coalesced, and no tensor needs an alignment beyond that of its elements. Types are
// asked for at run time: the whole block goes one way, and all loads of a turn are under way before
// the first is converted.
//
// Every product and sum is rounded by itself, never contracted: the numbers are those of the
// reference in plain torch. Sums of squares go through one number a block, added in a fixed order.

#include "cuda/fused_adamw.h"

#include <math.h>

#include "cuda/device.cuh"

namespace bigops {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kEach = kStepBlock / 32;  // elements of a lane
constexpr int kSteps = 1024;            // step counters of a launch
constexpr int kBuckets = 22 * 128;      // as bigops/ops/fused_adamw/states.py makes them
constexpr int kLowest = (127 - 22) << 7;

template <class Rule>
struct Table {
  Rule rule;
  int count;
  StepTensor tensors[kStepTensors];
};
static_assert(sizeof(Table<AdamwRule>) <= 32764, "what a kernel's parameters may have");

// Index of the tensor whose chunk this block has.
template <class Rule>
__device__ __forceinline__ int find(const Table<Rule>& table) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const bool right = table.tensors[middle].chunk <= static_cast<int64_t>(blockIdx.x);
    (right ? low : high) = middle;
  }
  return low;
}

// Elements of a row; the blocks of a row; all blocks.
__host__ __device__ __forceinline__ int64_t row_of(const StepTensor& t) {
  return t.row ? t.row : t.numel;
}
__host__ __device__ __forceinline__ int64_t blocks_of_row(const StepTensor& t) {
  return (row_of(t) + kStepBlock - 1) / kStepBlock;
}
int64_t blocks_of(const StepTensor& t) {
  return t.numel == 0 ? 0 : t.numel / row_of(t) * blocks_of_row(t);
}

// The blocks that a warp takes one after the other.
struct Walk {
  uint32_t row, per_row;
  int64_t in_row;  // block of the row
  // Of tensors of several rows, blocks are below 2^32.
  __device__ __forceinline__ Walk(const StepTensor& t, int64_t block)
      : row(0), per_row(static_cast<uint32_t>(blocks_of_row(t))), in_row(block) {
    if (t.row) {
      row = static_cast<uint32_t>(block) / per_row;
      in_row = static_cast<uint32_t>(block) % per_row;
    }
  }
  __device__ __forceinline__ void next(const StepTensor& t) {
    in_row += kWarps;
    for (; t.row && in_row >= per_row; in_row -= per_row) ++row;
  }
  // First element of the block, and how many.
  __device__ __forceinline__ int64_t begin(const StepTensor& t) const {
    return static_cast<int64_t>(row) * t.row + in_row * kStepBlock;
  }
  __device__ __forceinline__ int left(const StepTensor& t) const {
    const int64_t rest = row_of(t) - in_row * kStepBlock;
    return static_cast<int>(rest < kStepBlock ? rest : kStepBlock);
  }
  // Index of the first element in the whole tensor.
  __device__ __forceinline__ int64_t index(const StepTensor& t) const {
    const uint32_t runs = t.run ? row / t.run : 0;
    return t.start + runs * t.stride + static_cast<int64_t>(row - runs * t.run) * t.row +
           in_row * kStepBlock;
  }
};

// --- elements of a lane ------------------------------------------------------------------------

// As they lie in memory, 0 past the end.
template <class T>
__device__ __forceinline__ void load(T (&to)[kEach], const void* from, int64_t begin, int lane,
                                     int left) {
  const T* at = static_cast<const T*>(from) + begin + lane;
#pragma unroll
  for (int j = 0; j < kEach; ++j) to[j] = 32 * j + lane < left ? __ldcs(at + 32 * j) : T(0);
}

__device__ __forceinline__ void load_raw(uint32_t (&to)[kEach], const void* from, StepType type,
                                         int64_t begin, int lane, int left) {
  if (type == kStepFloat) {
    load(to, from, begin, lane, left);
  } else {
    uint16_t half[kEach];
    load(half, from, begin, lane, left);
#pragma unroll
    for (int j = 0; j < kEach; ++j) to[j] = half[j];
  }
}

__device__ __forceinline__ void to_floats(float (&to)[kEach], const uint32_t (&raw)[kEach],
                                          StepType type) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (type == kStepFloat)
      to[j] = __uint_as_float(raw[j]);
    else if (type == kStepBFloat16)
      to[j] = __uint_as_float(raw[j] << 16);
    else
      to[j] = __half2float(__ushort_as_half(static_cast<uint16_t>(raw[j])));
  }
}

template <class T>
__device__ __forceinline__ void store(void* to, const T (&from)[kEach], int64_t begin, int lane,
                                      int left) {
  T* at = static_cast<T*>(to) + begin + lane;
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (32 * j + lane < left) __stcs(at + 32 * j, from[j]);
}

template <class T>
__device__ __forceinline__ void store_rounded(void* to, const float (&from)[kEach], int64_t begin,
                                              int lane, int left) {
  T rounded[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) rounded[j] = from_float<T>(from[j]);
  store(to, rounded, begin, lane, left);
}

// Rounded to nearest.
__device__ __forceinline__ void store_as(StepType type, void* to, const float (&from)[kEach],
                                         int64_t begin, int lane, int left) {
  if (type == kStepFloat)
    store(to, from, begin, lane, left);
  else if (type == kStepBFloat16)
    store_rounded<bf16>(to, from, begin, lane, left);
  else
    store_rounded<f16>(to, from, begin, lane, left);
}

// --- 8-bit states ------------------------------------------------------------------------------

// Values of the codes of a block.
__device__ __forceinline__ void decode(float (&x)[kEach], const uint32_t (&codes)[kEach],
                                       const float* values, float absmax) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) x[j] = __fmul_rn(values[codes[j]], absmax);
}

// Stores the codes of the nearest values of the map and the absmax of the block; a whole warp.
template <bool Signed>
__device__ __forceinline__ void encode(void* codes, float* scale, const float (&x)[kEach],
                                       const int32_t* buckets, int64_t block, int64_t begin,
                                       int lane, int left) {
  uint32_t top = 0;  // magnitudes order as their bits, NaN above inf: a broken state stays visible
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const uint32_t magnitude = 32 * j + lane < left ? __float_as_uint(x[j]) & 0x7fffffffu : 0u;
    top = magnitude > top ? magnitude : top;
  }
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, top, bits);
    top = other > top ? other : top;
  }
  const float absmax = __uint_as_float(top);
  const float divisor = absmax > 0.0f ? absmax : 1.0f;
  uint8_t code[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int bits = static_cast<int>(__float_as_uint(__fdiv_rn(x[j], divisor)) & 0x7fffffffu);
    int bucket = (bits >> 16) - kLowest;
    bucket = bucket < -1 ? -1 : bucket >= kBuckets ? kBuckets - 1 : bucket;
    const int found = buckets[bucket + 1];
    const int index = (found & 0xff) + (bits > (found & -256) ? 1 : 0);
    if (Signed) {  // 127 negative values, 0, 128 positive ones
      const int below = 127 - index;
      code[j] = static_cast<uint8_t>(x[j] < 0.0f ? (below < 0 ? 0 : below) : 127 + index);
    } else {  // above 0 never becomes 0: a denominator of 0 would be a leap
      code[j] = static_cast<uint8_t>(index == 0 && x[j] > 0.0f ? 1 : index);
    }
  }
  store(codes, code, begin, lane, left);
  if (lane == 0) __stcs(scale + block, absmax);
}

// --- stochastic rounding -----------------------------------------------------------------------

// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
__device__ __forceinline__ void philox(uint32_t (&c)[4], uint64_t counter, uint32_t stream,
                                       uint32_t step, uint64_t seed) {
  c[0] = static_cast<uint32_t>(counter);
  c[1] = static_cast<uint32_t>(counter >> 32);
  c[2] = stream;
  c[3] = step;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xd2511f53u, c[0]), low0 = 0xd2511f53u * c[0];
    const uint32_t high1 = __umulhi(0xcd9e8d57u, c[2]), low1 = 0xcd9e8d57u * c[2];
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

// In bfloat16, up with a probability of what truncation would drop.
__device__ __forceinline__ uint16_t round_up_or_down(float x, uint32_t random) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u)
    return static_cast<uint16_t>(((bits & 0x7fffffu) ? bits | 0x400000u : bits) >> 16);
  return static_cast<uint16_t>((bits + random) >> 16);
}

// Element 32 j + lane of a block of the whole tensor takes half j % 2 of word j / 2 of one draw.
// From another element on, a lane's elements lie in two blocks, at one lane of both.
__device__ __forceinline__ void store_stochastic(const StepTensor& t, const float (&from)[kEach],
                                                 const AdamwRule& rule, int64_t at, int64_t begin,
                                                 int lane, int left) {
  const int phase = static_cast<int>(at % kStepBlock), place = phase % 32 + lane;
  const uint64_t counter = static_cast<uint64_t>(at / kStepBlock * 32 + place % 32);
  uint32_t words[8] = {}, drawn[4];
  philox(drawn, counter, t.stream, rule.rounding_step, rule.seed);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = drawn[i];
  if (phase != 0) {
    philox(drawn, counter + 32, t.stream, rule.rounding_step, rule.seed);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[4 + i] = drawn[i];
    const int skipped = phase / 32 + place / 32;  // halves, 8 at most, before the first element's
#pragma unroll
    for (int by = 4; by > 0; by /= 2)
#pragma unroll
      for (int i = 0; i + by < 8; ++i)
        if (skipped & 2 * by) words[i] = words[i + by];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (skipped & 1) words[i] = words[i] >> 16 | words[i + 1] << 16;
  }
  uint16_t rounded[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    rounded[j] = round_up_or_down(from[j], words[j / 2] >> 16 * (j % 2) & 0xffffu);
  store(t.param, rounded, begin, lane, left);
}

// --- AdamW -------------------------------------------------------------------------------------

// Whether there is a step at all, and what the gradients are multiplied by.
__device__ __forceinline__ bool unscale(const AdamwRule& rule, float& factor) {
  double whole = rule.factor;
  if (rule.norm != nullptr) {
    const double norm = *rule.norm;
    if (!(fabs(norm) <= 1.7976931348623157e308)) return false;
    const double clip = rule.clip / (norm * fabs(rule.factor) + 1e-6);
    whole *= clip < 1.0 ? clip : 1.0;
  }
  factor = static_cast<float>(whole);
  return true;
}

__global__ void __launch_bounds__(kThreads)
    adamw_step(const __grid_constant__ Table<AdamwRule> table) {
  const AdamwRule& rule = table.rule;
  float factor;
  if (!unscale(rule, factor)) return;
  const StepTensor& t = table.tensors[find(table)];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float size = t.sizes ? t.sizes[0] : t.size, inverse = t.sizes ? t.sizes[1] : t.inverse;
  const bool coded = t.first_scale != nullptr;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) - t.chunk) * kStepChunk;
  const int64_t last = first + kStepChunk;
  Walk walk(t, first + warp);
  for (int64_t block = first + warp; block < last; block += kWarps, walk.next(t)) {
    const int64_t begin = walk.begin(t);
    if (begin >= t.numel) break;
    const int left = walk.left(t);
    uint32_t p_raw[kEach], g_raw[kEach], m_raw[kEach], v_raw[kEach];
    float m_absmax = 0.0f, v_absmax = 0.0f;
    load_raw(p_raw, t.param, t.param_type, begin, lane, left);
    load_raw(g_raw, t.grad, t.grad_type, begin, lane, left);
    if (coded) {
      uint8_t m_codes[kEach], v_codes[kEach];
      load(m_codes, t.first, begin, lane, left);
      load(v_codes, t.second, begin, lane, left);
      m_absmax = __ldcs(t.first_scale + block);
      v_absmax = __ldcs(t.second_scale + block);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        m_raw[j] = m_codes[j];
        v_raw[j] = v_codes[j];
      }
    } else {
      load(m_raw, t.first, begin, lane, left);
      load(v_raw, t.second, begin, lane, left);
    }
    float p[kEach], g[kEach], m[kEach], v[kEach];
    to_floats(p, p_raw, t.param_type);
    to_floats(g, g_raw, t.grad_type);
    if (coded) {
      decode(m, m_raw, rule.signed_values, m_absmax);
      decode(v, v_raw, rule.unsigned_values, v_absmax);
    } else {
      to_floats(m, m_raw, kStepFloat);
      to_floats(v, v_raw, kStepFloat);
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      float grad = __fmul_rn(g[j], factor);
      if (rule.decay != 0.0f) grad = __fadd_rn(grad, __fmul_rn(rule.decay, p[j]));
      m[j] = __fadd_rn(m[j], __fmul_rn(rule.one_minus_beta1, __fsub_rn(grad, m[j])));
      // The weight first, as torch: grad * grad is inf past 1.8e19, where v itself still has room.
      v[j] = __fadd_rn(__fmul_rn(v[j], rule.beta2_float),
                       __fmul_rn(__fmul_rn(rule.one_minus_beta2, grad), grad));
      const float below = __fadd_rn(__fmul_rn(__fsqrt_rn(v[j]), inverse), rule.eps);
      p[j] = __fsub_rn(__fmul_rn(p[j], rule.keep), __fmul_rn(size, __fdiv_rn(m[j], below)));
    }
    if (coded) {
      encode<true>(t.first, t.first_scale, m, rule.signed_buckets, block, begin, lane, left);
      encode<false>(t.second, t.second_scale, v, rule.unsigned_buckets, block, begin, lane, left);
    } else {
      store(t.first, m, begin, lane, left);
      store(t.second, v, begin, lane, left);
    }
    if (rule.stochastic && t.param_type == kStepBFloat16)
      store_stochastic(t, p, rule, walk.index(t), begin, lane, left);
    else
      store_as(t.param_type, t.param, p, begin, lane, left);
    if (t.copy != nullptr) store_as(t.copy_type, t.copy, p, begin, lane, left);
  }
}

struct Steps {
  AdamwRule rule;
  float* sizes;
  int count;
  float* steps[kSteps];
};

__global__ void __launch_bounds__(kThreads) count_steps(const __grid_constant__ Steps table) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  float factor;
  if (i >= table.count || !unscale(table.rule, factor)) return;
  const float n = *table.steps[i] + 1.0f;
  *table.steps[i] = n;
  const AdamwRule& rule = table.rule;
  table.sizes[2 * i] = static_cast<float>(rule.lr / (1.0 - pow(rule.beta1, double(n))));
  table.sizes[2 * i + 1] = static_cast<float>(1.0 / sqrt(1.0 - pow(rule.beta2, double(n))));
}

// --- norm --------------------------------------------------------------------------------------

// The sum over the block, in thread 0, in an order of its own.
__device__ __forceinline__ double sum_of_block(double sum) {
  BIGOPS_SHARED(double, sums, kWarps);
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();  // the sums of all warps
  double total = 0.0;
  for (int i = 0; i < kWarps; ++i) total += sums[i];
  return total;
}

struct NormRule {
  double* partial;  // of this launch
};

// In float64: squares of float32 past 2^64 are inf in float32.
__global__ void __launch_bounds__(kThreads)
    square_sums(const __grid_constant__ Table<NormRule> table) {
  const StepTensor& t = table.tensors[find(table)];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) - t.chunk) * kStepChunk;
  const int64_t last = first + kStepChunk;
  double sum = 0.0;
  Walk walk(t, first + warp);
  for (int64_t block = first + warp; block < last; block += kWarps, walk.next(t)) {
    const int64_t begin = walk.begin(t);
    if (begin >= t.numel) break;
    const int left = walk.left(t);
    if (t.grad_type == kStepDouble) {
      double g[kEach];
      load(g, t.grad, begin, lane, left);
#pragma unroll
      for (int j = 0; j < kEach; ++j) sum += g[j] * g[j];
    } else {
      uint32_t raw[kEach];
      float g[kEach];
      load_raw(raw, t.grad, t.grad_type, begin, lane, left);
      to_floats(g, raw, t.grad_type);
#pragma unroll
      for (int j = 0; j < kEach; ++j) sum += static_cast<double>(g[j]) * static_cast<double>(g[j]);
    }
  }
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) table.rule.partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    norm_of_sums(const double* partial, int64_t count, double* norm) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) *norm = sqrt(sum);
}

// --- launches ----------------------------------------------------------------------------------

const char* last_error() {
#if defined(__CUDACC__)
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return cudaGetErrorString(error);
#endif
  return nullptr;
}

// launch(table, blocks) for every so many tensors.
template <class Rule, class Launch>
const char* in_tables(const StepTensor* tensors, int64_t count, const Rule& rule,
                      const Launch& launch) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  const char* error = nullptr;
  for (int64_t i = 0; i < count && error == nullptr;) {
    Table<Rule> table;
    table.rule = rule;
    table.count = 0;
    int64_t chunks = 0;
    for (; i < count && table.count < kStepTensors; ++i) {
      const int64_t more = chunks_of(tensors + i, 1);
      if (table.count > 0 && chunks + more > kMostBlocks) break;
      if (more > kMostBlocks) return "a tensor has too many elements";
      table.tensors[table.count] = tensors[i];
      table.tensors[table.count++].chunk = chunks;
      chunks += more;
    }
    error = launch(table, static_cast<unsigned>(chunks));
  }
  return error;
}

}  // namespace

int64_t chunks_of(const StepTensor* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i)
    chunks += (blocks_of(tensors[i]) + kStepChunk - 1) / kStepChunk;
  return chunks;
}

const char* advance_steps(float* const* steps, int64_t count, float* sizes, const AdamwRule& rule,
                          void* stream) {
  for (int64_t i = 0; i < count; i += kSteps) {
    Steps table;
    table.rule = rule;
    table.sizes = sizes + 2 * i;
    table.count = static_cast<int>(count - i < kSteps ? count - i : kSteps);
    for (int j = 0; j < table.count; ++j) table.steps[j] = steps[i + j];
    const dim3 grid(static_cast<unsigned>((table.count + kThreads - 1) / kThreads));
    BIGOPS_LAUNCH(count_steps, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), table);
    if (const char* error = last_error()) return error;
  }
  return nullptr;
}

const char* step_adamw(const StepTensor* tensors, int64_t count, const AdamwRule& rule,
                       void* stream) {
  return in_tables(tensors, count, rule, [&](const Table<AdamwRule>& table, unsigned blocks) {
    BIGOPS_LAUNCH(adamw_step, dim3(blocks), dim3(kThreads), 0, static_cast<cudaStream_t>(stream),
                  table);
    return last_error();
  });
}

const char* norm_of_gradients(const StepTensor* tensors, int64_t count, double* partial,
                              double* norm, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  int64_t done = 0;
  const char* error =
      in_tables(tensors, count, NormRule{}, [&](Table<NormRule>& table, unsigned blocks) {
        table.rule.partial = partial + done;
        done += blocks;
        BIGOPS_LAUNCH(square_sums, dim3(blocks), dim3(kThreads), 0, on, table);
        return last_error();
      });
  if (error != nullptr) return error;
  BIGOPS_LAUNCH(norm_of_sums, dim3(1), dim3(kThreads), 0, on, partial, done, norm);
  return last_error();
}

}  // namespace bigops
