// The kernels of sparse24_linear as tests call them.

#include "cuda/sparse24_linear.cu"

extern "C" void run_sparse24(const void* x, const float* x_scale, const int32_t* x_zero,
                             const void* values, const uint32_t* meta, const float* scale,
                             const int32_t* sums, const void* bias, const void* residual, void* y,
                             int64_t m, int64_t n, int64_t k, int64_t x_stride, int64_t padded,
                             int64_t tiles, int64_t activation, int64_t whole, int64_t half,
                             int64_t type) {
  const bigops::Sparse24Task task{
      x, x_scale, x_zero,   values, meta,  scale,           sums,       bias,     residual, y, m,
      n, k,       x_stride, padded, tiles, int(activation), whole != 0, half != 0};
  bigops::multiply_sparse24(task, static_cast<bigops::Sparse24Type>(type), nullptr);
}
