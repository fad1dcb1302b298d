// A program for one size of its inputs: every value has its place, every step its task.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "engine/aligned_memory.h"
#include "engine/memory_plan.h"
#include "engine/step.h"
#include "engine/team.h"

namespace qtoolkit::engine {

// An input or output of a plan.
struct Outside {
  Shape shape;
  Type type = Type::float32;
  bool planar = false;     // of rank 4: NCHW in memory, else NHWC
  bool is_signed = false;  // int8 codes
  bool operator==(const Outside&) const = default;
};

// A plan's steps and how they are connected, which does not depend on sizes.
struct Program {
  struct Node {
    std::string label;  // for errors
    std::unique_ptr<Step> step;
    std::vector<int64_t> inputs;  // values
  };
  std::vector<ValueInfo> inputs;
  std::vector<Node> nodes;
  std::vector<int64_t> outputs;  // values

  int64_t values() const { return static_cast<int64_t>(inputs.size() + nodes.size()); }
  ValueInfo info(int64_t value) const;
  // Of every value; throws std::invalid_argument that names the step which cannot take its inputs.
  std::vector<Shape> shapes(std::span<const Outside> inputs) const;
  int64_t multiplications(size_t node, std::span<const Shape> shapes) const;
  std::vector<Outside> outside_outputs(std::span<const Shape> shapes) const;
};

class Instance {
 public:
  // The program outlives it.
  Instance(const Program& program, std::span<const Outside> inputs);

  int64_t arena_bytes() const { return arena_bytes_; }
  const View& output_of(size_t node) const { return planned_[node].output; }

  // How many ways each task has, and the way that each goes.
  std::vector<int64_t> choices() const;
  void choose(std::span<const int64_t> choices);
  // Runs the plan on made-up inputs with every choice, and keeps the fastest of each step,
  // which it returns.
  std::vector<int64_t> tune(int64_t threads, const Team& team);
  // The least milliseconds of each step in so many runs on made-up inputs, threads waiting for each
  // other after every step.
  std::vector<double> profile(int64_t threads, const Team& team, int64_t runs);

  // An arena with its borders filled. Runs borrow one each.
  class Arena {
   public:
    explicit Arena(Instance& instance) : instance_(instance), memory_(instance.borrow()) {}
    ~Arena() { instance_.give_back(std::move(memory_)); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    uint8_t* data() const { return memory_.get(); }

   private:
    Instance& instance_;
    AlignedMemory memory_;
  };

  // One thread's part of a run. All threads of the team call it with the same memory and barrier.
  void run(const Memory& memory, int64_t thread, int64_t threads, Barrier& barrier) const;

 private:
  struct Planned {
    std::unique_ptr<Task> task;
    View output;
    bool fills_border = false;  // its border does not last from run to run
    bool waits_before = false;  // it uses memory of steps that may still be running
  };

  void run_step(const Planned& step, const Memory& memory, int64_t thread, int64_t threads) const;
  void find_waits(const Program& program, std::span<const View> values);
  AlignedMemory borrow();
  void give_back(AlignedMemory memory);

  std::vector<Planned> planned_;
  int64_t arena_bytes_ = 0;
  std::vector<int64_t> input_bytes_, output_bytes_;  // for made-up runs
  std::mutex mutex_;
  std::vector<AlignedMemory> free_;
};

}  // namespace qtoolkit::engine
