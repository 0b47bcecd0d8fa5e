// The kernels of quantized_linear and sparse_linear for one set of lanes, as a table.
// Include after a lanes header and compressed.h. Internal linkage throughout.

#include "cpu/simd/activation.inl"
#include "cpu/simd/quantize.inl"
#include "cpu/simd/quantized_linear.inl"

namespace bigops {
namespace {

template <class L>
constexpr CompressedKernels compressed_table() {
  static_assert(kRowBlock % L::dense_rows == 0, "results are padded to kRowBlock rows");
  return {L::width,
          L::max_vectors,
          L::width * L::grad_vectors,
          {quantize<L, float>, quantize<L, bf16>, quantize<L, f16>},
          {widen<L, float>, widen<L, bf16>, widen<L, f16>},
          {finish<L, float>, finish<L, bf16>, finish<L, f16>},
          {finish<L, float, true>, finish<L, bf16, true>, finish<L, f16, true>},
          {gradient<L, float>, gradient<L, bf16>, gradient<L, f16>},
          transpose<L>,
          max_index<L>,
          row_sums<L>,
          reduce<L>,
          dense_dot<L>,
          dense_columns<L>,
          dense_grad<L>};
}

}  // namespace
}  // namespace bigops
