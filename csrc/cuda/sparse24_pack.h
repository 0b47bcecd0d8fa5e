// The kernels of sparse24_pack: plain numbers and pointers, no torch, no CUDA.
#pragma once

#include <stdint.h>

namespace bigops {

enum Sparse24Source : int { kPackFloat, kPackBFloat16, kPackHalf };  // of a dense weight

// What stays of each four neighbours.
enum Sparse24Choice : int {
  kPackGiven,    // what a mask says, at most two; without a mask what is not 0
  kPackLargest,  // the two largest magnitudes of a row's four; of equal ones the first
  kPackBlocks,   // of each 4 x 4 block two a row and a column, the greatest sum of magnitudes
};

// Dense [N, K] to the storage of Sparse24Weight, and of its transpose where values_t is not null:
// layout in bigops/formats/sparse24.py.
struct Sparse24PackTask {
  const void* w;        // [N, K] of a Sparse24Source
  const uint8_t* mask;  // [N, K] of 0 and 1, or null; with kPackGiven only
  void* values;         // [N, padded_k / 2], 4-byte aligned, bfloat16 or half
  uint32_t* meta;       // [tiles_n, padded_k / 64, 32]
  void* values_t;       // [K, padded_n / 2] or null; N and K divide by 4 then
  uint32_t* meta_t;     // [tiles_k, padded_n / 64, 32]
  int32_t* broken;      // [padded_n / 64 * padded_k / 64]: whether a tile held a four it could not
                        // keep, whose values are NaN
  int64_t n, k, padded_n, padded_k;  // padded: filled up to 64
  int64_t tiles_n, tiles_k;          // of 16 rows of W, of W^T
  int choice;
};

// The values of W^T from those of W: both metadata are there.
struct Sparse24TransposeTask {
  const void* values;      // [N, padded_k / 2], 16-byte aligned, as all that follows
  const uint32_t* meta;    // [tiles_n, padded_k / 64, 32]
  const uint32_t* meta_t;  // [tiles_k, padded_n / 64, 32]
  void* values_t;          // [K, padded_n / 2]
  int64_t n, k, padded_n, padded_k, tiles_n, tiles_k;
};

// half: the stored values are float16, else bfloat16. Launch on `stream`, a cudaStream_t; give the
// text of an error, or null.
const char* pack_sparse24(const Sparse24PackTask& task, Sparse24Source source, bool half,
                          void* stream);
const char* transpose_sparse24(const Sparse24TransposeTask& task, bool half, void* stream);

}  // namespace bigops
