// act_quant on the CPU: rows of activations to u8, once for all products that read them.

#include "common/kernel_table.h"
#include "common/record.h"
#include "cpu/compressed_linear.h"

namespace bigops {
namespace {

std::tuple<Tensor, Tensor, Tensor> act_quant(const Tensor& x_any, bool symmetric) {
  check_cpu("x", x_any);
  if (x_any.dim() == 0) fail("x", "at least 1 dimension", "none");
  const FloatKind kind = float_kind("x", x_any.scalar_type());
  const Tensor x = dense(x_any);
  const SelectedCompressed selected = select_compressed();
  if (g_recording.load(std::memory_order_relaxed) != 0)
    record(selected.isa, "act_quant", short_name(x.scalar_type()),
           symmetric ? "symmetric" : "dynamic");
  const int64_t dim = x.dim(), k = x.size(dim - 1);
  int64_t sizes[16], m = 1;
  Tensor values = empty_rows_like(x, k, ScalarType::Byte);
  for (int64_t i = 0; i + 1 < dim; ++i) m *= sizes[i] = x.size(i);
  Tensor scale = empty(sizes, dim - 1, ScalarType::Float);
  Tensor zero_point = empty(sizes, dim - 1, ScalarType::Int);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  uint8_t* to = static_cast<uint8_t*>(values.mutable_data_ptr());
  float* scales = static_cast<float*>(scale.mutable_data_ptr());
  int32_t* zeros = static_cast<int32_t*>(zero_point.mutable_data_ptr());
  const int64_t row = k * (kind == kFloat32 ? 4 : 2);
  for_tasks(m, m * k > kWorthThreads / 4, [&](int64_t begin, int64_t end) {
    selected.kernels->quantize[kind]({from + begin * row, end - begin, k,
                                      symmetric ? kSymmetricRows : kDynamicRows, 0.0f, 0,
                                      to + begin * k, k, scales + begin, zeros + begin});
  });
  for (int64_t i = 0; k == 0 && i < m; ++i) scales[i] = 1.0f, zeros[i] = 0;
  return {values, scale, zero_point};
}

}  // namespace

std::pair<std::string, std::string> choose_act_quant(const std::string& dtype, bool symmetric) {
  return {kernel_name(select_compressed().isa, "act_quant", dtype.c_str(),
                      symmetric ? "symmetric" : "dynamic"),
          "range and rounding of a row while it is in the cache"};
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "act_quant", TORCH_BOX(&bigops::act_quant));
}
