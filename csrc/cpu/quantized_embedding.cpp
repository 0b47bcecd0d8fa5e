// quantized_embedding on the CPU: rows of an int8 or int4 weight by their numbers, dequantised.
//
// The weight lies as quantized_linear reads it, so that a head shares it with the embedding that it
// is tied to: of each line of 64 bytes a row has 4. A row of K columns touches K / 4 lines (8 bits)
// where a table of rows would touch K / 64; the lines lie one after the other, so that the
// processor asks for them ahead.

#include <atomic>
#include <cstring>

#include "common/kernel_table.h"
#include "common/record.h"
#include "cpu/quantized_embedding.h"
#include "cpu/quantized_weight.h"
#include "cpu/simd/quantized_embedding.h"

namespace bigops {
namespace {

constexpr int64_t kWorthThreads = 32'768;  // columns of all rows; waking a thread costs about 5 us

struct Chosen {
  const RowKernels* kernels;
  Isa isa;
};

Chosen choose_rows() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx512) return {&avx512_rows, Isa::avx512};
  if (active_isa() >= Isa::avx2) return {&avx2_rows, Isa::avx2};
#endif
  return {&portable_rows, Isa::portable};
}

int64_t id_at(const void* ids, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(ids)[i] : static_cast<const int32_t*>(ids)[i];
}

// [.., K] for ids [..]
Tensor quantized_embedding(const Tensor& ids_any, const Tensor& values, const Tensor& scale,
                           const OptTensor& zero_point, int64_t pad, int64_t k, int64_t bits,
                           int64_t group, ScalarType dtype) {
  const Weight w = check_weight(values, scale, zero_point, {}, {}, pad, k, bits, group, kFloating);
  if (group % kWeightTile != 0) fail("group", "0 or a multiple of 16", std::to_string(group));
  check_cpu("ids", ids_any);
  const bool wide = ids_any.scalar_type() == ScalarType::Long;
  if (!wide) check_dtype("ids", ids_any, ScalarType::Int);
  const FloatKind kind = float_kind("dtype", dtype);
  const Tensor ids = dense(ids_any);
  const Chosen chosen = choose_rows();
  record(chosen.isa, "quantized_embedding", short_name(dtype), bits == 8 ? "w8" : "w4");

  int64_t sizes[16];
  const int64_t dim = ids.dim();
  STD_TORCH_CHECK(dim < 16, "ids: at most 15 dimensions are served; got ", dim);
  for (int64_t i = 0; i < dim; ++i) sizes[i] = ids.size(i);
  sizes[dim] = k;
  Tensor out = empty(sizes, dim + 1, dtype);
  const int64_t m = ids.numel();
  const void* given = ids.const_data_ptr();
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = k * (kind == kFloat32 ? 4 : 2);
  const RowKernel kernel = (bits == 8 ? chosen.kernels->bits8 : chosen.kernels->bits4)[kind];
  std::atomic<int64_t> bad{-1};  // the place of an id that names no row
  for_tasks(m, m * k > kWorthThreads, [&](int64_t begin, int64_t end) {
    RowTask t{};
    t.k = k;
    t.group = group == 0 ? k : group;
    t.stride = w.stride;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = id_at(given, wide, i);
      if (id < 0 || id >= w.n) {
        bad.store(i, std::memory_order_relaxed);
        continue;
      }
      t.values = w.values() + id / kWeightTile * w.tile_bytes() + id % kWeightTile * 4;
      t.scale = w.scale() + id;
      t.zero_point = w.zero() == nullptr ? nullptr : w.zero() + id;
      t.out = to + i * row_bytes;
      kernel(t);
    }
  });
  const int64_t place = bad.load();
  if (place >= 0)
    fail("ids", "rows of the weight, 0 to " + std::to_string(w.n - 1),
         std::to_string(id_at(given, wide, place)));
  return out;
}

}  // namespace

std::pair<std::string, std::string> choose_quantized_embedding(int64_t bits,
                                                               const std::string& dtype) {
  return {
      kernel_name(choose_rows().isa, "quantized_embedding", dtype.c_str(), bits == 8 ? "w8" : "w4"),
      "rows of the tiles that quantized_linear reads"};
}

}  // namespace bigops

STABLE_TORCH_LIBRARY_IMPL(bigops, CPU, m) {
  bigops::implement(m, "quantized_embedding", TORCH_BOX(&bigops::quantized_embedding));
}
