// The kernels of sparse24_pack as tests call them.

#include "cuda/sparse24_pack.cu"

extern "C" void run_pack(const void* w, const uint8_t* mask, void* values, uint32_t* meta,
                         void* values_t, uint32_t* meta_t, int32_t* broken, int64_t n, int64_t k,
                         int64_t choice, int64_t source, int64_t half) {
  const int64_t padded_n = (n + 63) / 64 * 64, padded_k = (k + 63) / 64 * 64;
  const int64_t tiles_n = (n + 15) / 16, tiles_k = (k + 15) / 16;
  const bigops::Sparse24PackTask task{w, mask, values,   meta,     values_t, meta_t,  broken,
                                      n, k,    padded_n, padded_k, tiles_n,  tiles_k, int(choice)};
  bigops::pack_sparse24(task, static_cast<bigops::Sparse24Source>(source), half != 0, nullptr);
}

extern "C" void run_turn(const void* values, const uint32_t* meta, const uint32_t* meta_t,
                         void* values_t, int64_t n, int64_t k, int64_t half) {
  const int64_t padded_n = (n + 63) / 64 * 64, padded_k = (k + 63) / 64 * 64;
  const bigops::Sparse24TransposeTask task{values, meta,     meta_t,   values_t,      n,
                                      k,      padded_n, padded_k, (n + 15) / 16, (k + 15) / 16};
  bigops::transpose_sparse24(task, half != 0, nullptr);
}
