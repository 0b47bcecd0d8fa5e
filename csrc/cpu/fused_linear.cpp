// fused_linear on the CPU: checks, choice between the own dot form and torch's product, threads.

#include <array>

#include "common/kernel_table.h"
#include "common/record.h"
#include "common/tensor.h"
#include "cpu/fused_linear.h"
#include "cpu/kernels.h"
#include "cpu/library_product.h"

namespace bigops {
namespace {

constexpr int64_t kWorthThreads = 200'000;  // operations; waking a thread costs about 5 us

bool served(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 ||
         t == ScalarType::Half;
}

struct Problem {
  int64_t m, n, k;  // n: columns of y
  int64_t width;    // rows of the weight: n, or 2n when gated
  int activation;
  ScalarType dtype;
};

Problem check_arguments(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                        const OptTensor& residual, int64_t activation) {
  Problem p;
  p.activation = check_activation(activation);
  p.dtype = x.scalar_type();
  check_cpu("x", x);
  check_cpu("weight", weight);
  if (!served(p.dtype)) fail("x", "dtype f32, bf16, f16 or f64", short_name(p.dtype));
  if (weight.dim() != 2) fail("weight", "2 dimensions [N, K]", shape_of(weight));
  p.width = weight.size(0);
  p.k = weight.size(1);
  if (x.dim() == 0 || x.size(x.dim() - 1) != p.k)
    fail("x", "shape [.., " + std::to_string(p.k) + "]", shape_of(x));
  const bool gated = is_gated(p.activation);
  if (gated && p.width % 2 != 0)
    fail("weight", "an even number of rows (gate, then up)", shape_of(weight));
  p.n = gated ? p.width / 2 : p.width;
  p.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) p.m *= x.size(i);
  check_dtype("weight", weight, p.dtype);
  if (bias.has_value()) {
    check_cpu("bias", *bias);
    check_vector("bias", *bias, p.width);
    check_dtype("bias", *bias, p.dtype);
  }
  if (residual.has_value()) {
    check_cpu("residual", *residual);
    check_dtype("residual", *residual, p.dtype);
    bool same = residual->dim() == x.dim() && residual->size(x.dim() - 1) == p.n;
    for (int64_t i = 0; same && i + 1 < x.dim(); ++i) same = residual->size(i) == x.size(i);
    if (!same)
      fail("residual", "x's shape with " + std::to_string(p.n) + " columns", shape_of(*residual));
  }
  return p;
}

bool own_kernel(int64_t m, int64_t width, int64_t k, ScalarType dtype) {
  const Crossover limit = crossover("fused_linear", short_name(dtype));
  return m <= limit.max_rows || 2.0 * m * width * k <= static_cast<double>(limit.max_flops);
}

// torch's fp16 product is 5 to 10 times slower than its fp32 one on CPUs without AVX512-FP16.
bool through_f32(ScalarType dtype) { return dtype == ScalarType::Half; }

bool by_onednn(ScalarType dtype) {
  return (dtype == ScalarType::Float || through_f32(dtype)) && onednn_floats();
}

// The product of another library, as it is recorded: forward "linear", backward "mm".
std::string library_form(ScalarType dtype, const char* product) {
  return std::string(by_onednn(dtype) ? "onednn_" : "torch_") + product +
         (through_f32(dtype) ? "_via_f32" : "");
}

// x [.., K] times weight [N, K] transposed, plus bias.
Tensor library_linear(const Problem& p, const Tensor& x, const Tensor& weight,
                      const OptTensor& bias) {
  if (x.scalar_type() != ScalarType::Float || !onednn_floats() || p.m * p.width * p.k == 0)
    return torch_linear(x, weight, bias);
  const Tensor z = onednn_linear(view_matrix(x, p.m, p.k), weight, bias);
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()));
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape[static_cast<size_t>(i)] = x.size(i);
  shape.back() = p.width;
  return torch::stable::view(z, shape);
}

Tensor to_f32(const Tensor& t) { return torch::stable::to(t, ScalarType::Float); }

void run_own(const Selected& s, const Problem& p, const Tensor& x, const Tensor& weight,
             const OptTensor& bias, const OptTensor& residual, Tensor& y, Tensor* preact) {
  LinearTask base{x.const_data_ptr(),
                  weight.const_data_ptr(),
                  data(bias),
                  data(residual),
                  y.mutable_data_ptr(),
                  preact != nullptr ? preact->mutable_data_ptr() : nullptr,
                  p.n,
                  p.k,
                  0,
                  0,
                  0,
                  0,
                  p.activation};
  const int64_t row_tiles = (p.m + kTileRows - 1) / kTileRows;
  const int64_t column_tiles = (p.n + kTileColumns - 1) / kTileColumns;
  // Consecutive tasks of a thread share a block of x, not of W: at small M all of x stays cached.
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      LinearTask t = base;
      t.m0 = task / column_tiles * kTileRows;
      t.n0 = task % column_tiles * kTileColumns;
      t.m1 = t.m0 + kTileRows < p.m ? t.m0 + kTileRows : p.m;
      t.n1 = t.n0 + kTileColumns < p.n ? t.n0 + kTileColumns : p.n;
      s.kernels->linear(t);
    }
  };
  for_tasks(row_tiles * column_tiles, p.m * p.width * (p.k + 16) > kWorthThreads, run);
}

void run_epilogue(const Selected& s, const Problem& p, const Tensor& z, const OptTensor& bias,
                  const OptTensor& residual, Tensor& y, Tensor* preact) {
  EpilogueTask base{z.const_data_ptr(),
                    z.scalar_type() != p.dtype,
                    data(bias),
                    data(residual),
                    y.mutable_data_ptr(),
                    preact != nullptr ? preact->mutable_data_ptr() : nullptr,
                    p.n,
                    0,
                    0,
                    p.activation};
  constexpr int64_t kRows = 16;
  auto run = [&](int64_t begin, int64_t end) {
    EpilogueTask t = base;
    t.m0 = begin * kRows;
    t.m1 = end * kRows < p.m ? end * kRows : p.m;
    s.kernels->epilogue(t);
  };
  for_tasks((p.m + kRows - 1) / kRows, p.m * p.width * 16 > kWorthThreads, run);
}

}  // namespace

Tensor dense_linear(const Tensor& x_any, const Tensor& weight_any, const OptTensor& bias_any,
                    const OptTensor& residual_any, int64_t activation, Tensor* preact,
                    const char* op) {
  const Problem p = check_arguments(x_any, weight_any, bias_any, residual_any, activation);
  const Tensor x = dense(x_any), weight = dense(weight_any);
  const OptTensor bias = dense(bias_any), residual = dense(residual_any);
  const Selected s = select_float_kernels(p.dtype);
  if (own_kernel(p.m, p.width, p.k, p.dtype)) {
    record(s.isa, op, short_name(p.dtype), "dot");
    Tensor y = empty_rows_like(x, p.n, p.dtype);
    if (preact != nullptr) *preact = empty_rows_like(x, p.width, p.dtype);
    if (p.m > 0 && p.n > 0) run_own(s, p, x, weight, bias, residual, y, preact);
    return y;
  }
  record(s.isa, op, short_name(p.dtype), library_form(p.dtype, "linear").c_str());
  const bool plain = p.activation == kNone && !residual.has_value();
  if (through_f32(p.dtype)) {
    const Tensor z = library_linear(p, to_f32(x), to_f32(weight), OptTensor());
    Tensor y = empty_rows_like(x, p.n, p.dtype);
    if (preact != nullptr) *preact = empty_rows_like(x, p.width, p.dtype);
    run_epilogue(s, p, z, bias, residual, y, preact);
    return y;
  }
  Tensor z = library_linear(p, x, weight, bias);
  if (preact != nullptr) *preact = z;
  if (plain && preact == nullptr) return z;
  // In place where z is ours alone and y has its shape.
  Tensor y = preact == nullptr && !is_gated(p.activation) ? z : empty_rows_like(x, p.n, p.dtype);
  run_epilogue(s, p, z, OptTensor(), residual, y, nullptr);
  return y;
}

namespace {

Tensor fused_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                    const OptTensor& residual, int64_t activation) {
  return dense_linear(x, weight, bias, residual, activation, nullptr, "fused_linear");
}

std::tuple<Tensor, Tensor> fused_linear_with_parts(const Tensor& x, const Tensor& weight,
                                                   const OptTensor& bias, const OptTensor& residual,
                                                   int64_t activation) {
  Tensor preact;
  const bool keep = activation != kNone;
  Tensor y = dense_linear(x, weight, bias, residual, activation, keep ? &preact : nullptr,
                          "fused_linear_with_parts");
  if (!keep) preact = nothing(x.scalar_type());
  return {y, preact};
}

}  // namespace

Tensor activated(const Tensor& z, const OptTensor& residual, int activation) {
  Problem p{};
  p.n = p.width = z.size(z.dim() - 1);
  p.m = p.n > 0 ? z.numel() / p.n : 0;
  p.activation = activation;
  p.dtype = z.scalar_type();
  Tensor y = empty_rows_like(z, p.n, p.dtype);
  run_epilogue(select_float_kernels(p.dtype), p, z, OptTensor(), residual, y, nullptr);
  return y;
}

Tensor nothing(ScalarType dtype) {
  const int64_t zero = 0;
  return empty(&zero, 1, dtype);
}

Tensor view_like(const Tensor& matrix, const Tensor& x) {
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) shape[static_cast<size_t>(i)] = x.size(i);
  return torch::stable::view(matrix, shape);
}

Tensor gradient_mm(const Tensor& a, const Tensor& b) {
  const ScalarType dtype = a.scalar_type();
  if (!through_f32(dtype)) return library_mm(a, b);
  return torch::stable::to(library_mm(to_f32(a), to_f32(b)), dtype);
}

std::string gradient_form(ScalarType dtype) { return library_form(dtype, "mm"); }

Tensor preact_gradient(const Tensor& grad, const OptTensor& preact, int activation, bool need_gz,
                       Tensor* gb) {
  const ScalarType dtype = grad.scalar_type();
  const int64_t n = grad.size(grad.dim() - 1);
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < grad.dim(); ++i) m *= grad.size(i);
  const int64_t width = is_gated(activation) ? 2 * n : n;
  const bool pointwise = activation != kNone && need_gz;
  const int64_t flat[2] = {m, width};
  Tensor gz = pointwise ? empty(flat, 2, dtype) : view_matrix(grad, m, n);
  if (gb != nullptr) *gb = empty(&width, 1, dtype);
  if (!pointwise && gb == nullptr) return gz;
  const Selected s = select_float_kernels(dtype);
  const int64_t share = n / (4 * int64_t(torch::stable::get_num_threads()));
  const int64_t rounded = (share + 63) / 64 * 64;
  const int64_t columns = rounded < 64 ? 64 : rounded > kGradColumns ? kGradColumns : rounded;
  auto run = [&](int64_t begin, int64_t end) {
    BackwardTask t{grad.const_data_ptr(),
                   data(preact),
                   pointwise ? gz.mutable_data_ptr() : nullptr,
                   gb != nullptr ? gb->mutable_data_ptr() : nullptr,
                   m,
                   n,
                   begin * columns,
                   end * columns < n ? end * columns : n,
                   activation};
    s.kernels->backward(t);
  };
  for_tasks((n + columns - 1) / columns, m * width * 16 > kWorthThreads, run);
  return gz;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> fused_linear_backward(const Tensor& grad_any,
                                                         const Tensor& x_any,
                                                         const Tensor& weight_any,
                                                         const OptTensor& preact_any,
                                                         int64_t activation, bool need_x,
                                                         bool need_weight, bool need_bias) {
  const Problem p =
      check_arguments(x_any, weight_any, OptTensor(), OptTensor(grad_any), activation);
  if (p.activation != kNone && !preact_any.has_value())
    fail("preact", std::string("z = x W^T + bias for activation ") + kActivationWords[p.activation],
         "None");
  const Tensor grad = dense(grad_any), x = dense(x_any), weight = dense(weight_any);
  const OptTensor preact = p.activation == kNone ? OptTensor() : dense(preact_any);
  if (preact.has_value()) {
    check_dtype("preact", *preact, p.dtype);
    if (preact->numel() != p.m * p.width)
      fail("preact", std::to_string(p.m) + " x " + std::to_string(p.width) + " elements",
           shape_of(*preact));
  }
  const Selected s = select_float_kernels(p.dtype);
  record(s.isa, "fused_linear_backward", short_name(p.dtype), library_form(p.dtype, "mm").c_str());

  const bool products = need_x || need_weight;
  Tensor gb = nothing(p.dtype);
  const Tensor gz =
      preact_gradient(grad, preact, p.activation, products, need_bias ? &gb : nullptr);

  Tensor gx = nothing(p.dtype), gw = nothing(p.dtype);
  if (need_x) gx = view_like(gradient_mm(gz, weight), x);
  if (need_weight) gw = gradient_mm(torch::stable::transpose(gz, 0, 1), view_matrix(x, p.m, p.k));
  return {gx, gw, gb};
}

}  // namespace

std::pair<std::string, std::string> choose_fused_linear(int64_t m, int64_t n, int64_t k,
                                                        const std::string& dtype) {
  const ScalarType type = dtype == "f64"    ? ScalarType::Double
                          : dtype == "bf16" ? ScalarType::BFloat16
                          : dtype == "f16"  ? ScalarType::Half
                                            : ScalarType::Float;
  const Selected s = select_float_kernels(type);
  const Crossover limit = crossover("fused_linear", short_name(type));
  const std::string bounds = std::to_string(limit.max_rows) + " rows or " +
                             std::to_string(limit.max_flops) + " operations";
  if (own_kernel(m, n, k, type))
    return {kernel_name(s.isa, "fused_linear", short_name(type), "dot"),
            "own kernel up to " + bounds + " (crossover table)"};
  return {
      kernel_name(s.isa, "fused_linear", short_name(type), library_form(type, "linear").c_str()),
      std::string(by_onednn(type) ? "oneDNN's" : "torch's") + " product above " + bounds +
          " (crossover table), own epilogue"};
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "fused_linear.code", TORCH_BOX(&bigops::fused_linear));
  bigops::implement(m, "fused_linear_with_parts.code", TORCH_BOX(&bigops::fused_linear_with_parts));
  bigops::implement(m, "fused_linear_backward.code", TORCH_BOX(&bigops::fused_linear_backward));
}
