// Meters run on plain threads, started together: they measure the machine, not torch's pool.

#include "cpu/meter.h"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/isa.h"
#include "cpu/simd/meter.h"

namespace bigops {
namespace {

using Clock = std::chrono::steady_clock;

// Work done per second by `threads` threads that call work(thread) for about `seconds`.
template <class F>
double rate(int threads, double seconds, const F& work) {
  std::atomic<int> ready{0};
  std::vector<double> rates(static_cast<size_t>(threads), 0.0);
  auto run = [&](int id) {
    work(id);  // warm: clocks, pages
    ready.fetch_add(1);
    while (ready.load() < threads) {
    }
    const auto start = Clock::now();
    double done = 0, elapsed = 0;
    do {
      done += work(id);
      elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    } while (elapsed < seconds);
    rates[static_cast<size_t>(id)] = done / elapsed;
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(run, i);
  run(0);
  for (auto& t : pool) t.join();
  double total = 0;
  for (double r : rates) total += r;
  return total;
}

}  // namespace

double measure_peak(const std::string& kind, int threads, double seconds) {
  double (*loop)() = nullptr;
  if (kind == "f32") loop = portable_meter_f32;
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (kind == "f32" && isa >= Isa::avx2) loop = avx2_meter_f32;
  if (kind == "f32" && isa >= Isa::avx512) loop = avx512_meter_f32;
  if (kind == "bf16" && isa >= Isa::avx512bf16) loop = avx512bf16_meter_bf16;
  if (kind == "s8" && isa >= Isa::avx512vnni) loop = avx512vnni_meter_s8;
#ifdef BIGOPS_AMX
  if (kind == "bf16" && isa >= Isa::amx) loop = amx_meter_bf16;
  if (kind == "s8" && isa >= Isa::amx) loop = amx_meter_s8;
#endif
#endif
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1");
  if (loop == nullptr)
    throw std::invalid_argument("kind: expected f32, bf16 or s8 with a unit for it at " +
                                std::string(isa_name(active_isa())) + "; got " + kind);
  return rate(threads, seconds, [loop](int) { return loop(); });
}

double measure_bandwidth(int64_t bytes, int threads, double seconds) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1");
  if (bytes < 4096) throw std::invalid_argument("bytes: expected at least 4096");
  uint64_t (*read)(const uint64_t*, int64_t) = portable_meter_read;
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (isa >= Isa::avx2) read = avx2_meter_read;
  if (isa >= Isa::avx512) read = avx512_meter_read;
#endif
  const int64_t words = bytes / 8;
  std::vector<std::vector<uint64_t>> buffers(static_cast<size_t>(threads));
  std::atomic<uint64_t> sink{0};
  return rate(threads, seconds, [&](int id) {
    auto& buffer = buffers[static_cast<size_t>(id)];
    if (buffer.empty()) buffer.assign(static_cast<size_t>(words), 1);
    const int64_t repeats = words < (1 << 20) ? (1 << 20) / words : 1;
    for (int64_t r = 0; r < repeats; ++r) sink.fetch_xor(read(buffer.data(), words));
    return static_cast<double>(repeats) * static_cast<double>(words) * 8;
  });
}

}  // namespace bigops
