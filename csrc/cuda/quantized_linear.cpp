// quantized_linear_decode: checks and registration of the kernels in quantized_linear.cu.

#include "cuda/quantized_linear.h"

#include "cuda/tensor.h"

namespace bigops {
namespace {

constexpr int64_t kTile = 16, kMaxSplits = 65535;  // a grid's second size

DecodeType type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return kDecodeFloat;
    case ScalarType::BFloat16: return kDecodeBFloat16;
    case ScalarType::Half: return kDecodeHalf;
    default: fail("x", "dtype f32, bf16 or f16", short_name(x.scalar_type()));
  }
}

// x: [M, K], M at most kDecodeRows.
Tensor quantized_linear_decode(const Tensor& x, const Tensor& values, const Tensor& scale,
                               const OptTensor& zero_point, int64_t pad, int64_t k, int64_t bits,
                               int64_t group, const OptTensor& bias, const OptTensor& residual,
                               int64_t activation, int64_t splits) {
  const DecodeType type = type_of(x);
  const ScalarType dtype = x.scalar_type();
  if (!on_device(x)) fail("x", "a CUDA tensor", "another device");
  if (x.dim() != 2 || x.size(1) != k || x.size(0) > kDecodeRows)
    fail("x", "shape [at most 16, " + std::to_string(k) + "]", shape_of(x));
  if (bits != 8 && bits != 4) fail("bits", "8 or 4", std::to_string(bits));
  if (group != 0 && group != 32 && group != 64 && group != 128)
    fail("group", "0, 32, 64 or 128", std::to_string(group));
  if (splits < 1 || splits > kMaxSplits)
    fail("splits", "1 to " + std::to_string(kMaxSplits), std::to_string(splits));
  const int64_t columns = bits == 8 ? 4 : 8, lines = (k + columns - 1) / columns;
  const int64_t tiles = values.dim() > 0 ? values.size(0) : 0, padded = tiles * kTile;
  const int64_t m = x.size(0), n = padded - pad;
  const int64_t groups = group == 0 ? 1 : (k + group - 1) / group;
  if (pad < 0 || pad >= kTile || n < 0)
    fail("pad", "the rows that fill up the last tile of 16", std::to_string(pad));
  check_on("values", values, x, bits == 8 ? ScalarType::Char : ScalarType::Byte,
           {tiles, lines, kTile, 4});
  check_on("scale", scale, x, ScalarType::Float, {groups, padded});
  check_on("zero_point", zero_point, x, ScalarType::Char, {groups, padded});
  const int code = check_epilogue(x, dtype, m, n, bias, residual, activation);

  const DeviceGuard guard(x);
  Tensor y = torch::stable::new_empty(x, {m, n}, dtype);
  if (m == 0 || n == 0) return y;
  const Tensor x_dense = dense(x), values_dense = dense_16(values), scale_dense = dense_16(scale);
  const OptTensor zero_dense = dense_16(zero_point), bias_dense = dense(bias);
  const OptTensor residual_dense = dense(residual);
  OptTensor partial;
  if (splits > 1) partial = torch::stable::new_empty(x, {splits, m, padded}, ScalarType::Float);

  DecodeTask task{};
  task.x = x_dense.const_data_ptr();
  task.values = static_cast<const uint8_t*>(values_dense.const_data_ptr());
  task.scale = static_cast<const float*>(scale_dense.const_data_ptr());
  task.zero_point = static_cast<const int8_t*>(data(zero_dense));
  task.bias = data(bias_dense);
  task.residual = data(residual_dense);
  task.y = y.mutable_data_ptr();
  task.partial = partial ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr;
  task.m = m;
  task.n = n;
  task.k = k;
  task.tiles = tiles;
  task.lines = lines;
  task.group = group;
  task.bits = static_cast<int>(bits);
  task.activation = code;
  task.splits = static_cast<int>(splits);
  const char* error = decode(task, type, stream_of(x));
  STD_TORCH_CHECK(error == nullptr, "quantized_linear_decode: ", error == nullptr ? "" : error);
  return y;
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, BIGOPS_DEVICE, m) {
  m.impl("quantized_linear_decode.code", TORCH_BOX(&bigops::quantized_linear_decode));
}
