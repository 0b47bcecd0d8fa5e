// norm, norm_with_sum and norm_act_quant on the CPU: threads over rows, which are read where they
// lie in whatever view, if only their columns are contiguous.

#include "cpu/norm.h"

#include <algorithm>
#include <tuple>

#include "common/isa.h"
#include "common/kernel_table.h"
#include "common/record.h"
#include "common/tensor.h"
#include "cpu/compressed_linear.h"
#include "cpu/simd/norm.h"

namespace bigops {
namespace {

constexpr int64_t kWorthRows = 32768;  // elements; waking a thread costs about 5 us

struct SelectedNorm {
  const NormKernels* kernels;
  Isa isa;
};

SelectedNorm select() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512) return {&avx512_norm, Isa::avx512};
  if (active_isa() >= Isa::avx2) return {&avx2_norm, Isa::avx2};
#endif
  return {&portable_norm, Isa::portable};
}

// The rows of a tensor [.., K] of any strides whose last is 1.
class RowsOf {
 public:
  explicit RowsOf(const Tensor& t) : item_(static_cast<int64_t>(t.element_size())) {
    base_ = static_cast<const char*>(t.const_data_ptr());
    for (int64_t d = t.dim() - 2; d >= 0; --d) {  // the innermost first; what continues it joins it
      const int64_t size = t.size(d), stride = t.stride(d);
      if (size == 1) continue;
      if (dims_ > 0 && stride == sizes_[dims_ - 1] * strides_[dims_ - 1]) {
        sizes_[dims_ - 1] *= size;
      } else {
        sizes_[dims_] = size;
        strides_[dims_++] = stride;
      }
    }
  }

  const void* at(int64_t row) const {
    int64_t offset = 0;
    for (int d = 0; d < dims_; ++d) {
      offset += row % sizes_[d] * strides_[d];
      row /= sizes_[d];
    }
    return base_ + offset * item_;
  }
  int64_t stride() const { return dims_ > 0 ? strides_[0] : 0; }
  // How many rows from this one on are a stride apart.
  int64_t run(int64_t row) const { return dims_ > 0 ? sizes_[0] - row % sizes_[0] : 1; }

 private:
  const char* base_;
  int64_t item_;
  int dims_ = 0;
  int64_t sizes_[16], strides_[16];
};

void check_parameter(const char* name, const OptTensor& t, const Tensor& x, const OptTensor& other,
                     int64_t k) {
  if (!t.has_value()) return;
  check_cpu(name, *t);
  check_vector(name, *t, k);
  if (t->scalar_type() != ScalarType::Float) check_dtype(name, *t, x.scalar_type());
  if (other.has_value()) check_dtype(name, *t, other->scalar_type());
}

void check_residual(const OptTensor& residual, const Tensor& x) {
  if (!residual.has_value()) return;
  check_cpu("residual", *residual);
  check_dtype("residual", *residual, x.scalar_type());
  bool same = residual->dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = residual->size(d) == x.size(d);
  if (!same) fail("residual", "shape " + shape_of(x) + ", that of x", shape_of(*residual));
}

struct Norm {
  Tensor x;
  OptTensor weight, bias, residual;
  double eps;
  bool rms;
  int64_t rows, k;
  FloatKind kind;
  FloatKind parameters;  // dtype of weight and bias

  Tensor like_x(bool wanted = true) const {
    const int64_t none = 0;
    return wanted ? empty_rows_like(x, k, x.scalar_type()) : empty(&none, 1, x.scalar_type());
  }
};

Norm check_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                const OptTensor& residual, double eps, int64_t norm_kind) {
  const bool rms = check_code("kind", norm_kind, kNormWords) == kRmsNorm;
  check_cpu("x", x);
  const FloatKind kind = float_kind("x", x.scalar_type());
  if (x.dim() == 0 || x.dim() > 16) fail("x", "shape [.., K] of 1 to 16 dimensions", shape_of(x));
  const int64_t k = x.size(x.dim() - 1);
  check_parameter("weight", weight, x, {}, k);
  check_parameter("bias", bias, x, weight, k);
  check_residual(residual, x);
  if (!(eps >= 0.0)) fail("eps", "a number of at least 0", std::to_string(eps));
  const OptTensor& parameter = weight.has_value() ? weight : bias;
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return {rows_as_they_lie(x),
          dense(weight),
          dense(bias),
          residual.has_value() ? OptTensor(rows_as_they_lie(*residual)) : residual,
          eps,
          rms,
          rows,
          k,
          kind,
          parameter.has_value() ? float_kind("weight", parameter->scalar_type()) : kFloat32};
}

// Where the results of a call begin; null for what is not wanted.
struct Results {
  void *y = nullptr, *sum = nullptr;
  uint8_t* values = nullptr;
  float* scale = nullptr;
  int32_t* zero_point = nullptr;
  bool symmetric = false;
};

// Weight or bias in float32, where it is not so widened to `memory`, once for the rows of a task.
const float* floats(const Norm& call, const OptTensor& t, float* memory) {
  if (!t.has_value() || call.parameters == kFloat32) return static_cast<const float*>(data(t));
  select_compressed().kernels->widen[call.parameters](data(t), call.k, memory);
  return memory;
}

void run(const char* op, const Norm& call, const Results& results) {
  const SelectedNorm selected = select();
  record(selected.isa, op, short_name(call.x.scalar_type()), kNormWords[call.rms]);
  if (call.rows == 0 || call.k == 0) return;
  const RowsOf x(call.x), residual(call.residual.has_value() ? *call.residual : call.x);
  const int64_t bytes = call.kind == kFloat32 ? 4 : 2;
  const auto kernel = selected.kernels->norm[call.kind];
  for_tasks(call.rows, call.rows * call.k > kWorthRows, [&](int64_t begin, int64_t end) {
    const auto from = [&](void* p, int64_t row) {
      return p == nullptr ? nullptr : static_cast<char*>(p) + row * call.k * bytes;
    };
    NormTask t{};
    float* memory = reinterpret_cast<float*>(scratch(3 * call.k * 4));
    t.row = memory;
    t.weight = floats(call, call.weight, memory + call.k);
    t.bias = floats(call, call.bias, memory + 2 * call.k);
    t.k = call.k;
    t.eps = static_cast<float>(call.eps);
    t.rms = call.rms;
    t.symmetric = results.symmetric;
    t.x_stride = x.stride();
    t.residual_stride = residual.stride();
    for (int64_t row = begin; row < end; row += t.rows) {
      t.rows = std::min({end - row, x.run(row), residual.run(row)});
      t.x = x.at(row);
      t.residual = call.residual.has_value() ? residual.at(row) : nullptr;
      t.y = from(results.y, row);
      t.sum = from(results.sum, row);
      if (results.values != nullptr) {
        t.values = results.values + row * call.k;
        t.scale = results.scale + row;
        t.zero_point = results.zero_point + row;
      }
      kernel(t);
    }
  });
}

void check_sum(const OptTensor& residual) {
  if (!residual.has_value()) fail("residual", "a tensor, whose sum with x is wanted", "None");
}

Tensor norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
            const OptTensor& residual, double eps, int64_t kind) {
  const Norm call = check_norm(x, weight, bias, residual, eps, kind);
  Tensor y = call.like_x();
  Results results;
  results.y = y.mutable_data_ptr();
  run("norm", call, results);
  return y;
}

std::tuple<Tensor, Tensor> norm_with_sum(const Tensor& x, const OptTensor& weight,
                                         const OptTensor& bias, const OptTensor& residual,
                                         double eps, int64_t kind) {
  const Norm call = check_norm(x, weight, bias, residual, eps, kind);
  check_sum(residual);
  Tensor y = call.like_x(), sum = call.like_x();
  Results results;
  results.y = y.mutable_data_ptr();
  results.sum = sum.mutable_data_ptr();
  run("norm_with_sum", call, results);
  return {y, sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_act_quant(
    const Tensor& x, const OptTensor& weight, const OptTensor& bias, const OptTensor& residual,
    double eps, int64_t kind, bool symmetric, bool keep_float, bool keep_sum) {
  const Norm call = check_norm(x, weight, bias, residual, eps, kind);
  if (keep_sum) check_sum(residual);
  int64_t sizes[16];
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes[d] = x.size(d);
  Tensor values = empty_rows_like(x, call.k, ScalarType::Byte);
  Tensor scale = empty(sizes, x.dim() - 1, ScalarType::Float);
  Tensor zero_point = empty(sizes, x.dim() - 1, ScalarType::Int);
  Tensor y = call.like_x(keep_float), sum = call.like_x(keep_sum);
  Results results;
  results.values = static_cast<uint8_t*>(values.mutable_data_ptr());
  results.scale = static_cast<float*>(scale.mutable_data_ptr());
  results.zero_point = static_cast<int32_t*>(zero_point.mutable_data_ptr());
  results.symmetric = symmetric;
  if (keep_float) results.y = y.mutable_data_ptr();
  if (keep_sum) results.sum = sum.mutable_data_ptr();
  if (call.k == 0) {  // as act_quant of bigops/formats/quantize.py says it of rows without numbers
    std::fill_n(results.scale, call.rows, 1.0f);
    std::fill_n(results.zero_point, call.rows, 0);
  }
  run("norm_act_quant", call, results);
  return {values, scale, zero_point, y, sum};
}

}  // namespace

std::string choose_norm(const std::string& op, const std::string& dtype, const std::string& kind) {
  return kernel_name(select().isa, op.c_str(), dtype.c_str(), kind.c_str());
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "norm.code", TORCH_BOX(&bigops::norm));
  bigops::implement(m, "norm_with_sum.code", TORCH_BOX(&bigops::norm_with_sum));
  bigops::implement(m, "norm_act_quant.code", TORCH_BOX(&bigops::norm_act_quant));
}
