// What quantized_linear and sparse_linear share on the host side: checked arguments, activations
// laid out for the kernels, tasks over threads, the pointwise part of the backward.
#pragma once

#include <atomic>
#include <optional>
#include <string>
#include <utility>

#include "common/isa.h"
#include "common/tensor.h"
#include "cpu/simd/compressed.h"

namespace bigops {

struct SelectedCompressed {
  const CompressedKernels* kernels;
  Isa isa;
};
SelectedCompressed select_compressed();

// The kernel that a call of this shape takes and why (bigops.explain asks through python.cpp).
std::pair<std::string, std::string> choose_quantized_linear(int64_t m, int64_t bits, int64_t group,
                                                            const std::string& activations,
                                                            const std::string& dtype, bool y_u8);
std::pair<std::string, std::string> choose_sparse_linear(int64_t m, const std::string& values,
                                                         const std::string& dtype, bool y_u8);

// u8 numbers q stand for scale * (q - zero_point).
struct Qparams {
  float scale;
  int32_t zero_point;
};
// Of a float32 [2], checked to the values, since a kernel divides by one of them.
Qparams check_qparams(const char* name, const Tensor& t);

// Arguments besides the storage, checked and contiguous.
struct CompressedCall {
  SelectedCompressed selected;
  int64_t m, n, k;
  ScalarType dtype;  // of bias and residual, and of a floating x
  FloatKind kind;
  int activation;
  Tensor x;
  OptTensor bias, residual;
  bool x_u8 = false;
  std::optional<Qparams> x_qparams,
      y_qparams;  // of the ops that have them; x_qparams with x_u8 at least

  const CompressedKernels& kernels() const { return *selected.kernels; }
  size_t item() const { return x_u8 ? 1 : dtype == ScalarType::Float ? 4 : 2; }
  const char* x_name() const { return x_u8 ? "u8" : short_name(dtype); }
  YKind y_kind() const { return y_qparams ? kYU8 : kYLikeX; }
  ScalarType y_dtype() const { return y_qparams ? ScalarType::Byte : dtype; }
  const char* row(int64_t i) const {  // of x
    return static_cast<const char*>(x.const_data_ptr()) + static_cast<size_t>(i * k) * item();
  }
  bool empty() const { return m == 0 || n == 0; }
};
// k: columns of the weight as far as the storage knows them.
CompressedCall check_compressed(const Tensor& x, int64_t n, int64_t k, const OptTensor& bias,
                                const OptTensor& residual, int64_t activation);
// The same for the ops with qparams, where x may be u8.
CompressedCall check_compressed(const Tensor& x, int64_t n, int64_t k, const OptTensor& x_qparams,
                                const OptTensor& y_qparams, const OptTensor& bias,
                                const OptTensor& residual, int64_t activation);

// Row i of x to u8, its scale and zero point; copied where it is u8 already.
void quantize_row(const CompressedCall& call, int64_t i, uint8_t* q, float* scale,
                  int32_t* zero_point);

// The part of a FinishTask that is the same for all of a call. `y_bad` outlives the tasks.
FinishTask finish_task(const CompressedCall& call, void* y, YKind kind, int32_t* y_bad);
// Raises where a task met a NaN or inf that was to become u8.
void check_finite(int32_t y_bad);

// Raw memory of this call, 64-byte aligned, freed with it.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  char* at(int64_t offset) const { return base_ + offset; }

 private:
  Tensor storage_;
  char* base_;
};

// Memory of this thread that later calls use again. Tasks keep it small (below 1 MB).
char* scratch(int64_t bytes);

inline int64_t round_up(int64_t v, int64_t step) { return (v + step - 1) / step * step; }

// x as u8 rows [M][stride], zero beyond K; or in tiles of the columns form (simd/compressed.h).
class Activations {
 public:
  static Activations rows(const CompressedCall& call, int64_t stride);
  static Activations tiles(const CompressedCall& call);  // u8

  const float* scale() const { return reinterpret_cast<const float*>(buffer_.at(0)); }
  const int32_t* zero_point() const {
    return reinterpret_cast<const int32_t*>(buffer_.at(zero_point_));
  }
  const char* data() const { return buffer_.at(data_); }
  int64_t stride() const { return stride_; }

  int64_t count() const { return (m_ + tile_rows_ - 1) / tile_rows_; }
  int64_t first_row(int64_t tile) const { return tile * tile_rows_; }
  int64_t row_count(int64_t tile) const {
    const int64_t left = m_ - first_row(tile);
    return left < tile_rows_ ? left : tile_rows_;
  }
  int vectors(int64_t tile) const {
    return static_cast<int>((row_count(tile) + width_ - 1) / width_);
  }
  const char* tile(int64_t i) const { return data() + first_row(i) * stride_; }

 private:
  Activations(const CompressedCall& call, int64_t stride, int64_t padded_rows);
  static Activations make_tiles(const CompressedCall& call, int vectors);

  Buffer buffer_;
  int64_t m_, zero_point_, data_;
  int64_t stride_;  // bytes of a row of x in either form
  int64_t tile_rows_ = 1;
  int width_ = 1;
};

// f(task) over [0, tasks): each thread takes the next one when it is done, so rows of uneven
// length balance. A task writes its own part of the result, whichever thread runs it.
template <class F>
void for_each_task(int64_t tasks, bool worth_threads, const F& f) {
  const int64_t threads = worth_threads ? torch::stable::get_num_threads() : 1;
  if (tasks <= 1 || threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < tasks ? threads : tasks, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(i);
  });
}

// The same, but each thread begins with its own range, the same in every call, and takes from the
// others' only after it: weights that fit the L2 caches stay in that of their thread.
template <class F>
void for_each_task_near(int64_t tasks, bool worth_threads, const F& f) {
  constexpr int64_t kMost = 64;
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  int64_t threads = worth_threads ? torch::stable::get_num_threads() : 1;
  threads = threads < tasks ? threads : tasks;
  threads = threads < kMost ? threads : kMost;
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) f(i);
    return;
  }
  Range ranges[kMost];
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next.store(tasks * t / threads, std::memory_order_relaxed);
    ranges[t].end = tasks * (t + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t own = begin; own < end; ++own)
      for (int64_t r = 0; r < threads; ++r) {
        Range& range = ranges[(own + r) % threads];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) f(i);
      }
  });
}

constexpr int64_t kWorthThreads = 400'000;  // int8 operations; waking a thread costs about 5 us

// gz = grad * act'(z) times `scale` in float [M, N] (when want_gz), and its unscaled column sums.
struct Pointwise {
  Buffer gz;
  Tensor bias_grad;
};
Pointwise pointwise_backward(const CompressedCall& call, const Tensor& grad, const float* z,
                             const float* scale, bool want_gz, bool need_bias);

// Stores a float tile [rows][stride] as columns [k0, k1) of a gradient [M, K] in x's dtype.
void store_tile(const CompressedCall& call, const float* tile, int64_t stride, int64_t m0,
                int64_t m1, int64_t k0, int64_t k1, void* out);

Tensor no_gradient(ScalarType dtype);

}  // namespace bigops
