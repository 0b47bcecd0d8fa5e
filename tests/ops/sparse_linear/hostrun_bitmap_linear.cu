// The decode kernels of a bitmap weight as tests call them.

#include "cuda/bitmap_linear.cu"

extern "C" void run_bitmap(const void* x, const void* values, const uint32_t* bits,
                           const int32_t* ptr, const void* bias, const void* residual, void* y,
                           float* partial, int64_t m, int64_t n, int64_t k, int64_t total,
                           int64_t panels, int64_t activation, int64_t splits, int64_t type) {
  const bigops::BitmapTask task{x,      values,          bits,       ptr, bias, residual,
                                y,      partial,         m,          n,   k,    total,
                                panels, int(activation), int(splits)};
  bigops::decode_bitmap(task, static_cast<bigops::BitmapType>(type), nullptr);
}
