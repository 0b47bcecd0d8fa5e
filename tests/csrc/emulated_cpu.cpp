// Runs under qemu-user as an older CPU (test_emulated_cpu.py): all instruction-set files are
// linked in, only those that the CPU has may run. Prints the chosen level and the largest
// difference between its kernels and the portable ones, relative to the sum of magnitudes; of the
// sparse ones over all kinds of words, groups of rows and entries of their tables.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "common/activation.h"
#include "common/isa.h"
#include "cpu/simd/fused_linear.h"
#include "cpu/simd/sparse_linear.h"
#include "cpu/simd/types.h"

using namespace bigops;

namespace {

constexpr int64_t kM = 5, kN = 37, kK = 83;

uint16_t bf16_bits(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return static_cast<uint16_t>(bits >> 16);
}

template <class T>
T element(float v);
template <>
float element<float>(float v) {
  return v;
}
template <>
bf16 element<bf16>(float v) {
  return bf16{bf16_bits(v)};
}
float value(float v) { return v; }
float value(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

template <class T>
std::vector<T> random(int64_t n) {
  std::vector<T> v(static_cast<size_t>(n));
  for (auto& e : v) e = element<T>(static_cast<float>(std::rand()) / RAND_MAX - 0.5f);
  return v;
}

template <class T>
double difference(const FloatKernels& kernels, const FloatKernels& portable, int activation) {
  const int64_t rows = is_gated(activation) ? 2 * kN : kN;
  const auto x = random<T>(kM * kK), w = random<T>(rows * kK), b = random<T>(rows);
  const auto r = random<T>(kM * kN);
  std::vector<T> y(kM * kN), want(kM * kN);
  LinearTask t{x.data(), w.data(), b.data(), r.data(), y.data(), nullptr,   kN,
               kK,       0,        kM,       0,        kN,       activation};
  kernels.linear(t);
  t.y = want.data();
  portable.linear(t);
  double worst = 0;
  for (size_t i = 0; i < y.size(); ++i)
    worst = std::fmax(worst, std::fabs(double(value(y[i])) - double(value(want[i]))));
  return worst;
}

// One chunk of 64 rows, one panel, in the storage of a sparse weight; and activations for it, with
// a lane for each of kLanes rows of x.
constexpr int64_t kChunk = 64, kSlices = kChunk / kSliceRows, kSteps = 7, kLanes = 8;

struct Sparse {
  int kind;
  int64_t columns;  // of a word
  std::vector<int32_t> ptr;
  std::vector<uint8_t> index, rows;
  std::vector<char> words, x;        // x: [64][kLanes] words
  std::vector<float> x_float, grad;  // [64 * columns][kLanes], [kChunk][kLanes]

  Sparse(int kind_, int group) : kind(kind_), columns(kWordColumns[kind_]) {
    const int64_t per = kSliceRows / group, steps = kSlices * kSteps - 3;
    for (int64_t i = 0; i <= kSlices; ++i)
      ptr.push_back(static_cast<int32_t>(i == kSlices ? steps : i * kSteps));
    index.resize(static_cast<size_t>(steps * per));
    for (auto& i : index) i = static_cast<uint8_t>(std::rand() % kPanelWords);
    for (int64_t i = 0; i < kSlices * per; ++i)  // every group of rows once, backwards
      rows.push_back(static_cast<uint8_t>(kSlices * per - 1 - i));
    words = numbers(steps * kSliceRows);
    x = numbers(kPanelWords * kLanes);
    x_float = random<float>(kPanelWords * columns * kLanes);
    grad = random<float>(kChunk * kLanes);
  }

  std::vector<char> numbers(int64_t count) const {
    std::vector<char> bytes(static_cast<size_t>(count * 4));
    if (kind == kWordS8) {
      for (auto& b : bytes) b = static_cast<char>(std::rand());
    } else if (kind == kWordF32) {
      const auto v = random<float>(count);
      memcpy(bytes.data(), v.data(), bytes.size());
    } else {
      const auto v = random<bf16>(2 * count);
      memcpy(bytes.data(), v.data(), bytes.size());
    }
    return bytes;
  }
};

// Tables differ in the width of a vector: the lanes of kLanes rows of x are cut into pieces of it.
std::vector<char> rows_form(const SparseKernels& k, const Sparse& s, int group) {
  std::vector<char> acc(kRowsAtOnce * kChunk * 4);
  SparseTask t{s.ptr.data(),
               s.index.data(),
               s.rows.data(),
               s.words.data(),
               kSlices,
               s.x.data(),
               kPanelWords * 4,
               3,
               0,
               acc.data(),
               kChunk};
  k.rows[group](t);
  return acc;
}

// [n][kLanes] as the pieces of a table of `width` lanes, in words, and back.
std::vector<char> piece(const char* from, int64_t n, int64_t first, int64_t width) {
  std::vector<char> out(static_cast<size_t>(n * width * 4));
  for (int64_t i = 0; i < n; ++i)
    memcpy(out.data() + i * width * 4, from + (i * kLanes + first) * 4, width * 4);
  return out;
}

void put(const std::vector<char>& piece, char* to, int64_t n, int64_t first, int64_t width) {
  for (int64_t i = 0; i < n; ++i)
    memcpy(to + (i * kLanes + first) * 4, piece.data() + i * width * 4, width * 4);
}

std::vector<char> columns_form(const SparseKernels& k, const Sparse& s, int group) {
  std::vector<char> all(kChunk * kLanes * 4);
  const int64_t width = k.width;
  for (int64_t first = 0; first + width <= kLanes; first += width) {
    const auto x = piece(s.x.data(), kPanelWords, first, width);
    std::vector<char> acc(static_cast<size_t>(kChunk * width * 4));
    SparseTask t{s.ptr.data(),
                 s.index.data(),
                 s.rows.data(),
                 s.words.data(),
                 kSlices,
                 x.data(),
                 0,
                 0,
                 1,
                 acc.data(),
                 0};
    k.columns[group](t);
    put(acc, all.data(), kChunk, first, width);
  }
  return all;
}

// Added up over the pieces of lanes.
std::vector<char> sample(const SparseKernels& k, const Sparse& s, int group) {
  const int64_t width = k.width;
  std::vector<char> out(static_cast<size_t>(s.ptr.back()) * kSliceRows * s.columns * 4);
  for (int64_t first = 0; first + width <= kLanes; first += width) {
    const auto x = piece(reinterpret_cast<const char*>(s.x_float.data()), kPanelWords * s.columns,
                         first, width);
    const auto grad = piece(reinterpret_cast<const char*>(s.grad.data()), kChunk, first, width);
    SampleTask t{s.ptr.data(),
                 s.index.data(),
                 s.rows.data(),
                 kSlices,
                 1,
                 reinterpret_cast<const int32_t*>(grad.data()),
                 reinterpret_cast<const int32_t*>(x.data()),
                 reinterpret_cast<float*>(out.data())};
    k.sample[group](t);
  }
  return out;
}

double worst_of(const std::vector<char>& a, const std::vector<char>& b, bool whole) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); i += 4) {
    float p, q;
    memcpy(&p, a.data() + i, 4);
    memcpy(&q, b.data() + i, 4);
    if (whole) {  // int32 sums are exact
      if (memcmp(a.data() + i, b.data() + i, 4) != 0) return 1e9;
    } else {
      worst = std::fmax(worst, std::fabs(double(p) - double(q)));
    }
  }
  return worst;
}

double sparse_difference(const SparseKernels& k, const SparseKernels& portable, int kind,
                         bool planted) {
  double worst = 0;
  constexpr int kRows[kGroupKinds] = {1, 4, 16};
  for (int g = 0; g < kGroupKinds; ++g) {
    const Sparse s(kind, kRows[g]);
    Sparse same = s;
    if (planted) same.words[3] ^= 0x40;  // one bit of one word
    const bool whole = kind == kWordS8;
    worst = std::fmax(worst, worst_of(rows_form(k, s, g), rows_form(portable, same, g), whole));
    worst =
        std::fmax(worst, worst_of(columns_form(k, s, g), columns_form(portable, same, g), whole));
    worst = std::fmax(worst, worst_of(sample(k, s, g), sample(portable, s, g), false));
  }
  return worst;
}

}  // namespace

int main(int argc, char**) {
  const Isa isa = best_isa();
  double f32 = 0, b16 = 0;
  for (int a = 0; a < kActivationCount; ++a) {
    const bool wide = isa >= Isa::avx512;
    const FloatKernels& k = wide ? avx512_f32 : isa >= Isa::avx2 ? avx2_f32 : portable_f32;
    const FloatKernels& h = isa == Isa::avx512bf16 ? avx512bf16_bf16
                            : wide                 ? avx512_bf16
                            : isa >= Isa::avx2     ? avx2_bf16
                                                   : portable_bf16;
    f32 = std::fmax(f32, difference<float>(k, portable_f32, a));
    b16 = std::fmax(b16, difference<bf16>(h, portable_bf16, a));
  }
  const SparseKernels* portable[] = {&portable_sparse_f32, &portable_sparse_bf16,
                                     &portable_sparse_s8};
  const SparseKernels* avx2[] = {&avx2_sparse_f32, &avx2_sparse_bf16, &avx2_sparse_s8};
  double sparse = 0;  // with more than AVX2 the tables are wider than kLanes: Python tests run them
  for (int kind = 0; kind < kWordKinds; ++kind)
    sparse = std::fmax(sparse, sparse_difference(*(isa >= Isa::avx2 ? avx2 : portable)[kind],
                                                 *portable[kind], kind, argc > 1));
  std::printf("%s f32 %.3g bf16 %.3g sparse %.3g\n", isa_name(isa), f32, b16, sparse);
  return f32 < 1e-4 && b16 < 0.1 && sparse < 1e-4 ? 0 : 1;
}
