#include "cpu/simd/lanes_avx512.h"
#include "cpu/simd/attention.inl"

namespace bigops {

const AttentionKernels avx512_attention_f32 = attention_table<Avx512Lanes, float>();
const AttentionKernels avx512_attention_bf16 = attention_table<Avx512Lanes, bf16>();
const AttentionKernels avx512_attention_f16 = attention_table<Avx512Lanes, f16>();

}  // namespace bigops
