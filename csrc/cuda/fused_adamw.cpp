// fused_adamw_step and fused_grad_norm_step: checks and registration of the kernels in
// fused_adamw.cu.

#include "cuda/fused_adamw.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cuda/tensor.h"

namespace bigops {
namespace {

using List = std::vector<Tensor>;

StepType type_of(const std::string& name, const Tensor& t, bool wide = false) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kStepFloat;
    case ScalarType::BFloat16: return kStepBFloat16;
    case ScalarType::Half: return kStepHalf;
    case ScalarType::Double:
      if (wide) return kStepDouble;
      [[fallthrough]];
    default:
      fail(name.c_str(), wide ? "dtype f32, bf16, f16 or f64" : "dtype f32, bf16 or f16",
           short_name(t.scalar_type()));
  }
}

std::string at(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

void check_count(const char* name, const List& list, size_t count, bool may_be_empty = false) {
  if (list.size() != count && !(may_be_empty && list.empty()))
    fail(name, std::to_string(count) + " tensors, one for each of params",
         std::to_string(list.size()));
}

void check_place(const std::string& name, const Tensor& t, const Tensor& like) {
  if (!on_device(t) || t.get_device_index() != like.get_device_index())
    fail(name.c_str(), "the device of params[0]", "another");
}

void check_shape(const std::string& name, const Tensor& t, const Tensor& param) {
  bool same = t.dim() == param.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == param.size(i);
  if (!same) fail(name.c_str(), "the parameter's shape " + shape_of(param), shape_of(t));
}

// --- layout ------------------------------------------------------------------------------------

// Whether the elements fill one stretch of memory, in whatever order.
bool fills_memory(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) != 1) dims.emplace_back(t.stride(i), t.size(i));
  std::sort(dims.begin(), dims.end());
  int64_t step = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != step) return false;
    step *= size;
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

// Gives tensors as stretches of memory in which one index means the same element in all: what was
// laid out in another way is worked on as a contiguous copy, and written back.
class Layout {
 public:
  void begin(const Tensor& param, bool by_index) {
    param_ = &param;
    direct_ = param.is_contiguous() || (!by_index && fills_memory(param));
  }
  void fits(const Tensor& t) { direct_ = direct_ && same_strides(*param_, t); }
  const void* read(const Tensor& t) {
    kept_.push_back(direct_ ? t : dense(t));
    return kept_.back().const_data_ptr();
  }
  void* written(const Tensor& t) {
    kept_.push_back(direct_ ? t : dense(t));
    if (!direct_ && !t.is_contiguous()) pairs_.emplace_back(t, kept_.back());
    return kept_.back().mutable_data_ptr();
  }
  void write_back() {
    for (auto& [to, from] : pairs_) torch::stable::copy_(to, from);
  }

 private:
  const Tensor* param_ = nullptr;
  bool direct_ = true;
  List kept_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

// --- AdamW -------------------------------------------------------------------------------------

struct Lists {
  const List &params, &grads, &first, &second, &steps, &first_scales, &second_scales, &copies;

  bool coded(size_t i) const { return first[i].scalar_type() == ScalarType::Byte; }
  bool has_copy(size_t i) const { return !copies.empty() && copies[i].numel() > 0; }
};

// Scales of shape [.., blocks of a row]: the first dimensions are the parameter's, the others one
// row. Its elements.
int64_t row_of(const std::string& name, const Tensor& scales, const Tensor& param) {
  const int64_t leading = scales.dim() - 1;
  bool fits = leading >= 0 && leading <= param.dim();
  int64_t row = 1;
  for (int64_t i = 0; fits && i < param.dim(); ++i) {
    if (i < leading)
      fits = scales.size(i) == param.size(i);
    else
      row *= param.size(i);
  }
  if (!fits || scales.size(leading) != (row + kStepBlock - 1) / kStepBlock)
    fail(name.c_str(), "the parameter's rows and an absmax for 256 elements of each",
         shape_of(scales));
  return row;
}

void check_state(const std::string& name, const Tensor& state, const Tensor& param, bool coded,
                 const List& scales, size_t i) {
  check_place(name, state, param);
  check_dtype(name.c_str(), state, coded ? ScalarType::Byte : ScalarType::Float);
  check_shape(name, state, param);
  if (!coded) return;
  const std::string scale = name + "'s scales";
  if (scales.empty()) fail(scale.c_str(), "one tensor for each of params", "none");
  check_place(scale, scales[i], param);
  check_dtype(scale.c_str(), scales[i], ScalarType::Float);
  row_of(scale, scales[i], param);
  if (!state.is_contiguous() || !scales[i].is_contiguous())
    fail(name.c_str(), "contiguous codes and scales", "another layout");
}

// Stochastic rounding, and of which tensors these are parts, if of any.
struct Random {
  const std::vector<int64_t>&streams, &firsts, &runs, &strides;
};

void check_random(const Lists& l, const Random& r) {
  const size_t count = l.params.size();
  for (const auto* list : {&r.streams, &r.firsts, &r.runs, &r.strides})
    if (!list->empty() && list->size() != count)
      fail("streams, firsts, runs, strides", "none, or one for each of params",
           std::to_string(list->size()));
  if (r.firsts.size() != r.runs.size() || r.runs.size() != r.strides.size())
    fail("firsts, runs, strides", "all of them or none", "some");
  for (size_t i = 0; i < r.runs.size(); ++i) {
    const int64_t numel = l.params[i].numel(), run = r.runs[i];
    const bool fits = run > 0 && numel % run == 0 && r.firsts[i] >= 0 && r.strides[i] >= run;
    const int64_t row = l.coded(i) ? row_of("scales", l.first_scales[i], l.params[i]) : 1;
    if (numel > 0 && !(fits && run % row == 0))
      fail(at("runs", i).c_str(), "whole rows of params, of which it is a part",
           std::to_string(run));
  }
}

// All of all lists, before the first tensor is changed: a kernel trusts its addresses.
void check_lists(const Lists& l, const Random& random, bool steps_on_device) {
  const size_t count = l.params.size();
  check_count("grads", l.grads, count);
  check_count("exp_avgs", l.first, count);
  check_count("exp_avg_sqs", l.second, count);
  check_count("steps", l.steps, count);
  check_count("exp_avg_scales", l.first_scales, count, true);
  check_count("exp_avg_sq_scales", l.second_scales, count, true);
  check_count("copies", l.copies, count, true);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = l.params[i];
    const std::string name = at("params", i), grad = at("grads", i), step = at("steps", i);
    check_place(name, param, l.params[0]);
    type_of(name, param);
    check_place(grad, l.grads[i], param);
    type_of(grad, l.grads[i]);
    check_shape(grad, l.grads[i], param);
    check_dtype(step.c_str(), l.steps[i], ScalarType::Float);
    if (l.steps[i].numel() != 1) fail(step.c_str(), "one element", shape_of(l.steps[i]));
    if (steps_on_device) check_place(step, l.steps[i], param);
    if (!steps_on_device) check_cpu(step.c_str(), l.steps[i]);
    check_state(at("exp_avgs", i), l.first[i], param, l.coded(i), l.first_scales, i);
    check_state(at("exp_avg_sqs", i), l.second[i], param, l.coded(i), l.second_scales, i);
    if (!l.has_copy(i)) continue;
    const std::string copy = at("copies", i);
    check_place(copy, l.copies[i], param);
    check_shape(copy, l.copies[i], param);
    if (type_of(copy, l.copies[i]) == kStepFloat) fail(copy.c_str(), "dtype bf16 or f16", "f32");
  }
  check_random(l, random);
}

// maps: values and buckets of the signed map of 8-bit states, then of the unsigned one.
void set_maps(AdamwRule& rule, const List& maps, const Tensor& like) {
  constexpr int64_t kValues = 256, kBuckets = 22 * 128 + 1;
  if (maps.size() != 4) fail("maps", "4 tensors with states of u8", std::to_string(maps.size()));
  for (size_t i = 0; i < 4; ++i) {
    const std::string name = at("maps", i);
    check_place(name, maps[i], like);
    check_dtype(name.c_str(), maps[i], i % 2 == 0 ? ScalarType::Float : ScalarType::Int);
    check_vector(name.c_str(), maps[i], i % 2 == 0 ? kValues : kBuckets);
    if (!maps[i].is_contiguous()) fail(name.c_str(), "contiguous memory", "another layout");
  }
  rule.signed_values = static_cast<const float*>(maps[0].const_data_ptr());
  rule.signed_buckets = static_cast<const int32_t*>(maps[1].const_data_ptr());
  rule.unsigned_values = static_cast<const float*>(maps[2].const_data_ptr());
  rule.unsigned_buckets = static_cast<const int32_t*>(maps[3].const_data_ptr());
}

// Rows of a tensor, counted in 32 bits.
void set_rows(StepTensor& t, int64_t row, int64_t run) {
  if (row == t.numel) return;
  const int64_t blocks = t.numel / row * ((row + kStepBlock - 1) / kStepBlock);
  if (row > 0xffffffffll || blocks > 0xffffffffll)
    fail("params", "rows and blocks below 2^32", std::to_string(std::max(row, blocks)));
  t.row = static_cast<uint32_t>(row);
  t.run = run == t.numel ? 0 : static_cast<uint32_t>(run / row);
}

StepTensor tensor_of(const Lists& l, size_t i, const Random& random, Layout& layout) {
  const bool coded = l.coded(i);
  const bool rounds = !random.streams.empty() && l.params[i].scalar_type() == ScalarType::BFloat16;
  layout.begin(l.params[i], coded || rounds);
  layout.fits(l.grads[i]);
  layout.fits(l.first[i]);
  layout.fits(l.second[i]);
  if (l.has_copy(i)) layout.fits(l.copies[i]);
  StepTensor t{};
  t.param = layout.written(l.params[i]);
  t.grad = layout.read(l.grads[i]);
  t.first = layout.written(l.first[i]);
  t.second = layout.written(l.second[i]);
  if (coded) {
    t.first_scale = static_cast<float*>(l.first_scales[i].mutable_data_ptr());
    t.second_scale = static_cast<float*>(l.second_scales[i].mutable_data_ptr());
  }
  t.copy_type = kStepNone;
  if (l.has_copy(i)) {
    t.copy = layout.written(l.copies[i]);
    t.copy_type = type_of("copies", l.copies[i]);
  }
  t.param_type = type_of("params", l.params[i]);
  t.grad_type = type_of("grads", l.grads[i]);
  t.numel = l.params[i].numel();
  int64_t run = t.numel;
  if (rounds) t.stream = static_cast<uint32_t>(random.streams[i]);
  if (rounds && !random.runs.empty()) {
    t.start = random.firsts[i];
    t.stride = random.strides[i];
    run = random.runs[i];
  }
  set_rows(t, coded ? row_of("scales", l.first_scales[i], l.params[i]) : run, run);
  return t;
}

void check_error(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": ", error == nullptr ? "" : error);
}

constexpr char kStep[] = "fused_adamw_step";

// steps_on_device: all steps are on the device of params, else all on the CPU. norm: of all
// gradients, float64 [] on the device, or None; with it nothing changes where it is not finite, and
// where that of the gradients times grad_factor is past clip_norm they are brought down to it.
void fused_adamw_step(std::vector<Tensor> params, std::vector<Tensor> grads,
                      std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                      std::vector<Tensor> steps, std::vector<Tensor> exp_avg_scales,
                      std::vector<Tensor> exp_avg_sq_scales, std::vector<Tensor> copies,
                      std::vector<Tensor> maps, bool steps_on_device, const OptTensor& norm,
                      double clip_norm, double lr, double beta1, double beta2, double eps,
                      double weight_decay, bool decoupled, bool maximize, double grad_factor,
                      std::vector<int64_t> streams, int64_t seed, int64_t rounding_step,
                      std::vector<int64_t> firsts, std::vector<int64_t> runs,
                      std::vector<int64_t> strides) {
  const Lists lists{params, grads,          exp_avgs,          exp_avg_sqs,
                    steps,  exp_avg_scales, exp_avg_sq_scales, copies};
  const Random random{streams, firsts, runs, strides};
  check_lists(lists, random, steps_on_device);
  if (params.empty()) return;
  AdamwRule rule{};
  if (norm.has_value()) {
    if (!steps_on_device) fail("norm", "None with steps on the CPU", "a tensor");
    check_on("norm", *norm, params[0], ScalarType::Double, {});
    if (!(clip_norm > 0)) fail("clip_norm", "above 0", std::to_string(clip_norm));
    rule.norm = static_cast<const double*>(norm->const_data_ptr());
  }
  rule.clip = clip_norm;
  rule.factor = maximize ? -grad_factor : grad_factor;
  rule.lr = lr;
  rule.beta1 = beta1;
  rule.beta2 = beta2;
  rule.keep = static_cast<float>(decoupled ? 1 - lr * weight_decay : 1);
  rule.decay = static_cast<float>(decoupled ? 0 : weight_decay);
  rule.one_minus_beta1 = static_cast<float>(1 - beta1);
  rule.beta2_float = static_cast<float>(beta2);
  rule.one_minus_beta2 = static_cast<float>(1 - beta2);
  rule.eps = static_cast<float>(eps);
  rule.stochastic = !streams.empty();
  rule.seed = static_cast<uint64_t>(seed);
  rule.rounding_step = static_cast<uint32_t>(rounding_step);
  for (size_t i = 0; i < params.size() && rule.signed_values == nullptr; ++i)
    if (lists.coded(i)) set_maps(rule, maps, params[0]);

  const DeviceGuard guard(params[0]);
  void* const stream = stream_of(params[0]);
  const int64_t count = static_cast<int64_t>(params.size());
  std::vector<float*> counters;
  for (const Tensor& step : steps) counters.push_back(static_cast<float*>(step.mutable_data_ptr()));
  Tensor sizes =
      torch::stable::new_empty(params[0], {steps_on_device ? count : 0, 2}, ScalarType::Float);
  float* const on_device = static_cast<float*>(sizes.mutable_data_ptr());
  if (steps_on_device)
    check_error(kStep, advance_steps(counters.data(), count, on_device, rule, stream));
  Layout layout;
  std::vector<StepTensor> tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    StepTensor t{};
    if (params[i].numel() > 0) t = tensor_of(lists, i, random, layout);
    if (steps_on_device) {
      t.sizes = on_device + 2 * i;
    } else {
      const double n = *counters[i] += 1.0f;
      t.size = static_cast<float>(lr / (1 - std::pow(beta1, n)));
      t.inverse = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, n)));
    }
    if (params[i].numel() > 0) tensors.push_back(t);
  }
  check_error(kStep,
              step_adamw(tensors.data(), static_cast<int64_t>(tensors.size()), rule, stream));
  layout.write_back();
}

// --- norm --------------------------------------------------------------------------------------

// grads: at least one.
Tensor fused_grad_norm_step(std::vector<Tensor> grads) {
  if (grads.empty()) fail("grads", "at least one tensor", "none");
  List kept;
  std::vector<StepTensor> tensors;
  const DeviceGuard guard(grads[0]);
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::string name = at("grads", i);
    check_place(name, grads[i], grads[0]);
    StepTensor t{};
    t.grad_type = type_of(name, grads[i], true);
    t.numel = grads[i].numel();
    if (t.numel == 0) continue;
    kept.push_back(fills_memory(grads[i]) ? grads[i] : dense(grads[i]));
    t.grad = kept.back().const_data_ptr();
    tensors.push_back(t);
  }
  const int64_t count = static_cast<int64_t>(tensors.size());
  Tensor partial =
      torch::stable::new_empty(grads[0], {chunks_of(tensors.data(), count)}, ScalarType::Double);
  Tensor norm = torch::stable::new_empty(grads[0], {}, ScalarType::Double);
  check_error(
      "fused_grad_norm_step",
      norm_of_gradients(tensors.data(), count, static_cast<double*>(partial.mutable_data_ptr()),
                        static_cast<double*>(norm.mutable_data_ptr()), stream_of(grads[0])));
  return norm;
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, BIGOPS_DEVICE, m) {
  m.impl("fused_adamw_step", TORCH_BOX(&bigops::fused_adamw_step));
  m.impl("fused_grad_norm_step", TORCH_BOX(&bigops::fused_grad_norm_step));
}
