// Rows of a quantised weight for any CPU.
#include "cpu/simd/vec_portable.h"
#include "cpu/simd/quantized_embedding.inl"

namespace bigops {
namespace {

struct OneColumn {
  template <int kBits>
  static float columns(const uint8_t* line, int64_t column) {
    return one_column<kBits>(line, column % (kBits == 8 ? 4 : 8));
  }
};

}  // namespace

const RowKernels portable_rows = row_kernels<Scalar<float>, OneColumn>();

}  // namespace bigops
