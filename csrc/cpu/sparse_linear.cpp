// sparse_linear on the CPU, forward: rows of W in slices (layout: bigops/formats/sparse_layout.py).

#include "cpu/sparse_linear.h"

#include "common/kernel_table.h"

namespace bigops {
namespace {

// Rows of x up to which looking words up beats tiles padded to a vector of rows (4096 x 4096 int8,
// 4 and 8 rows against a tile of 16: at 80% 271 and 460 us against 409, at 90% 183 and 324 us
// against 252; AVX-512).
constexpr int64_t kRowsForm = 6;
// panels whose int32 sums cannot overflow
constexpr int64_t kExactPanels = kExactColumns / (kPanelWords * kWordColumns[kWordS8]);
// panels whose float sums are added up before they enter a total: that of all panels of a long row
// would lose a digit
constexpr int64_t kFloatPanels = 64;

bool rows_form(int64_t m) { return m <= kRowsForm; }

std::string form_of(const SparseStorage& s, int64_t m, bool y_u8) {
  return form_name(std::string(word_name(s.kind)) + (rows_form(m) ? "_rows" : "_columns"), y_u8);
}

// The row quantiser's results.
struct RowScales {
  Buffer buffer;
  int64_t m;

  explicit RowScales(int64_t m_) : buffer(m_ * 8), m(m_) {}
  float* scale() const { return reinterpret_cast<float*>(buffer.at(0)); }
  int32_t* zero_point() const { return reinterpret_cast<int32_t*>(buffer.at(m * 4)); }
};

// Memory of one task: the sums of a part of the panels, and where there are several parts the
// totals, int64_t or float.
struct Sums {
  int64_t rows, lanes;
  char* base;
  int64_t total_bytes;

  Sums(char* memory, int64_t rows_, int64_t lanes_, int64_t bytes_of_a_total)
      : rows(rows_), lanes(lanes_), base(memory), total_bytes(rows * lanes * bytes_of_a_total) {}
  size_t count() const { return static_cast<size_t>(rows * lanes); }
  template <class T>
  T* totals() const {
    return reinterpret_cast<T*>(base);
  }
  template <class T>
  T* parts() const {
    return reinterpret_cast<T*>(base + total_bytes);
  }
  template <class Total, class Part>
  void add_part() const {
    for (size_t i = 0; i < count(); ++i) totals<Total>()[i] += parts<Part>()[i];
  }
};

// One call: x in the form that the kernels want, and the epilogue.
struct Product {
  const CompressedCall& call;
  const SparseStorage& s;
  const RowScales& row_scales;
  const RowWords* x_rows;  // rows form
  const Tiles* x_tiles;    // columns form
  FinishTask base;

  int64_t part_panels() const { return s.kind == kWordS8 ? kExactPanels : kFloatPanels; }
  bool in_parts() const { return s.panels > part_panels(); }
  bool wide() const { return s.kind == kWordS8 && in_parts(); }

  int64_t bytes_of_a_total() const { return !in_parts() ? 0 : s.kind == kWordS8 ? 8 : 4; }
  // Memory of `run`, for so many rows of x.
  int64_t bytes(int64_t lanes) const { return s.chunk * lanes * (4 + bytes_of_a_total()); }

  void run_panel(int64_t c, int64_t p, int64_t tile, const char* x, bool fresh,
                 int32_t* acc) const {
    SparseTask t{};
    t.ptr = s.ptr(c, p);
    t.index = s.indices();
    t.rows = s.groups(s.rows, c, p);
    t.words = s.values.const_data_ptr();
    t.slices = s.spc;
    if (x_tiles != nullptr) {
      t.x = x + p * kPanelWords * x_tiles->lanes(tile) * 4;
      t.vectors = x_tiles->vectors(tile);
      t.acc = acc;
      t.fresh = fresh;
      s.kernels().columns[s.group](t);
      return;
    }
    t.x_stride = x_rows->stride();
    t.acc_stride = s.chunk;
    for (int64_t i = 0; i < call.m; i += kRowsAtOnce) {
      t.m = static_cast<int>(call.m - i < kRowsAtOnce ? call.m - i : kRowsAtOnce);
      t.x = x_rows->row(i) + p * kPanelWords * 4;
      t.acc = acc + i * s.chunk;
      s.kernels().rows[s.group](t);
    }
  }

  // One chunk of W and one tile of x, which lies at `x` (all rows of x in the rows form). False
  // where the storage is broken.
  bool run(int64_t c, int64_t tile, const char* x, char* memory) const {
    if (!s.sound(call.kernels(), c)) return false;
    const bool tiled = x_tiles != nullptr;
    const int64_t m0 = tiled ? x_tiles->first_row(tile) : 0;
    const int64_t rows = tiled ? x_tiles->row_count(tile) : call.m;
    const Sums sums(memory, s.chunk, tiled ? x_tiles->lanes(tile) : call.m, bytes_of_a_total());
    std::memset(sums.base, 0, static_cast<size_t>(sums.total_bytes));
    const int64_t step = part_panels();
    for (int64_t p0 = 0; p0 == 0 || p0 < s.panels; p0 += step) {  // one pass of no panels, too
      if (!tiled || p0 >= s.panels)  // the columns form begins its sums with the first panel
        std::memset(sums.parts<char>(), 0, sums.count() * 4);
      const int64_t p1 = p0 + step < s.panels ? p0 + step : s.panels;
      for (int64_t p = p0; p < p1; ++p) run_panel(c, p, tile, x, p == p0, sums.parts<int32_t>());
      if (wide())
        sums.add_part<int64_t, int32_t>();
      else if (in_parts())
        sums.add_part<float, float>();
    }
    if (wide()) to_float(sums, c, m0, rows);
    finish(sums, c, m0, rows);
    return true;
  }

  // The parts become float z: by int64, since neither the sums nor zero_point * sum fit 32 bits.
  void to_float(const Sums& sums, int64_t c, int64_t m0, int64_t rows) const {
    const bool tiled = x_tiles != nullptr;
    const int32_t* weight_sums = static_cast<const int32_t*>(data(s.sums));
    for (int64_t n = s.first_row(c); n < s.end_row(c); ++n)
      for (int64_t m = 0; m < rows; ++m) {
        const int64_t r = n - s.first_row(c);
        const int64_t at = tiled ? r * sums.lanes + m : m * s.chunk + r;
        const int64_t total =
            sums.totals<int64_t>()[at] -
            static_cast<int64_t>(row_scales.zero_point()[m0 + m]) * weight_sums[n];
        const float z = static_cast<float>(total) * (row_scales.scale()[m0 + m] * s.scales()[n]);
        sums.parts<float>()[at] = z;
      }
  }

  void finish(const Sums& sums, int64_t c, int64_t m0, int64_t rows) const {
    const bool tiled = x_tiles != nullptr;
    FinishTask f = base;
    f.tile = in_parts() && !wide() ? sums.totals<char>() : sums.parts<char>();
    f.stride = tiled ? sums.lanes : s.chunk;
    f.m0 = m0;
    f.m1 = m0 + rows;
    f.n0 = s.first_row(c);
    f.n1 = s.end_row(c);
    if (s.kind != kWordS8 || wide())
      f.scale = nullptr;
    else
      f.sums = static_cast<const int32_t*>(data(s.sums)) + f.n0;
    (tiled ? call.kernels().finish_columns : call.kernels().finish)[call.kind](f);
  }
};

// Writes rows of x as words of the kind, zero from K on.
auto row_filler(const CompressedCall& call, const SparseStorage& s, const RowScales& scales) {
  return [&call, &s, &scales](int64_t first, int64_t rows, char* to, int64_t stride) {
    if (s.kind == kWordS8) {
      quantize_rows(call, first, rows, to, stride, scales.scale() + first,
                    scales.zero_point() + first);
      return;
    }
    const int64_t bytes = call.k * (s.kind == kWordF32 ? 4 : 2);
    for (int64_t i = first; i < first + rows; ++i, to += stride) {
      if (s.kind == kWordF32)
        call.kernels().widen[call.kind](call.row(i), call.k, reinterpret_cast<float*>(to));
      else if (bytes > 0)
        std::memcpy(to, call.row(i), static_cast<size_t>(bytes));
      std::memset(to + bytes, 0, static_cast<size_t>(stride - bytes));
    }
  };
}

Tensor run(const CompressedCall& call, const SparseStorage& s) {
  check_sparse_call(call, s);
  if (g_recording.load(std::memory_order_relaxed) != 0)
    record(s.selected.isa, "sparse_linear", call.x_name(),
           form_of(s, call.m, call.y_qparams.has_value()).c_str());
  Tensor y = empty_rows_like(call.x, call.n, call.y_dtype());
  if (!call.empty()) sparse_product(call, s, y.mutable_data_ptr(), call.y_kind());
  return y;
}

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& index, const Tensor& rows,
                     const Tensor& length, const Tensor& ptr, const OptTensor& scale,
                     const OptTensor& sums, int64_t n, int64_t chunk, const OptTensor& bias,
                     const OptTensor& residual, int64_t activation) {
  const SparseStorage s =
      check_sparse(x, {values, index, rows, length, ptr, scale, sums}, n, chunk);
  return run(check_compressed(x, s.n, s.k, bias, residual, activation), s);
}

Tensor sparse_linear_u8(const Tensor& x, const Tensor& values, const Tensor& index,
                        const Tensor& rows, const Tensor& length, const Tensor& ptr,
                        const OptTensor& scale, const OptTensor& sums, int64_t n, int64_t chunk,
                        const OptTensor& x_qparams, const OptTensor& y_qparams,
                        const OptTensor& bias, const OptTensor& residual, int64_t activation) {
  const SparseStorage s =
      check_sparse(x, {values, index, rows, length, ptr, scale, sums}, n, chunk);
  if (x_qparams.has_value() && s.kind != kWordS8)
    fail("x_qparams", "None with floating values", "a tensor");
  return run(check_compressed(x, s.n, s.k, x_qparams, y_qparams, bias, residual, activation), s);
}

Tensor sparse_linear_rows(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                          const Tensor& values, const Tensor& index, const Tensor& rows,
                          const Tensor& length, const Tensor& ptr, const OptTensor& scale,
                          const OptTensor& sums, int64_t n, int64_t chunk, const OptTensor& bias,
                          const OptTensor& residual, int64_t activation) {
  const SparseStorage s =
      check_sparse(x, {values, index, rows, length, ptr, scale, sums}, n, chunk);
  if (s.kind != kWordS8) fail("x", "a floating dtype with floating values", "u8");
  return run(check_compressed_rows(x, x_scale, x_zero_point, s.n, s.k, bias, residual, activation),
             s);
}

}  // namespace

SelectedSparse select_sparse(WordKind kind) {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (kind == kWordS8 && isa >= Isa::avx512vnni) return {&avx512vnni_sparse_s8, Isa::avx512vnni};
  if (kind == kWordBf16 && isa >= Isa::avx512bf16)
    return {&avx512bf16_sparse_bf16, Isa::avx512bf16};
  if (isa >= Isa::avx512)
    return {kind == kWordF32    ? &avx512_sparse_f32
            : kind == kWordBf16 ? &avx512_sparse_bf16
                                : &avx512_sparse_s8,
            Isa::avx512};
  if (isa == Isa::avx2)
    return {kind == kWordF32    ? &avx2_sparse_f32
            : kind == kWordBf16 ? &avx2_sparse_bf16
                                : &avx2_sparse_s8,
            Isa::avx2};
#endif
  return {kind == kWordF32    ? &portable_sparse_f32
          : kind == kWordBf16 ? &portable_sparse_bf16
                              : &portable_sparse_s8,
          Isa::portable};
}

const char* word_name(WordKind kind) {
  return kind == kWordF32 ? "f32" : kind == kWordBf16 ? "bf16" : "s8";
}

bool SparseStorage::sound(const CompressedKernels& helpers, int64_t c) const {
  const int32_t* p = ptr(c, 0);
  const int64_t count = panels * spc, per = kSliceRows / group_rows;
  if (p[0] < 0) return false;
  for (int64_t i = 0; i < count; ++i)
    if (p[i + 1] < p[i]) return false;
  if (p[count] > steps) return false;
  if (helpers.max_index(indices() + p[0] * per, (p[count] - p[0]) * per) >= kPanelWords)
    return false;
  const int64_t most = chunk / group_rows;
  return most > 255 || helpers.max_index(groups(rows, c, 0), count * per) < most;
}

[[noreturn]] void broken_sparse() {
  STD_TORCH_CHECK(false,
                  "ptr, index, rows: expected a ptr that rises from 0 to the number of steps, "
                  "indices inside a panel and rows inside a chunk; the storage is broken "
                  "(SparseWeight.validate says where)");
  __builtin_unreachable();
}

SparseStorage check_sparse(const Tensor& x, const SparseTensors& t, int64_t n, int64_t chunk) {
  check_cpu("values", t.values);
  check_cpu("index", t.index);
  check_cpu("rows", t.rows);
  check_cpu("length", t.length);
  check_cpu("ptr", t.ptr);
  if (x.dim() == 0) fail("x", "at least 1 dimension", "none");
  SparseStorage s;
  const ScalarType dtype = t.values.scalar_type();
  if (dtype == ScalarType::Float)
    s.kind = kWordF32;
  else if (dtype == ScalarType::BFloat16)
    s.kind = kWordBf16;
  else if (dtype == ScalarType::Char)
    s.kind = kWordS8;
  else
    fail("values", "dtype f32, bf16 or s8", short_name(dtype));
  if (t.scale.has_value() != (s.kind == kWordS8) || t.sums.has_value() != (s.kind == kWordS8))
    fail("scale, sums", "both with int8 values and with no others",
         std::string("values of ") + short_name(dtype));
  if (n < 0) fail("n", "at least 0", std::to_string(n));
  if (chunk != 64 && chunk != 128 && chunk != 256)
    fail("chunk", "64, 128 or 256", std::to_string(chunk));
  s.n = n;
  s.k = x.size(x.dim() - 1);
  s.chunk = chunk;
  s.spc = chunk / kSliceRows;
  s.panels = (s.used_words() + kPanelWords - 1) / kPanelWords;
  s.chunks = (n + chunk - 1) / chunk;
  const int64_t slices = s.chunks * s.panels * s.spc;
  if (t.values.dim() != 3 || t.values.size(1) != kSliceRows || t.values.size(2) != s.columns())
    fail("values", "shape [steps, 16, " + std::to_string(s.columns()) + "]", shape_of(t.values));
  s.steps = t.values.size(0);
  check_dtype("index", t.index, ScalarType::Byte);
  check_dtype("rows", t.rows, ScalarType::Byte);
  check_dtype("length", t.length, ScalarType::Byte);
  check_dtype("ptr", t.ptr, ScalarType::Int);
  const int64_t per = t.index.dim() == 2 ? t.index.size(1) : 0;
  if ((per != 1 && per != 4 && per != 16) || t.index.size(0) != s.steps)
    fail("index", "shape [steps, 16], [steps, 4] or [steps, 1]", shape_of(t.index));
  s.group_rows = kSliceRows / per;
  s.group = per == 16 ? kGroup1 : per == 4 ? kGroup4 : kGroup16;
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor*>{"rows", &t.rows},
                                     std::pair<const char*, const Tensor*>{"length", &t.length}})
    if (tensor->dim() != 2 || tensor->size(0) != slices || tensor->size(1) != per)
      fail(name, "shape [" + std::to_string(slices) + ", " + std::to_string(per) + "]",
           shape_of(*tensor));
  check_vector("ptr", t.ptr, slices + 1);
  if (s.kind == kWordS8) {
    check_cpu("scale", *t.scale);
    check_cpu("sums", *t.sums);
    check_dtype("scale", *t.scale, ScalarType::Float);
    check_dtype("sums", *t.sums, ScalarType::Int);
    check_vector("scale", *t.scale, n);
    check_vector("sums", *t.sums, n);
  }
  s.values = dense(t.values);
  s.index = dense(t.index);
  s.rows = dense(t.rows);
  s.length = dense(t.length);
  s.ptr_tensor = dense(t.ptr);
  s.scale = dense(t.scale);
  s.sums = dense(t.sums);
  s.selected = select_sparse(s.kind);
  const int32_t* p = s.ptr(0, 0);
  if (p[0] != 0 || p[slices] != s.steps) broken_sparse();
  return s;
}

void check_sparse_call(const CompressedCall& call, const SparseStorage& s) {
  if (s.kind == kWordBf16 && call.dtype != ScalarType::BFloat16)
    fail("x", "dtype bf16, that of the values", short_name(call.dtype));
}

namespace {

// Vectors of a tile of x: the most, unless threads would find no task.
int tile_vectors(const CompressedCall& call, const SparseStorage& s) {
  int vectors = s.kernels().max_vectors;
  const auto tasks = [&] {
    const int64_t rows = int64_t(s.kernels().width) * vectors;
    return s.chunks * ((call.m + rows - 1) / rows);
  };
  while (vectors > 1 && tasks() < torch::stable::get_num_threads()) vectors /= 2;
  return vectors;
}

// Whether a task takes one tile of x through all of W: it quantises and transposes the tile itself,
// where it is cached then, and threads wait for each other once. W is read anew for each tile, so
// that it must fit the L2 cache, and the tiles must share out.
constexpr int64_t kNearWords = int64_t(1) << 20;  // bytes of W
constexpr int64_t kNearTile = int64_t(1) << 18;   // of a tile

bool by_tiles(const Tiles& tiles, const SparseStorage& s) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = (tiles.count() + threads - 1) / threads;  // tiles of a thread
  return s.steps * kSliceRows * 4 <= kNearWords && tiles.tile_bytes() <= kNearTile &&
         8 * most * threads <= 9 * tiles.count();
}

}  // namespace

void sparse_product(const CompressedCall& call, const SparseStorage& s, void* y, YKind y_kind) {
  const RowScales scales(s.kind == kWordS8 ? call.m : 0);
  const bool worth = call.m * call.k > kWorthThreads / 16;
  const bool worth_product =
      call.m * (s.steps * kSliceRows * s.columns() + call.n * 16) > kWorthThreads;
  const auto fill = row_filler(call, s, scales);
  int32_t y_bad = 0;
  FinishTask base = finish_task(call, y, y_kind, &y_bad);
  base.row_scale = scales.scale();
  base.zero_point = scales.zero_point();
  base.scale = s.scales();
  std::atomic<bool> sound{true};
  const auto hold = [&](bool found) {
    if (!found) sound.store(false, std::memory_order_relaxed);
  };
  if (rows_form(call.m)) {
    const RowWords rows(call.m, s.words(), worth, fill);
    const Product product{call, s, scales, &rows, nullptr, base};
    for_each_task(s.chunks, worth_product, [&](int64_t c) {
      hold(product.run(c, 0, nullptr, scratch(product.bytes(call.m))));
    });
  } else {
    const Tiles tiles(call.kernels(), call.m, s.used_words(), s.words(), tile_vectors(call, s));
    const Product product{call, s, scales, nullptr, &tiles, base};
    const int64_t memory = product.bytes(tiles.lanes(0));
    if (by_tiles(tiles, s)) {
      const int64_t more = memory > tiles.row_bytes() ? memory : tiles.row_bytes();
      for_each_task(tiles.count(), worth_product, [&](int64_t tile) {
        char* const x = scratch(tiles.tile_bytes() + more);
        char* const rest = x + tiles.tile_bytes();
        tiles.fill_tile(tile, rest, x, fill);
        for (int64_t c = 0; c < s.chunks; ++c) hold(product.run(c, tile, x, rest));
      });
    } else {
      const TileWords words(tiles, worth, fill);
      // A task takes all tiles of its chunk (whose words then stay cached), unless tasks run short.
      const int64_t count = tiles.count();
      const int64_t split = s.chunks < 4 * int64_t(torch::stable::get_num_threads()) ? count : 1;
      for_each_task(s.chunks * split, worth_product, [&](int64_t task) {
        const int64_t c = task / split, first = task % split;
        for (int64_t tile = first; tile < (split > 1 ? first + 1 : count); ++tile)
          hold(product.run(c, tile, words.at(tile, 0), scratch(memory)));
      });
    }
  }
  if (!sound.load()) broken_sparse();
  check_finite(y_bad);
}

std::pair<std::string, std::string> choose_sparse_linear(int64_t m, const std::string& values,
                                                         const std::string& dtype, bool y_u8) {
  SparseStorage s;
  s.kind = values == "s8" ? kWordS8 : values == "bf16" ? kWordBf16 : kWordF32;
  const std::string limit = std::to_string(kRowsForm) + " rows of x";
  return {kernel_name(select_sparse(s.kind).isa, "sparse_linear", dtype.c_str(),
                      form_of(s, m, y_u8).c_str()),
          (rows_form(m) ? "one row of W a lane, words of x looked up, up to " + limit
                        : "one row of x a lane, a panel of x in the L1 cache, above " + limit) +
              (y_u8 ? ", result stored as u8" : "")};
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "sparse_linear.code", TORCH_BOX(&bigops::sparse_linear));
  bigops::implement(m, "sparse_linear_u8.code", TORCH_BOX(&bigops::sparse_linear_u8));
  bigops::implement(m, "sparse_linear_rows.code", TORCH_BOX(&bigops::sparse_linear_rows));
}
