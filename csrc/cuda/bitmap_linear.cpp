// bitmap_linear_decode: checks and registration of the kernels in bitmap_linear.cu.

#include "cuda/bitmap_linear.h"

#include "cuda/tensor.h"

namespace bigops {
namespace {

constexpr int64_t kUnit = 16, kMaxSplits = 65535;  // bytes that ptr counts in

BitmapType type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kBitmapFloat;
    case ScalarType::BFloat16: return kBitmapBFloat16;
    case ScalarType::Half: return kBitmapHalf;
    default: fail("values", "dtype f32, bf16 or f16", short_name(dtype));
  }
}

// x: [M, K] in the dtype of the values, M at most kBitmapDecodeRows.
Tensor bitmap_linear_decode(const Tensor& x, const Tensor& values, const Tensor& bits,
                            const Tensor& ptr, int64_t n, const OptTensor& bias,
                            const OptTensor& residual, int64_t activation, int64_t splits) {
  if (!on_device(x)) fail("x", "a CUDA tensor", "another device");
  const ScalarType dtype = values.scalar_type();
  const BitmapType type = type_of(dtype);
  if (x.dim() != 2 || x.size(0) > kBitmapDecodeRows)
    fail("x", "shape [at most 16, K]", shape_of(x));
  check_dtype("x", x, dtype);
  if (n < 0) fail("n", "at least 0", std::to_string(n));
  if (splits < 1 || splits > kMaxSplits)
    fail("splits", "1 to " + std::to_string(kMaxSplits), std::to_string(splits));
  const int64_t m = x.size(0), k = x.size(1), per = kUnit / (type == kBitmapFloat ? 4 : 2);
  const int64_t groups = (n + kBitmapRows - 1) / kBitmapRows;
  const int64_t panels = (k + kBitmapColumns - 1) / kBitmapColumns;
  if (values.dim() != 1 || values.size(0) % per != 0)
    fail("values", "shape [a multiple of " + std::to_string(per) + "]", shape_of(values));
  check_on("values", values, x, dtype, {values.size(0)});
  check_on("bits", bits, x, ScalarType::Int, {groups, panels, 32});
  check_on("ptr", ptr, x, ScalarType::Int, {groups * panels + 1});
  const int code = check_epilogue(x, dtype, m, n, bias, residual, activation);

  const DeviceGuard guard(x);
  Tensor y = torch::stable::new_empty(x, {m, n}, dtype);
  if (m == 0 || n == 0) return y;
  const Tensor x_dense = dense(x), values_dense = dense_16(values), bits_dense = dense_16(bits);
  const Tensor ptr_dense = dense(ptr);
  const OptTensor bias_dense = dense(bias), residual_dense = dense(residual);
  Tensor partial = torch::stable::new_empty(x, {splits > 1 ? splits : 0, m, n}, ScalarType::Float);

  BitmapTask task{};
  task.x = x_dense.const_data_ptr();
  task.values = values_dense.const_data_ptr();
  task.bits = static_cast<const uint32_t*>(bits_dense.const_data_ptr());
  task.ptr = static_cast<const int32_t*>(ptr_dense.const_data_ptr());
  task.bias = data(bias_dense);
  task.residual = data(residual_dense);
  task.y = y.mutable_data_ptr();
  task.partial = static_cast<float*>(partial.mutable_data_ptr());
  task.m = m;
  task.n = n;
  task.k = k;
  task.total = values.size(0) / per;
  task.panels = panels;
  task.activation = code;
  task.splits = static_cast<int>(splits);
  const char* error = decode_bitmap(task, type, stream_of(x));
  STD_TORCH_CHECK(error == nullptr, "bitmap_linear_decode: ", error == nullptr ? "" : error);
  return y;
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, BIGOPS_DEVICE, m) {
  m.impl("bitmap_linear_decode.code", TORCH_BOX(&bigops::bitmap_linear_decode));
}
