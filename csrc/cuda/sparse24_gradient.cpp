// sparse24_gradient: checks and registration of the kernel in sparse24_gradient.cu.

#include "cuda/sparse24_gradient.h"

#include "cuda/tensor.h"

namespace bigops {
namespace {

constexpr int64_t kTile = 16, kColumns = 64;  // of a tile of metadata

// gz [M, N], x [M, K] to the gradient of the values [N, K' / 2] in their dtype.
Tensor sparse24_gradient(const Tensor& gz, const Tensor& x, const Tensor& meta) {
  if (!on_device(x)) fail("x", "a CUDA tensor", "another device");
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Half)
    fail("x", "dtype bf16 or f16", short_name(dtype));
  if (x.dim() != 2) fail("x", "shape [M, K]", shape_of(x));
  const int64_t m = x.size(0), k = x.size(1), n = gz.dim() == 2 ? gz.size(1) : 0;
  check_on("gz", gz, x, dtype, {m, n});
  const int64_t padded = (k + kColumns - 1) / kColumns * kColumns;
  check_on("meta", meta, x, ScalarType::Int, {(n + kTile - 1) / kTile, padded / kColumns, 32});

  const DeviceGuard guard(x);
  Tensor values = torch::stable::new_empty(x, {n, padded / 2});
  if (n == 0 || k == 0) return values;
  const Tensor gz_dense = dense(gz), x_dense = dense(x), meta_dense = dense(meta);
  Sparse24GradientTask task{};
  task.gz = gz_dense.const_data_ptr();
  task.x = x_dense.const_data_ptr();
  task.meta = static_cast<const uint32_t*>(meta_dense.const_data_ptr());
  task.values = values.mutable_data_ptr();
  task.m = m;
  task.n = n;
  task.k = k;
  task.padded = padded;
  const char* error = gradient_sparse24(task, dtype == ScalarType::Half, stream_of(x));
  STD_TORCH_CHECK(error == nullptr, "sparse24_gradient: ", error == nullptr ? "" : error);
  return values;
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, BIGOPS_DEVICE, m) {
  m.impl("sparse24_gradient", TORCH_BOX(&bigops::sparse24_gradient));
}
