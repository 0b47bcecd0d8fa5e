// attention on the CPU: softmax(q k^T scale + mask) v, for inference.

#include "cpu/attention.h"

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "common/crossover.h"
#include "common/kernel_table.h"
#include "common/record.h"
#include "cpu/compressed_linear.h"
#include "cpu/heads.h"
#include "cpu/simd/attention.h"

namespace bigops {
namespace {

constexpr const char* kName = "attention";
constexpr int64_t kChunkRows = 192;  // rows of a task: 50 KB of sums at 64 columns
constexpr int64_t kLeastRows = 24;   // the same where tasks run short
constexpr int64_t kWorthFlops = 500'000;

struct Chosen {
  const AttentionKernels* kernels;  // null: torch's own
  Isa isa;
};

// `bf16`: products of float32 may be of bf16.
Chosen select(ScalarType dtype, bool bf16) {
#if defined(__x86_64__)
  const Isa active = active_isa();
  const bool narrow = dtype == ScalarType::BFloat16;
  const bool pairs = narrow || (bf16 && dtype == ScalarType::Float);
#ifdef BIGOPS_AMX
  if (pairs && active >= Isa::amx)
    return {narrow ? &amx_attention_bf16 : &amx_attention_f32, Isa::amx};
#endif
  if (pairs && active >= Isa::avx512bf16 && bf16_dot_pays())
    return {narrow ? &avx512bf16_attention_bf16 : &avx512bf16_attention_f32, Isa::avx512bf16};
  if (active >= Isa::avx2) {
    const bool wide = active >= Isa::avx512;
    const Isa level = wide ? Isa::avx512 : Isa::avx2;
    if (dtype == ScalarType::BFloat16)
      return {wide ? &avx512_attention_bf16 : &avx2_attention_bf16, level};
    if (dtype == ScalarType::Half)
      return {wide ? &avx512_attention_f16 : &avx2_attention_f16, level};
    return {wide ? &avx512_attention_f32 : &avx2_attention_f32, level};
  }
#endif
  if (dtype == ScalarType::BFloat16) return {&portable_attention_bf16, Isa::portable};
  if (dtype == ScalarType::Half) return {&portable_attention_f16, Isa::portable};
  return {&portable_attention_f32, Isa::portable};
}

struct Problem {
  ScalarType dtype;
  bool bf16;  // products of float32 may be of bf16
  int64_t t, s, d, dv;
  int64_t group;  // heads of q to one of k and v
  int64_t items;  // heads of k and v of all batch items

  int64_t rows() const { return group * t; }
  int64_t flops() const { return 2 * items * rows() * s * (d + dv); }
};

Crossover limits(const Problem& p) { return crossover(kName, short_name(p.dtype)); }

Chosen choose(const Problem& p) {
  Chosen chosen = select(p.dtype, p.bf16);
  const Crossover c = limits(p);
  if (p.dtype == ScalarType::Double ||
      (p.rows() > kFewRows && p.t > c.max_rows && p.flops() > c.max_flops))
    chosen.kernels = nullptr;
  return chosen;
}

const char* form(const Problem& p, const Chosen& chosen) {
  return chosen.kernels == nullptr ? "sdpa" : p.rows() <= kFewRows ? "few" : "rows";
}

struct Mask {
  OptTensor tensor;
  int kind = kNoMask;
  std::array<int64_t, 4> strides{};

  const void* at(int64_t batch, int64_t head) const {
    if (!tensor.has_value()) return nullptr;
    const int64_t size = kind == kMaskBool ? 1 : kind == kMaskF64 ? 8 : kind == kMaskF32 ? 4 : 2;
    return static_cast<const char*>(tensor->const_data_ptr()) +
           (batch * strides[0] + head * strides[1]) * size;
  }
};

int mask_kind(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return kMaskBool;
    case ScalarType::Float: return kMaskF32;
    case ScalarType::BFloat16: return kMaskBf16;
    case ScalarType::Half: return kMaskF16;
    case ScalarType::Double: return kMaskF64;
    default: fail("mask", "dtype bool or a floating one", short_name(dtype));
  }
}

Mask check_mask(const OptTensor& mask, const std::array<int64_t, 4>& full) {
  if (!mask.has_value()) return {};
  check_cpu("mask", *mask);
  Mask m{mask, mask_kind(mask->scalar_type())};
  const int64_t dim = mask->dim();
  bool fits = dim <= 4;
  for (int64_t i = 0; fits && i < dim; ++i) {
    const int64_t at = 4 - dim + i, size = mask->size(i);
    fits = size == full[static_cast<size_t>(at)] || size == 1;
    m.strides[static_cast<size_t>(at)] = size == 1 ? 0 : mask->stride(i);
  }
  if (!fits)
    fail("mask",
         "one that broadcasts to [" + std::to_string(full[0]) + ", " + std::to_string(full[1]) +
             ", " + std::to_string(full[2]) + ", " + std::to_string(full[3]) + "]",
         shape_of(*mask));
  return m;
}

void check_heads(const char* name, const Tensor& t, ScalarType dtype) {
  check_cpu(name, t);
  check_dtype(name, t, dtype);
  if (t.dim() != 4) fail(name, "shape [B, H, length, columns]", shape_of(t));
}

Tensor call(const char* name, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
Tensor triangle(int64_t t, int64_t s, ScalarType dtype, T open, T shut) {
  const int64_t sizes[] = {t, s};
  Tensor made = empty(sizes, 2, dtype);
  T* to = static_cast<T*>(made.mutable_data_ptr());
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < s; ++j) *to++ = j <= i ? open : shut;
  return made;
}

Tensor by_torch(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, OptTensor mask,
                bool causal, std::optional<double> scale) {
  using torch::stable::detail::from;
  if (mask.has_value() && mask->dim() < 2) mask = view_matrix(*mask, 1, mask->numel());
  if (mask.has_value() && causal) {  // of which torch takes one
    constexpr float kInf = std::numeric_limits<float>::infinity();
    mask = mask->scalar_type() == ScalarType::Bool
               ? call("aten::logical_and", *mask, triangle(p.t, p.s, ScalarType::Bool, true, false))
               : call("aten::minimum", *mask, triangle(p.t, p.s, ScalarType::Float, kInf, -kInf));
    causal = false;
  }
  if (mask.has_value() && mask->scalar_type() != ScalarType::Bool &&
      mask->scalar_type() != p.dtype) {
    int64_t sizes[4];
    for (int64_t i = 0; i < mask->dim(); ++i) sizes[i] = mask->size(i);
    Tensor cast = empty(sizes, mask->dim(), p.dtype);
    mask = torch::stable::copy_(cast, *mask);
  }
  std::array<StableIValue, 8> stack{from(q),   from(k),      from(v),     from(mask),
                                    from(0.0), from(causal), from(scale), from(p.group != 1)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::scaled_dot_product_attention", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  const Tensor y = torch::stable::detail::to<Tensor>(stack[0]);
  Tensor out = empty_heads(y.size(0), y.size(1), y.size(2), y.size(3), y.scalar_type());
  bool same = true;
  for (int64_t i = 0; i < 4; ++i) same = same && (y.size(i) <= 1 || y.stride(i) == out.stride(i));
  return same ? y : torch::stable::copy_(out, y);
}

// Tasks: batch items times heads of k and v, times blocks of rows, times parts of the keys.
void run(const AttentionKernels& kernels, const Problem& p, const Tensor& q, const Tensor& k,
         const Tensor& v, const Mask& mask, bool causal, float scale, Tensor& out) {
  const int64_t heads = k.size(1), items = p.items, rows = p.rows();
  const bool worth = p.flops() > kWorthFlops;
  const int64_t threads = worth ? torch::stable::get_num_threads() : 1;
  int64_t block = kChunkRows;
  while (block > kLeastRows && items * ((rows + block - 1) / block) < 4 * threads) block /= 2;
  const int64_t blocks = (rows + block - 1) / block;
  int64_t keys = p.s > 0 ? p.s : 1;
  while (keys > 2 * kChunkKeys && items * blocks * ((p.s + keys - 1) / keys) < 4 * threads)
    keys = round_up((keys + 1) / 2, kPanelKeys);
  const int64_t parts = p.s > 0 ? (p.s + keys - 1) / keys : 1;
  const int64_t step = rows * partial_floats(p.dv);
  std::optional<Buffer> partial;
  if (parts > 1) partial.emplace(items * parts * step * 4);

  const auto size = static_cast<int64_t>(p.dtype == ScalarType::Float ? 4 : 2);
  const auto at = [size](const Tensor& t, int64_t b, int64_t h) {
    return static_cast<const char*>(t.const_data_ptr()) +
           (b * t.stride(0) + h * t.stride(1)) * size;
  };
  const auto out_at = [&](int64_t b, int64_t h) {
    return const_cast<char*>(at(out, b, h * p.group));
  };
  AttentionTask base{};
  base.q_head = q.stride(1);
  base.q_row = q.stride(2);
  base.k_row = k.stride(2);
  base.v_row = v.stride(2);
  base.out_head = out.stride(1);
  base.out_row = out.stride(2);
  base.t = p.t;
  base.s = p.s;
  base.d = p.d;
  base.dv = p.dv;
  base.scale = scale;
  base.causal = causal;
  base.mask_kind = mask.kind;
  base.mask_head = mask.strides[1];
  base.mask_row = mask.strides[2];
  base.mask_key = mask.strides[3];
  const int64_t bytes = attention_scratch(block, keys, p.d, p.dv);
  // heads that lie next to each other, whose lines share pages, by one thread
  for_each_task_near(items * blocks * parts, threads > 1, [&](int64_t task) {
    const int64_t part = task % parts, item = task / parts / blocks;
    const int64_t b = item / heads, h = item % heads;
    AttentionTask t = base;
    t.row0 = task / parts % blocks * block;
    t.row1 = t.row0 + block < rows ? t.row0 + block : rows;
    t.key0 = part * keys;
    t.key1 = t.key0 + keys < p.s ? t.key0 + keys : p.s;
    t.q = at(q, b, h * p.group);
    t.k = at(k, b, h);
    t.v = at(v, b, h);
    t.out = out_at(b, h);
    t.mask = mask.at(b, h * p.group);
    t.scratch = scratch(bytes);
    if (partial)
      t.partial = reinterpret_cast<float*>(partial->at((item * parts + part) * step * 4)) +
                  t.row0 * partial_floats(p.dv);
    kernels.attend(t);
  });
  if (!partial) return;
  for_each_task(items, threads > 1, [&](int64_t item) {
    const int64_t b = item / heads, h = item % heads;
    CombineTask t{};
    t.partial = reinterpret_cast<const float*>(partial->at(item * parts * step * 4));
    t.parts = parts;
    t.rows = rows;
    t.t = p.t;
    t.dv = p.dv;
    t.out = out_at(b, h);
    t.out_head = out.stride(1);
    t.out_row = out.stride(2);
    kernels.combine(t);
  });
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& mask_any,
                 bool causal, std::optional<double> scale, bool bf16) {
  const ScalarType dtype = q.scalar_type();
  check_heads("q", q, dtype);
  if (dtype != ScalarType::Float && dtype != ScalarType::Double && dtype != ScalarType::BFloat16 &&
      dtype != ScalarType::Half)
    fail("q", "dtype f32, bf16, f16 or f64", short_name(dtype));
  check_heads("k", k, dtype);
  check_heads("v", v, dtype);
  const int64_t b = q.size(0), heads = q.size(1), own = k.size(1);
  const auto wanted = [&](int64_t columns) {
    return "[" + std::to_string(b) + ", heads, length, " + std::to_string(columns) + "]";
  };
  if (k.size(0) != b || k.size(3) != q.size(3)) fail("k", wanted(q.size(3)), shape_of(k));
  if (own == 0 ? heads != 0 : heads % own != 0)
    fail("k", "heads that divide the " + std::to_string(heads) + " of q", std::to_string(own));
  if (v.size(0) != b || v.size(1) != own || v.size(2) != k.size(2))
    fail("v", "[B, H, length] of k, " + shape_of(k), shape_of(v));
  const Problem p{
      dtype, bf16, q.size(2), k.size(2), q.size(3), v.size(3), own > 0 ? heads / own : 1, b * own};
  const Mask mask = check_mask(mask_any, {b, heads, p.t, p.s});
  const Chosen chosen = choose(p);
  record(chosen.isa, kName, short_name(dtype), form(p, chosen));
  if (chosen.kernels == nullptr) return by_torch(p, q, k, v, mask_any, causal, scale);
  Tensor out = empty_heads(b, heads, p.t, p.dv, dtype);
  if (b * heads * p.t * p.dv == 0) return out;
  const double factor = scale.has_value() ? *scale : p.d > 0 ? 1 / std::sqrt(double(p.d)) : 1;
  run(*chosen.kernels, p, rows_as_they_lie(q), rows_as_they_lie(k), rows_as_they_lie(v), mask,
      causal, static_cast<float>(factor), out);
  return out;
}

}  // namespace

std::pair<std::string, std::string> choose_attention(int64_t items, int64_t group, int64_t t,
                                                     int64_t s, int64_t d, int64_t dv,
                                                     const std::string& dtype, bool bf16) {
  const ScalarType type = dtype == "f64"    ? ScalarType::Double
                          : dtype == "bf16" ? ScalarType::BFloat16
                          : dtype == "f16"  ? ScalarType::Half
                                            : ScalarType::Float;
  const Problem p{type, bf16, t, s, d, dv, group, items};
  const Chosen chosen = choose(p);
  const Crossover c = limits(p);
  const std::string up_to = std::to_string(c.max_rows) + " queries or " +
                            std::to_string(c.max_flops) + " operations (crossover table)";
  const std::string reason =
      type == ScalarType::Double  ? "torch's scaled_dot_product_attention: no kernel of float64"
      : chosen.kernels == nullptr ? "torch's scaled_dot_product_attention beyond " + up_to
      : p.rows() <= kFewRows      ? "own kernel for few rows, keys and values as they lie"
                                  : "own kernel up to " + up_to;
  return {kernel_name(chosen.isa, kName, short_name(type), form(p, chosen)), reason};
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "attention", TORCH_BOX(&bigops::attention));
}
