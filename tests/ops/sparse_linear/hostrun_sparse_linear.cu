// The decode kernels of sparse_linear as tests call them.

#include "cuda/sparse_linear.cu"

extern "C" void run_decode(const void* x, const float* x_scale, const int32_t* x_zero,
                           const uint32_t* values, const uint8_t* index, const uint8_t* rows,
                           const int32_t* ptr, const float* scale, const int32_t* sums,
                           const void* bias, const void* residual, void* y, void* partial,
                           int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t steps,
                           int64_t panels, int64_t chunks, int64_t chunk, int64_t group_bits,
                           int64_t activation, int64_t splits, int64_t type, int64_t word) {
  const bigops::SparseDecodeTask task{x,
                                      x_scale,
                                      x_zero,
                                      values,
                                      index,
                                      rows,
                                      ptr,
                                      scale,
                                      sums,
                                      bias,
                                      residual,
                                      y,
                                      partial,
                                      m,
                                      n,
                                      k,
                                      x_stride,
                                      steps,
                                      panels,
                                      chunks,
                                      int(chunk),
                                      int(group_bits),
                                      int(activation),
                                      int(splits)};
  bigops::decode_sparse(task, static_cast<bigops::SparseDecodeType>(type),
                        static_cast<bigops::SparseDecodeWord>(word), nullptr);
}
