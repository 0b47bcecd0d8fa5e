// rotary on the CPU: threads over tokens, whose heads are read where they lie in whatever view, if
// only their columns are contiguous.

#include "cpu/rotary.h"

#include "common/isa.h"
#include "common/kernel_table.h"
#include "common/record.h"
#include "cpu/compressed_linear.h"
#include "cpu/heads.h"
#include "cpu/simd/rotary.h"

namespace bigops {
namespace {

constexpr const char* kName = "rotary";
constexpr int64_t kWorthThreads = 32768;  // elements; waking a thread costs about 5 us

struct Chosen {
  const RotaryKernels* kernels;
  Isa isa;
};

Chosen select() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512) return {&avx512_rotary, Isa::avx512};
  if (active_isa() >= Isa::avx2) return {&avx2_rotary, Isa::avx2};
#endif
  return {&portable_rotary, Isa::portable};
}

// cos or sin: [T, R], [B or 1, T, R] or [B or 1, 1, T, R].
class Table {
 public:
  Table(const char* name, const Tensor& given, const Tensor& x, ScalarType other) {
    check_cpu(name, given);
    if (given.scalar_type() != ScalarType::Float) check_dtype(name, given, x.scalar_type());
    check_dtype(name, given, other);
    const int64_t dim = given.dim(), b = x.size(0), t = x.size(2), d = x.size(3);
    bool fits = dim >= 2 && dim <= 4 && given.size(dim - 2) == t;
    columns_ = fits ? given.size(dim - 1) : 0;
    fits = fits && columns_ % 2 == 0 && columns_ <= d && (dim < 4 || given.size(1) == 1) &&
           (dim < 3 || given.size(0) == 1 || given.size(0) == b);
    if (!fits)
      fail(name, "shape [B or 1, T, R] of x [B, H, T, D] " + shape_of(x) + ", R even and at most D",
           shape_of(given));
    tensor_ = rows_as_they_lie(given);
    base_ = static_cast<const char*>(tensor_.const_data_ptr());
    const auto item = static_cast<int64_t>(tensor_.element_size());
    batch_ = dim > 2 && tensor_.size(0) > 1 ? tensor_.stride(0) * item : 0;
    token_ = tensor_.stride(dim - 2) * item;
  }

  int64_t columns() const { return columns_; }
  const void* at(int64_t b, int64_t t) const { return base_ + b * batch_ + t * token_; }

 private:
  Tensor tensor_;
  const char* base_;
  int64_t columns_, batch_, token_;
};

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  check_cpu("x", x);
  const FloatKind kind = float_kind("x", x.scalar_type());
  if (x.dim() != 4) fail("x", "shape [B, H, T, D]", shape_of(x));
  const Table cos_table("cos", cos, x, cos.scalar_type());
  const Table sin_table("sin", sin, x, cos.scalar_type());
  if (sin_table.columns() != cos_table.columns()) fail("sin", "the columns of cos", shape_of(sin));
  const Tensor rows = rows_as_they_lie(x);
  const int64_t b = rows.size(0), heads = rows.size(1), tokens = rows.size(2), d = rows.size(3);
  const Chosen chosen = select();
  record(chosen.isa, kName, short_name(rows.scalar_type()), "half");
  Tensor y = empty_heads(b, heads, tokens, d, rows.scalar_type());
  const int64_t token = heads * d;
  if (b * tokens * token == 0) return y;
  const auto kernel =
      chosen.kernels->rotate[kind][cos.scalar_type() == ScalarType::Float ? kFloatTables : kLikeX];
  const int64_t bytes = kind == kFloat32 ? 4 : 2;
  const auto* from = static_cast<const char*>(rows.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t x_batch = rows.stride(0) * bytes, x_token = rows.stride(2) * bytes;
  RotaryTask task{};
  task.x_head = rows.stride(1);
  task.heads = heads;
  task.d = d;
  task.r = cos_table.columns();
  for_tasks(b * tokens, b * tokens * token > kWorthThreads, [&](int64_t begin, int64_t end) {
    RotaryTask t = task;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = i / tokens, at = i % tokens;
      t.x = from + item * x_batch + at * x_token;
      t.cos = cos_table.at(item, at);
      t.sin = sin_table.at(item, at);
      t.y = to + i * token * bytes;
      kernel(t);
    }
  });
  return y;
}

}  // namespace

std::string choose_rotary(const std::string& dtype) {
  return kernel_name(select().isa, kName, dtype.c_str(), "half");
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "rotary", TORCH_BOX(&bigops::rotary));
}
