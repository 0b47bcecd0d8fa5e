// attention in bfloat16 with vdpbf16ps.
#include "cpu/simd/attention_pairs.inl"

namespace bigops {

const AttentionKernels avx512bf16_attention_bf16 = {attend<ToPairs<PairWords>>,
                                                    combine<Avx512, bf16>};
const AttentionKernels avx512bf16_attention_f32 = {attend<FloatsToPairs<PairWords>>,
                                                   combine<Avx512, float>};

}  // namespace bigops
