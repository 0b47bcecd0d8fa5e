// fused_adamw, fused_sgd and fused_grad_norm on the CPU: all tensors in one call, checked before
// the first is changed, with threads balanced over elements.

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/isa.h"
#include "common/kernel_table.h"
#include "common/record.h"
#include "common/tensor.h"
#include "cpu/state_maps.h"

namespace bigops {
namespace {

using List = std::vector<Tensor>;

constexpr int64_t kChunk = 16384;         // elements of long rows; a multiple of kStateBlock
constexpr int64_t kWorthThreads = 32768;  // elements in all; waking a thread costs about 5 us

int type_code(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return kF32;
    case ScalarType::BFloat16: return kBf16;
    case ScalarType::Half: return kF16;
    case ScalarType::Double: return kF64;
    default: return kNoType;
  }
}

struct SelectedOptimizer {
  const OptimizerKernels* kernels;
  Isa isa;
};

SelectedOptimizer select(int type) {
  if (type == kF64) return {&portable_optimizer_f64, Isa::portable};
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512) return {&avx512_optimizer, Isa::avx512};
  if (active_isa() >= Isa::avx2) return {&avx2_optimizer, Isa::avx2};
#endif
  return {&portable_optimizer, Isa::portable};
}

// --- threads ---------------------------------------------------------------------------------

struct Chunk {
  size_t tensor;
  int64_t begin, end;  // blocks of that tensor
  int64_t before;      // elements of all chunks before this one
};

// The same chunks at every thread count: so are sums over them.
class Chunks {
 public:
  // A tensor of rows of `row` elements, not empty.
  void add(size_t tensor, int64_t numel, int64_t row) {
    const int64_t per_row = (row + kStateBlock - 1) / kStateBlock, blocks = numel / row * per_row;
    const int64_t together = kChunk / std::min(row, kStateBlock);
    auto elements = [&](int64_t block) {
      return block / per_row * row + std::min(block % per_row * kStateBlock, row);
    };
    for (int64_t begin = 0; begin < blocks; begin += together) {
      const int64_t end = std::min(begin + together, blocks);
      chunks_.push_back({tensor, begin, end, total_});
      total_ += elements(end) - elements(begin);
    }
  }

  const std::vector<Chunk>& all() const { return chunks_; }

  // f(index of the chunk), every thread the same number of elements within one chunk.
  template <class F>
  void run(const F& f) const {
    if (total_ == 0) return;
    const int64_t parts = total_ > kWorthThreads ? int64_t(torch::stable::get_num_threads()) : 1;
    for_tasks(parts, true, [&](int64_t first_part, int64_t last_part) {
      for (size_t i = start(first_part, parts), end = start(last_part, parts); i < end; ++i) f(i);
    });
  }

 private:
  size_t start(int64_t part, int64_t parts) const {
    const double at = double(total_) * double(part) / double(parts);
    const auto found =
        std::lower_bound(chunks_.begin(), chunks_.end(), at,
                         [](const Chunk& c, double value) { return double(c.before) < value; });
    return static_cast<size_t>(found - chunks_.begin());
  }

  std::vector<Chunk> chunks_;
  int64_t total_ = 0;
};

// --- layout ----------------------------------------------------------------------------------

// Whether the elements fill one stretch of memory, in whatever order.
bool fills_memory(const Tensor& t) {
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

// Mutated tensors that are worked on as contiguous copies and written back at the end.
class WrittenBack {
 public:
  Tensor dense(const Tensor& t) {
    if (t.is_contiguous()) return t;
    Tensor copy = torch::stable::contiguous(t);
    pairs_.emplace_back(t, copy);
    return copy;
  }
  void write() {
    for (auto& [to, from] : pairs_) torch::stable::copy_(to, from);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

// --- checks ----------------------------------------------------------------------------------

std::string at(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

void check_count(const char* name, const List& list, size_t expected, bool may_be_empty = false) {
  if (list.size() != expected && !(may_be_empty && list.empty()))
    fail(name, std::to_string(expected) + " tensors, one for each of params",
         std::to_string(list.size()));
}

void check_shape(const std::string& name, const Tensor& t, const Tensor& param) {
  bool same = t.dim() == param.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == param.size(i);
  if (!same) fail(name.c_str(), "the parameter's shape " + shape_of(param), shape_of(t));
}

void check_gradient(const std::string& name, const Tensor& grad) {
  check_cpu(name.c_str(), grad);
  if (type_code(grad.scalar_type()) == kNoType)
    fail(name.c_str(), "dtype f32, bf16, f16 or f64", short_name(grad.scalar_type()));
}

// What a step takes of every tensor; lists in the order of the schema, empty where not used.
struct Lists {
  const List &params, &grads, &first, &second, &first_scales, &second_scales, &copies;
  const char *first_name, *second_name;
  bool two_states;
};

bool is_coded(const Lists& l, size_t i) {
  return !l.first.empty() && l.first[i].scalar_type() == ScalarType::Byte;
}

bool has_copy(const Lists& l, size_t i) { return !l.copies.empty() && l.copies[i].numel() > 0; }

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
  if (!fits || scales.size(leading) != (row + kStateBlock - 1) / kStateBlock)
    fail(name.c_str(), "the parameter's rows and an absmax for 256 elements of each",
         shape_of(scales));
  return row;
}

void check_state(const std::string& name, const Tensor& state, const Tensor& param, bool coded,
                 const List& scales, size_t i) {
  check_cpu(name.c_str(), state);
  check_shape(name, state, param);
  const bool wide = param.scalar_type() == ScalarType::Double;
  check_dtype(name.c_str(), state,
              coded  ? ScalarType::Byte
              : wide ? ScalarType::Double
                     : ScalarType::Float);
  if (!coded) return;
  if (wide) fail(name.c_str(), "dtype f64 for a parameter of f64", "u8");
  if (!state.is_contiguous()) fail(name.c_str(), "contiguous codes", "another layout");
  const std::string scale = name + "'s scales";
  if (scales.empty()) fail(scale.c_str(), "one tensor for each of params", "none");
  check_cpu(scale.c_str(), scales[i]);
  check_dtype(scale.c_str(), scales[i], ScalarType::Float);
  row_of(scale, scales[i], param);
  if (!scales[i].is_contiguous()) fail(scale.c_str(), "contiguous scales", "another layout");
}

struct Random {
  const std::vector<int64_t>&streams, &firsts, &runs, &strides;
  int64_t seed, step;
};

void check_places(const Lists& l, const Random& r) {
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
    const int64_t row = is_coded(l, i) ? row_of("scales", l.first_scales[i], l.params[i]) : 1;
    if (numel > 0 && !(fits && run % row == 0))
      fail(at("runs", i).c_str(), "whole rows of params, of which it is a part",
           std::to_string(run));
  }
}

void check_lists(const Lists& l, const Random& random) {
  const size_t count = l.params.size();
  check_count("grads", l.grads, count);
  check_count(l.first_name, l.first, count, !l.two_states);
  if (l.two_states) check_count(l.second_name, l.second, count);
  check_count("scales", l.first_scales, count, true);
  check_count("scales", l.second_scales, count, true);
  check_count("copies", l.copies, count, true);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = l.params[i];
    const std::string name = at("params", i);
    check_cpu(name.c_str(), param);
    const int type = type_code(param.scalar_type());
    if (type == kNoType)
      fail(name.c_str(), "dtype f32, bf16, f16 or f64", short_name(param.scalar_type()));
    const std::string grad = at("grads", i);
    check_gradient(grad, l.grads[i]);
    check_shape(grad, l.grads[i], param);
    if ((type == kF64) != (type_code(l.grads[i].scalar_type()) == kF64))
      fail(grad.c_str(), "f64 where the parameter is f64, and nowhere else",
           short_name(l.grads[i].scalar_type()));
    const bool coded = is_coded(l, i);
    if (!l.first.empty())
      check_state(at(l.first_name, i), l.first[i], param, coded, l.first_scales, i);
    if (l.two_states)
      check_state(at(l.second_name, i), l.second[i], param, coded, l.second_scales, i);
    if (has_copy(l, i)) {
      const std::string copy = at("copies", i);
      check_cpu(copy.c_str(), l.copies[i]);
      check_shape(copy, l.copies[i], param);
      const int to = type_code(l.copies[i].scalar_type());
      if (to != kBf16 && to != kF16)
        fail(copy.c_str(), "dtype bf16 or f16", short_name(l.copies[i].scalar_type()));
      if (type == kF64) fail(copy.c_str(), "no copy of a parameter of f64", "one");
    }
  }
  check_places(l, random);
}

// --- the step --------------------------------------------------------------------------------

// One task per tensor, laid out so that element i means the same in all its pointers.
StepTask task_of(const Lists& l, size_t i, bool random, WrittenBack& back, List& kept) {
  const bool coded = is_coded(l, i);
  bool direct = l.params[i].is_contiguous() || (!coded && !random && fills_memory(l.params[i]));
  auto fits = [&](const Tensor& t) { direct = direct && same_strides(l.params[i], t); };
  fits(l.grads[i]);
  if (!l.first.empty()) fits(l.first[i]);
  if (l.two_states) fits(l.second[i]);
  if (has_copy(l, i)) fits(l.copies[i]);
  auto mutated = [&](const Tensor& t) {
    kept.push_back(direct ? t : back.dense(t));
    return kept.back().mutable_data_ptr();
  };
  StepTask t{};
  t.param = mutated(l.params[i]);
  kept.push_back(direct ? l.grads[i] : dense(l.grads[i]));
  t.grad = kept.back().const_data_ptr();
  if (!l.first.empty()) t.first = mutated(l.first[i]);
  if (l.two_states) t.second = mutated(l.second[i]);
  if (coded) t.first_scale = static_cast<float*>(l.first_scales[i].mutable_data_ptr());
  if (coded && l.two_states)
    t.second_scale = static_cast<float*>(l.second_scales[i].mutable_data_ptr());
  t.copy_type = kNoType;
  if (has_copy(l, i)) {
    t.copy = mutated(l.copies[i]);
    t.copy_type = type_code(l.copies[i].scalar_type());
  }
  t.param_type = type_code(l.params[i].scalar_type());
  t.grad_type = type_code(l.grads[i].scalar_type());
  t.row = l.params[i].numel();
  if (coded) {
    t.maps = &state_maps();
    t.row = row_of("scales", l.first_scales[i], l.params[i]);
  }
  return t;
}

// set(task, i) adds the numbers of the rule to the task of tensor i.
template <class Set>
void run_step(const Lists& l, const Random& random, const char* op,
              void (*OptimizerKernels::*kernel)(const StepTask&), const Set& set) {
  const size_t count = l.params.size();
  std::vector<StepTask> tasks(count);
  std::vector<Rounding> roundings(count);
  List kept;
  kept.reserve(5 * count);
  WrittenBack back;
  Chunks chunks;
  for (size_t i = 0; i < count; ++i) {
    if (l.params[i].numel() > 0) {
      const bool rounds =
          !random.streams.empty() && l.params[i].scalar_type() == ScalarType::BFloat16;
      tasks[i] = task_of(l, i, rounds, back, kept);
      if (rounds) {
        const bool part = !random.runs.empty();
        const int64_t numel = l.params[i].numel();
        roundings[i] = {
            static_cast<uint64_t>(random.seed), static_cast<uint32_t>(random.streams[i]),
            static_cast<uint32_t>(random.step), part ? random.firsts[i] : 0,
            part ? random.runs[i] : numel,      part ? random.strides[i] : numel};
        tasks[i].rounding = &roundings[i];
        if (!is_coded(l, i)) tasks[i].row = roundings[i].run;
      }
      record(select(tasks[i].param_type).isa, op, short_name(l.params[i].scalar_type()),
             is_coded(l, i) ? "8bit" : "fused");
      chunks.add(i, l.params[i].numel(), tasks[i].row);
    }
    set(tasks[i], i);
  }
  chunks.run([&](size_t index) {
    const Chunk& c = chunks.all()[index];
    StepTask t = tasks[c.tensor];
    t.begin = c.begin;
    t.end = c.end;
    (select(t.param_type).kernels->*kernel)(t);
  });
  back.write();
}

void fused_adamw(std::vector<Tensor> params, std::vector<Tensor> grads,
                 std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                 std::vector<Tensor> steps, std::vector<Tensor> exp_avg_scales,
                 std::vector<Tensor> exp_avg_sq_scales, std::vector<Tensor> copies, double lr,
                 double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                 bool maximize, double grad_factor, std::vector<int64_t> streams, int64_t seed,
                 int64_t rounding_step, std::vector<int64_t> firsts, std::vector<int64_t> runs,
                 std::vector<int64_t> strides) {
  const Lists lists{
      params, grads,      exp_avgs,      exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales,
      copies, "exp_avgs", "exp_avg_sqs", true};
  const Random random{streams, firsts, runs, strides, seed, rounding_step};
  check_lists(lists, random);
  check_count("steps", steps, params.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    const std::string name = at("steps", i);
    check_cpu(name.c_str(), steps[i]);
    check_dtype(name.c_str(), steps[i], ScalarType::Float);
    if (steps[i].numel() != 1) fail(name.c_str(), "one element", shape_of(steps[i]));
  }
  run_step(lists, random, "fused_adamw", &OptimizerKernels::adamw, [&](StepTask& t, size_t i) {
    float* step = static_cast<float*>(steps[i].mutable_data_ptr());
    *step += 1.0f;
    const double n = *step;
    t.factor = maximize ? -grad_factor : grad_factor;
    t.keep = decoupled ? 1 - lr * weight_decay : 1;
    t.weight_decay = decoupled ? 0 : weight_decay;
    t.beta1 = beta1;
    t.beta2 = beta2;
    t.eps = eps;
    t.step_size = lr / (1 - std::pow(beta1, n));
    t.inv_sqrt_bias2 = 1 / std::sqrt(1 - std::pow(beta2, n));
  });
}

void fused_sgd(std::vector<Tensor> params, std::vector<Tensor> grads,
               std::vector<Tensor> momentum_buffers, std::vector<Tensor> momentum_scales,
               std::vector<Tensor> copies, double lr, double momentum, double dampening,
               double weight_decay, bool nesterov, bool first_step, bool maximize,
               double grad_factor, std::vector<int64_t> streams, int64_t seed,
               int64_t rounding_step, std::vector<int64_t> firsts, std::vector<int64_t> runs,
               std::vector<int64_t> strides) {
  const List none;
  const Lists lists{params, grads,  momentum_buffers,   none, momentum_scales,
                    none,   copies, "momentum_buffers", "",   false};
  const Random random{streams, firsts, runs, strides, seed, rounding_step};
  check_lists(lists, random);
  if (momentum != 0 && momentum_buffers.size() != params.size())
    fail("momentum_buffers", "one for each of params where momentum is not 0",
         std::to_string(momentum_buffers.size()));
  run_step(lists, random, "fused_sgd", &OptimizerKernels::sgd, [&](StepTask& t, size_t) {
    t.factor = maximize ? -grad_factor : grad_factor;
    t.lr = lr;
    t.momentum = momentum;
    t.dampening = dampening;
    t.weight_decay = weight_decay;
    t.nesterov = nesterov;
    t.first_step = first_step;
    t.has_momentum = momentum != 0;
  });
}

Tensor fused_grad_norm(std::vector<Tensor> grads) {
  List kept;
  Chunks chunks;
  for (size_t i = 0; i < grads.size(); ++i) {
    check_gradient(at("grads", i), grads[i]);
    kept.push_back(fills_memory(grads[i]) ? grads[i] : dense(grads[i]));
    const ScalarType dtype = grads[i].scalar_type();
    record(select(type_code(dtype)).isa, "fused_grad_norm", short_name(dtype), "double");
    if (grads[i].numel() > 0) chunks.add(i, grads[i].numel(), grads[i].numel());
  }
  std::vector<double> sums(chunks.all().size());
  chunks.run([&](size_t index) {
    const Chunk& c = chunks.all()[index];
    const Tensor& grad = kept[c.tensor];
    const int type = type_code(grad.scalar_type());
    sums[index] =
        select(type).kernels->sum_squares(grad.const_data_ptr(), type, c.begin * kStateBlock,
                                          std::min(c.end * kStateBlock, grad.numel()));
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  Tensor norm = empty(nullptr, 0, ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(total);
  return norm;
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "fused_adamw", TORCH_BOX(&bigops::fused_adamw));
  bigops::implement(m, "fused_sgd", TORCH_BOX(&bigops::fused_sgd));
  bigops::implement(m, "fused_grad_norm", TORCH_BOX(&bigops::fused_grad_norm));
}
