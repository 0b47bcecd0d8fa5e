// sparse_linear for 1 to 16 rows of x: words of float, bfloat16 or int8 in slices of 16 rows.
//
// A block has one chunk of rows of W and a share of its panels. The 64 words that a panel takes of
// each row of x lie in shared memory, word by word, so that a lane finds all rows of x at the word
// that its row of W stores; the sums of the chunk's rows lie there as well. A warp has a slice:
// lane r and lane 16 + r take every other step of row r. In a panel each row stands in one slice,
// so no two warps add to one row between two barriers, and sums are added in a fixed order, without
// atomics. int8 words meet quantised rows of x in int32, which is exact.
//
// What is read from the storage is checked before it becomes an address: rows of a chunk whose
// storage is broken are NaN.

#include "cuda/sparse_linear.h"

#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"

namespace bigops {
namespace {

constexpr int kPanel = 64, kSlice = 16;  // words, rows
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlocks = 2;          // of an SM, at least: at most 128 registers
constexpr int kBroken = INT32_MIN;  // no sum of int8 products, as 2^14 K stays below 2^31

struct Int8 {};  // four to a word

// A word of W by a word of x, added to a sum; a word of x of type T at column `at` of its row.
template <class Word>
struct Words;

template <>
struct Words<float> {
  using Sum = float;
  static constexpr int columns = 1;
  __device__ static float broken() { return __uint_as_float(0x7fffffff); }
  __device__ static float multiply(uint32_t w, uint32_t x, float sum) {
    return sum + __uint_as_float(w) * __uint_as_float(x);
  }
  template <class T>
  __device__ static uint32_t load(const T* row, int64_t at, int64_t k) {
    return at < k ? __float_as_uint(to_float(row[at])) : 0;
  }
};

template <>
struct Words<bf16> {
  using Sum = float;
  static constexpr int columns = 2;
  __device__ static float broken() { return __uint_as_float(0x7fffffff); }
  __device__ static float multiply(uint32_t w, uint32_t x, float sum) {
    sum += __uint_as_float(w << 16) * __uint_as_float(x << 16);
    return sum + __uint_as_float(w & 0xffff0000u) * __uint_as_float(x & 0xffff0000u);
  }
  __device__ static uint32_t load(const bf16* row, int64_t at, int64_t k) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(row);
    const uint32_t low = at < k ? bits[at] : 0, high = at + 1 < k ? bits[at + 1] : 0;
    return high << 16 | low;
  }
};

template <>
struct Words<Int8> {
  using Sum = int;
  static constexpr int columns = 4;
  __device__ static int broken() { return kBroken; }
  __device__ static int multiply(uint32_t w, uint32_t x, int sum) {
    return __dp4a(static_cast<int>(w), static_cast<int>(x), sum);
  }
  // Rows are padded to whole words.
  __device__ static uint32_t load(const int8_t* row, int64_t at, int64_t k) {
    return at < k ? *reinterpret_cast<const uint32_t*>(row + at) : 0;
  }
};

template <int Rows>
struct Layout {
  static constexpr int sum_pitch = Rows + 1;              // odd, but for one row
  static constexpr int x_pitch = Rows == 16 ? 20 : Rows;  // words; 16-byte aligned from 4 rows on
  static constexpr int held = (Rows * kPanel + kThreads - 1) / kThreads;  // words of a thread
  static size_t bytes(int chunk) {
    return 4 * static_cast<size_t>(2 * kPanel * x_pitch + chunk * sum_pitch);
  }
};

// The words of all rows of x at one place.
template <int Rows>
__device__ __forceinline__ void load_rows(uint32_t (&to)[Rows], const uint32_t* from) {
  if constexpr (Rows % 4 == 0) {
#pragma unroll
    for (int i = 0; i < Rows; i += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(from + i);
      to[i] = v.x;
      to[i + 1] = v.y;
      to[i + 2] = v.z;
      to[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < Rows; ++i) to[i] = from[i];
  }
}

// partial [split, m, row of the chunk] of the sums; x: rows of X, x_stride apart.
template <class X, class Word, int Rows>
__global__ void __launch_bounds__(kThreads, kBlocks) sparse_sums(const SparseDecodeTask task) {
  using W = Words<Word>;
  using Sum = typename W::Sum;
  using L = Layout<Rows>;
  BIGOPS_DYNAMIC_SHARED(uint32_t, memory);
  uint32_t* const x_words = memory;  // [2, kPanel, x_pitch]
  Sum* const sums = reinterpret_cast<Sum*>(memory + 2 * kPanel * L::x_pitch);  // [chunk, sum_pitch]
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int row = lane % kSlice, half = lane / kSlice;
  const int m = static_cast<int>(task.m), slices = task.chunk / kSlice;
  const int indices = kSlice >> task.group_bits, mine = row >> task.group_bits;

  const int64_t share = (task.panels + task.splits - 1) / task.splits;
  const int64_t first = blockIdx.y * share;
  const int64_t last = first + share < task.panels ? first + share : task.panels;
  int broken = 0;

  uint32_t held[L::held];
  const auto fetch = [&](int64_t panel) {
#pragma unroll
    for (int i = 0; i < L::held; ++i) {
      const int at = thread + i * kThreads, of = at / kPanel;
      const int64_t column = (panel * kPanel + at % kPanel) * W::columns;
      held[i] = 0;
      if (of < m)
        held[i] = W::load(static_cast<const X*>(task.x) + of * task.x_stride, column, task.k);
    }
  };
  const auto put = [&](int64_t panel) {
    uint32_t* to = x_words + (panel - first) % 2 * (kPanel * L::x_pitch);
#pragma unroll
    for (int i = 0; i < L::held; ++i) {
      const int at = thread + i * kThreads;
      if (at < Rows * kPanel) to[at % kPanel * L::x_pitch + at / kPanel] = held[i];
    }
  };

  for (int i = thread; i < task.chunk * L::sum_pitch; i += kThreads) sums[i] = Sum(0);
  if (first < last) {
    fetch(first);
    put(first);
  }
  __syncthreads();  // x of the first panel, and sums of zero
  for (int64_t panel = first; panel < last; ++panel) {
    if (panel + 1 < last) fetch(panel + 1);
    const uint32_t* x = x_words + (panel - first) % 2 * (kPanel * L::x_pitch);
    for (int s = warp; s < slices; s += kWarps) {
      const int64_t slice = (blockIdx.x * task.panels + panel) * slices + s;
      int64_t begin = task.ptr[slice], end = task.ptr[slice + 1];
      if (begin < 0 || end > task.steps || end < begin) {
        broken = 1;
        begin = end = 0;
      }
      Sum part[Rows];
#pragma unroll
      for (int i = 0; i < Rows; ++i) part[i] = Sum(0);
#pragma unroll(Rows == 16 ? 2 : 4)
      for (int64_t step = begin + half; step < end; step += 2) {
        const uint32_t w = task.values[step * kSlice + row];
        const int word = task.index[step * indices + mine];
        broken |= word >= kPanel;
        uint32_t of_x[Rows];
        load_rows(of_x, x + word % kPanel * L::x_pitch);
#pragma unroll
        for (int i = 0; i < Rows; ++i) part[i] = W::multiply(w, of_x[i], part[i]);
      }
      const int group = task.rows[slice * indices + mine];
      const int to = (group << task.group_bits) + row % (1 << task.group_bits);
      broken |= to >= task.chunk;
#pragma unroll
      for (int i = 0; i < Rows; ++i) {
        const Sum whole = part[i] + __shfl_xor_sync(0xffffffffu, part[i], kSlice);
        if (half == i % 2 && to < task.chunk) sums[to * L::sum_pitch + i] += whole;
      }
    }
    if (panel + 1 < last) put(panel + 1);
    __syncthreads();  // sums of this panel, x of the next one
  }
  broken = __syncthreads_or(broken);
  const int64_t padded = task.chunks * task.chunk;
  Sum* to = static_cast<Sum*>(task.partial) + blockIdx.y * task.m * padded +
            blockIdx.x * static_cast<int64_t>(task.chunk);
  for (int i = thread; i < m * task.chunk; i += kThreads) {
    const int of = i / task.chunk, n = i % task.chunk;
    to[of * padded + n] = broken ? W::broken() : sums[n * L::sum_pitch + of];
  }
}

__device__ __forceinline__ float dequantise(float sum, const SparseDecodeTask&, int64_t, int64_t) {
  return sum;
}

__device__ __forceinline__ float dequantise(int64_t sum, const SparseDecodeTask& task, int64_t m,
                                            int64_t n) {
  const int64_t whole = sum - static_cast<int64_t>(task.x_zero[m]) * task.sums[n];
  return static_cast<float>(whole) * (task.x_scale[m] * task.scale[n]);
}

// y of the sums of all splits, added in their order.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) sparse_finish(const SparseDecodeTask task) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, m = blockIdx.y;
  if (n >= task.n) return;
  const int64_t padded = task.chunks * task.chunk;
  const Sum* from = static_cast<const Sum*>(task.partial) + m * padded + n;
  std::conditional_t<std::is_same<Sum, int>::value, int64_t, float> total = 0;
  bool broken = false;
  for (int s = 0; s < task.splits; ++s) {
    const Sum part = from[s * task.m * padded];
    if constexpr (std::is_same<Sum, int>::value) broken |= part == kBroken;
    total += part;
  }
  const float z = broken ? Words<float>::broken() : dequantise(total, task, m, n);
  static_cast<T*>(task.y)[m * task.n + n] =
      finish(z, task.activation, static_cast<const T*>(task.bias),
             static_cast<const T*>(task.residual), m, n, task.n);
}

#if defined(__CUDACC__)
const char* error_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

template <class X, class Word, int Rows>
const char* launch(const SparseDecodeTask& task, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(task.chunks), static_cast<unsigned>(task.splits));
  const auto kernel = sparse_sums<X, Word, Rows>;
  BIGOPS_LAUNCH(kernel, grid, dim3(kThreads), Layout<Rows>::bytes(task.chunk), stream, task);
#if defined(__CUDACC__)
  return error_of(cudaGetLastError());
#else
  return nullptr;
#endif
}

template <class X, class Word>
const char* launch_sums(const SparseDecodeTask& task, cudaStream_t stream) {
  if (task.m == 1) return launch<X, Word, 1>(task, stream);
  return task.m <= 4 ? launch<X, Word, 4>(task, stream) : launch<X, Word, 16>(task, stream);
}

template <class T, class Sum>
const char* launch_finish(const SparseDecodeTask& task, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((task.n + kThreads - 1) / kThreads),
                  static_cast<unsigned>(task.m));
  const auto kernel = sparse_finish<T, Sum>;
  BIGOPS_LAUNCH(kernel, grid, dim3(kThreads), 0, stream, task);
#if defined(__CUDACC__)
  return error_of(cudaGetLastError());
#else
  return nullptr;
#endif
}

template <class T>
const char* launch_type(const SparseDecodeTask& task, SparseDecodeWord word, cudaStream_t stream) {
  const char* error = nullptr;
  if (word == kSparseWordInt8) {
    error = launch_sums<int8_t, Int8>(task, stream);
    return error ? error : launch_finish<T, int>(task, stream);
  }
  if (word == kSparseWordFloat) {
    error = launch_sums<T, float>(task, stream);
  } else if constexpr (std::is_same<T, bf16>::value) {
    error = launch_sums<bf16, bf16>(task, stream);
  } else {
    return "bfloat16 words need a bfloat16 x";
  }
  return error ? error : launch_finish<T, float>(task, stream);
}

}  // namespace

const char* decode_sparse(const SparseDecodeTask& task, SparseDecodeType type,
                          SparseDecodeWord word, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (type == kSparseFloat) return launch_type<float>(task, word, on);
  return type == kSparseBFloat16 ? launch_type<bf16>(task, word, on)
                                 : launch_type<f16>(task, word, on);
}

}  // namespace bigops
