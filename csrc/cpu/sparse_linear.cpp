// sparse_linear on the CPU: 1x4 blocks in panels (layout: bigops/ops/sparse_linear.py).

#include <cstring>

#include "common/record.h"
#include "cpu/compressed_linear.h"

namespace bigops {
namespace {

constexpr int64_t kPermuteRows = 2;  // rows of x up to which the look-up in registers wins
constexpr int kFloatVectors = 2;     // 115 GFLOP/s; 93 with 1, 110 with 4 (80%, 784 x 2048)
constexpr int64_t kTaskRows = 256;   // weight rows of a task at most; their sums fit the L2 cache
constexpr int64_t kSlice = 48;       // weight rows that go through the epilogue at a time
constexpr int64_t kExactPanels = kExactColumns / kPanel;

struct Storage {
  Tensor values, index, panel_ptr;
  OptTensor scale;
  int64_t panels, blocks, n, k;

  const int32_t* ptr(int64_t panel, int64_t row) const {
    return static_cast<const int32_t*>(panel_ptr.const_data_ptr()) + panel * n + row;
  }
  const uint8_t* indices() const { return static_cast<const uint8_t*>(index.const_data_ptr()); }
  const float* scales() const { return static_cast<const float*>(data(scale)); }

  // Everything that a kernel reads through is proven in range first: rows [n0, n1) of a panel.
  bool sound(const CompressedKernels& kernels, int64_t panel, int64_t n0, int64_t n1) const {
    const int32_t* p = ptr(panel, 0);
    int64_t before = p[n0];
    if (before < 0) return false;
    for (int64_t i = n0; i < n1; ++i) {
      if (p[i + 1] < before) return false;
      before = p[i + 1];
    }
    if (before > blocks) return false;
    const int64_t left = (k + kBlock - 1) / kBlock - panel * kPanelBlocks;
    const int64_t limit = left < kPanelBlocks ? left : kPanelBlocks;
    return before == p[n0] ||
           kernels.max_index(indices() + p[n0], before - p[n0]) < static_cast<int>(limit);
  }
};

[[noreturn]] void broken() {
  STD_TORCH_CHECK(false,
                  "panel_ptr, index: expected a panel_ptr that rises from 0 to the number of "
                  "blocks and block columns inside their panel; the storage is broken "
                  "(SparseWeight.validate says where)");
  __builtin_unreachable();
}

Storage check_storage(const Tensor& x, const Tensor& values, const Tensor& index,
                      const Tensor& panel_ptr, const OptTensor& scale) {
  check_cpu("values", values);
  check_cpu("index", index);
  check_cpu("panel_ptr", panel_ptr);
  if (x.dim() == 0) fail("x", "at least 1 dimension", "none");
  Storage s;
  s.k = x.size(x.dim() - 1);
  s.panels = s.k > 0 ? (s.k + kPanel - 1) / kPanel : 1;
  check_dtype("values", values, scale.has_value() ? ScalarType::Char : ScalarType::Float);
  check_dtype("index", index, ScalarType::Byte);
  check_dtype("panel_ptr", panel_ptr, ScalarType::Int);
  if (values.dim() != 2 || values.size(1) != kBlock)
    fail("values", "shape [blocks, 4]", shape_of(values));
  s.blocks = values.size(0);
  check_vector("index", index, s.blocks);
  if (panel_ptr.dim() != 1 || panel_ptr.size(0) < 1)
    fail("panel_ptr", "shape [P * N + 1]", shape_of(panel_ptr));
  s.n = (panel_ptr.size(0) - 1) / s.panels;
  if (scale.has_value()) {
    check_cpu("scale", *scale);
    check_dtype("scale", *scale, ScalarType::Float);
    if (scale->dim() != 1) fail("scale", "shape [N]", shape_of(*scale));
    s.n = scale->size(0);
  }
  check_vector("panel_ptr", panel_ptr, s.panels * s.n + 1);
  s.values = dense(values);
  s.index = dense(index);
  s.panel_ptr = dense(panel_ptr);
  s.scale = dense(scale);
  if (*s.ptr(0, 0) != 0 || *s.ptr(s.panels, 0) != s.blocks) broken();
  return s;
}

enum class Form { permute, columns, float_columns };

Form choose(const CompressedKernels& kernels, bool int8, int64_t m) {
  if (!int8) return Form::float_columns;
  return m <= kPermuteRows && kernels.sparse_permute != nullptr ? Form::permute : Form::columns;
}

const char* name_of(Form form) {
  return form == Form::permute   ? "s8_permute"
         : form == Form::columns ? "s8_columns"
                                 : "f32_columns";
}

Activations prepare(const CompressedCall& call, const Storage& s, Form form) {
  if (form == Form::permute) return Activations::rows(call, s.panels * kPanel);
  if (form == Form::columns) return Activations::tiles(call);
  return Activations::float_tiles(call, kFloatVectors);
}

// Memory of one task: sums [rows][lanes], their weight sums, and a slice of y.
struct TaskMemory {
  int64_t lanes, rows, width;
  bool wide;
  char* base;

  TaskMemory(int64_t lanes_, int64_t rows_, int64_t width_, bool wide_)
      : lanes(lanes_), rows(rows_), width(width_), wide(wide_) {
    base = scratch(rows * (lanes * (wide ? 12 : 4) + width * 4 + 4) + lanes * kSlice * 4 + 64);
  }
  int64_t* parts() const { return reinterpret_cast<int64_t*>(base); }  // when wide
  int32_t* acc() const { return reinterpret_cast<int32_t*>(base + (wide ? rows * lanes * 8 : 0)); }
  int32_t* partial() const { return acc() + rows * lanes; }
  int32_t* slice() const { return partial() + rows * width; }
  int32_t* sums() const { return slice() + lanes * kSlice; }
};

struct Product {
  const CompressedCall& call;
  const Storage& s;
  Form form;
  const Activations& a;
  FinishTask base;
  std::atomic<bool> sound{true};

  const CompressedKernels& kernels() const { return call.kernels(); }

  // Blocks of panels [p0, p1) for weight rows [n0, n1) and one tile of x.
  void run_panels(int64_t p0, int64_t p1, int64_t n0, int64_t n1, int64_t tile, int32_t* acc,
                  int32_t* partial) {
    SparseTask t{};
    t.index = s.indices();
    t.values = s.values.const_data_ptr();
    t.n = n1 - n0;
    t.acc = acc;
    t.sums = partial;
    t.vectors = form == Form::permute ? 1 : a.vectors(tile);
    // bytes of x for one column: one row in the permute form, all lanes in the others
    const int64_t column = form == Form::permute   ? 1
                           : form == Form::columns ? int64_t(t.vectors) * kernels().width
                                                   : int64_t(t.vectors) * kernels().width * 4;
    const char* x = form == Form::permute ? a.data() + tile * a.stride() : a.tile(tile);
    const auto kernel = form == Form::permute   ? kernels().sparse_permute
                        : form == Form::columns ? kernels().sparse_s8
                                                : kernels().sparse_f32;
    for (int64_t p = p0; p < p1; ++p) {
      t.ptr = s.ptr(p, n0);
      t.x = x + p * kPanel * column;
      t.first = p == p0;
      kernel(t);
    }
  }

  // y[m0 : m0 + rows, n0:n1] from acc; slices keep the transposed sums in the L1 cache.
  void finish(const TaskMemory& memory, int64_t n0, int64_t n1, int64_t m0, int64_t rows,
              int64_t lanes) {
    const bool permute = form == Form::permute;
    if (permute) kernels().reduce(memory.acc(), n1 - n0, memory.slice());
    for (int64_t n = n0; n < n1; n += permute ? n1 - n0 : kSlice) {
      const int64_t end = permute || n1 - n < kSlice ? n1 : n + kSlice;
      if (!permute)
        kernels().transpose(
            {memory.acc() + (n - n0) * lanes, lanes, end - n, rows, memory.slice(), kSlice});
      FinishTask f = base;
      f.tile = memory.slice();
      f.stride = permute ? memory.rows : kSlice;
      f.sums = memory.sums() + (n - n0);
      f.m0 = m0;
      f.m1 = m0 + rows;
      f.n0 = n;
      f.n1 = end;
      kernels().finish[call.kind](f);
    }
  }

  void run(int64_t n0, int64_t n1, int64_t first, int64_t last, int64_t rows_per_tile) {
    for (int64_t p = 0; p < s.panels; ++p)
      if (!s.sound(kernels(), p, n0, n1)) {
        sound.store(false, std::memory_order_relaxed);
        return;
      }
    const bool int8 = form != Form::float_columns;
    const bool wide = int8 && s.panels > kExactPanels;
    const TaskMemory memory(form == Form::permute ? kernels().width : rows_per_tile, n1 - n0,
                            kernels().width, wide);
    for (int64_t i = first; i < last; ++i) {
      const bool permute = form == Form::permute;
      const int64_t m0 = permute ? i : a.first_row(i), rows = permute ? 1 : a.row_count(i);
      const int64_t lanes = permute ? kernels().width : int64_t(a.vectors(i)) * kernels().width;
      const bool need_sums = int8 && (permute || wide || i == first);
      if (!wide) {
        run_panels(0, s.panels, n0, n1, i, memory.acc(), need_sums ? memory.partial() : nullptr);
        if (need_sums) kernels().reduce(memory.partial(), n1 - n0, memory.sums());
        finish(memory, n0, n1, m0, rows, lanes);
      } else {
        finish_wide(memory, n0, n1, i, m0, rows, lanes);
      }
    }
  }

  // K past kExactColumns: int32 sums of 128 panels at a time, added in int64.
  void finish_wide(const TaskMemory& memory, int64_t n0, int64_t n1, int64_t tile, int64_t m0,
                   int64_t rows, int64_t lanes) {
    const int64_t n = n1 - n0;
    int64_t* parts = memory.parts();
    std::memset(parts, 0, static_cast<size_t>(n * lanes) * sizeof(int64_t));
    for (int64_t p = 0; p < s.panels; p += kExactPanels) {
      const int64_t end = p + kExactPanels < s.panels ? p + kExactPanels : s.panels;
      run_panels(p, end, n0, n1, tile, memory.acc(), memory.partial());
      kernels().reduce(memory.partial(), n, memory.sums());
      if (form == Form::permute) kernels().reduce(memory.acc(), n, memory.acc());
      const int64_t step = form == Form::permute ? 1 : lanes;
      for (int64_t r = 0; r < n; ++r)
        for (int64_t m = 0; m < rows; ++m)
          parts[r * lanes + m] += memory.acc()[r * step + m] -
                                  static_cast<int64_t>(a.zero_point()[m0 + m]) * memory.sums()[r];
    }
    float* z = reinterpret_cast<float*>(memory.slice());  // one weight row at a time
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t m = 0; m < rows; ++m)
        z[m] = static_cast<float>(parts[r * lanes + m]) * (a.scale()[m0 + m] * s.scales()[n0 + r]);
      FinishTask f = base;
      f.scale = nullptr;
      f.tile = z;
      f.stride = 1;
      f.m0 = m0;
      f.m1 = m0 + rows;
      f.n0 = n0 + r;
      f.n1 = n0 + r + 1;
      kernels().finish[call.kind](f);
    }
  }
};

// y: [M, N] in x's dtype, or float when y_float.
void product(const CompressedCall& call, const Storage& s, void* y, bool y_float) {
  const CompressedKernels& kernels = call.kernels();
  const bool int8 = s.scale.has_value();
  const Form form = choose(kernels, int8, call.m);
  const Activations a = prepare(call, s, form);
  FinishTask base{};
  base.row_scale = a.scale();
  base.zero_point = a.zero_point();
  base.scale = s.scales();
  base.bias = data(call.bias);
  base.residual = data(call.residual);
  base.y = y;
  base.y_float = y_float;
  base.n = call.n;
  base.activation = call.activation;
  Product product{call, s, form, a, base};

  const int64_t tiles = form == Form::permute ? call.m : a.count();
  const int64_t most = form == Form::permute ? 1 : a.row_count(0);
  const int64_t rows_per_tile = round_up(most, kernels.width);
  const int64_t step = task_rows(call.n, 16, kTaskRows);
  const int64_t chunks = (call.n + step - 1) / step;
  // A task takes all tiles of its weight rows (which then stay cached), unless tasks run short.
  const int64_t split = chunks < 2 * int64_t(torch::stable::get_num_threads()) ? tiles : 1;
  const auto run = [&](int64_t task) {
    const int64_t n0 = task / split * step, n1 = n0 + step < call.n ? n0 + step : call.n;
    const int64_t first = split == 1 ? 0 : task % split;
    product.run(n0, n1, first, split == 1 ? tiles : first + 1, rows_per_tile);
  };
  for_each_task(chunks * split, call.m * (s.blocks * 4 + call.n * 16) > kWorthThreads, run);
  if (!product.sound.load()) broken();
}

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& index,
                     const Tensor& panel_ptr, const OptTensor& scale, const OptTensor& bias,
                     const OptTensor& residual, std::string_view activation) {
  const Storage s = check_storage(x, values, index, panel_ptr, scale);
  const CompressedCall call = check_compressed(x, s.n, s.k, bias, residual, activation);
  record(call.selected.isa, "sparse_linear", short_name(call.dtype),
         name_of(choose(call.kernels(), scale.has_value(), call.m)));
  Tensor y = empty_rows_like(x, call.n, call.dtype);
  if (!call.empty()) product(call, s, y.mutable_data_ptr(), false);
  return y;
}

// gx = gz W: a task owns one panel of columns for one vector of rows of x, so that nothing is
// added to by two threads and the order of additions is fixed.
void input_gradient(const CompressedCall& call, const Storage& s, const float* gz, void* gx) {
  const CompressedKernels& kernels = call.kernels();
  const int64_t w = kernels.width;
  const int64_t tiles = (call.m + w - 1) / w;
  const Buffer transposed(tiles * call.n * w * 4);  // [tile][N][w]
  const auto turn = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t rows = call.m - i * w < w ? call.m - i * w : w;
      char* to = transposed.at(i * call.n * w * 4);
      if (rows < w) std::memset(to, 0, static_cast<size_t>(call.n * w * 4));
      kernels.transpose({gz + i * w * call.n, call.n, rows, call.n, to, w});
    }
  };
  for_tasks(tiles, call.m * call.n > kWorthThreads / 8, turn);
  std::atomic<bool> sound{true};
  const auto run = [&](int64_t task) {
    const int64_t p = task / tiles, i = task % tiles;
    if (!s.sound(kernels, p, 0, call.n)) return sound.store(false, std::memory_order_relaxed);
    float* columns = reinterpret_cast<float*>(scratch(2 * kPanel * w * 4));
    float* rows = columns + kPanel * w;
    std::memset(columns, 0, static_cast<size_t>(kPanel * w * 4));
    const SparseGradTask t{s.ptr(p, 0),
                           s.indices(),
                           s.values.const_data_ptr(),
                           call.n,
                           reinterpret_cast<const float*>(transposed.at(i * call.n * w * 4)),
                           columns};
    if (s.scale.has_value())
      kernels.sparse_grad_s8(t);
    else
      kernels.sparse_grad_f32(t);
    const int64_t k0 = p * kPanel, k1 = k0 + kPanel < call.k ? k0 + kPanel : call.k;
    const int64_t m1 = i * w + w < call.m ? i * w + w : call.m;
    kernels.transpose({columns, w, k1 - k0, w, rows, kPanel});
    store_tile(call, rows, kPanel, i * w, m1, k0, k1, gx);
  };
  for_each_task(call.k > 0 ? s.panels * tiles : 0, call.m * (s.blocks * 4 + call.k) > kWorthThreads,
                run);
  if (!sound.load()) broken();
}

std::tuple<Tensor, Tensor> sparse_linear_backward(const Tensor& grad_any, const Tensor& x,
                                                  const Tensor& values, const Tensor& index,
                                                  const Tensor& panel_ptr, const OptTensor& scale,
                                                  const OptTensor& bias,
                                                  std::string_view activation, bool need_x,
                                                  bool need_bias) {
  const Storage s = check_storage(x, values, index, panel_ptr, scale);
  CompressedCall call = check_compressed(x, s.n, s.k, bias, OptTensor(grad_any), activation);
  const Tensor grad = *call.residual;  // checked as such: grad has the shape of y
  call.residual.reset();
  record(call.selected.isa, "sparse_linear_backward", short_name(call.dtype),
         scale.has_value() ? "s8_scatter" : "f32_scatter");

  const bool pointwise = call.activation != kNone;
  const Buffer z(pointwise ? call.m * call.n * 4 : 0);
  const float* z_data = pointwise ? reinterpret_cast<const float*>(z.at(0)) : nullptr;
  if (pointwise && !call.empty()) {
    CompressedCall plain = call;
    plain.activation = kNone;
    product(plain, s, z.at(0), true);
  }
  const Pointwise p = pointwise_backward(call, grad, z_data, s.scales(), need_x, need_bias);
  if (!need_x) return {no_gradient(call.dtype), p.bias_grad};
  Tensor gx = empty_rows_like(x, call.k, call.dtype);
  if (call.m > 0)
    input_gradient(call, s, reinterpret_cast<const float*>(p.gz.at(0)), gx.mutable_data_ptr());
  return {gx, p.bias_grad};
}

}  // namespace

std::pair<std::string, std::string> choose_sparse_linear(int64_t m, int64_t, int64_t, int64_t,
                                                         const std::string& values,
                                                         const std::string& dtype) {
  const SelectedCompressed selected = select_compressed();
  const Form form = choose(*selected.kernels, values == "s8", m);
  const std::string limit = std::to_string(kPermuteRows) + " rows of x";
  return {kernel_name(selected.isa, "sparse_linear", dtype.c_str(), name_of(form)),
          form == Form::permute ? "a panel of x in registers, up to " + limit
                                : "one row of x a lane, a panel of x in the L1 cache"};
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&bigops::sparse_linear));
  m.impl("sparse_linear_backward", TORCH_BOX(&bigops::sparse_linear_backward));
}
