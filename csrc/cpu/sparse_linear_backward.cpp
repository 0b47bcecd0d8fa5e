// sparse_linear on the CPU, backward: the transposed product for x, the sampled one for the values.

#include "cpu/sparse_linear.h"

#include "common/kernel_table.h"

#include <vector>

namespace bigops {
namespace {

// Writes rows of a float matrix [M, n] that is read as tiles.
auto float_rows(const float* from, int64_t n) {
  return each_row([from, n](int64_t i, char* to) {
    if (n > 0) std::memcpy(to, from + i * n, static_cast<size_t>(n * 4));
  });
}

inline uint16_t bf16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = value != value ? bits | 0x400000u : bits + 0x7fff + ((bits >> 16) & 1);
  return static_cast<uint16_t>(bits >> 16);
}

void to_bf16(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = bf16_of(from[i]);
}

// Writes rows 2i and 2i + 1 of a matrix [M, n] as pairs of bf16; a missing last row is zero.
template <class T, class F>
auto row_pairs(const T* from, int64_t m, int64_t n, const F& bf16) {
  return each_row([=](int64_t i, char* to) {
    const T *low = from + 2 * i * n, *high = low + n;
    const bool both = 2 * i + 1 < m;
    uint32_t* words = reinterpret_cast<uint32_t*>(to);
    for (int64_t k = 0; k < n; ++k) words[k] = bf16(low[k]);
    if (both)
      for (int64_t k = 0; k < n; ++k) words[k] |= static_cast<uint32_t>(bf16(high[k])) << 16;
  });
}

constexpr int64_t kPartRows = kPanelWords;  // rows of W whose gz stays in the L1 cache
constexpr int64_t kGradTiles = 4;           // tiles of x that share one transposed block

// Sums are added to a total after so many rows of W (for x) or of x (for the values): one sum over
// all of them would lose a digit where they are many.
constexpr int64_t kSumRowsOfW = 4096, kSumRowsOfX = 2048;

void add(const float* part, int64_t n, float* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += part[i];
}

template <WordKind kind>
float element(const char* word, int64_t column) {
  if (kind == kWordS8) return static_cast<float>(reinterpret_cast<const int8_t*>(word)[column]);
  uint32_t bits = 0;
  if (kind == kWordBf16) {
    uint16_t half;
    std::memcpy(&half, word + 2 * column, 2);
    bits = static_cast<uint32_t>(half) << 16;
  } else {
    std::memcpy(&bits, word, 4);
  }
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// One panel of one chunk, transposed: the same slices, whose rows are the columns of the panel and
// whose words are floats, in parts of 64 rows of W. So the forward's kernel gives gx; adding to gx
// word by word took 5 cycles a vector, the transposed block takes 1.5.
class TransposedBlock {
 public:
  TransposedBlock(const SparseStorage& s, int64_t c, int64_t p)
      : columns_(kPanelWords * s.columns()), parts_(s.chunk / kPartRows) {
    std::memset(count_, 0, sizeof(count_));
    if (s.kind == kWordF32)
      fill<kWordF32>(s, c, p);
    else if (s.kind == kWordBf16)
      fill<kWordBf16>(s, c, p);
    else
      fill<kWordS8>(s, c, p);
  }

  bool sound() const { return sound_; }

  // gx [columns][lanes] += the block times gz [chunk][lanes].
  void run(const SparseKernels& kernels, const char* gz, int vectors, int64_t lanes,
           float* gx) const {
    SparseTask t{};
    t.index = index_.data();
    t.words = words_.data();
    t.slices = columns_ / kSliceRows;
    t.vectors = vectors;
    t.acc = gx;
    for (int64_t part = 0; part < parts_; ++part) {
      t.ptr = ptr_ + part * t.slices;
      t.rows = rows_ + part * columns_;
      t.x = gz + part * kPartRows * lanes * 4;
      kernels.columns[kGroup1](t);
    }
  }

 private:
  static constexpr int64_t kMostKeys = 4 * kPanelWords * 4;  // parts times columns

  template <WordKind kind>
  void fill(const SparseStorage& s, int64_t c, int64_t p) {
    constexpr int64_t g = kWordColumns[kind];
    visit(s, c, p, [&](int64_t row, int64_t word, int64_t) {
      int32_t* at = count_ + row / kPartRows * columns_ + word * g;
      for (int64_t e = 0; e < g; ++e) ++at[e];
    });
    // Rows that come twice in a chunk (broken storage) could make a column longer than a part.
    for (int64_t i = 0; i < parts_ * columns_; ++i) sound_ = sound_ && count_[i] <= kPartRows;
    if (!sound_) return;
    sort();
    const int64_t words = ptr_[parts_ * columns_ / kSliceRows] * kSliceRows;
    words_.assign(static_cast<size_t>(words), 0.0f);
    index_.assign(static_cast<size_t>(words), 0);
    const char* from = static_cast<const char*>(s.values.const_data_ptr());
    float* to = words_.data();
    uint8_t* index = index_.data();
    visit(s, c, p, [&](int64_t row, int64_t word, int64_t at) {
      int32_t* next = count_ + row / kPartRows * columns_ + word * g;
      for (int64_t e = 0; e < g; ++e) {
        const int32_t place = next[e];
        next[e] = place + static_cast<int32_t>(kSliceRows);
        to[place] = element<kind>(from + at * 4, e);
        index[place] = static_cast<uint8_t>(row % kPartRows);
      }
    });
  }

  // f(row of the chunk, word of the panel, position in values) for all that is no padding.
  template <class F>
  static void visit(const SparseStorage& s, int64_t c, int64_t p, const F& f) {
    const int32_t* ptr = s.ptr(c, p);
    const uint8_t* groups = s.groups(s.rows, c, p);
    const uint8_t* lengths = s.groups(s.length, c, p);
    const uint8_t* indices = s.indices();
    const int64_t per = kSliceRows / s.group_rows, group = s.group_rows;
    for (int64_t i = 0; i < s.spc; ++i)
      for (int64_t r = 0; r < kSliceRows; ++r) {
        const int64_t place = i * per + r / group, steps = ptr[i + 1] - ptr[i];
        const int64_t row = groups[place] * group + r % group;
        const int64_t most = lengths[place] < steps ? lengths[place] : steps;
        const uint8_t* index = indices + int64_t(ptr[i]) * per + r / group;
        int64_t at = int64_t(ptr[i]) * kSliceRows + r;
        for (int64_t j = 0; j < most; ++j, index += per, at += kSliceRows) f(row, *index, at);
      }
  }

  // Columns of each part by falling length; count_ becomes where each column's next word goes.
  void sort() {
    int32_t steps = 0, slice = 0;
    for (int64_t part = 0; part < parts_; ++part) {
      int32_t* count = count_ + part * columns_;
      uint8_t* order = rows_ + part * columns_;
      int32_t start[kPartRows + 2] = {};  // counting sort: a column has at most kPartRows words
      for (int64_t k = 0; k < columns_; ++k) ++start[kPartRows - count[k] + 1];
      for (int64_t i = 0; i < kPartRows; ++i) start[i + 1] += start[i];
      for (int64_t k = 0; k < columns_; ++k)
        order[start[kPartRows - count[k]]++] = static_cast<uint8_t>(k);
      for (int64_t i = 0; i < columns_; i += kSliceRows) {
        ptr_[slice++] = steps;
        const int32_t longest = count[order[i]];
        for (int64_t r = 0; r < kSliceRows; ++r)
          count[order[i + r]] = steps * static_cast<int32_t>(kSliceRows) + static_cast<int32_t>(r);
        steps += longest;
      }
    }
    ptr_[slice] = steps;
  }

  int64_t columns_, parts_;
  bool sound_ = true;
  int32_t count_[kMostKeys];
  int32_t ptr_[kMostKeys / kSliceRows + 1];
  uint8_t rows_[kMostKeys];
  std::vector<float> words_;
  std::vector<uint8_t> index_;
};

// gx = gz W: a task owns one panel of columns for some tiles of rows of x, so that nothing is added
// to by two threads and the order of additions is fixed.
void input_gradient(const CompressedCall& call, const SparseStorage& s, const TileWords& gz,
                    void* gx) {
  const SparseKernels& kernels = *select_sparse(kWordF32).kernels;
  const int64_t width = kPanelWords * s.columns();  // columns of a panel
  const int64_t groups = (gz.count() + kGradTiles - 1) / kGradTiles;
  std::atomic<bool> sound{true};
  const auto run = [&](int64_t task) {
    const int64_t p = task / groups, first = task % groups * kGradTiles;
    const int64_t last = first + kGradTiles < gz.count() ? first + kGradTiles : gz.count();
    const int64_t size = width * gz.lanes(first), count = size * (last - first);
    const int64_t step = kSumRowsOfW / s.chunk;
    const bool in_parts = s.chunks > step;
    float* const total = reinterpret_cast<float*>(scratch(count * (in_parts ? 8 : 4)));
    float* const part = in_parts ? total + count : total;
    std::memset(total, 0, static_cast<size_t>(count * 4));
    for (int64_t c0 = 0; c0 < s.chunks; c0 += step) {
      if (in_parts) std::memset(part, 0, static_cast<size_t>(count * 4));
      for (int64_t c = c0; c < s.chunks && c < c0 + step; ++c) {
        const TransposedBlock block(s, c, p);
        if (!block.sound()) return sound.store(false, std::memory_order_relaxed);
        for (int64_t i = first; i < last; ++i)
          block.run(kernels, gz.at(i, s.first_row(c)), gz.vectors(i), gz.lanes(i),
                    part + (i - first) * size);
      }
      if (in_parts) add(part, count, total);
    }
    for (int64_t i = first; i < last; ++i) {
      FinishTask f{};
      f.tile = total + (i - first) * size;
      f.stride = gz.lanes(i);
      f.y = gx;
      f.n = call.k;
      f.m0 = gz.first_row(i);
      f.m1 = f.m0 + gz.row_count(i);
      f.n0 = p * width;
      f.n1 = f.n0 + width < call.k ? f.n0 + width : call.k;
      f.activation = kNone;
      call.kernels().finish_columns[call.kind](f);
    }
  };
  for_each_task(s.panels * groups,
                call.m * (s.steps * kSliceRows * s.columns() + call.k) > kWorthThreads, run);
  if (!sound.load()) broken_sparse();
}

// Sums [steps][16][columns] of one panel of one chunk: padding becomes 0 again, and so do rows and
// columns past the matrix, where the sum may be 0 * inf.
void clear_padding(const SparseStorage& s, int64_t c, int64_t p, float* sums) {
  const int32_t* ptr = s.ptr(c, p);
  const uint8_t* lengths = s.groups(s.length, c, p);
  const uint8_t* groups = s.groups(s.rows, c, p);
  const int64_t g = s.columns(), group = s.group_rows, per = kSliceRows / group;
  const int64_t cut = s.k % g, last_word = s.k / g - p * kPanelWords;  // the word that K cuts
  const auto zero = [](float* at, int64_t n) { std::memset(at, 0, static_cast<size_t>(n * 4)); };
  for (int64_t place = 0; place < s.spc * per; ++place) {
    const int64_t i = place / per, steps = ptr[i + 1] - ptr[i];
    const int64_t inside = s.n - s.first_row(c) - groups[place] * group;  // rows of the group
    const uint8_t* index = s.indices() + int64_t(ptr[i]) * per + place % per;
    float* at = sums + ((ptr[i] - ptr[0]) * per + place % per) * group * g;
    const int64_t stored = lengths[place] < steps ? lengths[place] : steps;
    const int64_t kept = inside > group ? group : inside > 0 ? inside : 0;
    for (int64_t j = kept < group ? 0 : stored; j < steps; ++j) {
      const int64_t from = j < stored ? kept : 0;
      zero(at + j * kSliceRows * g + from * g, (group - from) * g);
    }
    for (int64_t j = 0; cut > 0 && j < stored; ++j)
      if (index[j * per] == last_word)
        for (int64_t r = 0; r < group; ++r) zero(at + j * kSliceRows * g + r * g + cut, g - cut);
  }
}

// The entries of gz^T x at the stored positions. A task owns one panel of one chunk and goes over
// all tiles of rows of x in order.
void value_gradient(const CompressedCall& call, const SparseStorage& s, const float* gz_rows,
                    void* out) {
  const SparseKernels& kernels = s.kernels();
  const bool pairs = kernels.grad_pairs;
  const auto tiles = [&](int64_t used, int64_t words, const auto& fill) {
    return TileWords(
        {call.kernels(), pairs ? (call.m + 1) / 2 : call.m, used, words, kernels.grad_vectors},
        call.m * used > kWorthThreads / 8, fill);
  };
  const auto widened = each_row([&call](int64_t i, char* to) {
    call.kernels().widen[call.kind](call.row(i), call.k, reinterpret_cast<float*>(to));
  });
  const auto as_stored = [](uint16_t bits) { return bits; };  // x is bf16 where the values are
  const uint16_t* x_rows = static_cast<const uint16_t*>(call.x.const_data_ptr());
  const int64_t padded_n = s.chunks * s.chunk, padded_k = s.words() * s.columns();
  const TileWords gz =
      pairs ? tiles(call.n, padded_n,
                    row_pairs(gz_rows, call.m, call.n, [](float v) { return bf16_of(v); }))
            : tiles(call.n, padded_n, float_rows(gz_rows, call.n));
  const TileWords x = pairs ? tiles(call.k, padded_k, row_pairs(x_rows, call.m, call.k, as_stored))
                            : tiles(call.k, padded_k, widened);
  const int64_t width = kPanelWords * s.columns();
  // tiles of a part; a tile holds at most kSumRowsOfX rows
  const int64_t step =
      kSumRowsOfX / (int64_t(kernels.width) * kernels.grad_vectors * (pairs ? 2 : 1));
  const auto run = [&](int64_t task) {
    const int64_t c = task / s.panels, p = task % s.panels;
    SampleTask t{};
    t.ptr = s.ptr(c, p);
    t.index = s.indices();
    t.rows = s.groups(s.rows, c, p);
    t.slices = s.spc;
    const int64_t first = t.ptr[0] * kSliceRows * s.columns();
    const int64_t count = t.ptr[s.spc] * kSliceRows * s.columns() - first;
    if (count == 0) return;  // and no memory to set, if nothing is stored at all
    const bool in_place = s.kind == kWordF32, in_parts = call.m > kSumRowsOfX;
    float* const memory = reinterpret_cast<float*>(scratch(count * 8));
    float* const total = in_place ? static_cast<float*>(out) + first : memory + count;
    t.out = in_parts ? memory : total;
    std::memset(total, 0, static_cast<size_t>(count * 4));
    for (int64_t i0 = 0; i0 < gz.count(); i0 += step) {
      if (in_parts) std::memset(t.out, 0, static_cast<size_t>(count * 4));
      for (int64_t i = i0; i < gz.count() && i < i0 + step; ++i) {
        t.vectors = gz.vectors(i);
        t.grad = reinterpret_cast<const int32_t*>(gz.at(i, s.first_row(c)));
        t.x = reinterpret_cast<const int32_t*>(x.at(i, p * width));
        kernels.sample[s.group](t);
      }
      if (in_parts) add(t.out, count, total);
    }
    clear_padding(s, c, p, total);
    if (!in_place) to_bf16(total, count, static_cast<uint16_t*>(out) + first);
  };
  for_each_task(s.chunks * s.panels, call.m * s.steps * kSliceRows * s.columns() > kWorthThreads,
                run);
}

std::tuple<Tensor, Tensor, Tensor> sparse_linear_backward(
    const Tensor& grad_any, const Tensor& x, const Tensor& values, const Tensor& index,
    const Tensor& rows, const Tensor& length, const Tensor& ptr, const OptTensor& scale,
    const OptTensor& sums, int64_t n, int64_t chunk, const OptTensor& bias, int64_t activation,
    bool need_x, bool need_values, bool need_bias) {
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
           (std::string(word_name(s.kind)) + (need_x ? "_transposed" : "") +
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
    sparse_product(plain, s, z.at(0), kYFloat);
  }
  // gz is grad itself where nothing changes it
  const bool same = !pointwise && call.dtype == ScalarType::Float && s.kind != kWordS8;
  const Pointwise p =
      pointwise_backward(call, grad, z_data, s.scales(), products && !same, need_bias);
  const float* gz = same ? static_cast<const float*>(grad.const_data_ptr())
                         : reinterpret_cast<const float*>(p.gz.at(0));
  Tensor gx = no_gradient(call.dtype), gv = no_gradient(call.dtype);
  if (need_x) gx = empty_rows_like(x, call.k, call.dtype);
  if (need_values) {
    const int64_t shape[3] = {s.steps, kSliceRows, s.columns()};
    gv = empty(shape, 3, values.scalar_type());
  }
  if (!products) return {gx, gv, p.bias_grad};
  if (need_x && call.m > 0) {
    const TileWords tiles({call.kernels(), call.m, call.n, s.chunks * s.chunk,
                           select_sparse(kWordF32).kernels->max_vectors},
                          call.m * call.n > kWorthThreads / 8, float_rows(gz, call.n));
    input_gradient(call, s, tiles, gx.mutable_data_ptr());
  }
  if (need_values) value_gradient(call, s, gz, gv.mutable_data_ptr());
  return {gx, gv, p.bias_grad};
}

}  // namespace
}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "sparse_linear_backward.code", TORCH_BOX(&bigops::sparse_linear_backward));
}
