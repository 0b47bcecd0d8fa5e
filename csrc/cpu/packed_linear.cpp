// packed_linear on the CPU: a dense weight in panels (layout: simd/packed_linear.h).

#include "cpu/simd/packed_linear.h"

#include <optional>
#include <vector>

#include "common/kernel_table.h"
#include "common/record.h"
#include "cpu/library_product.h"
#include "cpu/packed_linear.h"
#include "cpu/tiles.h"

namespace bigops {
namespace {

constexpr int64_t kChunkRows = 192;  // rows of x of a task: 48 KB of sums
constexpr int64_t kLeastRows = 24;   // the same where tasks run short
constexpr int64_t kFewRows = 6;  // and where panels do: a factor of low rank, one register block

// By tile registers: fewer rows gain nothing; x of 64 rows stays in L2 while panels go by; their
// sums of 1024 columns are added up in float.
constexpr int64_t kLeastTileRows = 4;
constexpr int64_t kTileChunkRows = 64;
constexpr int64_t kTileWords = 512;

struct Chosen {
  void (*product)(const PackedTask&);
  Isa isa;

  bool tiles() const { return isa == Isa::amx; }
  int64_t chunk_rows() const { return tiles() ? kTileChunkRows : kChunkRows; }
  int64_t words() const { return tiles() ? kTileWords : kPackedWords; }
};

Chosen choose(int64_t m, FloatKind kind) {
  const PackedKernels* kernels = &portable_packed;
  Isa isa = Isa::portable;
#if defined(__x86_64__)
  const Isa active = active_isa();
#ifdef BIGOPS_AMX
  if (kind == kBFloat16 && active >= Isa::amx && m >= kLeastTileRows) return {amx_packed, Isa::amx};
#endif
  if (kind == kBFloat16 && active >= Isa::avx512bf16 && bf16_dot_pays())
    return {avx512bf16_packed, Isa::avx512bf16};
  if (active >= Isa::avx512) {
    kernels = &avx512_packed;
    isa = Isa::avx512;
  } else if (active >= Isa::avx2) {
    kernels = &avx2_packed;
    isa = Isa::avx2;
  }
#endif
  return {kind == kFloat32 ? kernels->f32 : kind == kBFloat16 ? kernels->bf16 : kernels->f16, isa};
}

struct Panels {
  Tensor values;
  int64_t count, n, words, word_bytes;  // words of one row of W

  const char* at(int64_t panel, int64_t word) const {
    return static_cast<const char*>(values.const_data_ptr()) +
           (panel * words + word) * kPackedColumns * word_bytes;
  }
};

// x as words: floats, or pairs of bf16; as it lies where it can be.
class Words {
 public:
  Words(const CompressedCall& call, int64_t words, bool tiles) {
    const bool pairs = call.kind == kBFloat16;
    const int64_t row = round_up(words * 4, tiles ? kStepBytes : 4);
    if (call.kind == kFloat32 || (pairs && call.k * 2 == row)) {
      base_ = call.row(0);
      stride_ = row;
      return;
    }
    const bool worth = call.m * call.k > kWorthThreads / 16;
    const auto fill = each_row([&](int64_t i, char* to) {
      if (pairs) {
        std::memcpy(to, call.row(i), static_cast<size_t>(call.k * 2));
        std::memset(to + call.k * 2, 0, static_cast<size_t>(row - call.k * 2));
      } else {
        call.kernels().widen[call.kind](call.row(i), call.k, reinterpret_cast<float*>(to));
      }
    });
    copy_.emplace(call.m, row / 4, worth, fill);
    base_ = copy_->row(0);
    stride_ = copy_->stride();
  }
  const char* at(int64_t row, int64_t word) const { return base_ + row * stride_ + word * 4; }
  int64_t stride() const { return stride_; }

 private:
  std::optional<RowWords> copy_;
  const char* base_;
  int64_t stride_;
};

// y: [M, N] in x's dtype, or float when y_float.
void product(const CompressedCall& call, const Panels& w, void* y, bool y_float) {
  const Chosen chosen = choose(call.m, call.kind);
  const Words x(call, w.words, chosen.tiles());
  const int64_t threads = torch::stable::get_num_threads();
  int64_t rows = chosen.chunk_rows();
  const int64_t least = w.count < 2 * threads ? kFewRows : kLeastRows;
  while (rows > least && w.count * ((call.m + rows - 1) / rows) < 4 * threads) rows /= 2;
  const int64_t chunks = (call.m + rows - 1) / rows;
  FinishTask finish{};
  finish.bias = data(call.bias);
  finish.residual = data(call.residual);
  finish.y = y;
  finish.y_kind = y_float ? kYFloat : kYLikeX;
  finish.n = call.n;
  finish.activation = call.activation;
  finish.stride = kPackedColumns;
  const auto run = [&](int64_t task) {
    const int64_t panel = task / chunks, m = task % chunks * rows;
    PackedTask t{};
    t.x_stride = x.stride();
    t.rows = call.m - m < rows ? call.m - m : rows;
    t.out = reinterpret_cast<float*>(scratch(t.rows * kPackedColumns * 4));
    FinishTask f = finish;
    f.tile = t.out;
    f.m0 = m;
    f.m1 = m + t.rows;
    f.n0 = panel * kPackedColumns;
    f.n1 = f.n0 + kPackedColumns < call.n ? f.n0 + kPackedColumns : call.n;
    t.columns = f.n1 - f.n0;
    for (int64_t k = 0; k == 0 || k < w.words; k += chosen.words()) {
      t.x = x.at(m, k);
      t.panel = w.at(panel, k);
      t.words = w.words - k < chosen.words() ? w.words - k : chosen.words();
      t.first = k == 0;
      chosen.product(t);
    }
    call.kernels().finish[call.kind](f);
  };
  for_each_task_near(w.count * chunks, call.m * call.n * (call.k + 16) > kWorthThreads, run);
}

Panels check_panels(const Tensor& panels, int64_t pad, int64_t k) {
  check_cpu("panels", panels);
  const ScalarType dtype = panels.scalar_type();
  const int64_t columns = dtype == ScalarType::BFloat16 ? 2 : 1;
  if (k < 0) fail("k", "at least 0", std::to_string(k));
  const int64_t words = (k + columns - 1) / columns;
  if (panels.dim() != 4 || panels.size(1) != words || panels.size(2) != kPackedColumns ||
      panels.size(3) != columns)
    fail("panels", "shape [.., " + std::to_string(words) + ", 64, " + std::to_string(columns) + "]",
         shape_of(panels));
  const int64_t n = panels.size(0) * kPackedColumns - pad;
  if (pad < 0 || pad >= kPackedColumns || n < 0)
    fail("pad", "the rows that fill up the last panel of 64", std::to_string(pad));
  return {dense(panels), panels.size(0), n, words,
          static_cast<int64_t>(dtype == ScalarType::Float ? 4 : 2) * columns};
}

CompressedCall check_call(const Tensor& x, const Panels& w, int64_t k, const OptTensor& bias,
                          const OptTensor& residual, int64_t activation) {
  const CompressedCall call = check_compressed(x, w.n, k, bias, residual, activation);
  check_dtype("panels", w.values, call.dtype);
  return call;
}

Tensor packed_linear(const Tensor& x, const Tensor& panels, int64_t pad, int64_t k,
                     const OptTensor& bias, const OptTensor& residual, int64_t activation) {
  const Panels w = check_panels(panels, pad, k);
  const CompressedCall call = check_call(x, w, k, bias, residual, activation);
  record(choose(call.m, call.kind).isa, "packed_linear", short_name(call.dtype), "panels");
  Tensor y = empty_rows_like(x, call.n, call.dtype);
  if (!call.empty()) product(call, w, y.mutable_data_ptr(), false);
  return y;
}

// The matrix [N, K] in float.
Tensor unpacked(const CompressedCall& call, const Panels& w) {
  const int64_t shape[2] = {call.n, call.k}, per = call.kind == kBFloat16 ? 2 : 1;
  Tensor rows = empty(shape, 2, ScalarType::Float);
  float* to = static_cast<float*>(rows.mutable_data_ptr());
  for_tasks(
      call.n > 0 ? w.count : 0, call.n * call.k > kWorthThreads, [&](int64_t begin, int64_t end) {
        std::vector<float> word(static_cast<size_t>(kPackedColumns * per));
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t first = panel * kPackedColumns;
          const int64_t count = call.n - first < kPackedColumns ? call.n - first : kPackedColumns;
          for (int64_t j = 0; j < w.words; ++j) {
            call.kernels().widen[call.kind](w.at(panel, j), kPackedColumns * per, word.data());
            for (int64_t c = 0; c < per && j * per + c < call.k; ++c)
              for (int64_t r = 0; r < count; ++r)
                to[(first + r) * call.k + j * per + c] = word[static_cast<size_t>(r * per + c)];
          }
        }
      });
  return rows;
}

std::tuple<Tensor, Tensor> packed_linear_backward(const Tensor& grad_any, const Tensor& x,
                                                  const Tensor& panels, int64_t pad, int64_t k,
                                                  const OptTensor& bias, int64_t activation,
                                                  bool need_x, bool need_bias) {
  const Panels w = check_panels(panels, pad, k);
  CompressedCall call = check_call(x, w, k, bias, OptTensor(grad_any), activation);
  const Tensor grad = *call.residual;  // checked as such: grad has the shape of y
  call.residual.reset();
  record(choose(call.m, call.kind).isa, "packed_linear_backward", short_name(call.dtype), "panels");
  const bool pointwise = call.activation != kNone;
  const Buffer z(pointwise ? call.m * call.n * 4 : 0);
  if (pointwise && !call.empty()) {
    CompressedCall plain = call;
    plain.activation = kNone;
    product(plain, w, z.at(0), true);
  }
  const Pointwise p =
      pointwise_backward(call, grad, pointwise ? reinterpret_cast<const float*>(z.at(0)) : nullptr,
                         nullptr, need_x, need_bias);
  if (!need_x) return {no_gradient(call.dtype), p.bias_grad};
  const int64_t shape[2] = {call.m, call.n};
  Tensor gz = empty(shape, 2, ScalarType::Float);
  if (!call.empty())
    std::memcpy(gz.mutable_data_ptr(), p.gz.at(0), static_cast<size_t>(call.m * call.n * 4));
  const Tensor gx = library_mm(gz, unpacked(call, w));
  std::vector<int64_t> sizes(static_cast<size_t>(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) sizes[static_cast<size_t>(i)] = x.size(i);
  return {torch::stable::view(torch::stable::to(gx, call.dtype), sizes), p.bias_grad};
}

}  // namespace

std::pair<std::string, std::string> choose_packed_linear(int64_t m, const std::string& dtype) {
  const FloatKind kind = dtype == "bf16" ? kBFloat16 : dtype == "f16" ? kFloat16 : kFloat32;
  const Chosen chosen = choose(m, kind);
  return {kernel_name(chosen.isa, "packed_linear", dtype.c_str(), "panels"),
          std::string("dense weight in panels of 64 rows, ") +
              (chosen.tiles() ? "blocks of 512 words along K in tile registers"
                              : "a block of 128 words along K in the L1 cache")};
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "packed_linear.code", TORCH_BOX(&bigops::packed_linear));
  bigops::implement(m, "packed_linear_backward.code", TORCH_BOX(&bigops::packed_linear_backward));
}
