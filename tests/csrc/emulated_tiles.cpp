// The products by tile registers (csrc/cpu/simd/quantized_tiles.inl) on registers made of memory,
// for CPUs without AMX and for the sanitizers, which see no load of an instruction in assembler.
// Against the portable kernels, bit by bit: all numbers are whole and scales powers of two, so
// float sums are exact. An argument plants a fault; the name of a case that differs is printed.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/simd/lines_portable.h"
#include "cpu/simd/quantized_linear.inl"
#include "cpu/simd/tiles_amx.h"
// after them
#include "cpu/simd/quantized_tiles.inl"

namespace bigops {
namespace {

[[noreturn]] void refuse(const char* what) {
  std::printf("no instruction does this: %s\n", what);
  std::exit(2);
}

// Intel's manual, volume 2: LDTILECFG, TILELOADD, TDPBUSD.
struct MemoryTiles {
  static inline TileShape shape{0, 0};
  static inline uint8_t bytes[8][16][64];
  static inline bool configured = false;

  static void configure(const TileShape& to) {
    for (int t = 0; t < 8; ++t)
      if (to.rows[t] < 1 || to.rows[t] > 16 || to.bytes[t] < 4 || to.bytes[t] > 64)
        refuse("a shape beyond a register");
    shape = to;
    std::memset(bytes, 0, sizeof(bytes));
    configured = true;
  }
  static void release() { configured = false; }

  template <int t>
  static void zero() {
    static_assert(t >= 0 && t < 8);
    if (!configured) refuse("a tile without a shape");
    std::memset(bytes[t], 0, sizeof(bytes[t]));
  }
  template <int t>
  static void load(const void* p, int64_t stride) {
    zero<t>();
    for (int r = 0; r < shape.rows[t]; ++r)
      std::memcpy(bytes[t][r], static_cast<const uint8_t*>(p) + r * stride, shape.bytes[t]);
  }
  template <int t>
  static void store(void* p, int64_t stride) {
    if (!configured) refuse("a tile without a shape");
    for (int r = 0; r < shape.rows[t]; ++r)
      std::memcpy(static_cast<uint8_t*>(p) + r * stride, bytes[t][r], shape.bytes[t]);
  }
  template <int c, int a, int b>
  static void dot_u8s8() {
    static_assert(c != a && c != b && a != b);
    if (!configured || shape.rows[a] != shape.rows[c] || shape.bytes[a] != 4 * shape.rows[b] ||
        shape.bytes[b] != shape.bytes[c])
      refuse("a product of shapes that do not fit");
    for (int m = 0; m < shape.rows[c]; ++m)
      for (int n = 0; n < shape.bytes[c] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, bytes[c][m] + 4 * n, 4);
        for (int k = 0; k < shape.bytes[a]; ++k)
          sum += bytes[a][m][k] * static_cast<int8_t>(bytes[b][k / 4][4 * n + k % 4]);
        std::memcpy(bytes[c][m] + 4 * n, &sum, 4);
      }
  }
};

uint32_t random_word() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

struct Case {
  int64_t rows, tiles, k, group;  // columns of a group, w4a8 where it is not 0
  bool zero_points;
};

struct Problem {
  const Case c;
  const int64_t columns = c.group ? 8 : 4, lines = (c.k + columns - 1) / columns;
  const int64_t stride = round_up(lines * columns), n = c.tiles * kWeightTile;
  const int64_t groups = c.group ? (c.k + c.group - 1) / c.group : 1;
  std::vector<uint8_t> x, values;
  std::vector<float> scale, x_scale, row_sum;
  std::vector<int32_t> x_zero, x_sum;
  std::vector<int8_t> zero;

  static int64_t round_up(int64_t v) { return (v + kStepBytes - 1) / kStepBytes * kStepBytes; }

  Problem(const Case& given, int64_t past)
      : c(given),
        x(static_cast<size_t>(c.rows * stride + past)),
        values(static_cast<size_t>(c.tiles * lines * kLineBytes)),
        scale(static_cast<size_t>(groups * n)),
        x_scale(static_cast<size_t>(c.rows), 0.5f),
        row_sum(static_cast<size_t>(n)),
        x_zero(static_cast<size_t>(c.rows)),
        x_sum(static_cast<size_t>(c.rows)),
        zero(static_cast<size_t>(groups * n)) {
    for (auto& v : x) v = static_cast<uint8_t>(random_word());
    for (int64_t m = 0; m < c.rows; ++m)  // zeros to the end of a line, anything after it
      for (int64_t k = c.k; k < lines * columns; ++k) x[static_cast<size_t>(m * stride + k)] = 0;
    for (auto& v : values) v = static_cast<uint8_t>(random_word());
    for (auto& v : scale) v = random_word() % 2 ? 1.0f : 2.0f;
    for (auto& v : row_sum) v = static_cast<float>(random_word() % 64);
    for (auto& v : x_zero) v = static_cast<int32_t>(random_word() % 256);
    for (auto& v : x_sum) v = static_cast<int32_t>(random_word() % 1000) - 500;
    for (auto& v : zero) v = static_cast<int8_t>(random_word() % 16) - 8;
  }

  std::vector<int32_t> product(void (*kernel)(const QuantizedTask&)) const {
    std::vector<int32_t> out(static_cast<size_t>(c.rows * n), 77);
    std::vector<float> totals(out.size());
    QuantizedTask t{};
    t.x = x.data();
    t.x_stride = stride;
    t.rows = c.rows;
    t.values = values.data();
    t.tile_stride = lines * kLineBytes;
    t.tiles = c.tiles;
    t.lines = lines;
    t.out = out.data();
    t.out_stride = n;
    t.totals = totals.data();
    t.group_lines = c.group ? c.group / 8 : lines;
    t.scale = scale.data();
    t.zero_point = c.zero_points ? zero.data() : nullptr;
    t.stride = n;
    t.x_scale = x_scale.data();
    t.x_zero = x_zero.data();
    t.row_sum = row_sum.data();
    t.x_sum = x_sum.data();
    kernel(t);
    return out;
  }
};

}  // namespace
}  // namespace bigops

int main(int argc, char** argv) {
  using namespace bigops;
  const std::string planted = argc > 1 ? argv[1] : "";
  constexpr IntegerProducts tiles = tile_products<MemoryTiles, PortableLines>();
  constexpr IntegerProducts plain = integer_products<PortableLines>();
  int count = 0;
  for (int64_t rows : {1, 15, 16, 31, 33, 64})
    for (int64_t n : {1, 5})
      for (int64_t k : {1, 63, 64, 68, 1100})
        for (int64_t group : {0, 32, 64, 128})
          for (bool zero_points : {false, true}) {
            const Case c{rows, n, k, group, zero_points};
            // what the host side leaves behind the last row
            Problem p(c, group && planted != "short" ? kStepBytes : 0);
            const auto want = p.product(group ? plain.w4a8 : plain.w8a8);
            if (planted == "flipped") p.values[0] ^= 0x10;
            const auto got = p.product(group ? tiles.w4a8 : tiles.w8a8);
            if (MemoryTiles::configured) refuse("tiles that are kept");
            if (got != want) {
              std::printf("rows %lld tiles %lld k %lld group %lld zero points %d differ\n",
                          (long long)rows, (long long)n, (long long)k, (long long)group,
                          zero_points);
              return 1;
            }
            ++count;
          }
  std::printf("%d cases\n", count);
  return 0;
}
