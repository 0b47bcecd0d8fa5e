// sparse24_pack: a dense weight to 2:4 for sparse tensor cores, and the transpose of such a weight.
//
// A block has 64 x 64 entries of W, each of 256 threads a 4 x 4 block of them in registers: it
// chooses what stays, writes the pairs of its rows, and shows the four bits of each four to the
// threads that put words of metadata together. The pairs of W^T go through shared memory, so that
// they too are written along rows. W is read once and each result written once.
//
// For the transposable form all 90 masks of a 4 x 4 block with two entries a row and a column are
// tried (Hubara et al. 2021, "Accelerated Sparse Neural Training", arXiv 2102.08124, whose
// transposable N:M masks are found by a flow; 90 masks are few enough to try). A sum is
// (row 0 + row 1) + (row 2 + row 3) of float32 sums of pairs, so that plain torch finds the same
// mask; of equal sums the first in the order of the rows' pairs 01 02 03 12 13 23 stays.

#include "cuda/sparse24_pack.h"

#include <type_traits>

#include "cuda/ptx.cuh"

namespace bigops {
namespace {

constexpr int kThreads = 256, kTile = 64, kFours = kTile / 4;
constexpr int kPitch = kFours + 1;  // words of a column of W^T: stores meet different banks
constexpr int kRowTiles = kTile / 16;

template <class From>
union Four {
  using Vector = std::conditional_t<sizeof(From) == 4, uint4, uint2>;
  Vector vector;
  From at[4];
};

// Four neighbours of a row as float32, 0 past the end; a vector where `aligned`.
template <class From>
__device__ __forceinline__ void load_four(float (&v)[4], const From* at, int left, bool aligned) {
  if (aligned) {
    Four<From> four;
    four.vector = ptx::load_streaming(reinterpret_cast<const typename Four<From>::Vector*>(at));
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = to_float(four.at[j]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = j < left ? to_float(at[j]) : 0.0f;
  }
}

// The mask of four numbers, bit j for number j: the two largest magnitudes. Of what lies past the
// end (left of four) nothing.
__device__ __forceinline__ unsigned largest_two(const float (&v)[4], int left) {
  int key[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    key[j] = j < left ? static_cast<int>(__float_as_uint(v[j]) & 0x7fffffffu) : -1;
  unsigned mask = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int before = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      before += i != j && (i < j ? key[i] >= key[j] : key[i] > key[j]) ? 1 : 0;
    mask |= (before < 2 && key[j] >= 0 ? 1u : 0u) << j;
  }
  return mask;
}

// The pairs of columns 01 02 03 12 13 23, a bit each, and the number of such a pair.
__device__ constexpr unsigned pair(int number) {
  return number < 3 ? 1u | 2u << number : number < 5 ? 2u | 4u << (number - 3) : 12u;
}
__device__ constexpr int which(unsigned columns) {
  return columns == 3u    ? 0
         : columns == 5u  ? 1
         : columns == 9u  ? 2
         : columns == 6u  ? 3
         : columns == 10u ? 4
                          : 5;
}

// The mask of a 4 x 4 block, row i in bits 4 i .. 4 i + 3.
__device__ __forceinline__ unsigned largest_block(const float (&v)[4][4]) {
  float sum[4][6];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = fabsf(v[i][0]), b = fabsf(v[i][1]), c = fabsf(v[i][2]), d = fabsf(v[i][3]);
    sum[i][0] = a + b, sum[i][1] = a + c, sum[i][2] = a + d;
    sum[i][3] = b + c, sum[i][4] = b + d, sum[i][5] = c + d;
  }
  float best = -1.0f;
  unsigned mask = 0;
#pragma unroll
  for (int p = 0; p < 6; ++p)
#pragma unroll
    for (int q = 0; q < 6; ++q)
#pragma unroll
      for (int r = 0; r < 6; ++r) {
        // The last row fills up the columns that three rows left with one; all others have two.
        const unsigned last = pair(p) ^ pair(q) ^ pair(r), thrice = pair(p) & pair(q) & pair(r);
        const unsigned none = ~(pair(p) | pair(q) | pair(r)) & 15u;
        if (thrice != 0u || none != 0u || __popc(last) != 2) continue;
        const int s = which(last);
        const float total = (sum[0][p] + sum[1][q]) + (sum[2][r] + sum[3][s]);
        if (total > best) {
          best = total;
          mask = pair(p) | pair(q) << 4 | pair(r) << 8 | pair(s) << 12;
        }
      }
  return mask;
}

// The places of the two numbers of a four: those of the mask, then the first that it leaves out.
__device__ __forceinline__ void places_of(unsigned mask, int& low, int& high) {
  if (__popc(mask) < 2) mask |= mask + 1;  // the lowest 0 becomes 1
  if (__popc(mask) < 2) mask |= mask + 1;
  low = __ffs(static_cast<int>(mask)) - 1;
  high = 31 - __clz(static_cast<int>(mask));
}

__device__ __forceinline__ float select(float a, float b, float c, float d, int at) {
  return at < 2 ? (at == 0 ? a : b) : (at == 2 ? c : d);
}

// A word of metadata of 16 rows and 16 fours, whose bits lie in `bits` [16, kFours].
__device__ __forceinline__ uint32_t word_of(const uint8_t* bits, int lane) {
  uint32_t word = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int q = 0; q < 4; ++q)
      word |= static_cast<uint32_t>(bits[(lane / 4 + 8 * h) * kFours + lane % 4 * 4 + q])
              << (16 * h + 4 * q);
  return word;
}

// The four bits of a row's four in the words of a tile of 16 rows and 64 columns.
__device__ __forceinline__ unsigned bits_of(const uint32_t* words, int row, int four) {
  return words[row % 8 * 4 + four / 4] >> (row / 8 * 16 + four % 4 * 4) & 15u;
}

// Pairs of W^T from shared memory, [column of W, four of rows], to their rows; n0: a multiple
// of 64.
__device__ __forceinline__ void store_transposed(const uint32_t* transposed, void* values_t,
                                                 int64_t n0, int64_t k0, int64_t k,
                                                 int64_t padded_n) {
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kFours; i += kThreads) {
    const int column = i / kFours, four = i % kFours;
    if (k0 + column >= k) continue;
    const int64_t at = ((k0 + column) * padded_n + n0) / 4 + four;  // in words
    static_cast<uint32_t*>(values_t)[at] = transposed[column * kPitch + four];
  }
}

// Fours of W that are to stay, a bit each, and whether that is more than can.
__device__ __forceinline__ unsigned choose(const Sparse24PackTask& task, const float (&v)[4][4],
                                           int64_t n, int64_t k, bool aligned, bool& broken) {
  const int left = task.k - k < 4 ? static_cast<int>(task.k - k) : 4;
  unsigned mask = 0;
  if (task.choice == kPackBlocks) {
    mask = largest_block(v);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i >= task.n) continue;
      unsigned row = 0;
      if (task.choice == kPackLargest) {
        row = largest_two(v[i], left);
      } else {
        const uint8_t* given = task.mask != nullptr ? task.mask + (n + i) * task.k + k : nullptr;
        uint32_t bytes = 0;
        if (given != nullptr && aligned) bytes = *reinterpret_cast<const uint32_t*>(given);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          bool kept = v[i][j] != 0.0f;
          if (given != nullptr)
            kept = aligned ? (bytes >> 8 * j & 255u) != 0u : j < left && given[j] != 0;
          row |= (kept ? 1u : 0u) << j;
        }
      }
      mask |= row << 4 * i;
    }
  }
  broken = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int across = __popc(mask >> 4 * i & 15u), down = __popc(mask >> i & 0x1111u);
    broken = broken || across > 2 || (task.values_t != nullptr && (across != 2 || down != 2));
  }
  return mask;
}

// From: of W; E: of the stored values.
template <class From, class E>
__global__ void __launch_bounds__(kThreads)
    sparse24_compress(const Sparse24PackTask task, int64_t across, bool aligned) {
  BIGOPS_SHARED(uint32_t, transposed, kTile* kPitch);
  BIGOPS_SHARED(uint8_t, bits, kTile* kFours);    // [row, four]
  BIGOPS_SHARED(uint8_t, bits_t, kTile* kFours);  // [column, four of rows]
  const int thread = threadIdx.x, r = thread / kFours, c = thread % kFours;
  const int64_t n0 = blockIdx.x / across * kTile, k0 = blockIdx.x % across * kTile;
  const int64_t n = n0 + 4 * r, k = k0 + 4 * c;
  const bool inside = n < task.n && k < task.k;

  float v[4][4] = {};
  unsigned mask = 0;
  bool broken = false;
  if (inside) {
    const int left = task.k - k < 4 ? static_cast<int>(task.k - k) : 4;
    const From* w = static_cast<const From*>(task.w);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i < task.n) load_four(v[i], w + (n + i) * task.k + k, left, aligned);
    mask = choose(task, v, n, k, aligned, broken);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((mask >> (4 * i + j) & 1u) == 0u) v[i][j] = 0.0f;
        if (broken) v[i][j] = __uint_as_float(0x7fc00000u);
      }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int low, high;
    places_of(mask >> 4 * i & 15u, low, high);
    bits[(4 * r + i) * kFours + c] = static_cast<uint8_t>(low | high << 2);
    if (n + i < task.n)
      static_cast<uint32_t*>(task.values)[((n + i) * task.padded_k + k) / 4] =
          ptx::pack(select(v[i][0], v[i][1], v[i][2], v[i][3], low),
                    select(v[i][0], v[i][1], v[i][2], v[i][3], high), E{});
  }
  if (task.values_t != nullptr) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned down = mask >> j;
      int low, high;
      places_of((down & 1u) | (down >> 3 & 2u) | (down >> 6 & 4u) | (down >> 9 & 8u), low, high);
      bits_t[(4 * c + j) * kFours + r] = static_cast<uint8_t>(low | high << 2);
      transposed[(4 * c + j) * kPitch + r] =
          ptx::pack(select(v[0][j], v[1][j], v[2][j], v[3][j], low),
                    select(v[0][j], v[1][j], v[2][j], v[3][j], high), E{});
    }
  }
  const int any = __syncthreads_or(broken ? 1 : 0);  // and the bits of all fours are there
  if (thread == 0) task.broken[blockIdx.x] = any;
  const int tile = thread / 32 % kRowTiles, lane = thread % 32;
  if (thread < kRowTiles * 32) {
    if (n0 / 16 + tile < task.tiles_n)
      task.meta[((n0 / 16 + tile) * (task.padded_k / kTile) + k0 / kTile) * 32 + lane] =
          word_of(bits + tile * 16 * kFours, lane);
  } else if (task.values_t != nullptr && k0 / 16 + tile < task.tiles_k) {
    task.meta_t[((k0 / 16 + tile) * (task.padded_n / kTile) + n0 / kTile) * 32 + lane] =
        word_of(bits_t + tile * 16 * kFours, lane);
  }
  if (task.values_t != nullptr)
    store_transposed(transposed, task.values_t, n0, k0, task.k, task.padded_n);
}

// A value whose place W^T does not have becomes NaN: metadata that do not belong together.
template <class E>
__global__ void __launch_bounds__(kThreads)
    sparse24_transpose(const Sparse24TransposeTask task, int64_t across) {
  BIGOPS_SHARED(uint4, values, kTile * kFours / 4);  // [row, four], pairs of 16 bits
  BIGOPS_SHARED(uint4, meta, kRowTiles * 8);
  BIGOPS_SHARED(uint4, meta_t, kRowTiles * 8);
  BIGOPS_SHARED(uint32_t, transposed, kTile* kPitch);
  const int thread = threadIdx.x, r = thread / kFours, c = thread % kFours;
  const int64_t n0 = blockIdx.x / across * kTile, k0 = blockIdx.x % across * kTile;
  {
    const int row = thread / 4, part = thread % 4;
    const bool there = n0 + row < task.n;
    const unsigned char* from = static_cast<const unsigned char*>(task.values);
    ptx::copy_async_16(values + thread,
                       there ? from + (n0 + row) * task.padded_k + k0 + part * 16 : from,
                       there ? 16 : 0);
  }
  if (thread < kRowTiles * 16) {
    const bool down = thread >= kRowTiles * 8;
    const int i = thread % (kRowTiles * 8), tile = i / 8, part = i % 8;
    const int64_t of = (down ? k0 : n0) / 16 + tile, column = (down ? n0 : k0) / kTile;
    const bool there = of < (down ? task.tiles_k : task.tiles_n);
    const uint32_t* from = down ? task.meta_t : task.meta;
    const int64_t wide = (down ? task.padded_n : task.padded_k) / kTile;
    ptx::copy_async_16((down ? meta_t : meta) + i,
                       there ? from + (of * wide + column) * 32 + part * 4 : from, there ? 16 : 0);
  }
  ptx::copy_commit();
  ptx::copy_wait<0>();
  __syncthreads();  // everybody's copies are here

  const uint32_t* words = reinterpret_cast<const uint32_t*>(meta);
  const uint32_t* words_t = reinterpret_cast<const uint32_t*>(meta_t);
  uint32_t row[4];
  unsigned places[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = 4 * r + i;
    row[i] = reinterpret_cast<const uint32_t*>(values)[at * kFours + c];
    places[i] = bits_of(words + at / 16 * 32, at % 16, c);
  }
  unsigned have = 0, met = 0;  // entries of the block in W, those that W^T has too
#pragma unroll
  for (int i = 0; i < 4; ++i) have |= (1u << (places[i] & 3u) | 1u << (places[i] >> 2)) << 4 * i;
  uint32_t pairs[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int at = 4 * c + j;
    const unsigned down = bits_of(words_t + at / 16 * 32, at % 16, r);
    pairs[j] = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = static_cast<int>(down >> 2 * h & 3u);
      const unsigned entry = 1u << (4 * i + j);
      if ((have & entry) == 0u) continue;
      met |= entry;
      const uint32_t both = i < 2 ? (i == 0 ? row[0] : row[1]) : (i == 2 ? row[2] : row[3]);
      const unsigned its =
          i < 2 ? (i == 0 ? places[0] : places[1]) : (i == 2 ? places[2] : places[3]);
      const uint32_t number = static_cast<int>(its & 3u) == j ? both & 0xffffu : both >> 16;
      pairs[j] |= number << 16 * h;
    }
  }
  const bool inside = n0 + 4 * r < task.n && k0 + 4 * c < task.k;
  const float nan = __uint_as_float(0x7fc00000u);
#pragma unroll
  for (int j = 0; j < 4; ++j)
    transposed[(4 * c + j) * kPitch + r] = !inside       ? 0u
                                           : met == have ? pairs[j]
                                                         : ptx::pack(nan, nan, E{});
  __syncthreads();  // the pairs of all columns are there
  store_transposed(transposed, task.values_t, n0, k0, task.k, task.padded_n);
}

const char* status() {
#if defined(__CUDACC__)
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return cudaGetErrorString(launched);
#endif
  return nullptr;
}

template <class From, class E>
const char* launch(const Sparse24PackTask& task, cudaStream_t stream) {
  const auto kernel = sparse24_compress<From, E>;
  const int64_t across = task.padded_k / kTile, down = task.padded_n / kTile;
  if (across > INT32_MAX / down) return "W has too many rows and columns for one grid";
  const bool aligned = task.k % 4 == 0 && reinterpret_cast<uintptr_t>(task.w) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(task.mask) % 4 == 0;
  BIGOPS_LAUNCH(kernel, dim3(static_cast<unsigned>(across * down)), dim3(kThreads), 0, stream, task,
                across, aligned);
  return status();
}

template <class From>
const char* launch(const Sparse24PackTask& task, bool half, cudaStream_t stream) {
  return half ? launch<From, f16>(task, stream) : launch<From, bf16>(task, stream);
}

template <class E>
const char* launch(const Sparse24TransposeTask& task, cudaStream_t stream) {
  const auto kernel = sparse24_transpose<E>;
  const int64_t across = task.padded_k / kTile, down = task.padded_n / kTile;
  if (across > INT32_MAX / down) return "W has too many rows and columns for one grid";
  BIGOPS_LAUNCH(kernel, dim3(static_cast<unsigned>(across * down)), dim3(kThreads), 0, stream, task,
                across);
  return status();
}

}  // namespace

const char* pack_sparse24(const Sparse24PackTask& task, Sparse24Source source, bool half,
                          void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (source == kPackFloat) return launch<float>(task, half, on);
  return source == kPackBFloat16 ? launch<bf16>(task, half, on) : launch<f16>(task, half, on);
}

const char* transpose_sparse24(const Sparse24TransposeTask& task, bool half, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return half ? launch<f16>(task, on) : launch<bf16>(task, on);
}

}  // namespace bigops
