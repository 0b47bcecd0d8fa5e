// quantized_linear on the CPU: int8 and int4 weights, activations in floating point or in u8.

#include "cpu/simd/quantized_linear.h"

#include <cstring>

#include "common/kernel_table.h"
#include "common/record.h"
#include "cpu/compressed_linear.h"
#include "cpu/quantized_weight.h"

namespace bigops {
namespace {

constexpr int64_t kChunkRows = 24;  // rows of x between two epilogues: four register blocks
constexpr int64_t kPanelTiles = 8;  // tiles of a task, where one chunk takes all rows;
constexpr int64_t kReadAgain = 4;   // else 256 KB of int8 at K = 4096 stay in L2 for all chunks
// The same of tile registers: pieces of 1 KB of 64 rows of y are written, where 4 tiles would make
// pieces of 256 bytes. 1536 x 384 at 512 rows takes 551 us so, 616 by 4.
constexpr int64_t kTileChunkRows = 64;
constexpr int64_t kTilePanel = 16;
// Below them vpdpbusd is the faster: 0.93 of the time by tiles at 6 rows of 768 x 3072, 1.16 at 8.
constexpr int64_t kLeastTileRows = 8;
// Of int4: in float the sums of each group are added up, and 32 columns fill half a register. Of
// 2048 x 4096 at 16 rows 1.4 times as fast as vpdpbusd by groups of 64, 0.8 times by 32.
constexpr int64_t kLeastTileGroup = 64;
constexpr int64_t kCachedBytes = int64_t(4)
                                 << 20;  // of a weight that caches may hold from call to call
constexpr int64_t kDecodedTiles = 16;    // 64 KB of floats in the backward
constexpr int64_t kGradChunk = 192;      // rows of a gradient that share them, 48 KB

struct Chosen {
  Isa isa;
  void (*product)(const QuantizedTask&);
  bool pairs;  // x stays bf16

  bool tiles() const { return isa == Isa::amx; }
  int64_t chunk_rows() const { return tiles() ? kTileChunkRows : kChunkRows; }
};

const QuantizedKernels& baseline(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512_quantized;
  if (isa >= Isa::avx2) return avx2_quantized;
#endif
  return portable_quantized;
}

Isa at_most(Isa isa, Isa limit) { return isa < limit ? isa : limit; }

// Each product by the highest instruction set that adds something to it.
Chosen choose(int64_t m, int64_t bits, int64_t group, bool integer, bool bf16) {
  const Isa isa = active_isa();
#ifdef BIGOPS_AMX
  if (isa >= Isa::amx && integer && m >= kLeastTileRows && (group == 0 || group >= kLeastTileGroup))
    return {Isa::amx, bits == 8 ? amx_quantized.w8a8 : amx_quantized.w4a8, false};
#endif
  const IntegerProducts* integers = &baseline(isa).integer;
  const FloatProducts* floats = &baseline(isa).floats;
  bool pairs = false;
#if defined(__x86_64__)
  if (isa >= Isa::avx512vnni) integers = &avx512vnni_quantized;
  if (isa >= Isa::avx512bf16 && bf16 && bf16_dot_pays()) {
    floats = &avx512bf16_quantized;
    pairs = true;
  }
#endif
  if (integer)
    return {at_most(isa, Isa::avx512vnni), bits == 8 ? integers->w8a8 : integers->w4a8, false};
  return {at_most(isa, pairs ? Isa::avx512bf16 : Isa::avx512), bits == 8 ? floats->w8 : floats->w4,
          pairs};
}

Chosen choose(const CompressedCall& call, const Weight& w) {
  return choose(call.m, w.bits, w.group, w.integer(), call.kind == kBFloat16);
}

// x as the kernels read it: rows of whole lines, zero beyond K, in u8, float or bf16.
class Rows {
 public:
  Rows(const CompressedCall& call, const Weight& w, const Chosen& chosen)
      : item_(w.integer()    ? 1
              : chosen.pairs ? 2
                             : 4),
        stride_(round_up(w.lines * w.columns * item_, chosen.tiles() ? kStepBytes : 1)),
        head_(round_up(call.m * 4, 64)),
        direct_(stride_ == call.k * static_cast<int64_t>(call.item()) &&
                item_ == static_cast<int64_t>(call.item()) && !(w.integer() && w.bits == 4)),
        buffer_((w.integer() ? 3 * head_ : 0) + (direct_ ? 0 : call.m * stride_ + kStepBytes)),
        base_(direct_ ? call.row(0) : buffer_.at(w.integer() ? 3 * head_ : 0)) {
    if (direct_ && !w.integer()) return;
    const QuantizedKernels& kernels = baseline(active_isa());
    const auto fill = [&](int64_t begin, int64_t end) {
      if (w.integer()) return quantize(call, w, kernels, begin, end);
      for (int64_t i = begin; i < end; ++i) {
        char* to = const_cast<char*>(at(i));
        if (chosen.pairs)
          std::memcpy(to, call.row(i), static_cast<size_t>(call.k * 2));
        else
          call.kernels().widen[call.kind](call.row(i), call.k, reinterpret_cast<float*>(to));
        std::memset(to + call.k * item_, 0, static_cast<size_t>(stride_ - call.k * item_));
      }
    };
    for_tasks(call.m, call.m * call.k > kWorthThreads / 4, fill);
  }

  const char* at(int64_t row) const { return base_ + row * stride_; }
  int64_t stride() const { return stride_; }
  float* scale() const { return reinterpret_cast<float*>(buffer_.at(0)); }
  int32_t* zero() const { return reinterpret_cast<int32_t*>(buffer_.at(head_)); }
  int32_t* sum() const { return reinterpret_cast<int32_t*>(buffer_.at(2 * head_)); }

 private:
  // Rows [begin, end), which are u8 already where they are read directly.
  void quantize(const CompressedCall& call, const Weight& w, const QuantizedKernels& kernels,
                int64_t begin, int64_t end) {
    if (direct_)
      u8_qparams(call, begin, end - begin, scale() + begin, zero() + begin);
    else
      quantize_rows(call, begin, end - begin, const_cast<char*>(at(begin)), stride_,
                    scale() + begin, zero() + begin);
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* q = reinterpret_cast<uint8_t*>(const_cast<char*>(at(i)));
      if (w.bits == 8 && w.zero() != nullptr)
        sum()[i] = kernels.sum(q, w.k) - static_cast<int32_t>(w.k) * zero()[i];
      if (w.bits == 4) kernels.interleave(q, stride_);
    }
  }

  int64_t item_, stride_, head_;
  bool direct_;
  Buffer buffer_;
  const char* base_;
};

// Sums past int32: parts of K added in int64, then z in float. tile [rows][stride].
void wide_sums(const Weight& w, const Rows& x, const Chosen& chosen, QuantizedTask t, int64_t m0,
               int64_t tile0, int64_t* total, int32_t* tile) {
  const int64_t columns = t.tiles * kWeightTile, part = kExactColumns / w.columns;
  std::memset(total, 0, static_cast<size_t>(t.rows * columns) * sizeof(int64_t));
  t.zero_point = nullptr;
  for (int64_t line = 0; line < w.lines; line += part) {
    QuantizedTask p = t;
    p.lines = w.lines - line < part ? w.lines - line : part;
    p.values += line * kLineBytes;
    p.x = static_cast<const uint8_t*>(p.x) + line * w.columns;
    chosen.product(p);
    for (int64_t m = 0; m < t.rows; ++m)
      for (int64_t n = 0; n < columns; ++n) total[m * columns + n] += tile[m * t.out_stride + n];
  }
  const int32_t* sums = static_cast<const int32_t*>(data(w.sum_tensor)) + tile0 * kWeightTile;
  const int8_t* zero = w.zero() == nullptr ? nullptr : w.zero() + tile0 * kWeightTile;
  const float* scale = w.scale() + tile0 * kWeightTile;
  for (int64_t m = 0; m < t.rows; ++m)
    for (int64_t n = 0; n < columns; ++n) {
      int64_t sum = total[m * columns + n] - static_cast<int64_t>(x.zero()[m0 + m]) * sums[n];
      if (zero != nullptr) sum -= static_cast<int64_t>(zero[n]) * x.sum()[m0 + m];
      const float z = static_cast<float>(sum) * (x.scale()[m0 + m] * scale[n]);
      std::memcpy(tile + m * t.out_stride + n, &z, sizeof(z));
    }
}

// Tiles of a task.
int64_t panel_of(const Chosen& chosen, int64_t m, int64_t tiles, int64_t threads) {
  const int64_t chunk = chosen.chunk_rows();
  if (chosen.tiles() && tiles * ((m + chunk - 1) / chunk) >= 4 * threads * kTilePanel)
    return kTilePanel;
  return m > chunk || tiles < 4 * threads * kPanelTiles ? kReadAgain : kPanelTiles;
}

// y: [M, N].
void product(const CompressedCall& call, const Weight& w, void* y, YKind y_kind) {
  const CompressedKernels& kernels = call.kernels();
  const Chosen chosen = choose(call, w);
  const Rows x(call, w, chosen);
  const bool wide = w.exact() && call.k > kExactColumns;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunk = chosen.chunk_rows();
  const int64_t panel = panel_of(chosen, call.m, w.tiles, threads);
  const int64_t panels = (w.tiles + panel - 1) / panel;
  // A task takes all rows of x, so that its panel is read from memory once, unless tasks run short.
  const int64_t chunks = (call.m + chunk - 1) / chunk;
  const int64_t split = panels >= 4 * threads ? 1 : chunks < 4 ? chunks : 4;
  const int64_t per_task = (chunks + split - 1) / split * chunk;
  const int64_t stride = panel * kWeightTile;

  QuantizedTask base{};
  base.x_stride = x.stride();
  base.tile_stride = w.tile_bytes();
  base.lines = w.lines;
  base.out_stride = stride;
  base.group_lines = w.group_lines;
  base.stride = w.stride;
  int32_t y_bad = 0;
  FinishTask finish = finish_task(call, y, y_kind, &y_bad);
  finish.stride = stride;
  if (w.exact()) {
    finish.row_scale = x.scale();
    finish.zero_point = x.zero();
    finish.scale = wide ? nullptr : w.scale();
  }

  const auto run = [&](int64_t task) {
    const int64_t tile = task / split * panel, row = task % split * per_task;
    QuantizedTask t = base;
    t.values = w.values() + tile * w.tile_bytes();
    t.tiles = w.tiles - tile < panel ? w.tiles - tile : panel;
    t.scale = w.scale() + tile * kWeightTile;
    if (w.zero() != nullptr) t.zero_point = w.zero() + tile * kWeightTile;
    const int64_t sums = chunk * stride;
    char* memory = scratch(sums * (wide ? 12 : w.exact() ? 4 : 8));
    t.out = memory + (wide ? sums * 8 : 0);
    if (!w.exact()) t.totals = reinterpret_cast<float*>(memory + sums * 4);
    FinishTask f = finish;
    f.tile = t.out;
    f.n0 = tile * kWeightTile;
    f.n1 = f.n0 + stride < call.n ? f.n0 + stride : call.n;
    if (w.exact())
      f.sums = static_cast<const int32_t*>(data(w.sum_tensor)) + f.n0;
    else if (w.integer())
      t.row_sum = static_cast<const float*>(data(w.sum_tensor)) + f.n0;
    const int64_t stop = row + per_task < call.m ? row + per_task : call.m;
    for (int64_t m = row; m < stop; m += chunk) {
      t.rows = stop - m < chunk ? stop - m : chunk;
      t.x = x.at(m);
      t.from_memory = m == row && w.tiles * w.tile_bytes() > kCachedBytes;
      if (w.integer()) {
        t.x_scale = x.scale() + m;
        t.x_zero = x.zero() + m;
        t.x_sum = x.sum() + m;
      }
      if (wide)
        wide_sums(w, x, chosen, t, m, tile, reinterpret_cast<int64_t*>(memory),
                  static_cast<int32_t*>(t.out));
      else
        chosen.product(t);
      f.m0 = m;
      f.m1 = m + t.rows;
      kernels.finish[call.kind](f);
    }
  };
  for_each_task_near(panels * split, call.m * call.n * (call.k + 16) > kWorthThreads, run);
  check_finite(y_bad);
}

// gx [M, K] = gz [M, N] times the dequantised weight.
void gradient(const CompressedCall& call, const Weight& w, const float* gz, void* gx) {
  const CompressedKernels& kernels = call.kernels();
  const QuantizedKernels& quantized = baseline(active_isa());
  const auto decode = w.bits == 8 ? quantized.decode8 : quantized.decode4;
  const int64_t block_lines = kGradColumns / w.columns;
  const auto run = [&](int64_t block) {
    constexpr int64_t kTile = kGradColumns * kWeightTile;
    float* columns = reinterpret_cast<float*>(
        scratch((kTile * (1 + kDecodedTiles) + kGradChunk * kGradColumns) * 4));
    float* rows = columns + kTile;
    float* sums = rows + kTile * kDecodedTiles;
    DecodeTask d{};
    d.first = block * block_lines;
    d.lines = w.lines - d.first < block_lines ? w.lines - d.first : block_lines;
    d.group_lines = w.group_lines;
    d.stride = w.stride;
    d.out = columns;
    std::memset(columns, 0, kTile * 4);  // columns past the end of K
    const int64_t k0 = block * kGradColumns;
    const int64_t k1 = k0 + kGradColumns < call.k ? k0 + kGradColumns : call.k;
    for (int64_t m0 = 0; m0 < call.m; m0 += kGradChunk) {
      const int64_t m1 = m0 + kGradChunk < call.m ? m0 + kGradChunk : call.m;
      for (int64_t tile0 = 0; tile0 < w.tiles; tile0 += kDecodedTiles) {
        const int64_t tiles = w.tiles - tile0 < kDecodedTiles ? w.tiles - tile0 : kDecodedTiles;
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t n = (tile0 + i) * kWeightTile;
          d.values = w.values() + (tile0 + i) * w.tile_bytes() + d.first * kLineBytes;
          d.scale = w.scale() + n;
          d.zero_point = w.zero() == nullptr ? nullptr : w.zero() + n;
          decode(d);
          kernels.transpose(
              {columns, kWeightTile, kGradColumns, kWeightTile, rows + i * kTile, kGradColumns});
        }
        const int64_t n0 = tile0 * kWeightTile, n1 = n0 + tiles * kWeightTile;
        FloatGradTask t{};
        t.grad_stride = call.n;
        t.n = (n1 < call.n ? n1 : call.n) - n0;
        t.weight = rows;
        t.first = tile0 == 0;
        for (int64_t m = m0; m < m1; m += kGradRows) {
          t.grad = gz + m * call.n + n0;
          t.m = m1 - m < kGradRows ? m1 - m : kGradRows;
          t.out = sums + (m - m0) * kGradColumns;
          quantized.grad(t);
        }
      }
      if (w.tiles == 0) std::memset(sums, 0, static_cast<size_t>((m1 - m0) * kGradColumns) * 4);
      store_tile(call, sums, kGradColumns, m0, m1, k0, k1, gx);
    }
  };
  for_each_task(call.m > 0 ? (call.k + kGradColumns - 1) / kGradColumns : 0,
                call.m * call.n * call.k > kWorthThreads, run);
}

// A call whose x becomes u8 as the weight says.
CompressedCall seen_by(const Weight& w, CompressedCall call) {
  call.x_qparams = w.qparams();
  call.mode = w.mode == kStatic      ? kStaticRows
              : w.mode == kSymmetric ? kSymmetricRows
                                     : kDynamicRows;
  return call;
}

Tensor run(const CompressedCall& given, const Weight& w) {
  const CompressedCall call = seen_by(w, given);
  if (g_recording.load(std::memory_order_relaxed) != 0)
    record(choose(call, w).isa, "quantized_linear", call.x_name(),
           form_name(w.form(), call.y_qparams.has_value()).c_str());
  Tensor y = empty_rows_like(call.x, call.n, call.y_dtype());
  if (!call.empty()) product(call, w, y.mutable_data_ptr(), call.y_kind());
  return y;
}

Tensor quantized_linear(const Tensor& x, const Tensor& values, const Tensor& scale,
                        const OptTensor& zero_point, const OptTensor& row_sum,
                        const OptTensor& x_qparams, int64_t pad, int64_t k, int64_t bits,
                        int64_t group, int64_t activations, const OptTensor& bias,
                        const OptTensor& residual, int64_t activation) {
  const Weight w =
      check_weight(values, scale, zero_point, row_sum, x_qparams, pad, k, bits, group, activations);
  return run(check_compressed(x, w.n, k, bias, residual, activation), w);
}

Tensor quantized_linear_u8(const Tensor& x, const Tensor& values, const Tensor& scale,
                           const OptTensor& zero_point, const OptTensor& row_sum,
                           const OptTensor& x_qparams, int64_t pad, int64_t k, int64_t bits,
                           int64_t group, int64_t activations, const OptTensor& y_qparams,
                           const OptTensor& bias, const OptTensor& residual, int64_t activation) {
  const Weight w =
      check_weight(values, scale, zero_point, row_sum, x_qparams, pad, k, bits, group, activations);
  return run(check_compressed(x, w.n, k, x_qparams, y_qparams, bias, residual, activation), w);
}

Tensor quantized_linear_rows(const Tensor& x, const Tensor& x_scale, const Tensor& x_zero_point,
                             const Tensor& values, const Tensor& scale, const OptTensor& zero_point,
                             const OptTensor& row_sum, const OptTensor& x_qparams, int64_t pad,
                             int64_t k, int64_t bits, int64_t group, int64_t activations,
                             const OptTensor& bias, const OptTensor& residual, int64_t activation) {
  const Weight w =
      check_weight(values, scale, zero_point, row_sum, x_qparams, pad, k, bits, group, activations);
  if (w.mode != kDynamic && w.mode != kSymmetric)
    fail("activations", "dynamic or symmetric with quantised rows", kActivateWords[w.mode]);
  return run(check_compressed_rows(x, x_scale, x_zero_point, w.n, k, bias, residual, activation),
             w);
}

std::tuple<Tensor, Tensor> quantized_linear_backward(
    const Tensor& grad_any, const Tensor& x, const Tensor& values, const Tensor& scale,
    const OptTensor& zero_point, const OptTensor& row_sum, const OptTensor& x_qparams, int64_t pad,
    int64_t k, int64_t bits, int64_t group, int64_t activations, const OptTensor& bias,
    int64_t activation, bool need_x, bool need_bias) {
  const Weight w =
      check_weight(values, scale, zero_point, row_sum, x_qparams, pad, k, bits, group, activations);
  CompressedCall call = check_compressed(x, w.n, k, bias, OptTensor(grad_any), activation);
  const Tensor grad = *call.residual;  // checked as such: grad has the shape of y
  call.residual.reset();
  record(at_most(active_isa(), Isa::avx512), "quantized_linear_backward", short_name(call.dtype),
         w.bits == 8 ? "w8" : "w4");

  const bool pointwise = call.activation != kNone;
  const Buffer z(pointwise ? call.m * call.n * 4 : 0);
  if (pointwise && !call.empty()) {
    CompressedCall plain = seen_by(w, call);
    plain.activation = kNone;
    product(plain, w, z.at(0), kYFloat);
  }
  const Pointwise p =
      pointwise_backward(call, grad, pointwise ? reinterpret_cast<const float*>(z.at(0)) : nullptr,
                         nullptr, need_x, need_bias);
  if (!need_x) return {no_gradient(call.dtype), p.bias_grad};
  Tensor gx = empty_rows_like(x, call.k, call.dtype);
  gradient(call, w, reinterpret_cast<const float*>(p.gz.at(0)), gx.mutable_data_ptr());
  return {gx, p.bias_grad};
}

}  // namespace

std::pair<std::string, std::string> choose_quantized_linear(int64_t m, int64_t bits, int64_t group,
                                                            const std::string& activations,
                                                            const std::string& dtype, bool y_u8) {
  const bool integer = activations != kActivateWords[kFloating];
  const Chosen chosen = choose(m, bits, group, integer, dtype == "bf16");
  const std::string width = bits == 8 ? "8" : "4";
  const std::string form = form_name("w" + width + (integer ? "a8" : ""), y_u8);
  const std::string weight = "int" + width + " weight in tiles of 16 rows, ";
  return {kernel_name(chosen.isa, "quantized_linear", dtype.c_str(), form.c_str()),
          weight +
              (chosen.tiles() ? "u8 activations, integer sums in tile registers"
               : integer      ? "u8 activations, integer sums"
               : chosen.pairs ? "pairs of bf16 activations, float sums"
                              : "float activations and sums") +
              (y_u8 ? ", result stored as u8" : "")};
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "quantized_linear.code", TORCH_BOX(&bigops::quantized_linear));
  bigops::implement(m, "quantized_linear_u8.code", TORCH_BOX(&bigops::quantized_linear_u8));
  bigops::implement(m, "quantized_linear_rows.code", TORCH_BOX(&bigops::quantized_linear_rows));
  bigops::implement(m, "quantized_linear_backward.code",
                    TORCH_BOX(&bigops::quantized_linear_backward));
}
