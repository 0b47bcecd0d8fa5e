// sparse24_pack and sparse24_transpose: checks and registration of the kernels in sparse24_pack.cu.

#include "cuda/sparse24_pack.h"

#include "cuda/tensor.h"

namespace bigops {
namespace {

constexpr int64_t kTile = 16, kColumns = 64;  // of a tile of metadata

int64_t filled_up(int64_t size) { return (size + kColumns - 1) / kColumns * kColumns; }
int64_t tiles_of(int64_t rows) { return (rows + kTile - 1) / kTile; }

Sparse24Source source_of(const Tensor& w) {
  switch (w.scalar_type()) {
    case ScalarType::Float: return kPackFloat;
    case ScalarType::BFloat16: return kPackBFloat16;
    case ScalarType::Half: return kPackHalf;
    default: fail("w", "dtype f32, bf16 or f16", short_name(w.scalar_type()));
  }
}

ScalarType stored_as(int64_t dtype) {
  const int code = check_code("dtype", dtype, kStoredWords);
  return code == kStoredHalf ? ScalarType::Half : ScalarType::BFloat16;
}

int choice_of(int64_t choice, const OptTensor& mask, bool transposable) {
  if (check_code("choice", choice, kChoiceWords) == kGiven) return kPackGiven;
  if (mask.has_value()) fail("mask", "None with a choice by size", "a tensor");
  return transposable ? kPackBlocks : kPackLargest;
}

// (values, meta, values_t, meta_t, broken); the pack of the transpose is empty unless transposable.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sparse24_pack(const Tensor& w,
                                                                 const OptTensor& mask,
                                                                 int64_t choice, int64_t dtype,
                                                                 bool transposable) {
  if (!on_device(w)) fail("w", "a CUDA tensor", "another device");
  const Sparse24Source source = source_of(w);
  const ScalarType stored = stored_as(dtype);
  if (w.dim() != 2) fail("w", "shape [N, K]", shape_of(w));
  const int64_t n = w.size(0), k = w.size(1);
  check_on("mask", mask, w, ScalarType::Bool, {n, k});
  const int choice_code = choice_of(choice, mask, transposable);
  if (transposable && (n % 4 != 0 || k % 4 != 0))
    fail("w", "N and K that divide by 4 for the transposable form", shape_of(w));
  const int64_t padded_n = filled_up(n), padded_k = filled_up(k);
  const int64_t tiles_n = tiles_of(n), tiles_k = tiles_of(k);

  const DeviceGuard guard(w);
  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType of) {
    return torch::stable::new_empty(w, sizes, of);
  };
  Tensor values = empty({n, padded_k / 2}, stored);
  Tensor meta = empty({tiles_n, padded_k / kColumns, 32}, ScalarType::Int);
  const int64_t rows_t = transposable ? k : 0, there = transposable ? tiles_k : 0;
  Tensor values_t = empty({rows_t, padded_n / 2}, stored);
  Tensor meta_t = empty({there, padded_n / kColumns, 32}, ScalarType::Int);
  Tensor broken = empty({padded_n / kColumns, padded_k / kColumns}, ScalarType::Int);
  if (n > 0 && k > 0) {
    const Tensor w_dense = dense(w);
    const OptTensor mask_dense = dense(mask);
    Sparse24PackTask task{};
    task.w = w_dense.const_data_ptr();
    task.mask = static_cast<const uint8_t*>(data(mask_dense));
    task.values = values.mutable_data_ptr();
    task.meta = static_cast<uint32_t*>(meta.mutable_data_ptr());
    task.values_t = transposable ? values_t.mutable_data_ptr() : nullptr;
    task.meta_t = static_cast<uint32_t*>(meta_t.mutable_data_ptr());
    task.broken = static_cast<int32_t*>(broken.mutable_data_ptr());
    task.n = n;
    task.k = k;
    task.padded_n = padded_n;
    task.padded_k = padded_k;
    task.tiles_n = tiles_n;
    task.tiles_k = tiles_k;
    task.choice = choice_code;
    const char* error = pack_sparse24(task, source, stored == ScalarType::Half, stream_of(w));
    STD_TORCH_CHECK(error == nullptr, "sparse24_pack: ", error == nullptr ? "" : error);
  }
  return {values, meta, values_t, meta_t, broken};
}

// The values of the transpose [K, N' / 2] of a transposable weight [N, K].
Tensor sparse24_transpose(const Tensor& values, const Tensor& meta, const Tensor& meta_t,
                          int64_t k) {
  if (!on_device(values)) fail("values", "a CUDA tensor", "another device");
  const ScalarType stored = values.scalar_type();
  if (stored != ScalarType::BFloat16 && stored != ScalarType::Half)
    fail("values", "dtype bf16 or f16", short_name(stored));
  if (k < 0 || k % 4 != 0) fail("k", "a multiple of 4", std::to_string(k));
  const int64_t padded_k = filled_up(k), n = values.dim() > 0 ? values.size(0) : 0;
  if (values.dim() != 2 || n % 4 != 0 || values.size(1) != padded_k / 2)
    fail("values", "shape [N, " + std::to_string(padded_k / 2) + "], N a multiple of 4",
         shape_of(values));
  const int64_t padded_n = filled_up(n), tiles_n = tiles_of(n), tiles_k = tiles_of(k);
  check_on("meta", meta, values, ScalarType::Int, {tiles_n, padded_k / kColumns, 32});
  check_on("meta_t", meta_t, values, ScalarType::Int, {tiles_k, padded_n / kColumns, 32});

  const DeviceGuard guard(values);
  Tensor values_t = torch::stable::new_empty(values, {k, padded_n / 2}, stored);
  if (n == 0 || k == 0) return values_t;
  const Tensor values_dense = dense_16(values), meta_dense = dense_16(meta);
  const Tensor meta_t_dense = dense_16(meta_t);
  Sparse24TransposeTask task{};
  task.values = values_dense.const_data_ptr();
  task.meta = static_cast<const uint32_t*>(meta_dense.const_data_ptr());
  task.meta_t = static_cast<const uint32_t*>(meta_t_dense.const_data_ptr());
  task.values_t = values_t.mutable_data_ptr();
  task.n = n;
  task.k = k;
  task.padded_n = padded_n;
  task.padded_k = padded_k;
  task.tiles_n = tiles_n;
  task.tiles_k = tiles_k;
  const char* error = transpose_sparse24(task, stored == ScalarType::Half, stream_of(values));
  STD_TORCH_CHECK(error == nullptr, "sparse24_transpose: ", error == nullptr ? "" : error);
  return values_t;
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, BIGOPS_DEVICE, m) {
  m.impl("sparse24_pack.code", TORCH_BOX(&bigops::sparse24_pack));
  m.impl("sparse24_transpose", TORCH_BOX(&bigops::sparse24_transpose));
}
