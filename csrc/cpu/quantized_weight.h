// A quantised weight as the schemas of its ops give it: checked, contiguous, with its strides.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>

#include "cpu/compressed_linear.h"
#include "cpu/simd/quantized_linear.h"

namespace bigops {

// The weight as the schema gives it, checked and contiguous.
struct Weight {
  Tensor values_tensor, scale_tensor;
  OptTensor zero_tensor, sum_tensor, qparams_tensor;
  int64_t n, k, bits, group;
  Activate mode;
  int64_t columns, lines, tiles, group_lines, stride;

  const uint8_t* values() const {
    return static_cast<const uint8_t*>(values_tensor.const_data_ptr());
  }
  const float* scale() const { return static_cast<const float*>(scale_tensor.const_data_ptr()); }
  const int8_t* zero() const { return static_cast<const int8_t*>(data(zero_tensor)); }
  std::optional<Qparams> qparams() const {
    if (!qparams_tensor.has_value()) return {};
    const float* qparams = static_cast<const float*>(qparams_tensor->const_data_ptr());
    return Qparams{qparams[0], static_cast<int32_t>(qparams[1])};
  }
  bool integer() const { return mode != kFloating; }
  bool exact() const { return integer() && bits == 8; }  // int32 sums over all of K
  int64_t tile_bytes() const { return lines * kLineBytes; }
  const char* form() const {
    return integer() ? (bits == 8 ? "w8a8" : "w4a8") : (bits == 8 ? "w8" : "w4");
  }
};

inline void check_sizes(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  std::string text = "[";
  for (int64_t size : sizes) {
    text += (i ? ", " : "") + std::to_string(size);
    same = same && t.size(i) == size;
    ++i;
  }
  if (!same) fail(name, "shape " + text + "]", shape_of(t));
}

inline void check_optional(const char* name, const OptTensor& t, bool wanted, ScalarType dtype,
                           std::initializer_list<int64_t> sizes) {
  if (wanted != t.has_value())
    fail(name, wanted ? "a tensor" : "None", wanted ? "None" : "a tensor");
  if (!wanted) return;
  check_cpu(name, *t);
  check_dtype(name, *t, dtype);
  check_sizes(name, *t, sizes);
}

inline Weight check_weight(const Tensor& values, const Tensor& scale, const OptTensor& zero_point,
                           const OptTensor& row_sum, const OptTensor& x_qparams, int64_t pad,
                           int64_t k, int64_t bits, int64_t group, int64_t activations) {
  const Activate mode =
      static_cast<Activate>(check_code("activations", activations, kActivateWords));
  if (bits != 8 && bits != 4) fail("bits", "8 or 4", std::to_string(bits));
  if (k < 0) fail("k", "at least 0", std::to_string(k));
  const bool exact = mode != kFloating && bits == 8;
  if (group < 0 || group % 8 != 0 || (exact && group != 0))
    fail("group", exact ? "0 with int8 activations and weights" : "0 or a multiple of 8",
         std::to_string(group));
  const int64_t columns = bits == 8 ? 4 : 8;
  const int64_t lines = (k + columns - 1) / columns, tiles = values.dim() > 0 ? values.size(0) : 0;
  const int64_t n = tiles * kWeightTile - pad;
  if (pad < 0 || pad >= kWeightTile || n < 0)
    fail("pad", "the rows that fill up the last tile of 16", std::to_string(pad));
  const int64_t groups = group == 0 ? 1 : (k + group - 1) / group, stride = tiles * kWeightTile;
  check_cpu("values", values);
  check_cpu("scale", scale);
  check_dtype("values", values, bits == 8 ? ScalarType::Char : ScalarType::Byte);
  check_sizes("values", values, {tiles, lines, kWeightTile, 4});
  check_dtype("scale", scale, ScalarType::Float);
  check_sizes("scale", scale, {groups, stride});
  check_optional("zero_point", zero_point, zero_point.has_value(), ScalarType::Char,
                 {groups, stride});
  check_optional("row_sum", row_sum, mode != kFloating,
                 bits == 8 ? ScalarType::Int : ScalarType::Float, {stride});
  check_optional("x_qparams", x_qparams, mode == kStatic, ScalarType::Float, {2});
  const int64_t all = lines > 0 ? lines : 1;
  return {dense(values),
          dense(scale),
          dense(zero_point),
          dense(row_sum),
          dense(x_qparams),
          n,
          k,
          bits,
          group,
          mode,
          columns,
          lines,
          tiles,
          group == 0 ? all : group / columns,
          stride};
}

}  // namespace bigops
