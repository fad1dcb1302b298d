#include "engine/thread_pool.h"

#include <algorithm>
#include <utility>

#include "engine/team.h"

namespace qtoolkit::engine {
namespace {

// Waits until `changed` or a while has passed: 50 to 200 us, in which a next run often begins.
template <class Changed>
void spin(const Changed& changed) {
  constexpr int kSpins = 4000;
  for (int i = 0; i < kSpins && !changed(); ++i) pause();
}

}  // namespace

WorkerPool::WorkerPool(int64_t threads) {
  try {
    for (int64_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {
    stop();
    throw;
  }
}

WorkerPool::~WorkerPool() { stop(); }

void WorkerPool::stop() {
  size_ = 0;
  run_.fetch_add(1, std::memory_order_release);
  run_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void WorkerPool::run_body(int64_t thread) {
  try {
    (*body_)(thread, size_);
  } catch (...) {
    const std::scoped_lock lock(error_mutex_);
    error_ = std::current_exception();
  }
}

void WorkerPool::work(int64_t thread) {
  for (uint32_t seen = 0;;) {
    spin([&] { return run_.load(std::memory_order_acquire) != seen; });
    run_.wait(seen, std::memory_order_acquire);
    ++seen;  // a run starts only after all workers finished the one before
    if (size_ == 0) return;
    if (thread < size_) run_body(thread);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
  }
}

void WorkerPool::run(int64_t threads, const std::function<void(int64_t, int64_t)>& body) {
  threads = std::min(threads, this->threads());
  if (threads <= 1) return body(0, 1);
  const std::scoped_lock lock(run_mutex_);
  body_ = &body;
  size_ = threads;
  unfinished_.store(static_cast<int64_t>(workers_.size()), std::memory_order_relaxed);
  run_.fetch_add(1, std::memory_order_release);
  run_.notify_all();
  run_body(0);
  spin([&] { return unfinished_.load(std::memory_order_acquire) == 0; });
  for (int64_t left = unfinished_.load(std::memory_order_acquire); left != 0;
       left = unfinished_.load(std::memory_order_acquire)) {
    unfinished_.wait(left, std::memory_order_acquire);
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

}  // namespace qtoolkit::engine
