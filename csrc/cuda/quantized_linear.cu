// quantized_linear for 1 to 16 rows of x: int8 and int4 weights, x in floating point.
//
// At so few rows the time is that of reading W, so W goes from memory to the tensor cores in as few
// steps as can be: cp.async into shared memory, one 8-byte load a lane, the numbers q - zero_point
// made in registers, exact in 16 bits. A tile of the storage, 16 rows of W, is the left side of
// mma.m16n8k16, x the right one. Which column of W stands in which k of the product is free as long
// as x agrees; so lane 4 g + t takes the bytes of rows 2 g and 2 g + 1 in line t of four, as they
// lie. A group is summed by itself, then scaled, in float32. float32 x is three bfloat16 planes,
// whose sum it is exactly.
//
// A block has four tiles; two warps share one tile's lines, and blocks may share K. All sums are
// added in a fixed order, without atomics.

#include "cuda/quantized_linear.h"

#include "cuda/epilogue.cuh"
#include "cuda/ptx.cuh"

namespace bigops {
namespace {

constexpr int kTile = 16, kLineBytes = 64;
constexpr int kTiles = 4, kRows = kTiles * kTile;  // of a block
constexpr int kSlices = 2;                         // warps that share a tile's lines
constexpr int kThreads = 32 * kTiles * kSlices;
constexpr int kLines = 32;                    // of a tile in a stage
constexpr int kSteps = kLines / kSlices / 4;  // of four lines, for a warp in a stage
constexpr int kSumPitch = kRows + 8;          // floats; eight banks from row to row
constexpr int kReduceThreads = 256;
constexpr int kBlocks = 3;  // of an SM, at least: at most 80 registers

template <class T, int Bits, int Blocks>
struct Shape {
  static constexpr int columns = Bits == 8 ? 4 : 8;  // of a line
  static constexpr int chunk = kLines * columns;     // of a stage
  static constexpr int rows = 8 * Blocks;            // of x
  static constexpr int groups = chunk / 32;          // scales of a row in a stage, at most
  // Eight or sixteen lanes read a run of x together: rows that far apart meet other banks.
  static constexpr int lane_bytes = columns * static_cast<int>(sizeof(T));
  static constexpr int pad = lane_bytes == 8 ? 32 : lane_bytes == 16 ? 64 : 16;
  static constexpr int x_pitch = chunk * static_cast<int>(sizeof(T)) + pad;  // bytes

  struct Stage {
    unsigned char values[kTiles * kLines * kLineBytes];
    float scale[groups * kRows];
    int8_t zero[groups * kRows];
    unsigned char x[rows * x_pitch];
  };
  static constexpr int stages = sizeof(Stage) > 24 * 1024 ? 3 : 4;  // 99 KB is sm_86's limit
  static constexpr size_t sums = sizeof(float) * kSlices * rows * kSumPitch;
  static constexpr size_t shared = sizeof(Stage) * stages > sums ? sizeof(Stage) * stages : sums;
  static_assert(sizeof(Stage) % 16 == 0, "stages stay aligned");
  static_assert(shared <= 99 * 1024, "what a block may have on sm_86 and sm_120");
};

// The type of the numbers that enter the products, for x of type T.
template <class T>
struct Number {
  using type = T;
};
template <>
struct Number<float> {
  using type = bf16;
};

// What is added to whole numbers after they were put into a float's low bits: takes off the float's
// own 2^7 (bf16), 2^10 (f16) or 2^23 (float), the offset of the stored numbers, and the zero point.
template <class N>
__device__ __forceinline__ uint32_t pair_offset(int all) {
  const float v = -static_cast<float>(all);
  return ptx::pack(v, v, N{});
}

// The numbers of a row's four bytes, as pairs of columns (0, 1), (2, 3) ..; exact.
template <class N, int Bits>
struct Numbers;

template <>
struct Numbers<bf16, 4> {
  uint32_t offset = 0;
  __device__ __forceinline__ void set_zero(int zero) { offset = pair_offset<bf16>(128 + 8 + zero); }
  __device__ __forceinline__ uint32_t pair(uint32_t word, int i) const {
    return ptx::add((word >> 4 * i & 0x000f000f) | 0x43004300, offset, bf16{});
  }
};

template <>
struct Numbers<f16, 4> {
  uint32_t offset = 0;
  __device__ __forceinline__ void set_zero(int zero) { offset = pair_offset<f16>(1024 + 8 + zero); }
  __device__ __forceinline__ uint32_t pair(uint32_t word, int i) const {
    return ptx::add((word >> 4 * i & 0x000f000f) | 0x64006400, offset, f16{});
  }
};

template <>
struct Numbers<bf16, 8> {  // bf16 counts to 256 only: by way of float
  float offset = 0.0f;
  __device__ __forceinline__ void set_zero(int zero) {
    offset = -8388736.0f - static_cast<float>(zero);  // 2^23 + 128
  }
  __device__ __forceinline__ float number(uint32_t word, int i) const {
    return __uint_as_float(__byte_perm(word, 0x4b000000, 0x7440 + i)) + offset;
  }
  __device__ __forceinline__ uint32_t pair(uint32_t word, int i) const {
    word ^= 0x80808080;
    return ptx::pack(number(word, 2 * i), number(word, 2 * i + 1), bf16{});
  }
};

template <>
struct Numbers<f16, 8> {
  uint32_t offset = 0;
  __device__ __forceinline__ void set_zero(int zero) {
    offset = pair_offset<f16>(1024 + 128 + zero);
  }
  __device__ __forceinline__ uint32_t pair(uint32_t word, int i) const {
    const uint32_t bytes = __byte_perm(word ^ 0x80808080, 0x64646464, i == 0 ? 0x4140 : 0x4342);
    return ptx::add(bytes, offset, f16{});
  }
};

// c += a x, where x holds the columns of a lane in one line, four to a product. 16-bit columns are
// read at once: by halves, the lanes of four lines would meet half of the banks twice.
template <class T, int Columns>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[Columns / 4][4],
                                         const T* x) {
  uint32_t b[Columns / 4][2];
  if constexpr (Columns == 8) {
    const uint4 v = *reinterpret_cast<const uint4*>(x);
    b[0][0] = v.x, b[0][1] = v.y, b[1][0] = v.z, b[1][1] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(x);
    b[0][0] = v.x, b[0][1] = v.y;
  }
#pragma unroll
  for (int half = 0; half < Columns / 4; ++half) ptx::multiply(c, a[half], b[half], T{});
}

template <int Columns>
__device__ __forceinline__ void multiply_planes(float (&c)[4], const uint32_t (&a)[Columns / 4][4],
                                                const float* x) {
#pragma unroll
  for (int half = 0; half < Columns / 4; ++half) {
    const float4 v = *reinterpret_cast<const float4*>(x + 4 * half);
    float rest[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
      float top[4];
      for (int i = 0; i < 4; ++i) {
        // Cut, not rounded: the largest floats must not become infinite, and the rest stays exact.
        const bool finite = fabsf(rest[i]) <= 3.402823466e38f;
        top[i] = finite ? __uint_as_float(__float_as_uint(rest[i]) & 0xffff0000u) : rest[i];
        rest[i] = finite ? rest[i] - top[i] : 0.0f;
      }
      const uint32_t b[2] = {ptx::pack(top[0], top[1], bf16{}), ptx::pack(top[2], top[3], bf16{})};
      ptx::multiply(c, a[half], b, bf16{});
    }
  }
}

template <class T, int Bits, int Blocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    decode_linear(const DecodeTask task, bool aligned) {
  using S = Shape<T, Bits, Blocks>;
  BIGOPS_DYNAMIC_SHARED(typename S::Stage, stages);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int tile = warp % kTiles, slice = warp / kTiles, row = lane / 4, line = lane % 4;
  const int64_t tile0 = static_cast<int64_t>(blockIdx.x) * kTiles;
  const int64_t n0 = tile0 * kTile, padded = task.tiles * kTile;
  const int m = static_cast<int>(task.m), group = static_cast<int>(task.group);
  const int group_bits = group == 32 ? 5 : group == 64 ? 6 : 7;  // a shift in place of a division
  const int64_t groups = (task.k + group - 1) >> group_bits;

  const int64_t chunks = (task.lines + kLines - 1) / kLines;
  const int64_t share = (chunks + task.splits - 1) / task.splits;
  const int64_t first = blockIdx.y * share;
  const int64_t last = first + share < chunks ? first + share : chunks;

  const auto load = [&](int64_t chunk, typename S::Stage& to) {
    for (int i = thread; i < kTiles * kLines * 4; i += kThreads) {
      const int of = i / (kLines * 4), at = i / 4 % kLines, part = i % 4;
      const int64_t from = chunk * kLines + at;
      const bool inside = tile0 + of < task.tiles && from < task.lines;
      const int64_t offset = ((tile0 + of) * task.lines + from) * kLineBytes + part * 16;
      // Lines 2 and 3 of four change halves, so that the four lines that a warp reads meet all
      // banks.
      const int place = part ^ (at / 2 % 2 * 2);
      ptx::copy_async_16(to.values + (of * kLines + at) * kLineBytes + place * 16,
                         inside ? task.values + offset : task.values, inside ? 16 : 0);
    }
    const int64_t k0 = chunk * S::chunk;
    if (group > 0) {
      const int64_t g0 = k0 >> group_bits;
      const int count = S::chunk >> group_bits;
#pragma unroll 1
      for (int i = thread; i < count * (kRows / 4); i += kThreads) {
        const int64_t g = g0 + i / (kRows / 4), n = n0 + i % (kRows / 4) * 4;
        const bool inside = g < groups && n < padded;
        ptx::copy_async_16(to.scale + i * 4, inside ? task.scale + g * padded + n : task.scale,
                           inside ? 16 : 0);
      }
      if (task.zero_point != nullptr)
#pragma unroll 1
        for (int i = thread; i < count * (kRows / 16); i += kThreads) {
          const int64_t g = g0 + i / (kRows / 16), n = n0 + i % (kRows / 16) * 16;
          const bool inside = g < groups && n < padded;
          ptx::copy_async_16(to.zero + i * 16,
                             inside ? task.zero_point + g * padded + n : task.zero_point,
                             inside ? 16 : 0);
        }
    }
    const T* x = static_cast<const T*>(task.x);
    if (aligned) {
      constexpr int per = 16 / static_cast<int>(sizeof(T)), pieces = S::chunk / per;
#pragma unroll 1
      for (int i = thread; i < m * pieces; i += kThreads) {
        const int64_t k = k0 + i % pieces * per;
        const bool inside = k < task.k;
        ptx::copy_async_16(to.x + i / pieces * S::x_pitch + i % pieces * 16,
                           inside ? x + (i / pieces) * task.k + k : x, inside ? 16 : 0);
      }
    } else {
#pragma unroll 1
      for (int i = thread; i < m * S::chunk; i += kThreads) {
        const int64_t k = k0 + i % S::chunk;
        T* place = reinterpret_cast<T*>(to.x + i / S::chunk * S::x_pitch) + i % S::chunk;
        *place = k < task.k ? x[(i / S::chunk) * task.k + k] : from_float<T>(0.0f);
      }
    }
  };

  // Rows 2 row and 2 row + 1 of the tile.
  Numbers<typename Number<T>::type, Bits> even, odd;
  const int64_t mine = n0 + tile * kTile + 2 * row;
  const bool whole_zero = group == 0 && task.zero_point != nullptr && mine < padded;
  even.set_zero(whole_zero ? task.zero_point[mine] : 0);
  odd.set_zero(whole_zero ? task.zero_point[mine + 1] : 0);
  const int group_mask = group / (4 * S::columns) - 1;  // steps of a group, less 1

  float part[Blocks][4] = {}, sum[Blocks][4] = {};
  const auto compute = [&](const typename S::Stage& from) {
#pragma unroll 2
    for (int step = 0; step < kSteps; ++step) {
      const int at = slice * (kLines / kSlices) + 4 * step + line;
      const int in_group =
          group > 0 ? (at * S::columns >> group_bits) * kRows + tile * kTile + 2 * row : 0;
      if (group > 0 && task.zero_point != nullptr && (step & group_mask) == 0) {
        even.set_zero(from.zero[in_group]);
        odd.set_zero(from.zero[in_group + 1]);
      }
      const int place = row / 2 ^ (at / 2 % 2 * 2);
      const uint2 words = *reinterpret_cast<const uint2*>(
          from.values + (tile * kLines + at) * kLineBytes + place * 16 + row % 2 * 8);
      uint32_t a[S::columns / 4][4];
#pragma unroll
      for (int half = 0; half < S::columns / 4; ++half) {  // four columns of the lane's line
        a[half][0] = even.pair(words.x, 2 * half);
        a[half][1] = odd.pair(words.y, 2 * half);
        a[half][2] = even.pair(words.x, 2 * half + 1);
        a[half][3] = odd.pair(words.y, 2 * half + 1);
      }
#pragma unroll
      for (int b = 0; b < Blocks; ++b) {
        // A row past M reads row 0: its column of the product is never stored.
        const int x_row = row + 8 * b < m ? row + 8 * b : 0;
        const T* x = reinterpret_cast<const T*>(from.x + x_row * S::x_pitch) + at * S::columns;
        if constexpr (sizeof(T) == 4)
          multiply_planes<S::columns>(part[b], a, x);
        else
          multiply<T, S::columns>(part[b], a, x);
      }
      if (group > 0 && (((step + 1) & group_mask) == 0 || step + 1 == kSteps)) {
        const float even_scale = from.scale[in_group], odd_scale = from.scale[in_group + 1];
#pragma unroll
        for (int b = 0; b < Blocks; ++b)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sum[b][i] += part[b][i] * (i < 2 ? even_scale : odd_scale);
            part[b][i] = 0.0f;
          }
      }
    }
  };

  for (int i = 0; i < S::stages - 1; ++i) {
    if (first + i < last) load(first + i, stages[i]);
    ptx::copy_commit();
  }
  int now = 0, next = S::stages - 1;  // stages
  for (int64_t chunk = first; chunk < last; ++chunk) {
    ptx::copy_wait<S::stages - 2>();
    __syncthreads();  // everybody's copies are here, and the stage that is filled next is read
    if (chunk + S::stages - 1 < last) load(chunk + S::stages - 1, stages[next]);
    ptx::copy_commit();
    compute(stages[now]);
    now = now + 1 < S::stages ? now + 1 : 0;
    next = next + 1 < S::stages ? next + 1 : 0;
  }
  ptx::copy_wait<0>();
  __syncthreads();  // the stages become sums

  float* sums = reinterpret_cast<float*>(stages);  // [slice, row of x, row of W]
#pragma unroll
  for (int b = 0; b < Blocks; ++b)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int x_row = 8 * b + 2 * line + i % 2, w_row = tile * kTile + 2 * row + i / 2;
      sums[(slice * S::rows + x_row) * kSumPitch + w_row] = group > 0 ? sum[b][i] : part[b][i];
    }
  __syncthreads();
  for (int i = thread; i < m * kRows; i += kThreads) {
    const int x_row = i / kRows, w_row = i % kRows;
    const int64_t n = n0 + w_row;
    if (n >= padded) continue;
    float z = 0.0f;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) z += sums[(s * S::rows + x_row) * kSumPitch + w_row];
    if (group == 0) z *= task.scale[n];
    if (task.splits > 1)
      task.partial[(blockIdx.y * task.m + x_row) * padded + n] = z;
    else if (n < task.n)
      static_cast<T*>(task.y)[x_row * task.n + n] =
          finish(z, task.activation, static_cast<const T*>(task.bias),
                 static_cast<const T*>(task.residual), x_row, n, task.n);
  }
}

// y of the sums of all splits, added in their order.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) add_splits(const DecodeTask task) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  const int64_t m = blockIdx.y, padded = task.tiles * kTile;
  if (n >= task.n) return;
  float z = 0.0f;
  for (int s = 0; s < task.splits; ++s) z += task.partial[(s * task.m + m) * padded + n];
  static_cast<T*>(task.y)[m * task.n + n] =
      finish(z, task.activation, static_cast<const T*>(task.bias),
             static_cast<const T*>(task.residual), m, n, task.n);
}

template <class T, int Bits, int Blocks>
const char* launch(const DecodeTask& task, cudaStream_t stream) {
  using S = Shape<T, Bits, Blocks>;
  const auto kernel = decode_linear<T, Bits, Blocks>;
  const bool aligned = task.k * static_cast<int64_t>(sizeof(T)) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(task.x) % 16 == 0;
  const unsigned blocks = static_cast<unsigned>((task.tiles + kTiles - 1) / kTiles);
#if defined(__CUDACC__)
  const cudaError_t allowed = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(S::shared));
  if (allowed != cudaSuccess) return cudaGetErrorString(allowed);
#endif
  BIGOPS_LAUNCH(kernel, dim3(blocks, static_cast<unsigned>(task.splits)), dim3(kThreads), S::shared,
                stream, task, aligned);
  if (task.splits > 1) {
    const int64_t across = (task.n + kReduceThreads - 1) / kReduceThreads;
    BIGOPS_LAUNCH(add_splits<T>, dim3(static_cast<unsigned>(across), static_cast<unsigned>(task.m)),
                  dim3(kReduceThreads), 0, stream, task);
  }
#if defined(__CUDACC__)
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return cudaGetErrorString(launched);
#endif
  return nullptr;
}

template <class T>
const char* launch(const DecodeTask& task, cudaStream_t stream) {
  const bool few = task.m <= 8;
  if (task.bits == 8) return few ? launch<T, 8, 1>(task, stream) : launch<T, 8, 2>(task, stream);
  return few ? launch<T, 4, 1>(task, stream) : launch<T, 4, 2>(task, stream);
}

}  // namespace

const char* decode(const DecodeTask& task, DecodeType type, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (type == kDecodeFloat) return launch<float>(task, on);
  return type == kDecodeBFloat16 ? launch<bf16>(task, on) : launch<f16>(task, on);
}

}  // namespace bigops
