// The products by tile registers (csrc/cpu/simd/*_tiles.inl) on registers made of memory, for CPUs
// without AMX and for the sanitizers, which see no load of an instruction in assembler. Against the
// portable kernels, bit by bit: all numbers are whole and scales powers of two, so float sums are
// exact. An argument plants a fault; the name of a case that differs is printed.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/simd/lines_portable.h"
#include "cpu/simd/packed_linear.inl"
#include "cpu/simd/quantized_linear.inl"
// after them
#include "cpu/simd/packed_tiles.inl"
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
  // f(sum, 4 bytes of a, 4 bytes of b)
  template <int c, int a, int b, class Sum, class F>
  static void dot(const F& f) {
    static_assert(c != a && c != b && a != b);
    if (!configured || shape.rows[a] != shape.rows[c] || shape.bytes[a] != 4 * shape.rows[b] ||
        shape.bytes[b] != shape.bytes[c])
      refuse("a product of shapes that do not fit");
    for (int m = 0; m < shape.rows[c]; ++m)
      for (int n = 0; n < shape.bytes[c] / 4; ++n) {
        Sum sum;
        std::memcpy(&sum, bytes[c][m] + 4 * n, 4);
        for (int k = 0; k < shape.rows[b]; ++k)
          sum = f(sum, bytes[a][m] + 4 * k, bytes[b][k] + 4 * n);
        std::memcpy(bytes[c][m] + 4 * n, &sum, 4);
      }
  }
  template <int c, int a, int b>
  static void dot_u8s8() {
    dot<c, a, b, int32_t>([](int32_t sum, const uint8_t* x, const uint8_t* w) {
      for (int i = 0; i < 4; ++i) sum += x[i] * static_cast<int8_t>(w[i]);
      return sum;
    });
  }
  template <int c, int a, int b>
  static void dot_bf16() {
    dot<c, a, b, float>([](float sum, const uint8_t* x, const uint8_t* w) {
      for (int i = 0; i < 4; i += 2) {
        float from[2];
        const uint8_t words[8] = {0, 0, x[i], x[i + 1], 0, 0, w[i], w[i + 1]};
        std::memcpy(from, words, 8);
        sum += from[0] * from[1];
      }
      return sum;
    });
  }
};

uint32_t g_random = 1;

uint32_t random_word() {
  g_random = g_random * 1664525u + 1013904223u;
  return g_random >> 8;
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

// Whole numbers of -7..7 in bf16 by a panel, in two blocks along K.
std::vector<float> packed(int64_t rows, int64_t columns, int64_t words,
                          void (*kernel)(const PackedTask&)) {
  const int64_t stride = Problem::round_up(words * 4);
  const auto number = [] {
    const float v = static_cast<float>(random_word() % 15) - 7.0f;
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return static_cast<uint16_t>(bits >> 16);
  };
  std::vector<uint16_t> x(static_cast<size_t>(rows * stride / 2));
  std::vector<uint16_t> panel(static_cast<size_t>(words * kPackedColumns * 2));
  for (int64_t m = 0; m < rows; ++m)  // zeros past K
    for (int64_t k = 0; k < words * 2; ++k) x[static_cast<size_t>(m * stride / 2 + k)] = number();
  for (int64_t i = 0; i < words * kPackedColumns * 2; ++i)
    panel[static_cast<size_t>(i)] = i / 2 % kPackedColumns < columns ? number() : uint16_t(0);
  std::vector<float> out(static_cast<size_t>(rows * kPackedColumns));
  const int64_t first = words > kTileRows ? kTileRows : words;
  for (int64_t word = 0; word < words; word += word == 0 ? first : words) {
    PackedTask t{};
    t.x = reinterpret_cast<const char*>(x.data()) + word * 4;
    t.x_stride = stride;
    t.rows = rows;
    t.panel = panel.data() + word * kPackedColumns * 2;
    t.words = word == 0 ? first : words - word;
    t.columns = columns;
    t.out = out.data();
    t.first = word == 0;
    kernel(t);
  }
  for (int64_t i = 0; i < rows * kPackedColumns; ++i)  // a kernel may leave them
    if (i % kPackedColumns >= columns) out[static_cast<size_t>(i)] = 0;
  return out;
}

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
  for (int64_t rows : {1, 15, 16, 33, 64})
    for (int64_t columns : {3, 16, 40, 64})
      for (int64_t words : {1, 16, 17, 100}) {
        const uint32_t seed = random_word();
        g_random = seed;
        const auto want = packed(rows, columns, words, packed_table<PortableLanes>().bf16);
        g_random = seed;
        const auto got = packed(rows, columns, words, packed_tiles<MemoryTiles, PortableVec>);
        if (got != want) {
          std::printf("rows %lld columns %lld words %lld differ\n", (long long)rows,
                      (long long)columns, (long long)words);
          return 1;
        }
        ++count;
      }
  std::printf("%d cases\n", count);
  return 0;
}
