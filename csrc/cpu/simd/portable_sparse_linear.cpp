#include "cpu/simd/lanes_portable.h"
#include "cpu/simd/sparse_linear.h"
#include "cpu/simd/sparse_linear.inl"

namespace bigops {

const SparseKernels portable_sparse_f32 = sparse_table<WordF32<PortableLanes>>();
const SparseKernels portable_sparse_bf16 = sparse_table<WordBf16<PortableLanes>>();
const SparseKernels portable_sparse_s8 = sparse_table<WordS8<PortableLanes>>();

}  // namespace bigops
