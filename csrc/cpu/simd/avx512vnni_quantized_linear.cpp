#include "cpu/simd/lanes_vnni.h"
#include "cpu/simd/lines_avx512.h"
#include "cpu/simd/quantized_linear.inl"

namespace bigops {

const IntegerProducts avx512vnni_quantized = integer_products<Avx512LinesOf<VnniLanes>>();

}  // namespace bigops
