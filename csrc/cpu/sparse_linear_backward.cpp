// sparse_linear on the CPU, backward: the transposed product for x, the sampled one for the values.

#include "cpu/sparse_linear.h"

namespace bigops {
namespace {

// Writes row i of a float matrix [M, n] that is read as tiles.
auto float_rows(const float* from, int64_t n) {
  return
      [from, n](int64_t i, char* to) { std::memcpy(to, from + i * n, static_cast<size_t>(n * 4)); };
}

// gx = gz W: a task owns one panel of columns for one tile of rows of x, so that nothing is added
// to by two threads and the order of additions is fixed.
void input_gradient(const CompressedCall& call, const SparseStorage& s, const TileWords& gz,
                    void* gx) {
  const CompressedKernels& helpers = call.kernels();
  const int64_t width = kPanelWords * s.columns();  // columns of a panel
  const auto run = [&](int64_t task) {
    const int64_t p = task / gz.count(), tile = task % gz.count(), lanes = gz.lanes(tile);
    float* columns = reinterpret_cast<float*>(scratch(2 * width * lanes * 4));
    float* rows = columns + width * lanes;
    std::memset(columns, 0, static_cast<size_t>(width * lanes * 4));
    ScatterTask t{};
    t.index = s.indices();
    t.words = s.values.const_data_ptr();
    t.slices = s.spc;
    t.vectors = gz.vectors(tile);
    t.x_grad = columns;
    for (int64_t c = 0; c < s.chunks; ++c) {
      t.ptr = s.ptr(c, p);
      t.rows = s.groups(s.rows, c, p);
      t.grad = reinterpret_cast<const float*>(gz.at(tile, s.first_row(c)));
      s.kernels().scatter[s.group](t);
    }
    const int64_t k0 = p * width, k1 = k0 + width < call.k ? k0 + width : call.k;
    helpers.transpose({columns, lanes, k1 - k0, gz.row_count(tile), rows, width});
    store_tile(call, rows, width, gz.first_row(tile), gz.first_row(tile) + gz.row_count(tile), k0,
               k1, gx);
  };
  for_each_task(s.panels * gz.count(),
                call.m * (s.steps * kSliceRows * s.columns() + call.k) > kWorthThreads, run);
}

// Sums [steps][16][columns] of one panel of one chunk to the values' dtype, 0 in the padding. Rows
// and columns past the matrix are set to zero too, since the sum there may be 0 * inf.
void store_values(const SparseStorage& s, int64_t c, int64_t p, const float* sums, void* out) {
  const int32_t* ptr = s.ptr(c, p);
  const uint8_t* length = s.groups(s.length, c, p);
  const uint8_t* rows = s.groups(s.rows, c, p);
  const int64_t g = s.columns(), per = kSliceRows / s.group_rows;
  for (int64_t i = 0; i < s.spc; ++i)
    for (int64_t j = ptr[i]; j < ptr[i + 1]; ++j)
      for (int64_t r = 0; r < kSliceRows; ++r) {
        const int64_t group = i * per + r / s.group_rows;
        const int64_t n = s.first_row(c) + rows[group] * s.group_rows + r % s.group_rows;
        const int64_t k = (p * kPanelWords + s.indices()[j * per + r / s.group_rows]) * g;
        const bool stored = j - ptr[i] < length[group] && n < s.n;
        for (int64_t e = 0; e < g; ++e) {
          const bool inside = stored && k + e < s.k;
          const float v = inside ? sums[((j - ptr[0]) * kSliceRows + r) * g + e] : 0.0f;
          const int64_t at = (j * kSliceRows + r) * g + e;
          if (s.kind == kWordF32) {
            static_cast<float*>(out)[at] = v;
          } else {
            uint32_t bits;
            std::memcpy(&bits, &v, 4);
            const bool nan = v != v;
            bits = nan ? bits | 0x400000u : bits + 0x7fff + ((bits >> 16) & 1);
            static_cast<uint16_t*>(out)[at] = static_cast<uint16_t>(bits >> 16);
          }
        }
      }
}

// The entries of gz^T x at the stored positions. A task owns one panel of one chunk and goes over
// all tiles of rows of x in order.
void value_gradient(const CompressedCall& call, const SparseStorage& s, const TileWords& gz,
                    void* out) {
  const TileWords x(
      call.kernels(), call.m, call.k, s.words() * s.columns(), s.kernels().grad_vectors,
      call.m * call.k > kWorthThreads / 8, [&call](int64_t i, char* to) {
        call.kernels().widen[call.kind](call.row(i), call.k, reinterpret_cast<float*>(to));
      });
  const int64_t width = kPanelWords * s.columns();
  const auto run = [&](int64_t task) {
    const int64_t c = task / s.panels, p = task % s.panels;
    SampleTask t{};
    t.ptr = s.ptr(c, p);
    t.index = s.indices();
    t.rows = s.groups(s.rows, c, p);
    t.slices = s.spc;
    const int64_t count = (t.ptr[s.spc] - t.ptr[0]) * kSliceRows * s.columns();
    t.out = reinterpret_cast<float*>(scratch(count * 4 + 4));
    std::memset(t.out, 0, static_cast<size_t>(count * 4));
    for (int64_t i = 0; i < gz.count(); ++i) {
      t.vectors = gz.vectors(i);
      t.grad = reinterpret_cast<const float*>(gz.at(i, s.first_row(c)));
      t.x = reinterpret_cast<const float*>(x.at(i, p * width));
      s.kernels().sample[s.group](t);
    }
    store_values(s, c, p, t.out, out);
  };
  for_each_task(s.chunks * s.panels, call.m * s.steps * kSliceRows * s.columns() > kWorthThreads,
                run);
}

std::tuple<Tensor, Tensor, Tensor> sparse_linear_backward(
    const Tensor& grad_any, const Tensor& x, const Tensor& values, const Tensor& index,
    const Tensor& rows, const Tensor& length, const Tensor& ptr, const OptTensor& scale,
    const OptTensor& sums, int64_t n, int64_t chunk, const OptTensor& bias,
    std::string_view activation, bool need_x, bool need_values, bool need_bias) {
  const SparseStorage s =
      check_sparse(x, {values, index, rows, length, ptr, scale, sums}, n, chunk);
  CompressedCall call = check_compressed(x, s.n, s.k, bias, OptTensor(grad_any), activation);
  check_sparse_call(call, s);
  if (need_values && s.kind == kWordS8)
    fail("values", "a floating-point dtype where they need a gradient", "s8");
  const Tensor grad = *call.residual;  // checked as such: grad has the shape of y
  call.residual.reset();
  if (g_recording.load(std::memory_order_relaxed) != 0)
    record(s.selected.isa, "sparse_linear_backward", short_name(call.dtype),
           (std::string(word_name(s.kind)) + (need_x ? "_scatter" : "") +
            (need_values ? "_sample" : ""))
               .c_str());
  for (int64_t c = 0; c < s.chunks; ++c)
    if (!s.sound(call.kernels(), c)) broken_sparse();

  const bool pointwise = call.activation != kNone, products = need_x || need_values;
  const Buffer z(pointwise ? call.m * call.n * 4 : 0);
  const float* z_data = pointwise ? reinterpret_cast<const float*>(z.at(0)) : nullptr;
  if (pointwise && !call.empty()) {
    CompressedCall plain = call;
    plain.activation = kNone;
    sparse_product(plain, s, z.at(0), true);
  }
  const Pointwise p = pointwise_backward(call, grad, z_data, s.scales(), products, need_bias);
  Tensor gx = no_gradient(call.dtype), gv = no_gradient(call.dtype);
  if (need_x) gx = empty_rows_like(x, call.k, call.dtype);
  if (need_values) {
    const int64_t shape[3] = {s.steps, kSliceRows, s.columns()};
    gv = empty(shape, 3, values.scalar_type());
  }
  if (!products) return {gx, gv, p.bias_grad};
  const TileWords gz(call.kernels(), call.m, call.n, s.chunks * s.chunk, s.kernels().grad_vectors,
                     call.m * call.n > kWorthThreads / 8,
                     float_rows(reinterpret_cast<const float*>(p.gz.at(0)), call.n));
  if (need_x && call.m > 0) input_gradient(call, s, gz, gx.mutable_data_ptr());
  if (need_values) value_gradient(call, s, gz, gv.mutable_data_ptr());
  return {gx, gv, p.bias_grad};
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  m.impl("sparse_linear_backward", TORCH_BOX(&bigops::sparse_linear_backward));
}
