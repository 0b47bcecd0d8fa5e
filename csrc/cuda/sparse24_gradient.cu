// sparse24_gradient: the gradient of the stored values of a 2:4 weight, bfloat16 or float16.
//
// The product gz^T x is dense: nothing of gz or x is zero. A block makes 128 x 128 of it by eight
// warps, each 64 x 32, over 32 rows of both at a time: stages of a ring are filled by cp.async and
// read transposed by ldmatrix, since the rows that are summed over lie along columns; 16-byte
// pieces of a row are permuted so that eight rows meet all banks. Then two lanes exchange halves,
// so that each has the four sums of a four of one row, and keeps the two that the metadata name:
// what is written is half of a dense gradient, and no dense one is ever in memory.
//
// Each sum is added by one warp in a fixed order, in float32.

#include "cuda/sparse24_gradient.h"

#include "cuda/ptx.cuh"

namespace bigops {
namespace {

constexpr int kThreads = 256, kBlocks = 2;  // of an SM, at least
constexpr int kSide = 128;                  // rows and columns of W of a block
constexpr int kDeep = 32;                   // rows of gz and x of a step
constexpr int kStages = 3;
constexpr int kWarpsN = 2, kTilesN = kSide / 16 / kWarpsN;     // of a warp: 16 rows of W
constexpr int kWarpsK = 4, kTilesK = kSide / 8 / kWarpsK;      // 8 columns
constexpr int kRowBytes = kSide * 2, kParts = kRowBytes / 16;  // of a row of a stage
constexpr int kPairs = kSide / 4;                              // of a row of the result
constexpr int kPitch = kPairs + 4;                             // words: 16-byte pieces stay aligned

struct Stage {
  unsigned char gz[kDeep * kRowBytes];
  unsigned char x[kDeep * kRowBytes];
};
constexpr size_t kShared = sizeof(Stage) * kStages;
static_assert(kShared >= sizeof(uint32_t) * kSide * kPitch, "the result takes the ring's place");
static_assert(kShared <= 49 * 1024, "two blocks fit an SM of sm_86 and sm_120");

// Where piece `part` of a row of a stage lies, in bytes.
__device__ __forceinline__ int place(int row, int part) {
  return row * kRowBytes + (part ^ row % 8) * 16;
}

// [rows of the step, 128 columns] of a matrix [m, columns]; zeros past its ends.
template <class E>
__device__ __forceinline__ void fill(unsigned char* to, const E* from, int64_t m0, int64_t m,
                                     int64_t c0, int64_t columns, bool aligned) {
  if (aligned) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kDeep * kParts; i += kThreads) {
      const int row = i / kParts, part = i % kParts;
      const int64_t left = m0 + row < m ? columns - c0 - part * 8 : 0;
      const int valid = left >= 8 ? 16 : left > 0 ? static_cast<int>(left) * 2 : 0;
      ptx::copy_async_16(to + place(row, part),
                         valid ? from + (m0 + row) * columns + c0 + part * 8 : from, valid);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kDeep * kSide; i += kThreads) {
      const int row = i / kSide, column = i % kSide;
      E v{};
      if (m0 + row < m && c0 + column < columns) v = from[(m0 + row) * columns + c0 + column];
      *reinterpret_cast<E*>(to + place(row, column / 8) + column % 8 * 2) = v;
    }
  }
}

// 16 rows of a step, one instruction deep. n0, k0: first row and column of the warp in the block.
template <int Half, class E>
__device__ __forceinline__ void multiply_half(float (&sum)[kTilesN][kTilesK][4], const Stage& from,
                                              int n0, int k0, int lane) {
  uint32_t a[kTilesN][4];
#pragma unroll
  for (int i = 0; i < kTilesN; ++i) {
    const int row = Half * 16 + lane / 16 * 8 + lane % 8, part = (n0 + 16 * i) / 8 + lane / 8 % 2;
    ptx::load_matrix_transposed(a[i], from.gz + place(row, part));
  }
#pragma unroll
  for (int j = 0; j < kTilesK; j += 2) {
    const int row = Half * 16 + lane % 16, part = (k0 + 8 * j) / 8 + lane / 16;
    uint32_t both[4];
    ptx::load_matrix_transposed(both, from.x + place(row, part));
    const uint32_t first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
#pragma unroll
    for (int i = 0; i < kTilesN; ++i) {
      ptx::multiply(sum[i][j], a[i], first, E{});
      ptx::multiply(sum[i][j + 1], a[i], second, E{});
    }
  }
}

__device__ __forceinline__ float select(const float (&four)[4], unsigned at) {
  return at < 2 ? (at == 0 ? four[0] : four[1]) : (at == 2 ? four[2] : four[3]);
}

template <class E>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sparse24_sampled(const Sparse24GradientTask task, int64_t across, bool gz_aligned,
                     bool x_aligned) {
  BIGOPS_DYNAMIC_SHARED(Stage, stages);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_n = warp / kWarpsK * kTilesN * 16, warp_k = warp % kWarpsK * kTilesK * 8;
  const int64_t n0 = blockIdx.x / across * kSide, k0 = blockIdx.x % across * kSide;
  const int64_t steps = (task.m + kDeep - 1) / kDeep;
  const E* gz = static_cast<const E*>(task.gz);
  const E* x = static_cast<const E*>(task.x);

  const auto load = [&](int64_t step, Stage& to) {
    fill(to.gz, gz, step * kDeep, task.m, n0, task.n, gz_aligned);
    fill(to.x, x, step * kDeep, task.m, k0, task.k, x_aligned);
  };

  float sum[kTilesN][kTilesK][4] = {};
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) load(i, stages[i]);
    ptx::copy_commit();
  }
  int now = 0, next = kStages - 1;  // stages
  for (int64_t step = 0; step < steps; ++step) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();  // everybody's copies are here, and the stage that is filled next is read
    if (step + kStages - 1 < steps) load(step + kStages - 1, stages[next]);
    ptx::copy_commit();
    multiply_half<0, E>(sum, stages[now], warp_n, warp_k, lane);
    multiply_half<1, E>(sum, stages[now], warp_n, warp_k, lane);
    now = now + 1 < kStages ? now + 1 : 0;
    next = next + 1 < kStages ? next + 1 : 0;
  }
  ptx::copy_wait<0>();
  __syncthreads();  // the stages become pairs of values

  uint32_t* pairs = reinterpret_cast<uint32_t*>(stages);  // [row of W, four]
  const int group = lane / 4, odd = lane % 2;
#pragma unroll
  for (int i = 0; i < kTilesN; ++i) {
    // An even lane takes the four of row `group`, an odd one that of the row eight below.
    const int row = warp_n + 16 * i + group + 8 * odd;
#pragma unroll
    for (int j = 0; j < kTilesK; ++j) {
      const float (&c)[4] = sum[i][j];
      const float low = __shfl_xor_sync(0xffffffffu, odd ? c[0] : c[2], 1);
      const float high = __shfl_xor_sync(0xffffffffu, odd ? c[1] : c[3], 1);
      const float four[4] = {odd ? low : c[0], odd ? high : c[1], odd ? c[2] : low,
                             odd ? c[3] : high};
      const int column = warp_k + 8 * j + lane % 4 / 2 * 4;
      const int64_t n = n0 + row, k = k0 + column;
      uint32_t word = 0;
      if (n < task.n && k < task.padded)
        word = task.meta[(n / 16 * (task.padded / 64) + k / 64) * 32 + n % 8 * 4 + k % 64 / 16];
      const unsigned bits = word >> (odd * 16 + column % 16) & 15u;
      pairs[row * kPitch + column / 4] =
          ptx::pack(select(four, bits & 3u), select(four, bits >> 2), E{});
    }
  }
  __syncthreads();  // the pairs of all warps are there
#pragma unroll
  for (int i = thread; i < kSide * kPairs / 4; i += kThreads) {
    const int row = i / (kPairs / 4), part = i % (kPairs / 4);
    const int64_t n = n0 + row, k = k0 + part * 16;
    if (n < task.n && k < task.padded)
      reinterpret_cast<uint4*>(task.values)[(n * task.padded + k) / 16] =
          *reinterpret_cast<const uint4*>(pairs + row * kPitch + part * 4);
  }
}

template <class E>
const char* launch(const Sparse24GradientTask& task, cudaStream_t stream) {
  const auto kernel = sparse24_sampled<E>;
  const int64_t across = (task.padded + kSide - 1) / kSide, down = (task.n + kSide - 1) / kSide;
  if (across > INT32_MAX / down) return "W has too many rows and columns for one grid";
  const auto aligned = [](const void* at, int64_t columns) {
    return columns % 8 == 0 && reinterpret_cast<uintptr_t>(at) % 16 == 0;
  };
#if defined(__CUDACC__)
  const cudaError_t allowed = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kShared));
  if (allowed != cudaSuccess) return cudaGetErrorString(allowed);
#endif
  BIGOPS_LAUNCH(kernel, dim3(static_cast<unsigned>(across * down)), dim3(kThreads), kShared, stream,
                task, across, aligned(task.gz, task.n), aligned(task.x, task.k));
#if defined(__CUDACC__)
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return cudaGetErrorString(launched);
#endif
  return nullptr;
}

}  // namespace

const char* gradient_sparse24(const Sparse24GradientTask& task, bool half, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return half ? launch<f16>(task, on) : launch<bf16>(task, on);
}

}  // namespace bigops
