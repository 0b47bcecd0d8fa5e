// The kernels of fused_adamw and fused_grad_norm as tests call them: on two tensors.

#include "cuda/fused_adamw.cu"

namespace {

bigops::StepTensor tensor(void* param, const void* grad, void* first, void* second,
                          float* first_scale, float* second_scale, void* copy, int64_t numel,
                          int64_t type, int64_t copy_type) {
  bigops::StepTensor t{};
  t.param = param;
  t.grad = grad;
  t.first = first;
  t.second = second;
  t.first_scale = first_scale;
  t.second_scale = second_scale;
  t.copy = copy;
  t.numel = numel;
  t.param_type = t.grad_type = static_cast<bigops::StepType>(type);
  t.copy_type = static_cast<bigops::StepType>(copy_type);
  return t;
}

}  // namespace

// The rule is that of the tests' ADAMW at a rate of 0.01; a full state, and one in 8 bits with a
// copy, whose rows have row1 elements, the last of a tensor past first1. sizes: [2, 2].
extern "C" void run_adamw(void* p0, const void* g0, void* m0, void* v0, int64_t n0, int64_t type0,
                          void* p1, const void* g1, void* m1, void* v1, float* ms1, float* vs1,
                          void* copy1, int64_t n1, int64_t type1, int64_t copy_type, float* step0,
                          float* step1, float* sizes, const float* signed_values,
                          const int32_t* signed_buckets, const float* unsigned_values,
                          const int32_t* unsigned_buckets, const double* norm, int64_t stochastic,
                          int64_t row1, int64_t first1) {
  bigops::AdamwRule rule{};
  rule.norm = norm;
  rule.clip = HUGE_VAL;
  rule.factor = 1.0;
  rule.lr = 1e-2;
  rule.beta1 = 0.8;
  rule.beta2 = 0.95;
  rule.keep = static_cast<float>(1 - 1e-2 * 0.1);
  rule.one_minus_beta1 = static_cast<float>(1 - 0.8);
  rule.beta2_float = 0.95f;
  rule.one_minus_beta2 = static_cast<float>(1 - 0.95);
  rule.eps = 1e-6f;
  rule.stochastic = stochastic != 0;
  rule.seed = 5;
  rule.signed_values = signed_values;
  rule.signed_buckets = signed_buckets;
  rule.unsigned_values = unsigned_values;
  rule.unsigned_buckets = unsigned_buckets;
  float* const steps[2] = {step0, step1};
  bigops::advance_steps(steps, 2, sizes, rule, nullptr);
  bigops::StepTensor tensors[2] = {tensor(p0, g0, m0, v0, nullptr, nullptr, nullptr, n0, type0, 0),
                                   tensor(p1, g1, m1, v1, ms1, vs1, copy1, n1, type1, copy_type)};
  tensors[0].sizes = sizes;
  tensors[1].sizes = sizes + 2;
  tensors[1].stream = 1;
  tensors[1].row = static_cast<uint32_t>(row1);
  tensors[1].start = first1;
  bigops::step_adamw(tensors, 2, rule, nullptr);
}

extern "C" void run_norm(const void* g0, int64_t n0, int64_t type0, const void* g1, int64_t n1,
                         int64_t type1, double* partial, double* norm) {
  const bigops::StepTensor tensors[2] = {
      tensor(nullptr, g0, nullptr, nullptr, nullptr, nullptr, nullptr, n0, type0, 0),
      tensor(nullptr, g1, nullptr, nullptr, nullptr, nullptr, nullptr, n1, type1, 0)};
  bigops::norm_of_gradients(tensors, 2, partial, norm, nullptr);
}
