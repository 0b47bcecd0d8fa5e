// sparse_linear of a bitmap weight for 1 to 16 rows of x: a bit for each entry, packed values.
//
// At so few rows the time is that of reading W. A warp has four rows of W and goes along their
// tiles of 256 columns: 32 words of bits, one a lane, and the values of all four rows one behind
// the other, which cp.async brings into shared memory tiles ahead of their use. The counts of the
// words, summed over the lanes before, say where the values of a word begin; within a word the bits
// below a lane's own do. Lane l has column 32 j + l of every word j: its x lies in shared memory
// for the whole block, row beside row, and its sums of all rows stay in registers to the end. Where
// no bit is set nothing is multiplied. Lanes and blocks that share K are added in a fixed order,
// without atomics.
//
// What is read from the storage is checked before it becomes an address: rows of a tile whose
// storage is broken are NaN.

#include "cuda/bitmap_linear.h"

#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"

namespace bigops {
namespace {

constexpr int kRows = kBitmapRows, kColumns = kBitmapColumns;
constexpr int kWords = kColumns / 32;  // of a row in a tile
constexpr int kBitBytes = 32 * 4;
constexpr int kFinishThreads = 256;
static_assert(kRows * kWords == 32, "a word for each lane");

template <class T, int Rows>
struct Layout {
  static constexpr int warps = sizeof(T) == 4 && Rows == 16 ? 4 : 8;
  static constexpr int threads = 32 * warps;
  static constexpr int stages = sizeof(T) == 4 ? 2 : 3;
  // Elements from column to column; eight lanes that read 16 bytes meet all banks.
  static constexpr int x_pitch = Rows == 16 ? (sizeof(T) == 4 ? 20 : 24) : Rows;
  static constexpr int x_bytes = kColumns * x_pitch * static_cast<int>(sizeof(T));
  static constexpr int value_bytes = kRows * kColumns * static_cast<int>(sizeof(T));
  static constexpr int stage_bytes = kBitBytes + value_bytes;
  static constexpr size_t bytes = 2 * x_bytes + static_cast<size_t>(warps) * stages * stage_bytes;
  static_assert(bytes <= 99 * 1024, "what a block may have on sm_86 and sm_120");
  static_assert(x_bytes % 16 == 0, "stages are aligned");
};

// Two 16-bit numbers of a word, the low half first; one float.
template <class T>
__device__ __forceinline__ float number(uint32_t word, int half) {
  if constexpr (sizeof(T) == 4)
    return __uint_as_float(word);
  else if constexpr (std::is_same<T, bf16>::value)
    return __uint_as_float(half ? word & 0xffff0000u : word << 16);
  else
    return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * half)));
}

// x of all rows at one column, by the widest loads.
template <class T, int Rows>
__device__ __forceinline__ void load_rows(float (&to)[Rows], const T* from) {
  constexpr int per = 4 / static_cast<int>(sizeof(T));  // numbers of a word
  constexpr int words = Rows / per;
  if constexpr (Rows == 1) {
    to[0] = to_float(from[0]);
  } else if constexpr (words % 4 == 0) {
#pragma unroll
    for (int i = 0; i < words; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + i * per);
      const uint32_t all[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4 * per; ++j) to[i * per + j] = number<T>(all[j / per], j % per);
    }
  } else {
    static_assert(words == 2, "two words or fours of them");
    const uint2 v = *reinterpret_cast<const uint2*>(from);
#pragma unroll
    for (int j = 0; j < 2 * per; ++j) to[j] = number<T>(j < per ? v.x : v.y, j % per);
  }
}

template <class T, int Rows>
__global__ void __launch_bounds__(Layout<T, Rows>::threads, 2)
    bitmap_decode(const BitmapTask task) {
  using L = Layout<T, Rows>;
  constexpr int kStages = L::stages;
  constexpr int per = 16 / static_cast<int>(sizeof(T));  // values in a unit of ptr
  BIGOPS_DYNAMIC_SHARED(unsigned char, memory);
  T* const x_columns = reinterpret_cast<T*>(memory);  // [2, kColumns, x_pitch]
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  unsigned char* const stages = memory + 2 * L::x_bytes + warp * (kStages * L::stage_bytes);
  const int m = static_cast<int>(task.m);
  const uint32_t below_me = (1u << lane) - 1u;

  const int64_t share = (task.panels + task.splits - 1) / task.splits;
  const int64_t first = blockIdx.y * share;
  const int64_t last = first + share < task.panels ? first + share : task.panels;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * L::warps + warp;
  const bool mine = group * kRows < task.n;  // else this warp brings x only
  bool broken = false;

  // Elements of x that this thread brings of a panel, four at a time.
  T held[4];
  const auto fetch = [&](int64_t panel, int batch) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = thread + (4 * batch + i) * L::threads, row = at / kColumns;
      const int64_t column = panel * kColumns + at % kColumns;
      held[i] = from_float<T>(0.0f);
      if (row < m && column < task.k)
        held[i] = static_cast<const T*>(task.x)[row * task.k + column];
    }
  };
  const auto put = [&](int64_t panel, int batch) {
    T* const to = x_columns + (panel - first) % 2 * (kColumns * L::x_pitch);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = thread + (4 * batch + i) * L::threads;
      if (at < Rows * kColumns) to[at % kColumns * L::x_pitch + at / kColumns] = held[i];
    }
  };
  constexpr int batches = (Rows * kColumns + 4 * L::threads - 1) / (4 * L::threads);

  // Brings a tile: its bits, and what its values take; a group of copies for each, though empty.
  const auto bring = [&](int64_t panel) {
    if (mine && panel < last) {
      const int64_t tile = group * task.panels + panel;
      unsigned char* const to = stages + (panel - first) % kStages * L::stage_bytes;
      if (lane < kBitBytes / 16)
        ptx::copy_async_16(to + 16 * lane, task.bits + 32 * tile + 4 * lane);
      const int64_t begin = task.ptr[tile], end = task.ptr[tile + 1];
      const bool sound =
          begin >= 0 && begin <= end && end <= task.total && end - begin <= L::value_bytes / 16;
      const int units = sound ? static_cast<int>(end - begin) : 0;
      const unsigned char* const from = static_cast<const unsigned char*>(task.values) + 16 * begin;
      for (int i = lane; i < units; i += 32)
        ptx::copy_async_16(to + kBitBytes + 16 * i, from + 16 * i);
      broken |= !sound;
    }
    ptx::copy_commit();
  };

  float sums[kRows][Rows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < Rows; ++i) sums[r][i] = 0.0f;

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) bring(first + s);
  for (int batch = 0; first < last && batch < batches; ++batch) {
    fetch(first, batch);
    put(first, batch);
  }
  __syncthreads();  // x of the first panel
  for (int64_t panel = first; panel < last; ++panel) {
    if (panel + 1 < last) fetch(panel + 1, 0);  // lands during this panel
    ptx::copy_wait<kStages - 2>();
    __syncwarp();  // the tile of every lane's copies; the tile before is no longer read
    bring(panel + kStages - 1);
    if (mine) {
      const unsigned char* const stage = stages + (panel - first) % kStages * L::stage_bytes;
      const T* const values = reinterpret_cast<const T*>(stage + kBitBytes);
      const T* const x = x_columns + (panel - first) % 2 * (kColumns * L::x_pitch);
      const uint32_t word = reinterpret_cast<const uint32_t*>(stage)[lane];
      int before = __popc(word);  // values of the words of lower lanes, after the sums
#pragma unroll
      for (int by = 1; by < 32; by *= 2) {
        const int lower = __shfl_up_sync(0xffffffffu, before, by);
        before += lane >= by ? lower : 0;
      }
      const int64_t tile = group * task.panels + panel;
      const int64_t stored = (static_cast<int64_t>(task.ptr[tile + 1]) - task.ptr[tile]) * per;
      const bool sound = __shfl_sync(0xffffffffu, before, 31) <= stored;
      broken |= !sound;
      before -= __popc(word);
#pragma unroll(Rows == 16 ? 1 : 2)
      for (int j = 0; j < kWords; ++j) {
        float of_x[Rows];
        load_rows(of_x, x + (32 * j + lane) * L::x_pitch);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint32_t bits = __shfl_sync(0xffffffffu, word, kWords * r + j);
          const int begin = __shfl_sync(0xffffffffu, before, kWords * r + j);
          if (sound && (bits >> lane & 1u)) {
            const float value = to_float(values[begin + __popc(bits & below_me)]);
#pragma unroll
            for (int i = 0; i < Rows; ++i) sums[r][i] += value * of_x[i];
          }
        }
      }
    }
    if (panel + 1 < last) {
      put(panel + 1, 0);
#pragma unroll 1
      for (int batch = 1; batch < batches; ++batch) {
        fetch(panel + 1, batch);
        put(panel + 1, batch);
      }
    }
    __syncthreads();  // x of the next panel
  }
  ptx::copy_wait<0>();
  if (!mine) return;
  float* const whole = reinterpret_cast<float*>(stages);  // [kRows, Rows]: no tile is left in it
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      float sum = sums[r][i];
#pragma unroll
      for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
      if (lane == 0) whole[r * Rows + i] = sum;
    }
  const unsigned any_broken = __ballot_sync(0xffffffffu, broken);
  __syncwarp();  // the sums of all lanes
  for (int at = lane; at < kRows * Rows; at += 32) {
    const int64_t n = group * kRows + at / Rows, row = at % Rows;
    if (n >= task.n || row >= m) continue;
    const float z = any_broken ? __uint_as_float(0x7fffffff) : whole[at];
    if (task.splits == 1)
      static_cast<T*>(task.y)[row * task.n + n] =
          finish(z, task.activation, static_cast<const T*>(task.bias),
                 static_cast<const T*>(task.residual), row, n, task.n);
    else
      task.partial[(blockIdx.y * task.m + row) * task.n + n] = z;
  }
}

// y of the sums of all splits, added in their order.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) bitmap_finish(const BitmapTask task) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x, m = blockIdx.y;
  if (n >= task.n) return;
  float z = 0.0f;
  for (int s = 0; s < task.splits; ++s) z += task.partial[(s * task.m + m) * task.n + n];
  static_cast<T*>(task.y)[m * task.n + n] =
      finish(z, task.activation, static_cast<const T*>(task.bias),
             static_cast<const T*>(task.residual), m, n, task.n);
}

#if defined(__CUDACC__)
const char* error_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

template <class T, int Rows>
const char* launch(const BitmapTask& task, cudaStream_t stream) {
  using L = Layout<T, Rows>;
  constexpr int rows = L::warps * kRows;
  const dim3 grid(static_cast<unsigned>((task.n + rows - 1) / rows),
                  static_cast<unsigned>(task.splits));
  const auto kernel = bitmap_decode<T, Rows>;
#if defined(__CUDACC__)
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(L::bytes));
  if (error != cudaSuccess) return error_of(error);
#endif
  BIGOPS_LAUNCH(kernel, grid, dim3(L::threads), L::bytes, stream, task);
#if defined(__CUDACC__)
  return error_of(cudaGetLastError());
#else
  return nullptr;
#endif
}

template <class T>
const char* launch_type(const BitmapTask& task, cudaStream_t stream) {
  const char* error = task.m == 1   ? launch<T, 1>(task, stream)
                      : task.m <= 4 ? launch<T, 4>(task, stream)
                                    : launch<T, 16>(task, stream);
  if (error != nullptr || task.splits == 1) return error;
  const dim3 grid(static_cast<unsigned>((task.n + kFinishThreads - 1) / kFinishThreads),
                  static_cast<unsigned>(task.m));
  BIGOPS_LAUNCH(bitmap_finish<T>, grid, dim3(kFinishThreads), 0, stream, task);
#if defined(__CUDACC__)
  error = error_of(cudaGetLastError());
#endif
  return error;
}

}  // namespace

const char* decode_bitmap(const BitmapTask& task, BitmapType type, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (type == kBitmapFloat) return launch_type<float>(task, on);
  return type == kBitmapBFloat16 ? launch_type<bf16>(task, on) : launch_type<f16>(task, on);
}

}  // namespace bigops
