// low_rank_linear on the CPU: two dense products in one op, and a third where there is a base.
//
// The intermediate t = scale x v^T is made whole. Up to 64 rows it lies in L2 anyway; above, to
// write and read it costs 50 / (K + N) of the products' time even from DRAM (8 bytes an entry at
// 40 GB/s against 2 (K + N) operations at 500 GFLOP/s): 1.3 % at 768 x 3072, so blocks of rows,
// each with two calls of the library, could not win.

#include "common/kernel_table.h"
#include "common/record.h"
#include "common/tensor.h"
#include "cpu/fused_linear.h"
#include "cpu/kernels.h"
#include "cpu/library_product.h"

namespace bigops {
namespace {

constexpr const char* kOp = "low_rank_linear";

void check_factors(const Tensor& x, const Tensor& u, const Tensor& v, const OptTensor& base) {
  check_cpu("u", u);
  check_cpu("v", v);
  if (u.dim() != 2) fail("u", "2 dimensions [N, r]", shape_of(u));
  if (v.dim() != 2) fail("v", "2 dimensions [r, K]", shape_of(v));
  if (u.size(1) != v.size(0))
    fail("u", std::to_string(v.size(0)) + " columns, the rows of v", shape_of(u));
  const int64_t least = u.size(0) < v.size(1) ? u.size(0) : v.size(1);
  if (v.size(0) > least)
    fail("u, v", "a rank of at most " + std::to_string(least) + ", the smaller side",
         std::to_string(v.size(0)));
  if (base.has_value()) {
    check_cpu("base", *base);
    check_dtype("base", *base, x.scalar_type());
    if (base->dim() != 2 || base->size(0) != u.size(0) || base->size(1) != v.size(1))
      fail("base", "shape [" + std::to_string(u.size(0)) + ", " + std::to_string(v.size(1)) + "]",
           shape_of(*base));
  }
}

Tensor times(const Tensor& t, double scale) {
  if (scale == 1.0) return t;
  // A tensor without dimensions gives no dtype to the product.
  Tensor factor = empty(nullptr, 0, ScalarType::Double);
  *static_cast<double*>(factor.mutable_data_ptr()) = scale;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(t),
                                    torch::stable::detail::from(factor)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// t and z: null when not asked for. z is left as it is for activation "none".
Tensor forward(const Tensor& x_any, const Tensor& u, const Tensor& v, const OptTensor& base,
               double scale, const OptTensor& bias, const OptTensor& residual, int64_t activation,
               Tensor* t_out, Tensor* z) {
  const int code = check_plain_activation(activation);
  check_factors(x_any, u, v, base);
  const Tensor x = dense(x_any);
  const Tensor t = times(dense_linear(x, v, OptTensor(), OptTensor(), kNone, nullptr, kOp), scale);
  if (t_out != nullptr) *t_out = t;
  if (!base.has_value()) return dense_linear(t, u, bias, residual, activation, z, kOp);
  if (code == kNone) {
    const Tensor low = dense_linear(t, u, OptTensor(), residual, kNone, nullptr, kOp);
    return dense_linear(x, *base, bias, low, kNone, nullptr, kOp);
  }
  const Tensor low = dense_linear(t, u, OptTensor(), OptTensor(), kNone, nullptr, kOp);
  const Tensor sum = dense_linear(x, *base, bias, low, kNone, nullptr, kOp);
  if (z != nullptr) *z = sum;
  if (residual.has_value()) {
    check_cpu("residual", *residual);
    check_dtype("residual", *residual, x.scalar_type());
    bool same = residual->dim() == sum.dim();
    for (int64_t i = 0; same && i < sum.dim(); ++i) same = residual->size(i) == sum.size(i);
    if (!same) fail("residual", "the shape of the result " + shape_of(sum), shape_of(*residual));
  }
  return activated(sum, dense(residual), code);
}

Tensor low_rank_linear(const Tensor& x, const Tensor& u, const Tensor& v, const OptTensor& base,
                       double scale, const OptTensor& bias, const OptTensor& residual,
                       int64_t activation) {
  return forward(x, u, v, base, scale, bias, residual, activation, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> low_rank_linear_with_parts(
    const Tensor& x, const Tensor& u, const Tensor& v, const OptTensor& base, double scale,
    const OptTensor& bias, const OptTensor& residual, int64_t activation) {
  Tensor t, z;
  const bool keep = check_activation(activation) != kNone;
  Tensor y = forward(x, u, v, base, scale, bias, residual, activation, &t, keep ? &z : nullptr);
  if (!keep) z = nothing(x.scalar_type());
  return {y, t, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_linear_backward(
    const Tensor& grad_any, const Tensor& x_any, const Tensor& u_any, const Tensor& v_any,
    const OptTensor& base_any, double scale, const Tensor& t_any, const OptTensor& preact_any,
    int64_t activation, bool need_x, bool need_u, bool need_v, bool need_base, bool need_bias) {
  const int code = check_plain_activation(activation);
  check_factors(x_any, u_any, v_any, base_any);
  check_cpu("grad", grad_any);
  check_cpu("x", x_any);
  check_cpu("t", t_any);
  const Tensor grad = dense(grad_any), x = dense(x_any), u = dense(u_any), v = dense(v_any);
  const ScalarType dtype = x.scalar_type();
  const int64_t n = u.size(0), rank = u.size(1), k = v.size(1);
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  if (x.dim() == 0 || x.size(x.dim() - 1) != k)
    fail("x", "shape [.., " + std::to_string(k) + "]", shape_of(x));
  check_dtype("grad", grad, dtype);
  check_dtype("u", u, dtype);
  check_dtype("v", v, dtype);
  check_dtype("t", t_any, dtype);
  if (grad.dim() == 0 || grad.size(grad.dim() - 1) != n || grad.numel() != m * n)
    fail("grad", "the shape of the result, " + std::to_string(m) + " x " + std::to_string(n),
         shape_of(grad));
  if (t_any.numel() != m * rank)
    fail("t", std::to_string(m) + " x " + std::to_string(rank) + " elements", shape_of(t_any));
  if (code != kNone) {
    if (!preact_any.has_value())
      fail("preact", std::string("what the activation ") + kActivationWords[code] + " was given",
           "None");
    check_cpu("preact", *preact_any);
    check_dtype("preact", *preact_any, dtype);
    if (preact_any->numel() != m * n)
      fail("preact", std::to_string(m) + " x " + std::to_string(n) + " elements",
           shape_of(*preact_any));
  }
  const OptTensor preact = code == kNone ? OptTensor() : dense(preact_any);
  record(select_float_kernels(dtype).isa, "low_rank_linear_backward", short_name(dtype),
         gradient_form(dtype).c_str());

  Tensor gx = nothing(dtype), gu = nothing(dtype), gv = nothing(dtype), gb = nothing(dtype),
         gbase = nothing(dtype);
  const bool products = need_x || need_u || need_v || need_base;
  const Tensor gz = preact_gradient(grad, preact, code, products, need_bias ? &gb : nullptr);
  if (!products) return {gx, gu, gv, gbase, gb};
  const Tensor gz_t = torch::stable::transpose(gz, 0, 1);
  const Tensor x2 = view_matrix(x, m, k);
  if (need_u) gu = gradient_mm(gz_t, view_matrix(dense(t_any), m, rank));
  if (need_base && base_any.has_value()) gbase = gradient_mm(gz_t, x2);
  if (need_x || need_v) {
    const Tensor gt = times(gradient_mm(gz, u), scale);
    if (need_v) gv = gradient_mm(torch::stable::transpose(gt, 0, 1), x2);
    if (need_x && base_any.has_value()) {
      // The sum of both products in the epilogue of the second.
      const OptTensor rest(gradient_mm(gz, dense(*base_any)));
      gx = view_like(dense_linear(gt, torch::stable::transpose(v, 0, 1), OptTensor(), rest, kNone,
                                  nullptr, "low_rank_linear_backward"),
                     x);
    } else if (need_x) {
      gx = view_like(gradient_mm(gt, v), x);
    }
  }
  return {gx, gu, gv, gbase, gb};
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "low_rank_linear.code", TORCH_BOX(&bigops::low_rank_linear));
  bigops::implement(m, "low_rank_linear_with_parts.code",
                    TORCH_BOX(&bigops::low_rank_linear_with_parts));
  bigops::implement(m, "low_rank_linear_backward.code",
                    TORCH_BOX(&bigops::low_rank_linear_backward));
}
