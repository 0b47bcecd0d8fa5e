#include "cpu/simd/lanes_vnni.h"
#include "cpu/simd/sparse_linear.h"
#include "cpu/simd/sparse_linear.inl"

namespace bigops {

const SparseKernels avx512vnni_sparse_s8 = sparse_table<WordS8<VnniLanes>>();

}  // namespace bigops
