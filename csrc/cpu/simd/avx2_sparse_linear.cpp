#include "cpu/simd/lanes_avx2.h"
#include "cpu/simd/sparse_linear.h"
#include "cpu/simd/sparse_linear.inl"

namespace bigops {

const SparseKernels avx2_sparse_f32 = sparse_table<WordF32<Avx2Lanes>>();
const SparseKernels avx2_sparse_bf16 = sparse_table<WordBf16<Avx2Lanes>>();
const SparseKernels avx2_sparse_s8 = sparse_table<WordS8<Avx2Lanes>>();

}  // namespace bigops
