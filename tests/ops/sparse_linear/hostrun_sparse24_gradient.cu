// The kernel of sparse24_gradient as tests call it.

#include "cuda/sparse24_gradient.cu"

extern "C" void run_gradient(const void* gz, const void* x, const uint32_t* meta, void* values,
                             int64_t m, int64_t n, int64_t k, int64_t half) {
  const bigops::Sparse24GradientTask task{gz, x, meta, values, m, n, k, (k + 63) / 64 * 64};
  bigops::gradient_sparse24(task, half != 0, nullptr);
}
