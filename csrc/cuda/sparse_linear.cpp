// sparse_linear_decode: checks and registration of the kernels in sparse_linear.cu.

#include "cuda/sparse_linear.h"

#include "cuda/tensor.h"

namespace bigops {
namespace {

constexpr int64_t kSlice = 16, kPanelWords = 64, kMaxSplits = 65535;
constexpr int64_t kExactColumns = 131072;  // 128 * 128 * K stays below 2^31

struct Kind {
  SparseDecodeWord word;
  int64_t columns;
};

Kind kind_of(const Tensor& values) {
  switch (values.scalar_type()) {
    case ScalarType::Float: return {kSparseWordFloat, 1};
    case ScalarType::BFloat16: return {kSparseWordBFloat16, 2};
    case ScalarType::Char: return {kSparseWordInt8, 4};
    default: fail("values", "dtype f32, bf16 or s8", short_name(values.scalar_type()));
  }
}

SparseDecodeType type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kSparseFloat;
    case ScalarType::BFloat16: return kSparseBFloat16;
    case ScalarType::Half: return kSparseHalf;
    default: fail("like", "dtype f32, bf16 or f16", short_name(dtype));
  }
}

// x: [M, K], M at most kSparseDecodeRows; with int8 values int8 [M, K rounded up to words] with
// x_scale and x_zero [M]. like: any tensor of the result's dtype.
Tensor sparse_linear_decode(const Tensor& x, const OptTensor& x_scale, const OptTensor& x_zero,
                            const Tensor& like, const Tensor& values, const Tensor& index,
                            const Tensor& rows, const Tensor& ptr, const OptTensor& scale,
                            const OptTensor& sums, int64_t n, int64_t k, int64_t chunk,
                            const OptTensor& bias, const OptTensor& residual, int64_t activation,
                            int64_t splits) {
  if (!on_device(x)) fail("x", "a CUDA tensor", "another device");
  const Kind kind = kind_of(values);
  const bool whole = kind.word == kSparseWordInt8;
  const ScalarType dtype = like.scalar_type();
  const SparseDecodeType type = type_of(dtype);
  if (kind.word == kSparseWordBFloat16 && dtype != ScalarType::BFloat16)
    fail("x", "dtype bf16 with bf16 values", short_name(dtype));
  if (k < 0 || (whole && k >= kExactColumns))
    fail("k", whole ? "0 to 131071 with int8 values" : "at least 0", std::to_string(k));
  if (chunk != 64 && chunk != 128 && chunk != 256)
    fail("chunk", "64, 128 or 256", std::to_string(chunk));
  if (splits < 1 || splits > kMaxSplits)
    fail("splits", "1 to " + std::to_string(kMaxSplits), std::to_string(splits));
  if (n < 0) fail("n", "at least 0", std::to_string(n));
  const int64_t words = (k + kind.columns - 1) / kind.columns;
  const int64_t width = whole ? words * kind.columns : k, m = x.dim() == 2 ? x.size(0) : 0;
  const bool fits = x.dim() == 2 && (whole ? x.size(1) >= width : x.size(1) == k);
  if (!fits || m > kSparseDecodeRows)
    fail("x", "shape [at most 16, " + std::to_string(width) + "]", shape_of(x));
  check_dtype("x", x, whole ? ScalarType::Char : dtype);
  const int64_t panels = (words + kPanelWords - 1) / kPanelWords, chunks = (n + chunk - 1) / chunk;
  const int64_t slices = chunks * panels * (chunk / kSlice);
  const int64_t steps = values.dim() > 0 ? values.size(0) : 0;
  const int64_t indices = index.dim() == 2 ? index.size(1) : 0;
  if (indices != 1 && indices != 4 && indices != 16)
    fail("index", "shape [.., 16], [.., 4] or [.., 1]", shape_of(index));
  check_on("values", values, x, values.scalar_type(), {steps, kSlice, kind.columns});
  check_on("index", index, x, ScalarType::Byte, {steps, indices});
  check_on("rows", rows, x, ScalarType::Byte, {slices, indices});
  check_on("ptr", ptr, x, ScalarType::Int, {slices + 1});
  check_whole(whole, x, m, n, x_scale, x_zero, scale, sums);
  const int code = check_epilogue(x, dtype, m, n, bias, residual, activation);

  const DeviceGuard guard(x);
  Tensor y = torch::stable::new_empty(x, {m, n}, dtype);
  if (m == 0 || n == 0) return y;
  const Tensor x_dense = whole ? dense_16(x) : dense(x), values_dense = dense_16(values);
  const Tensor index_dense = dense(index), rows_dense = dense(rows), ptr_dense = dense(ptr);
  const OptTensor x_scale_dense = dense(x_scale), x_zero_dense = dense(x_zero);
  const OptTensor scale_dense = dense(scale), sums_dense = dense(sums);
  const OptTensor bias_dense = dense(bias), residual_dense = dense(residual);
  Tensor partial = torch::stable::new_empty(x, {splits, m, chunks * chunk},
                                            whole ? ScalarType::Int : ScalarType::Float);

  SparseDecodeTask task{};
  task.x = x_dense.const_data_ptr();
  task.x_scale = static_cast<const float*>(data(x_scale_dense));
  task.x_zero = static_cast<const int32_t*>(data(x_zero_dense));
  task.values = static_cast<const uint32_t*>(values_dense.const_data_ptr());
  task.index = static_cast<const uint8_t*>(index_dense.const_data_ptr());
  task.rows = static_cast<const uint8_t*>(rows_dense.const_data_ptr());
  task.ptr = static_cast<const int32_t*>(ptr_dense.const_data_ptr());
  task.scale = static_cast<const float*>(data(scale_dense));
  task.sums = static_cast<const int32_t*>(data(sums_dense));
  task.bias = data(bias_dense);
  task.residual = data(residual_dense);
  task.y = y.mutable_data_ptr();
  task.partial = partial.mutable_data_ptr();
  task.m = m;
  task.n = n;
  task.k = k;
  task.x_stride = x.size(1);
  task.steps = steps;
  task.panels = panels;
  task.chunks = chunks;
  task.chunk = static_cast<int>(chunk);
  task.group_bits = indices == 16 ? 0 : indices == 4 ? 2 : 4;
  task.activation = code;
  task.splits = static_cast<int>(splits);
  const char* error = decode_sparse(task, type, kind.word, stream_of(x));
  STD_TORCH_CHECK(error == nullptr, "sparse_linear_decode: ", error == nullptr ? "" : error);
  return y;
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, BIGOPS_DEVICE, m) {
  m.impl("sparse_linear_decode.code", TORCH_BOX(&bigops::sparse_linear_decode));
}
