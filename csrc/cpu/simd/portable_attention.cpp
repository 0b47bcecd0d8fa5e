#include "cpu/simd/lanes_portable.h"
#include "cpu/simd/attention.inl"

namespace bigops {

const AttentionKernels portable_attention_f32 = attention_table<PortableLanes, float>();
const AttentionKernels portable_attention_bf16 = attention_table<PortableLanes, bf16>();
const AttentionKernels portable_attention_f16 = attention_table<PortableLanes, f16>();

}  // namespace bigops
