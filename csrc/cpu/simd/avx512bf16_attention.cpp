// attention in bfloat16 with vdpbf16ps.
#include "cpu/simd/attention_pairs.inl"

namespace bigops {

const AttentionKernels avx512bf16_attention_bf16 = {attend<ToPairs<PairWords>>,
                                                    combine<Avx512, bf16>};

}  // namespace bigops
