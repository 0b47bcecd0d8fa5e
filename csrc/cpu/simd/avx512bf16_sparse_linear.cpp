#include "cpu/simd/lanes_bf16.h"
#include "cpu/simd/sparse_linear.h"
#include "cpu/simd/sparse_linear.inl"

namespace bigops {

const SparseKernels avx512bf16_sparse_bf16 = sparse_table<WordBf16<Bf16Lanes>>();

}  // namespace bigops
