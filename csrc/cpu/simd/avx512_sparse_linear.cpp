#include "cpu/simd/lanes_avx512.h"
#include "cpu/simd/sparse_linear.h"
#include "cpu/simd/sparse_linear.inl"

namespace bigops {

const SparseKernels avx512_sparse_f32 = sparse_table<WordF32<Avx512Lanes>>();
const SparseKernels avx512_sparse_bf16 = sparse_table<WordBf16<Avx512Lanes>>();
const SparseKernels avx512_sparse_s8 = sparse_table<WordS8<Avx512Lanes>>();

}  // namespace bigops
