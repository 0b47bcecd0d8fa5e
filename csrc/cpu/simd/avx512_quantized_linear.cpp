#include "cpu/simd/lines_avx512.h"
#include "cpu/simd/quantized_linear.inl"

namespace bigops {

const QuantizedKernels avx512_quantized = quantized_table<Avx512LinesOf<Avx512Lanes>>();

}  // namespace bigops
