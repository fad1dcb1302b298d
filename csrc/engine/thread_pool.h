// A team of threads that outlives its runs, where no OpenMP is there.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace qtoolkit::engine {

// The calling thread and so many workers, which spin for a while after a run and then sleep.
class WorkerPool {
 public:
  explicit WorkerPool(int64_t threads);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int64_t threads() const { return static_cast<int64_t>(workers_.size()) + 1; }

  // A Team: body(thread, threads) on each of at most `threads` threads. Calls wait for each other.
  // An exception of a body is thrown here once all have returned.
  void run(int64_t threads, const std::function<void(int64_t, int64_t)>& body);

 private:
  void work(int64_t thread);
  void run_body(int64_t thread);
  void stop();

  std::mutex run_mutex_;  // held for a run
  const std::function<void(int64_t, int64_t)>* body_ = nullptr;
  int64_t size_ = 0;  // threads of the run; 0 ends the workers
  std::mutex error_mutex_;
  std::exception_ptr error_;
  alignas(64) std::atomic<uint32_t> run_{0};        // its number: a change starts the workers
  alignas(64) std::atomic<int64_t> unfinished_{0};  // workers of this run
  std::vector<std::thread> workers_;
};

}  // namespace qtoolkit::engine
