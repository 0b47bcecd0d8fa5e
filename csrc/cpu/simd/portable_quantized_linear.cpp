#include "cpu/simd/lines_portable.h"
#include "cpu/simd/quantized_linear.inl"

namespace bigops {

const QuantizedKernels portable_quantized = quantized_table<PortableLines>();

}  // namespace bigops
