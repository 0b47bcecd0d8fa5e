// sparse24_linear on sparse tensor cores: W 2:4 sparse, bfloat16, float16 or int8.
//
// mma.sp takes its sparse matrix on the left side, so tiles of y^T = W x^T are computed: a block
// has 128 rows of W and 32 or 128 rows of x, four warps. A step is 64 columns of 16 bits or 128 of
// 8: 64 bytes of a row of values, 128 bytes of a row of x, two instructions deep either way. Stages
// of a ring are filled by cp.async and read by ldmatrix; 16-byte pieces of a row are permuted so
// that eight rows meet all banks. A word of metadata for each lane lies as the instruction wants
// it, so W is read at 9/16 of its dense bytes and nothing of it is rearranged. The sums of a tile
// go through shared memory, so that y, bias and residual are touched along rows.
//
// Each sum is added by one warp in a fixed order. What of x stands at zeros of W is never read into
// a sum, NaN and infinity included.

#include "cuda/sparse24_linear.h"

#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"

namespace bigops {
namespace {

constexpr int kThreads = 128, kWarps = 4;
constexpr int kWide = 128, kTile = 16;          // rows of W: of a block, of an instruction
constexpr int kValueBytes = 64, kXBytes = 128;  // of a row in a step
constexpr int kStages = 3;
constexpr int kSumPitch = kWide + 4;  // 2 * 132 is 8 banks on: stores meet all banks
constexpr int kBlocks = 2;            // of an SM, at least

// Rows: of x in a block.
template <class E, int Rows>
struct Shape {
  static constexpr int columns = kXBytes / static_cast<int>(sizeof(E));  // of a step
  static constexpr int words = columns / 64;  // of metadata, for a lane and 16 rows of W
  static constexpr int warps_x = Rows == 128 ? 2 : 1, warps_w = kWarps / warps_x;
  static constexpr int tiles_w = kWide / kTile / warps_w;  // of a warp: 16 rows of W
  static constexpr int tiles_x = Rows / 8 / warps_x;       // 8 rows of x
  static_assert(Rows == 128 || Rows == 32, "rows that warps share evenly");

  struct Stage {
    unsigned char values[kWide * kValueBytes];
    unsigned char x[Rows * kXBytes];
    uint32_t meta[kWide / kTile * words * 32];
  };
  static constexpr size_t sums = 4 * Rows * kSumPitch, ring = sizeof(Stage) * kStages;
  static constexpr size_t shared = ring > sums ? ring : sums;
  static_assert(sizeof(Stage) % 128 == 0, "stages stay aligned");
  static_assert(shared <= 99 * 1024, "what a block may have on sm_86 and sm_120");
};

template <class E>
using SumOf = std::conditional_t<std::is_same<E, int8_t>::value, int32_t, float>;

// Half a step, one instruction deep. w0, x0: first rows of the warp in the stage.
template <int Half, class E, int Rows, class Sum>
__device__ __forceinline__ void multiply_half(
    Sum (&sum)[Shape<E, Rows>::tiles_w][Shape<E, Rows>::tiles_x][4],
    const typename Shape<E, Rows>::Stage& from, int w0, int x0, int lane) {
  using S = Shape<E, Rows>;
  constexpr bool bytes = sizeof(E) == 1;
  uint32_t a[S::tiles_w][4], meta[S::tiles_w];
#pragma unroll
  for (int i = 0; i < S::tiles_w; ++i) {
    const int row = w0 + i * kTile + lane % 16, part = 2 * Half + lane / 16;
    ptx::load_matrix(a[i], from.values + row * kValueBytes + (part ^ row / 2 % 4) * 16);
    const int tile = w0 / kTile + i;
    meta[i] = from.meta[(bytes ? 2 * tile + Half : tile) * 32 + lane];
  }
#pragma unroll
  for (int j = 0; j < S::tiles_x; ++j) {
    const int row = x0 + j * 8 + lane % 8, part = 4 * Half + lane / 8;
    uint32_t b[4];
    ptx::load_matrix(b, from.x + row * kXBytes + (part ^ row % 8) * 16);
#pragma unroll
    for (int i = 0; i < S::tiles_w; ++i)
      ptx::multiply_sparse<bytes ? 0 : Half>(sum[i][j], a[i], b, meta[i], E{});
  }
}

__device__ __forceinline__ float dequantise(float sum, const Sparse24Task&, int64_t, int64_t) {
  return sum;
}

__device__ __forceinline__ float dequantise(int32_t sum, const Sparse24Task& task, int64_t m,
                                            int64_t n) {
  const int64_t zero = task.x_zero[m];
  return static_cast<float>(sum - zero * task.sums[n]) * (task.x_scale[m] * task.scale[n]);
}

// E: of the values and of x as they are multiplied; T: of y.
template <class E, class T, int Rows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sparse24_product(const Sparse24Task task, int64_t across, bool aligned) {
  using S = Shape<E, Rows>;
  using Sum = SumOf<E>;
  BIGOPS_DYNAMIC_SHARED(typename S::Stage, stages);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int w0 = warp / S::warps_x * S::tiles_w * kTile, x0 = warp % S::warps_x * S::tiles_x * 8;
  const int64_t n0 = blockIdx.x % across * kWide, m0 = blockIdx.x / across * Rows;
  const int64_t steps = task.padded / S::columns, row_bytes = steps * kValueBytes;
  const unsigned char* values = static_cast<const unsigned char*>(task.values);
  const E* x = static_cast<const E*>(task.x);

  const auto load = [&](int64_t step, typename S::Stage& to) {
#pragma unroll 2
    for (int i = thread; i < kWide * 4; i += kThreads) {
      const int row = i / 4, part = i % 4;
      const bool inside = n0 + row < task.n;
      const int64_t offset = (n0 + row) * row_bytes + step * kValueBytes + part * 16;
      ptx::copy_async_16(to.values + row * kValueBytes + (part ^ row / 2 % 4) * 16,
                         inside ? values + offset : values, inside ? 16 : 0);
    }
#pragma unroll 2
    for (int i = thread; i < kWide / kTile * S::words * 8; i += kThreads) {
      const int tile = i / (S::words * 8), part = i % (S::words * 8);
      // Tiles past the last one take its places: zeros are no places that an instruction may meet.
      const int64_t of = n0 / kTile + tile, last = task.tiles - 1;
      const int64_t offset = ((of < last ? of : last) * steps + step) * (S::words * 32) + part * 4;
      ptx::copy_async_16(to.meta + i * 4, task.meta + offset);
    }
    const int64_t k0 = step * S::columns;
    if (aligned) {
      constexpr int per = 16 / static_cast<int>(sizeof(E));
#pragma unroll 2
      for (int i = thread; i < Rows * 8; i += kThreads) {
        const int row = i / 8, part = i % 8;
        const int64_t left = m0 + row < task.m ? task.k - k0 - part * per : 0;
        const int valid = left >= per ? 16 : left > 0 ? static_cast<int>(left * sizeof(E)) : 0;
        const int64_t offset = (m0 + row) * task.x_stride + k0 + part * per;
        ptx::copy_async_16(to.x + row * kXBytes + (part ^ row % 8) * 16, valid ? x + offset : x,
                           valid);
      }
    } else {
#pragma unroll 1
      for (int i = thread; i < Rows * S::columns; i += kThreads) {
        const int row = i / S::columns, at = i % S::columns * static_cast<int>(sizeof(E));
        const int64_t k = k0 + i % S::columns;
        E v{};
        if (m0 + row < task.m && k < task.k) v = x[(m0 + row) * task.x_stride + k];
        *reinterpret_cast<E*>(to.x + row * kXBytes + (at / 16 ^ row % 8) * 16 + at % 16) = v;
      }
    }
  };

  Sum sum[S::tiles_w][S::tiles_x][4] = {};
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
    multiply_half<0, E, Rows>(sum, stages[now], w0, x0, lane);
    multiply_half<1, E, Rows>(sum, stages[now], w0, x0, lane);
    now = now + 1 < kStages ? now + 1 : 0;
    next = next + 1 < kStages ? next + 1 : 0;
  }
  ptx::copy_wait<0>();
  __syncthreads();  // the stages become sums

  Sum* sums = reinterpret_cast<Sum*>(stages);  // [row of x, row of W]
#pragma unroll
  for (int i = 0; i < S::tiles_w; ++i)
#pragma unroll
    for (int j = 0; j < S::tiles_x; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int x_row = x0 + 8 * j + lane % 4 * 2 + e % 2;
        const int w_row = w0 + kTile * i + lane / 4 + e / 2 * 8;
        sums[x_row * kSumPitch + w_row] = sum[i][j][e];
      }
  __syncthreads();
  const int64_t n = n0 + thread;  // a row of W for each thread
  if (n >= task.n) return;
  const int rows = task.m - m0 < Rows ? static_cast<int>(task.m - m0) : Rows;
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    const float z = dequantise(sums[row * kSumPitch + thread], task, m0 + row, n);
    static_cast<T*>(task.y)[(m0 + row) * task.n + n] =
        finish(z, task.activation, static_cast<const T*>(task.bias),
               static_cast<const T*>(task.residual), m0 + row, n, task.n);
  }
}

template <class E, class T, int Rows>
const char* launch(const Sparse24Task& task, cudaStream_t stream) {
  using S = Shape<E, Rows>;
  const auto kernel = sparse24_product<E, T, Rows>;
  const int64_t across = (task.n + kWide - 1) / kWide, down = (task.m + Rows - 1) / Rows;
  if (across > INT32_MAX / down) return "x and W have too many rows for one grid";
  const bool aligned = task.x_stride * static_cast<int64_t>(sizeof(E)) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(task.x) % 16 == 0;
#if defined(__CUDACC__)
  const cudaError_t allowed = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(S::shared));
  if (allowed != cudaSuccess) return cudaGetErrorString(allowed);
#endif
  BIGOPS_LAUNCH(kernel, dim3(static_cast<unsigned>(across * down)), dim3(kThreads), S::shared,
                stream, task, across, aligned);
#if defined(__CUDACC__)
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return cudaGetErrorString(launched);
#endif
  return nullptr;
}

template <class E, class T>
const char* launch(const Sparse24Task& task, cudaStream_t stream) {
  return task.m <= 32 ? launch<E, T, 32>(task, stream) : launch<E, T, 128>(task, stream);
}

}  // namespace

const char* multiply_sparse24(const Sparse24Task& task, Sparse24Type type, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (task.whole) {
    if (type == kSparse24Float) return launch<int8_t, float>(task, on);
    return type == kSparse24BFloat16 ? launch<int8_t, bf16>(task, on)
                                     : launch<int8_t, f16>(task, on);
  }
  if (type == kSparse24Float)
    return task.half ? launch<f16, float>(task, on) : launch<bf16, float>(task, on);
  return type == kSparse24BFloat16 ? launch<bf16, bf16>(task, on) : launch<f16, f16>(task, on);
}

}  // namespace bigops
