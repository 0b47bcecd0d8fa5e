#include "cpu/simd/lanes_avx2.h"
#include "cpu/simd/attention.inl"

namespace bigops {

const AttentionKernels avx2_attention_f32 = attention_table<Avx2Lanes, float>();
const AttentionKernels avx2_attention_bf16 = attention_table<Avx2Lanes, bf16>();
const AttentionKernels avx2_attention_f16 = attention_table<Avx2Lanes, f16>();

}  // namespace bigops
