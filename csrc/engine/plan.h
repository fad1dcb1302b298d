// A converted network as one object: its steps, its packed weights, and an instance for each size
// of inputs that it has met. run() may be called by many threads at once.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "engine/instance.h"
#include "engine/program.h"

namespace qtoolkit::engine {

// One step for a report.
struct StepReport {
  std::string name, kind, kernel;  // kernel with the path it takes now
  Shape shape;                     // of the output
  int64_t bytes = 0;               // of the output and of packed constants
  int64_t multiplications = 0;
  int64_t choice_count = 0;
  double milliseconds = -1;  // -1: not measured
};
struct PlanReport {
  std::vector<StepReport> steps;
  int64_t arena_bytes = 0, packed_bytes = 0;
};

class Plan {
 public:
  // A thread is worth its part of the barriers, a microsecond or two a step, with this many
  // multiplications a step.
  static constexpr int64_t kWorkOfThread = int64_t{1} << 19;

  // Throws std::invalid_argument that says what is wrong with the data. Tests give less work to a
  // thread, so that small networks have several.
  explicit Plan(ProgramData data, int64_t work_of_thread = kWorkOfThread);

  // What a plan with the same results, and the same tuning, is made from.
  ProgramData data() const;

  size_t input_count() const { return program_.inputs.size(); }
  const ProgramData& description() const { return data_; }

  // Shapes and layouts of the outputs. Throws std::invalid_argument if a step cannot take them.
  std::vector<Outside> outputs(std::span<const Outside> inputs) const;

  // Inputs are dense, of one batch size. Throws as outputs() does, and std::bad_alloc.
  void run(std::span<const Outside> inputs, std::span<const void* const> data,
           std::span<void* const> outputs, int64_t threads, const Team& team);

  // Finds the fastest ways for that size and that many threads; they are kept with the plan.
  void tune(std::span<const Outside> inputs, int64_t threads, const Team& team);

  PlanReport report(std::span<const Outside> inputs, int64_t threads, const Team& team,
                    bool profile);

  // How many sizes are kept at most; the one not used for longest goes first.
  static constexpr size_t kMostInstances = 8;
  size_t instances() const;

 private:
  using Key = std::vector<int64_t>;
  // How a batch is run: so many images at a time, by all threads together or by each alone.
  struct Strategy {
    int64_t images = 1;
    bool together = true;
  };

  // What follows from the sizes of inputs, kept because a small network takes no longer than
  // finding it anew.
  struct Known {
    Key key;
    std::vector<Outside> outputs;
    int64_t most_threads = 1;  // more would cost more than they save
  };

  std::shared_ptr<const Known> known(std::span<const Outside> inputs) const;
  Strategy strategy_for(std::span<const Outside> inputs, int64_t threads) const;
  std::shared_ptr<Instance> instance(std::span<const Outside> inputs, int64_t images,
                                     int64_t threads, const Team& team);
  void run_as(const Strategy& strategy, std::span<const Outside> inputs,
              std::span<const void* const> data, std::span<void* const> outputs, int64_t threads,
              const Team& team);
  double time_of(const Strategy& strategy, std::span<const Outside> inputs, int64_t threads,
                 const Team& team);

  ProgramData data_;  // without the packed constants' data
  const int64_t work_of_thread_;
  AlignedMemory packed_;
  int64_t packed_bytes_ = 0;
  Program program_;

  mutable std::mutex mutex_;  // guards what follows
  std::map<Key, std::vector<int64_t>> tuning_;
  std::list<std::pair<Key, std::shared_ptr<Instance>>> instances_;  // the latest used first
  mutable std::list<std::shared_ptr<const Known>> known_;           // the latest first
};

// The CPU and the instruction set of its kernels: tuning holds for it.
std::string cpu_name();

}  // namespace qtoolkit::engine
