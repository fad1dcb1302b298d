// The public interface of include/qtoolkit/plan.h over the engine.
#include <algorithm>
#include <span>
#include <utility>

#include "engine/plan.h"
#include "engine/plan_file.h"
#include "engine/thread_pool.h"
#include "kernels/path.h"
#include "qtoolkit/plan.h"

namespace qtoolkit {
namespace {

using engine::require;

// As ProgramData has them.
constexpr DType kInputTypes[] = {DType::float32, DType::uint8, DType::int8};

const char* name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "uint8", "int8"};
  return kNames[static_cast<size_t>(dtype)];
}

engine::Outside outside_of(const TensorInfo& tensor, const InputInfo& input, size_t number) {
  require(tensor.dtype == input.dtype, "input ", number, " must be ", name(input.dtype), ", got ",
          name(tensor.dtype));
  require(static_cast<int64_t>(tensor.shape.size()) == input.rank, "input ", number, " must have ",
          input.rank, " dimensions, got ", tensor.shape.size());
  engine::Outside outside;
  outside.shape = engine::shape_of(tensor.shape);
  outside.type = input.dtype == DType::float32 ? engine::Type::float32 : engine::Type::codes;
  outside.planar = input.rank == 4 && tensor.layout == Layout::contiguous;
  return outside;
}

TensorInfo info_of(const engine::Outside& outside) {
  TensorInfo info;
  if (outside.type == engine::Type::codes) {
    info.dtype = outside.is_signed ? DType::int8 : DType::uint8;
  }
  info.shape = outside.shape.sizes();
  if (outside.shape.rank == 4 && !outside.planar) info.layout = Layout::channels_last;
  return info;
}

}  // namespace

class ThreadPool::Workers : public engine::WorkerPool {
 public:
  using WorkerPool::WorkerPool;
};

ThreadPool::ThreadPool(int threads) {
  require(threads >= 1, "a pool of ", threads, " threads; it needs one at least");
  workers_ = std::make_unique<Workers>(threads);
}
ThreadPool::~ThreadPool() = default;
int ThreadPool::threads() const { return static_cast<int>(workers_->threads()); }

class Plan::State {
 public:
  explicit State(engine::ProgramData data) : plan_(std::move(data)) {
    const engine::ProgramData& program = plan_.description();
    for (size_t i = 0; i < program.input_ranks.size(); ++i) {
      inputs_.push_back({kInputTypes[program.input_types[i]], program.input_ranks[i]});
    }
  }

  const std::vector<InputInfo>& inputs() const { return inputs_; }
  engine::Plan& plan() { return plan_; }

  std::vector<engine::Outside> outside(const std::vector<TensorInfo>& inputs) const {
    require(inputs.size() == inputs_.size(), "this plan takes ", inputs_.size(), " inputs, got ",
            inputs.size());
    std::vector<engine::Outside> result;
    for (size_t i = 0; i < inputs.size(); ++i) {
      result.push_back(outside_of(inputs[i], inputs_[i], i));
    }
    return result;
  }

  void run(const std::vector<TensorInfo>& inputs, const std::vector<const void*>& data,
           const std::vector<void*>& results, engine::WorkerPool* pool) {
    const std::vector<engine::Outside> outside = this->outside(inputs);
    const size_t outputs = plan_.description().outputs.size();
    require(data.size() == inputs.size() && results.size() == outputs, "this plan takes ",
            inputs.size(), " and gives ", outputs, " tensors; got pointers to ", data.size(),
            " and ", results.size());
    if (outside[0].shape.images == 0) return;
    require(!std::ranges::count(data, nullptr) && !std::ranges::count(results, nullptr),
            "a pointer to an input or output is null");
    plan_.run(outside, data, results, pool == nullptr ? 1 : pool->threads(), team(pool));
  }

  void tune(const std::vector<TensorInfo>& inputs, engine::WorkerPool* pool) {
    plan_.tune(outside(inputs), pool == nullptr ? 1 : pool->threads(), team(pool));
  }

 private:
  static engine::Team team(engine::WorkerPool* pool) {
    return [pool](int64_t threads, const std::function<void(int64_t, int64_t)>& body) {
      if (pool == nullptr) return body(0, 1);
      pool->run(threads, body);
    };
  }

  engine::Plan plan_;
  std::vector<InputInfo> inputs_;
};

Plan::Plan(const std::string& path)
    : state_(std::make_unique<State>(engine::read_plan_file(path))) {}
Plan::Plan(std::unique_ptr<State> state) : state_(std::move(state)) {}
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

Plan Plan::from_bytes(const void* bytes, size_t size) {
  const std::span<const uint8_t> all(static_cast<const uint8_t*>(bytes), size);
  return Plan(std::make_unique<State>(engine::plan_from_bytes(all)));
}

const std::vector<InputInfo>& Plan::inputs() const { return state_->inputs(); }

std::vector<TensorInfo> Plan::outputs(const std::vector<TensorInfo>& inputs) const {
  std::vector<TensorInfo> result;
  for (const engine::Outside& output : state_->plan().outputs(state_->outside(inputs))) {
    result.push_back(info_of(output));
  }
  return result;
}

void Plan::run(const std::vector<TensorInfo>& inputs, const std::vector<const void*>& data,
               const std::vector<void*>& results) const {
  state_->run(inputs, data, results, nullptr);
}
void Plan::run(const std::vector<TensorInfo>& inputs, const std::vector<const void*>& data,
               const std::vector<void*>& results, ThreadPool& pool) const {
  state_->run(inputs, data, results, pool.workers_.get());
}

void Plan::tune(const std::vector<TensorInfo>& inputs) { state_->tune(inputs, nullptr); }
void Plan::tune(const std::vector<TensorInfo>& inputs, ThreadPool& pool) {
  state_->tune(inputs, pool.workers_.get());
}

void Plan::save(const std::string& path) const {
  engine::write_plan_file(state_->plan().data(), path);
}

std::string cpu_path() {
  return std::string(kernels::name(kernels::selected_path(kernels::Kernel::conv2d)));
}

}  // namespace qtoolkit
