// sparse24_linear_product: checks and registration of the kernels in sparse24_linear.cu.

#include "cuda/sparse24_linear.h"

#include "cuda/tensor.h"

namespace bigops {
namespace {

constexpr int64_t kTile = 16, kColumns = 64;  // of a tile of metadata
constexpr int64_t kExactColumns = 131072;     // 128 * 128 * K stays below 2^31

Sparse24Type type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kSparse24Float;
    case ScalarType::BFloat16: return kSparse24BFloat16;
    case ScalarType::Half: return kSparse24Half;
    default: fail("like", "dtype f32, bf16 or f16", short_name(dtype));
  }
}

// x: [M, K]; with int8 values int8 [M, at least K] with x_scale and x_zero [M]. like: any tensor of
// the result's dtype.
Tensor sparse24_linear_product(const Tensor& x, const OptTensor& x_scale, const OptTensor& x_zero,
                               const Tensor& like, const Tensor& values, const Tensor& meta,
                               const OptTensor& scale, const OptTensor& sums, int64_t k,
                               const OptTensor& bias, const OptTensor& residual,
                               int64_t activation) {
  if (!on_device(x)) fail("x", "a CUDA tensor", "another device");
  const ScalarType dtype = like.scalar_type(), stored = values.scalar_type();
  const bool whole = stored == ScalarType::Char;
  const Sparse24Type type = type_of(dtype);
  if (!whole && stored != ScalarType::BFloat16 && stored != ScalarType::Half)
    fail("values", "dtype bf16, f16 or s8", short_name(stored));
  if (k < 0 || (whole && k >= kExactColumns))
    fail("k", whole ? "0 to 131071 with int8 values" : "at least 0", std::to_string(k));
  const bool fits = x.dim() == 2 && (whole ? x.size(1) >= k : x.size(1) == k);
  if (!fits) fail("x", "shape [M, " + std::to_string(k) + "]", shape_of(x));
  check_dtype("x", x, whole ? ScalarType::Char : stored);
  if (!whole && dtype != stored && dtype != ScalarType::Float)
    fail("like", "the dtype of the values or f32", short_name(dtype));
  const int64_t step = whole ? 2 * kColumns : kColumns, padded = (k + step - 1) / step * step;
  const int64_t m = x.size(0), n = values.dim() > 0 ? values.size(0) : 0;
  const int64_t tiles = (n + kTile - 1) / kTile;
  check_on("values", values, x, stored, {n, padded / 2});
  check_on("meta", meta, x, ScalarType::Int, {tiles, padded / kColumns, 32});
  check_whole(whole, x, m, n, x_scale, x_zero, scale, sums);
  const int code = check_epilogue(x, dtype, m, n, bias, residual, activation);

  const DeviceGuard guard(x);
  Tensor y = torch::stable::new_empty(x, {m, n}, dtype);
  if (m == 0 || n == 0) return y;
  const Tensor x_dense = dense(x), values_dense = dense_16(values), meta_dense = dense_16(meta);
  const OptTensor x_scale_dense = dense(x_scale), x_zero_dense = dense(x_zero);
  const OptTensor scale_dense = dense(scale), sums_dense = dense(sums);
  const OptTensor bias_dense = dense(bias), residual_dense = dense(residual);

  Sparse24Task task{};
  task.x = x_dense.const_data_ptr();
  task.x_scale = static_cast<const float*>(data(x_scale_dense));
  task.x_zero = static_cast<const int32_t*>(data(x_zero_dense));
  task.values = values_dense.const_data_ptr();
  task.meta = static_cast<const uint32_t*>(meta_dense.const_data_ptr());
  task.scale = static_cast<const float*>(data(scale_dense));
  task.sums = static_cast<const int32_t*>(data(sums_dense));
  task.bias = data(bias_dense);
  task.residual = data(residual_dense);
  task.y = y.mutable_data_ptr();
  task.m = m;
  task.n = n;
  task.k = k;
  task.x_stride = x.size(1);
  task.padded = padded;
  task.tiles = tiles;
  task.activation = code;
  task.whole = whole;
  task.half = stored == ScalarType::Half;
  const char* error = multiply_sparse24(task, type, stream_of(x));
  STD_TORCH_CHECK(error == nullptr, "sparse24_linear_product: ", error == nullptr ? "" : error);
  return y;
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, BIGOPS_DEVICE, m) {
  m.impl("sparse24_linear_product.code", TORCH_BOX(&bigops::sparse24_linear_product));
}
