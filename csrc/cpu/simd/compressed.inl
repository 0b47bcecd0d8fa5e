// The kernels of quantized_linear and sparse_linear for one set of lanes, as a table.
// Include after a lanes header and compressed.h. Internal linkage throughout.

#include "cpu/simd/activation.inl"
#include "cpu/simd/quantize.inl"

namespace bigops {
namespace {

template <class L>
constexpr CompressedKernels compressed_table() {
  return {L::width,
          L::max_vectors,
          {quantize<L, float>, quantize<L, bf16>, quantize<L, f16>},
          {widen<L, float>, widen<L, bf16>, widen<L, f16>},
          {finish<L, float>, finish<L, bf16>, finish<L, f16>},
          {finish<L, float, true>, finish<L, bf16, true>, finish<L, f16, true>},
          {gradient<L, float>, gradient<L, bf16>, gradient<L, f16>},
          transpose<L>,
          max_index<L>};
}

}  // namespace
}  // namespace bigops
