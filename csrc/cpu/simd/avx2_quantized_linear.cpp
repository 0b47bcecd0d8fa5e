#include "cpu/simd/lines_avx2.h"
#include "cpu/simd/quantized_linear.inl"

namespace bigops {

const QuantizedKernels avx2_quantized = quantized_table<Avx2Lines>();

}  // namespace bigops
