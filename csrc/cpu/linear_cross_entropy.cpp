// linear_cross_entropy on the CPU: the pass over a chunk of logits. The products and the loop over
// the chunks are in bigops/ops/linear_cross_entropy/__init__.py.

#include <array>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "common/kernel_table.h"
#include "common/record.h"
#include "common/tensor.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/simd/linear_cross_entropy.h"

namespace bigops {
namespace {

constexpr int64_t kWorthThreads = 10'000;  // logits; waking a thread costs about 5 us

struct Chosen {
  CrossEntropyKernel kernel;
  Isa isa;
};

Chosen choose(ScalarType dtype) {
  if (dtype == ScalarType::Double) return {portable_cross_entropy_f64, Isa::portable};
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx2) {
    const bool wide = active_isa() >= Isa::avx512;
    const Isa level = wide ? Isa::avx512 : Isa::avx2;
    if (dtype == ScalarType::BFloat16)
      return {wide ? avx512_cross_entropy_bf16 : avx2_cross_entropy_bf16, level};
    if (dtype == ScalarType::Half)
      return {wide ? avx512_cross_entropy_f16 : avx2_cross_entropy_f16, level};
    return {wide ? avx512_cross_entropy_f32 : avx2_cross_entropy_f32, level};
  }
#endif
  if (dtype == ScalarType::BFloat16) return {portable_cross_entropy_bf16, Isa::portable};
  if (dtype == ScalarType::Half) return {portable_cross_entropy_f16, Isa::portable};
  return {portable_cross_entropy_f32, Isa::portable};
}

void check_part(const char* name, const OptTensor& t, int64_t n, ScalarType dtype) {
  if (!t.has_value()) return;
  check_cpu(name, *t);
  check_vector(name, *t, n);
  check_dtype(name, *t, dtype);
}

// The loss of each row [M], the log of its sum of exponentials (0 of an ignored one) and, with
// `predict`, the class of its largest logit (else an empty tensor); with `gradient` the logits
// [M, V] become d loss / d logits (without the bias: bias and soft cap are applied here) times
// `scale` of the row.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_chunk(
    Tensor logits, const Tensor& target, const OptTensor& bias_any,
    const OptTensor& class_weight_any, const OptTensor& scale_any, double class_weight_sum,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool gradient,
    bool predict) {
  const ScalarType dtype = logits.scalar_type();
  check_cpu("logits", logits);
  if (dtype != ScalarType::Float && dtype != ScalarType::Double && dtype != ScalarType::BFloat16 &&
      dtype != ScalarType::Half)
    fail("logits", "dtype f32, bf16, f16 or f64", short_name(dtype));
  if (logits.dim() != 2 || !logits.is_contiguous())
    fail("logits", "contiguous [M, V]", shape_of(logits));
  const int64_t m = logits.size(0), v = logits.size(1);
  const ScalarType sums = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_cpu("target", target);
  check_vector("target", target, m);
  if (target.scalar_type() != ScalarType::Long) fail("target", "dtype int64", "another");
  check_part("bias", bias_any, v, dtype);
  check_part("class_weight", class_weight_any, v, sums);
  check_part("scale", scale_any, m, sums);

  const Tensor classes = dense(target);
  const int64_t* y = static_cast<const int64_t*>(classes.const_data_ptr());
  for (int64_t i = 0; i < m; ++i)  // before anything is written
    if (y[i] != ignore_index && (y[i] < 0 || y[i] >= v))
      fail("target", "classes below " + std::to_string(v) + " or ignore_index",
           std::to_string(y[i]));

  const OptTensor bias = dense(bias_any), class_weight = dense(class_weight_any);
  const OptTensor scale = dense(scale_any);
  Tensor losses = empty(&m, 1, sums), lse = empty(&m, 1, sums);
  const int64_t predicted = predict ? m : 0;
  Tensor predictions = empty(&predicted, 1, ScalarType::Long);
  const Chosen s = choose(dtype);
  record(s.isa, "linear_cross_entropy", short_name(dtype), gradient ? "gradient" : "loss");
  const CrossEntropyTask base{
      logits.mutable_data_ptr(),
      y,
      data(bias),
      data(class_weight),
      data(scale),
      losses.mutable_data_ptr(),
      lse.mutable_data_ptr(),
      predict ? static_cast<int64_t*>(predictions.mutable_data_ptr()) : nullptr,
      nullptr,
      v,
      0,
      0,
      ignore_index,
      class_weight_sum,
      label_smoothing,
      z_loss,
      softcap,
      gradient};
  auto run = [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(static_cast<size_t>(v) * (sums == ScalarType::Double ? 8 : 4));
    CrossEntropyTask t = base;
    t.scratch = scratch.data();
    t.m0 = begin;
    t.m1 = end;
    s.kernel(t);
  };
  for_tasks(m, m * v > kWorthThreads, run);
  return {losses, lse, predictions};
}

}  // namespace

std::string choose_linear_cross_entropy(const std::string& dtype) {
  const ScalarType type = dtype == "f64"    ? ScalarType::Double
                          : dtype == "bf16" ? ScalarType::BFloat16
                          : dtype == "f16"  ? ScalarType::Half
                                            : ScalarType::Float;
  return kernel_name(choose(type).isa, "linear_cross_entropy", short_name(type), "gradient");
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "linear_cross_entropy_chunk",
                    TORCH_BOX(&bigops::linear_cross_entropy_chunk));
}
