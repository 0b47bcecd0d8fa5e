// quantized_linear on the CPU: dense int8 weight, activations to u8 row by row.

#include "common/record.h"
#include "cpu/compressed_linear.h"

namespace bigops {
namespace {

constexpr int64_t kDotRows = 8;       // rows of x up to which the dot form wins (measured)
constexpr int64_t kTaskColumns = 48;  // weight rows of a task; its sums stay in the L1 cache
static_assert(kTaskColumns % kRowBlock == 0, "results are padded to kRowBlock rows");

bool dot_form(int64_t m) { return m <= kDotRows; }
const char* form(int64_t m) { return dot_form(m) ? "dot" : "columns"; }

CompressedCall check_all(const Tensor& x, const Tensor& weight, const Tensor& scale,
                         const OptTensor& bias, const OptTensor& residual,
                         std::string_view activation) {
  check_cpu("weight", weight);
  check_cpu("scale", scale);
  check_dtype("weight", weight, ScalarType::Char);
  if (weight.dim() != 2) fail("weight", "2 dimensions [N, K]", shape_of(weight));
  check_dtype("scale", scale, ScalarType::Float);
  check_vector("scale", scale, weight.size(0));
  return check_compressed(x, weight.size(0), weight.size(1), bias, residual, activation);
}

FinishTask finish_task(const CompressedCall& call, const Activations& a, const float* scale,
                       void* y, bool y_float) {
  FinishTask f{};
  f.row_scale = a.scale();
  f.zero_point = a.zero_point();
  f.scale = scale;
  f.bias = data(call.bias);
  f.residual = data(call.residual);
  f.y = y;
  f.y_float = y_float;
  f.n = call.n;
  f.activation = call.activation;
  return f;
}

// y: [M, N] in x's dtype, or float when y_float.
void product(const CompressedCall& call, const int8_t* weight, const float* scale, void* y,
             bool y_float) {
  const CompressedKernels& kernels = call.kernels();
  const bool dot = dot_form(call.m);
  const Activations a =
      dot ? Activations::rows(call, round_up(call.k, 64)) : Activations::tiles(call);
  const FinishTask base = finish_task(call, a, scale, y, y_float);
  const bool wide = call.k > kExactColumns;
  const int64_t tiles = dot ? 1 : a.count();
  const int64_t most = dot ? call.m : int64_t(kernels.width) * kernels.max_vectors;  // rows of x
  const int64_t chunks = (call.n + kTaskColumns - 1) / kTaskColumns;
  // A task takes all tiles of its weight rows (which then stay cached), unless tasks run short.
  const int64_t split = chunks < 4 * int64_t(torch::stable::get_num_threads()) ? tiles : 1;
  const auto run = [&](int64_t task) {
    const int64_t n0 = task / split * kTaskColumns;
    const int64_t n1 = n0 + kTaskColumns < call.n ? n0 + kTaskColumns : call.n;
    const int64_t first = split == 1 ? 0 : task % split;
    const int64_t last = split == 1 ? tiles : first + 1;
    char* memory = scratch(most * kTaskColumns * (4 + 4 + (wide ? 8 : 0)) + kTaskColumns * 4);
    int64_t* parts = reinterpret_cast<int64_t*>(memory);
    int32_t* tile = reinterpret_cast<int32_t*>(memory + (wide ? most * kTaskColumns * 8 : 0));
    int32_t* columns = tile + most * kTaskColumns;
    int32_t* sums = columns + most * kTaskColumns;
    for (int64_t i = first; i < last; ++i) {
      const int64_t m0 = dot ? 0 : a.first_row(i), rows = dot ? call.m : a.row_count(i);
      const int64_t lanes = dot ? 0 : int64_t(a.vectors(i)) * kernels.width;
      Sums total(wide, parts, rows, n1 - n0);
      for (int64_t k0 = 0; k0 == 0 || k0 < call.k; k0 += kExactColumns) {
        DenseTask t{};
        t.k = call.k - k0 < kExactColumns ? call.k - k0 : kExactColumns;
        t.weight = weight + n0 * call.k + k0;
        t.weight_stride = call.k;
        t.n = n1 - n0;
        t.m = rows;
        t.sums = sums;
        if (dot) {
          t.x = reinterpret_cast<const uint8_t*>(a.data()) + k0;
          t.x_stride = a.stride();
          t.out = tile;
          t.out_stride = kTaskColumns;
          kernels.dense_dot(t);
        } else {
          t.x = reinterpret_cast<const uint8_t*>(a.tile(i)) + k0 * lanes;
          t.vectors = a.vectors(i);
          t.out = columns;
          kernels.dense_columns(t);
          if (wide || i == first) kernels.row_sums(t.weight, t.weight_stride, t.n, t.k, sums);
          kernels.transpose({columns, lanes, t.n, rows, tile, kTaskColumns});
        }
        total.add(tile, kTaskColumns, a.zero_point() + m0, sums);
      }
      FinishTask f = base;
      if (wide) {
        total.to_float(tile, kTaskColumns, a.scale() + m0, scale + n0);
        f.scale = nullptr;
      }
      f.tile = tile;
      f.stride = kTaskColumns;
      f.sums = sums;
      f.m0 = m0;
      f.m1 = m0 + rows;
      f.n0 = n0;
      f.n1 = n1;
      kernels.finish[call.kind](f);
    }
  };
  for_each_task(chunks * split, call.m * call.n * (call.k + 16) > kWorthThreads, run);
}

Tensor quantized_linear(const Tensor& x, const Tensor& weight_any, const Tensor& scale_any,
                        const OptTensor& bias, const OptTensor& residual,
                        std::string_view activation) {
  const CompressedCall call = check_all(x, weight_any, scale_any, bias, residual, activation);
  record(call.selected.isa, "quantized_linear", short_name(call.dtype), form(call.m));
  Tensor y = empty_rows_like(x, call.n, call.dtype);
  if (call.empty()) return y;
  const Tensor weight = dense(weight_any), scale = dense(scale_any);
  product(call, static_cast<const int8_t*>(weight.const_data_ptr()),
          static_cast<const float*>(scale.const_data_ptr()), y.mutable_data_ptr(), false);
  return y;
}

std::tuple<Tensor, Tensor> quantized_linear_backward(const Tensor& grad_any, const Tensor& x,
                                                     const Tensor& weight_any,
                                                     const Tensor& scale_any, const OptTensor& bias,
                                                     std::string_view activation, bool need_x,
                                                     bool need_bias) {
  CompressedCall call = check_all(x, weight_any, scale_any, bias, OptTensor(grad_any), activation);
  const Tensor grad = *call.residual;  // checked as such: grad has the shape of y
  call.residual.reset();
  record(call.selected.isa, "quantized_linear_backward", short_name(call.dtype), "direct");
  const Tensor weight = dense(weight_any), scale_tensor = dense(scale_any);
  const int8_t* w = static_cast<const int8_t*>(weight.const_data_ptr());
  const float* scale = static_cast<const float*>(scale_tensor.const_data_ptr());

  const bool pointwise = call.activation != kNone;
  const Buffer z(pointwise ? call.m * call.n * 4 : 0);
  const float* z_data = pointwise ? reinterpret_cast<const float*>(z.at(0)) : nullptr;
  if (pointwise && !call.empty()) {
    CompressedCall plain = call;
    plain.activation = kNone;
    product(plain, w, scale, z.at(0), true);
  }
  const Pointwise p = pointwise_backward(call, grad, z_data, scale, need_x, need_bias);
  if (!need_x) return {no_gradient(call.dtype), p.bias_grad};

  Tensor gx = empty_rows_like(x, call.k, call.dtype);
  const CompressedKernels& kernels = call.kernels();
  const float* gz = reinterpret_cast<const float*>(p.gz.at(0));
  const int64_t width = kernels.grad_columns;
  const auto run = [&](int64_t block) {
    const int64_t k0 = block * width, k1 = k0 + width < call.k ? k0 + width : call.k;
    float* tile = reinterpret_cast<float*>(scratch(kGradRows * width * 4));
    for (int64_t m = 0; m < call.m; m += kGradRows) {
      const int64_t rows = call.m - m < kGradRows ? call.m - m : kGradRows;
      kernels.dense_grad({gz + m * call.n, rows, call.n, w + k0, call.k, k1 - k0, tile});
      store_tile(call, tile, width, m, m + rows, k0, k1, gx.mutable_data_ptr());
    }
  };
  for_each_task(call.m > 0 ? (call.k + width - 1) / width : 0,
                call.m * call.n * call.k > kWorthThreads, run);
  return {gx, p.bias_grad};
}

}  // namespace

std::pair<std::string, std::string> choose_quantized_linear(int64_t m, int64_t, int64_t,
                                                            const std::string& dtype) {
  const std::string limit = std::to_string(kDotRows) + " rows of x";
  return {kernel_name(select_compressed().isa, "quantized_linear", dtype.c_str(), form(m)),
          dot_form(m) ? "both operands run along K, up to " + limit
                      : "one row of x a lane, above " + limit};
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&bigops::quantized_linear));
  m.impl("quantized_linear_backward", TORCH_BOX(&bigops::quantized_linear_backward));
}
