// Threads that run one plan together.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

namespace qtoolkit::engine {

// Calls body(thread, threads) on each of `threads` threads (or fewer: body is told how many there
// are) at the same time, and returns when all have returned. One thread is a plain call.
using Team =
    std::function<void(int64_t threads, const std::function<void(int64_t, int64_t)>& body)>;

// What a thread does in a loop that waits for another.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Where the threads of a team meet between two steps. Steps take microseconds, so a thread spins
// first; then it yields, because there may be more threads than cores.
class Barrier {
 public:
  // Every thread of the team gives the team's size.
  void wait(int64_t threads) {
    if (threads == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    // 4000 pauses are 50 to 200 us, longer than one thread's lead in a step of a balanced plan.
    constexpr int kSpins = 4000;
    for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) {
      if (spin < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

}  // namespace qtoolkit::engine
