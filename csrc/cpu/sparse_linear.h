// The storage of a sparse weight as the CPU kernels read it, checked; what forward and backward
// share. Layout: bigops/formats/sparse_layout.py.
#pragma once

#include <string>
#include <tuple>
#include <utility>

#include "common/record.h"
#include "cpu/compressed_linear.h"
#include "cpu/simd/sparse_linear.h"
#include "cpu/tiles.h"

namespace bigops {

struct SelectedSparse {
  const SparseKernels* kernels;
  Isa isa;
};
SelectedSparse select_sparse(WordKind kind);

struct SparseStorage {
  Tensor values, index, rows, length, ptr_tensor;
  OptTensor scale, sums;
  WordKind kind;
  GroupKind group;
  int64_t group_rows;           // rows that share an index
  int64_t n, k, chunk;          // rows of a chunk
  int64_t panels, chunks, spc;  // slices of one panel of a chunk
  int64_t steps;
  SelectedSparse selected;

  const SparseKernels& kernels() const { return *selected.kernels; }
  int64_t columns() const { return kWordColumns[kind]; }  // of a word
  int64_t used_words() const { return (k + columns() - 1) / columns(); }
  int64_t words() const { return panels * kPanelWords; }  // of a row of x
  int64_t slice(int64_t c, int64_t p) const { return (c * panels + p) * spc; }
  const int32_t* ptr(int64_t c, int64_t p) const {
    return static_cast<const int32_t*>(ptr_tensor.const_data_ptr()) + slice(c, p);
  }
  const uint8_t* indices() const { return static_cast<const uint8_t*>(index.const_data_ptr()); }
  const uint8_t* groups(const Tensor& t, int64_t c, int64_t p) const {
    return static_cast<const uint8_t*>(t.const_data_ptr()) +
           slice(c, p) * (kSliceRows / group_rows);
  }
  const float* scales() const { return static_cast<const float*>(data(scale)); }
  int64_t first_row(int64_t c) const { return c * chunk; }
  int64_t end_row(int64_t c) const { return (c + 1) * chunk < n ? (c + 1) * chunk : n; }

  // Everything that a kernel reads through, proven in range: one chunk.
  bool sound(const CompressedKernels& helpers, int64_t c) const;
};

struct SparseTensors {
  const Tensor &values, &index, &rows, &length, &ptr;
  const OptTensor &scale, &sums;
};
SparseStorage check_sparse(const Tensor& x, const SparseTensors& t, int64_t n, int64_t chunk);
[[noreturn]] void broken_sparse();

const char* word_name(WordKind kind);
// x W^T with its epilogue into y [M, N].
void sparse_product(const CompressedCall& call, const SparseStorage& s, void* y, YKind y_kind);
// bf16 values meet bf16 activations only.
void check_sparse_call(const CompressedCall& call, const SparseStorage& s);

}  // namespace bigops
