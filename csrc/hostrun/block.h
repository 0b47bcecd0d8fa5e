// A thread block on the CPU: what makes a .cu source run and be checked without a GPU (tests only).
//
// Threads are fibers that change places at barriers, in an order that a seed shuffles; with
// HOSTRUN_THREADS they are real threads, for ThreadSanitizer. Blocks run one after another. Shared
// memory is filled with 0xff (NaN in every floating type) before each block. What a GPU leaves
// undefined ends the process with a message: threads at different barriers, a thread that left
// while others wait, a copy that is misaligned or that nobody waited for.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace hostrun {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kExchangeBytes = 64;  // what a lane shows its warp at once
constexpr auto kPatience = std::chrono::seconds(30);

struct Settings {
  unsigned seed = 0;                 // order of threads: 0 ascending, 1 descending, else shuffled
  int64_t only_block = -1;           // the one blockIdx.x that runs, or -1 for all
  bool copies_land_early = false;    // cp.async writes when issued; else when it is waited for
  std::atomic<int64_t> copied{0};    // bytes read by cp.async
  std::atomic<int64_t> streamed{0};  // bytes read by the loads of ptx.cuh and by __ldcs
  std::atomic<int64_t> stored{0};    // bytes written by __stcs
};

inline Settings settings;

[[noreturn]] inline void fail(const char* what, const char* detail = "") {
  fprintf(stderr, "hostrun: %s%s\n", what, detail);
  fflush(stderr);
  abort();
}

// Where a thread waits. Threads that meet at one barrier must have come from one place.
struct Site {
  const char* what;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && strcmp(what, other.what) == 0;
  }
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;  // the rest is filled with zeros
  // Word by word: gcc expands a memcpy of 16 bytes after ThreadSanitizer's pass, which misses it.
  void land() const {
    uint32_t* words = static_cast<uint32_t*>(to);
    for (size_t i = 0; i < bytes / 4; ++i) {
      uint32_t word = 0;
      for (size_t b = 0; b < 4 && 4 * i + b < valid; ++b)
        word |= static_cast<uint32_t>(static_cast<const unsigned char*>(from)[4 * i + b]) << 8 * b;
      words[i] = word;
    }
  }
};

class Barrier;
struct Block;

struct Thread {
  dim3 index;
  int lane, warp;
  Block* block;
  std::vector<Copy> open;                // issued, in no group yet
  std::deque<std::vector<Copy>> groups;  // committed, not waited for
  bool done = false;
  ucontext_t context;
  char* stack;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct WarpState {
  alignas(16) unsigned char shown[kWarp][kExchangeBytes];
};

struct SharedArray {
  std::unique_ptr<unsigned char, decltype(&free)> memory{nullptr, &free};
};

struct Block {
  dim3 index, size, grid;
  const std::function<void()>* kernel;
  std::vector<Thread> threads;
  std::vector<WarpState> warps;
  std::deque<Barrier> barriers;  // of each warp, then of the block
  unsigned char* dynamic = nullptr;
  std::map<const void*, SharedArray> arrays;
  std::mutex arrays_mutex;
  std::atomic<int> any{0};  // of __syncthreads_or
  uint64_t progress = 0;
  ucontext_t scheduler;
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_bytes = 0;

  Barrier& whole();
};

inline thread_local Thread* self = nullptr;

inline std::unique_ptr<unsigned char, decltype(&free)> poisoned(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes ? bytes : 1) != 0) fail("out of memory");
  memset(memory, 0xff, bytes);
  return {static_cast<unsigned char*>(memory), &free};
}

// --- fibers --------------------------------------------------------------------------------

inline void leave(bool for_good = false) {
  Thread* t = self;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &t->fake_stack, t->block->scheduler_stack,
                                 t->block->scheduler_bytes);
#endif
  swapcontext(&t->context, &t->block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t->fake_stack, &t->block->scheduler_stack,
                                  &t->block->scheduler_bytes);
#endif
  (void)for_good;
}

inline void enter(Block& block, Thread& t) {
  self = &t;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.fake_stack, t.stack, kStackBytes);
#endif
  swapcontext(&block.scheduler, &t.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.fake_stack, nullptr, nullptr);
#endif
  (void)block;
}

class Barrier {
 public:
  explicit Barrier(int members) : members_(members) {}

  void wait(const Site& site) {
#if defined(HOSTRUN_THREADS)
    std::unique_lock<std::mutex> lock(mutex_);
#endif
    if (arrived_ == 0)
      first_ = site;
    else if (!(first_ == site))
      differ(site);
    if (gone_ > 0) left(site);
    const uint64_t round = round_;
    if (++arrived_ == members_) {
      arrived_ = 0;
      ++round_;
#if defined(HOSTRUN_THREADS)
      changed_.notify_all();
    } else if (!changed_.wait_for(lock, kPatience, [&] { return round_ != round; })) {
      left(site);
    }
#else
      ++self->block->progress;
    } else {
      ++self->block->progress;
      while (round_ == round) leave();
    }
#endif
  }

  // A thread that ends its kernel: nobody may wait for it afterwards.
  void go() {
#if defined(HOSTRUN_THREADS)
    const std::lock_guard<std::mutex> lock(mutex_);
#endif
    ++gone_;
    if (arrived_ > 0) left(first_);
  }

 private:
  [[noreturn]] void differ(const Site& site) const {
    char detail[160];
    snprintf(detail, sizeof(detail), "%s in line %d, %s in line %d", first_.what, first_.line,
             site.what, site.line);
    fail("divergent barrier: threads wait at ", detail);
  }
  [[noreturn]] static void left(const Site& site) {
    char detail[120];
    snprintf(detail, sizeof(detail), "%s in line %d, others ended the kernel or never came",
             site.what, site.line);
    fail("divergent barrier: threads wait at ", detail);
  }

  int members_, arrived_ = 0, gone_ = 0;
  uint64_t round_ = 0;
  Site first_{"", 0};
#if defined(HOSTRUN_THREADS)
  std::mutex mutex_;
  std::condition_variable changed_;
#endif
};

inline Barrier& Block::whole() { return barriers.back(); }

// --- what kernels call ---------------------------------------------------------------------

inline void sync_block(int line) { self->block->whole().wait({"__syncthreads", line}); }

// A barrier that says whether the predicate held for any thread.
inline int any_of_block(int predicate, int line) {
  Block& block = *self->block;
  if (predicate) block.any.store(1, std::memory_order_relaxed);
  block.whole().wait({"__syncthreads_or", line});
  const int any = block.any.load(std::memory_order_relaxed);
  block.whole().wait({"__syncthreads_or", line});  // everybody has read it
  if (self == &block.threads[0]) block.any.store(0, std::memory_order_relaxed);
  block.whole().wait({"__syncthreads_or", line});
  return any;
}

inline void sync_warp(const char* what, int line) {
  self->block->barriers[static_cast<size_t>(self->warp)].wait({what, line});
}

// Every lane shows `mine`; `read(at)` sees the others' by at(lane) before anyone goes on.
template <class T, class Read>
auto exchange(const char* what, int line, const T& mine, Read read) {
  static_assert(sizeof(T) <= kExchangeBytes, "a lane shows at most kExchangeBytes");
  WarpState& warp = self->block->warps[static_cast<size_t>(self->warp)];
  memcpy(warp.shown[self->lane], &mine, sizeof(T));
  sync_warp(what, line);
  const auto at = [&](int lane) {
    T value;
    memcpy(&value, warp.shown[lane & (kWarp - 1)], sizeof(T));
    return value;
  };
  const auto result = read(at);
  sync_warp(what, line);
  return result;
}

// A static shared array: `tag` is an object of its own for each declaration in the source.
inline void* shared_array(const void* tag, size_t bytes) {
  Block& block = *self->block;
  const std::lock_guard<std::mutex> lock(block.arrays_mutex);
  SharedArray& array = block.arrays[tag];
  if (!array.memory) array.memory = poisoned(bytes);
  return array.memory.get();
}

inline void copy_async(void* to, const void* from, size_t bytes, size_t valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) fail("cp.async to a misaligned address");
  if (valid > 0 && reinterpret_cast<uintptr_t>(from) % bytes != 0)
    fail("cp.async from a misaligned address");
  settings.copied.fetch_add(static_cast<int64_t>(valid), std::memory_order_relaxed);
  const Copy copy{to, from, bytes, valid};
  if (settings.copies_land_early)
    copy.land();
  else
    self->open.push_back(copy);
}

inline void copy_commit() {
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

inline void copy_wait(size_t still_open) {
  auto& groups = self->groups;
  for (; groups.size() > still_open; groups.pop_front())
    for (const Copy& copy : groups.front()) copy.land();
}

// --- launch --------------------------------------------------------------------------------

inline void run_thread() {
  (*self->block->kernel)();
  for (const auto& group : self->groups)
    if (!group.empty()) fail("a thread ended with cp.async groups that it never waited for");
  if (!self->open.empty()) fail("a thread ended with cp.async that it never committed");
  self->block->barriers[static_cast<size_t>(self->warp)].go();
  self->block->whole().go();
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->block->scheduler_stack,
                                  &self->block->scheduler_bytes);
#endif
  run_thread();
  self->done = true;
  ++self->block->progress;
  leave(true);
}

inline void run_fibers(Block& block) {
  static thread_local std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() < block.threads.size()) stacks.emplace_back(new char[kStackBytes]);
  std::vector<size_t> order(block.threads.size());
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = i;
    Thread& t = block.threads[i];
    t.stack = stacks[i].get();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(t.stack, kStackBytes);
#endif
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStackBytes;
    t.context.uc_link = nullptr;
    makecontext(&t.context, fiber_main, 0);
  }
  if (settings.seed == 1) std::reverse(order.begin(), order.end());
  std::mt19937 random(settings.seed);
  for (size_t left = order.size(); left > 0;) {
    const uint64_t before = block.progress;
    if (settings.seed > 1) std::shuffle(order.begin(), order.end(), random);
    for (const size_t i : order) {
      if (block.threads[i].done) continue;
      enter(block, block.threads[i]);
      left -= block.threads[i].done ? 1 : 0;
    }
    if (left > 0 && block.progress == before) fail("divergent barrier: no thread can go on");
  }
  self = nullptr;
}

inline void run_threads(Block& block) {
  std::vector<std::thread> threads;
  for (Thread& t : block.threads)
    threads.emplace_back([&t] {
      self = &t;
      run_thread();
    });
  for (std::thread& thread : threads) thread.join();
}

inline void run_block(Block& block, size_t dynamic_bytes) {
  const unsigned count = block.size.x * block.size.y * block.size.z;
  if (count == 0 || count > 1024 || count % kWarp != 0)
    fail("a block needs whole warps, 1024 threads at most");
  block.threads = std::vector<Thread>(count);
  block.warps = std::vector<WarpState>(count / kWarp);
  for (size_t i = 0; i < block.warps.size(); ++i) block.barriers.emplace_back(kWarp);
  block.barriers.emplace_back(static_cast<int>(count));
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = block.threads[i];
    t.index =
        dim3(i % block.size.x, i / block.size.x % block.size.y, i / block.size.x / block.size.y);
    t.lane = static_cast<int>(i % kWarp);
    t.warp = static_cast<int>(i / kWarp);
    t.block = &block;
  }
  const auto dynamic = poisoned(dynamic_bytes);
  block.dynamic = dynamic.get();
#if defined(HOSTRUN_THREADS)
  run_threads(block);
#else
  run_fibers(block);
#endif
}

// Arguments are taken as the kernel declares them, as <<<>>> does.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t dynamic_bytes,
            Arguments... arguments) {
  const std::function<void()> call = [&] { kernel(arguments...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        if (settings.only_block >= 0 && x != settings.only_block) continue;
        Block block;
        block.index = dim3(x, y, z);
        block.size = size;
        block.grid = grid;
        block.kernel = &call;
        run_block(block, dynamic_bytes);
      }
}

}  // namespace hostrun
