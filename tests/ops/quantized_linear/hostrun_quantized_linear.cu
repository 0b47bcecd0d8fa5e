// The decode kernels of quantized_linear as tests call them.

#include "cuda/quantized_linear.cu"

extern "C" void run_decode(const void* x, const uint8_t* values, const float* scale,
                           const int8_t* zero_point, const void* bias, const void* residual,
                           void* y, float* partial, int64_t m, int64_t n, int64_t k, int64_t tiles,
                           int64_t lines, int64_t group, int64_t bits, int64_t activation,
                           int64_t splits, int64_t type) {
  const bigops::DecodeTask task{
      x, values, scale, zero_point, bias,      residual,        y,          partial, m, n,
      k, tiles,  lines, group,      int(bits), int(activation), int(splits)};
  bigops::decode(task, static_cast<bigops::DecodeType>(type), nullptr);
}
