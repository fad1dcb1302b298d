#include "engine/plan.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <limits>

#include "kernels/path.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qtoolkit::engine {
namespace {

int64_t batch_of(std::span<const Outside> inputs) {
  for (const Outside& input : inputs) {
    require(input.shape.images == inputs[0].shape.images,
            "the inputs of a plan must be of one batch size, got ", inputs[0].shape.images, " and ",
            input.shape.images);
  }
  return inputs[0].shape.images;
}

std::vector<Outside> with_images(std::span<const Outside> all, int64_t images) {
  std::vector<Outside> result(all.begin(), all.end());
  for (Outside& one : result) one.shape.images = images;
  return result;
}

int64_t image_bytes(const Outside& outside) {
  return outside.shape.height * outside.shape.width * outside.shape.channels *
         (outside.type == Type::codes ? 1 : 4);
}

// `what` tells the keys of instances from those of strategies; `images` stand for the inputs' own.
// The key is of the calling thread, as a run is to allocate nothing: the next call overwrites it.
const std::vector<int64_t>& key_of(int64_t what, std::span<const Outside> inputs, int64_t images,
                                   int64_t threads) {
  thread_local std::vector<int64_t> key;
  key.assign({what, threads});
  for (const Outside& input : inputs) {
    const Shape& shape = input.shape;
    key.insert(key.end(), {shape.rank, images, shape.height, shape.width, shape.channels,
                           input.planar ? 1 : 0});
  }
  return key;
}
constexpr int64_t kInstance = 0, kStrategy = 1;

void run_together(const Instance& instance, const Memory& memory, int64_t threads,
                  const Team& team) {
  // The team may be smaller than asked for, which its threads learn when they start.
  Barrier barrier;
  const auto body = [&](int64_t thread, int64_t count) {
    instance.run(memory, thread, count, barrier);
  };
  team(threads, std::ref(body));  // a copy would be allocated
}

}  // namespace

std::string cpu_name() {
  std::string name = "cpu";
#if defined(__x86_64__)
  unsigned int words[12] = {};
  for (unsigned int i = 0; i < 3; ++i) {
    __get_cpuid(0x80000002 + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2],
                &words[4 * i + 3]);
  }
  char text[sizeof(words) + 1] = {};
  std::memcpy(text, words, sizeof(words));
  name = text;
#elif defined(__aarch64__) && defined(__linux__)
  if ((getauxval(AT_HWCAP) & HWCAP_CPUID) != 0) {
    uint64_t id = 0;  // implementer, part and revision
    asm("mrs %0, midr_el1" : "=r"(id));
    name = "arm " + std::to_string(id);
  }
#endif
  return name + ", " + std::string(kernels::name(kernels::selected_path(kernels::Kernel::conv2d)));
}

Plan::Plan(ProgramData data, int64_t work_of_thread)
    : data_(std::move(data)), work_of_thread_(work_of_thread) {
  const std::string cpu = cpu_name();  // throws if the environment names no kernel path
  require(data_.version == ProgramData::kVersion, "a plan of version ", data_.version,
          "; this qtoolkit reads version ", ProgramData::kVersion,
          ": compile the converted model again, or update qtoolkit");
  require(!data_.input_ranks.empty() && data_.input_types.size() == data_.input_ranks.size() &&
              data_.input_zero_points.size() == data_.input_ranks.size(),
          "the inputs of a plan are not described");
  for (size_t i = 0; i < data_.input_ranks.size(); ++i) {
    const int64_t rank = data_.input_ranks[i], type = data_.input_types[i];
    const int64_t zero_point = data_.input_zero_points[i];
    require(rank >= 2 && rank <= 4, "an input of rank ", rank);
    require(type >= 0 && type <= 2, "an input of unknown type ", type);
    require(zero_point >= (type == 2 ? -128 : 0) && zero_point <= (type == 2 ? 127 : 255),
            "an input with a zero point of ", zero_point);
    program_.inputs.push_back({type == 0 ? Type::float32 : Type::codes,
                               static_cast<int32_t>(type == 2 ? zero_point + 128 : zero_point)});
  }
  for (StepData& step : data_.steps) {
    Program::Node node;
    std::vector<ValueInfo> inputs;
    require(!step.inputs.empty(), "step '", step.name, "' has no input");
    for (const int64_t value : step.inputs) {
      require(value >= 0 && value < program_.values(), "step '", step.name, "' reads the value ",
              value, ", which no step before it computes");
      inputs.push_back(program_.info(value));
    }
    node.step = make_step(step, inputs);
    node.label = "step '" + step.name + "' (" + step.kind + ")";
    node.inputs = step.inputs;
    program_.nodes.push_back(std::move(node));
    packed_bytes_ += (program_.nodes.back().step->packed_bytes() + 63) / 64 * 64;
  }
  require(!data_.outputs.empty(), "a plan needs an output");
  for (size_t i = 0; i < data_.outputs.size(); ++i) {
    const int64_t value = data_.outputs[i];
    require(value >= static_cast<int64_t>(program_.inputs.size()) && value < program_.values(),
            "no step computes the output ", value);
    require(std::count(data_.outputs.begin(), data_.outputs.end(), value) == 1, "the value ", value,
            " is an output twice");
  }
  program_.outputs = data_.outputs;

  packed_ = aligned_memory(packed_bytes_ + kArenaSlack);
  uint8_t* at = packed_.get();
  for (size_t i = 0; i < program_.nodes.size(); ++i) {
    Step& step = *program_.nodes[i].step;
    if (step.packed_bytes() == 0) continue;
    step.pack(at);
    data_.steps[i].constants.at(step.packed_constant()).data.reset();
    at += (step.packed_bytes() + 63) / 64 * 64;
  }
  // Where the CPU is another, the sizes are tuned again when they are met.
  const bool same_cpu = data_.cpu == cpu;
  for (TuningData& tuning : data_.tuning) {
    tuning_[std::move(tuning.key)] = same_cpu ? std::move(tuning.choices) : std::vector<int64_t>{};
  }
  data_.tuning.clear();
}

ProgramData Plan::data() const {
  ProgramData result = data_;
  for (size_t i = 0; i < result.steps.size(); ++i) {
    const Step& step = *program_.nodes[i].step;
    if (step.packed_bytes() == 0) continue;
    result.steps[i].constants.at(step.packed_constant()).data = step.unpack();
  }
  result.cpu = cpu_name();
  const std::scoped_lock lock(mutex_);
  for (const auto& [key, choices] : tuning_) result.tuning.push_back({key, choices});
  return result;
}

size_t Plan::instances() const {
  const std::scoped_lock lock(mutex_);
  return instances_.size();
}

std::vector<Outside> Plan::outputs(std::span<const Outside> inputs) const {
  return known(inputs)->outputs;
}

std::shared_ptr<const Plan::Known> Plan::known(std::span<const Outside> inputs) const {
  require(inputs.size() == program_.inputs.size(), "this plan takes ", program_.inputs.size(),
          " inputs, got ", inputs.size());
  const int64_t batch = batch_of(inputs);
  {
    const Key& key = key_of(kInstance, inputs, batch, 0);
    const std::scoped_lock lock(mutex_);
    for (const std::shared_ptr<const Known>& one : known_) {
      if (one->key == key) return one;
    }
  }
  const std::vector<Shape> shapes = program_.shapes(inputs);
  // An element of a step without multiplications takes as long as some of them.
  constexpr double kOfElement = 16;
  double work = 0;
  for (size_t i = 0; i < program_.nodes.size(); ++i) {
    const Shape& out = shapes[program_.inputs.size() + i];
    work += static_cast<double>(program_.multiplications(i, shapes)) +
            kOfElement * static_cast<double>(out.elements());
  }
  const double most = work / static_cast<double>(work_of_thread_ * program_.values());
  const auto result = std::make_shared<const Known>(
      Known{key_of(kInstance, inputs, batch, 0), program_.outside_outputs(shapes),
            static_cast<int64_t>(std::clamp(most, 1.0, 65536.0))});
  const std::scoped_lock lock(mutex_);
  known_.push_front(result);
  if (known_.size() > kMostInstances) known_.pop_back();
  return result;
}

std::shared_ptr<Instance> Plan::instance(std::span<const Outside> inputs, int64_t images,
                                         int64_t threads, const Team& team) {
  Key key;
  std::vector<int64_t> choices;
  bool tunes = false;
  {
    const Key& wanted = key_of(kInstance, inputs, images, threads);
    const std::scoped_lock lock(mutex_);
    for (auto it = instances_.begin(); it != instances_.end(); ++it) {
      if (it->first != wanted) continue;
      instances_.splice(instances_.begin(), instances_, it);
      return it->second;
    }
    key = wanted;
    if (const auto found = tuning_.find(key); found != tuning_.end()) {
      choices = found->second;
      tunes = choices.empty();
    }
  }
  // Outside the lock, as it takes a while: two threads may both make one, and either serves.
  auto made = std::make_shared<Instance>(program_, with_images(inputs, images));
  if (!choices.empty()) made->choose(choices);
  if (tunes) choices = made->tune(threads, team);
  const std::scoped_lock lock(mutex_);
  if (tunes) tuning_[key] = choices;
  instances_.emplace_front(key, made);
  if (instances_.size() > kMostInstances) instances_.pop_back();
  return made;
}

Plan::Strategy Plan::strategy_for(std::span<const Outside> inputs, int64_t threads) const {
  const int64_t batch = inputs[0].shape.images;
  {
    const std::scoped_lock lock(mutex_);
    const auto found = tuning_.find(key_of(kStrategy, inputs, batch, threads));
    if (found != tuning_.end() && found->second.size() == 2 && found->second[0] >= 1) {
      return {std::min(found->second[0], batch), found->second[1] != 0};
    }
  }
  // One image at a time keeps activations in the near cache.
  if (threads == 1 || batch >= threads) return {1, threads == 1};
  return {batch, true};
}

void Plan::run_as(const Strategy& strategy, std::span<const Outside> inputs,
                  std::span<const void* const> data, std::span<void* const> outputs,
                  int64_t threads, const Team& team) {
  const int64_t batch = inputs[0].shape.images;
  const int64_t parts = (batch + strategy.images - 1) / strategy.images;
  const int64_t rest = batch - (parts - 1) * strategy.images;
  const int64_t team_size = strategy.together ? threads : 1;
  const std::shared_ptr<Instance> whole = instance(inputs, strategy.images, team_size, team);
  const std::shared_ptr<Instance> last =
      rest == strategy.images ? whole : instance(inputs, rest, team_size, team);
  const std::shared_ptr<const Known> known = this->known(inputs);

  // The pointers of one part, of the calling thread: see key_of.
  struct Pointers {
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
  };
  const auto pointers_of = [&](int64_t part) -> const Pointers& {
    thread_local Pointers pointers;
    const int64_t image = part * strategy.images;
    pointers.inputs.resize(data.size());
    for (size_t i = 0; i < data.size(); ++i) {
      pointers.inputs[i] = static_cast<const uint8_t*>(data[i]) + image * image_bytes(inputs[i]);
    }
    pointers.outputs.resize(outputs.size());
    for (size_t i = 0; i < outputs.size(); ++i) {
      pointers.outputs[i] =
          static_cast<uint8_t*>(outputs[i]) + image * image_bytes(known->outputs[i]);
    }
    return pointers;
  };

  if (strategy.together) {
    for (int64_t part = 0; part < parts; ++part) {
      Instance& instance = part + 1 < parts ? *whole : *last;
      const Instance::Arena arena(instance);
      const Pointers& own = pointers_of(part);
      const Memory memory{arena.data(), own.inputs.data(), own.outputs.data()};
      run_together(instance, memory, threads, team);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  const auto body = [&](int64_t, int64_t) {
    Barrier alone;
    for (int64_t part = next.fetch_add(1); part < parts; part = next.fetch_add(1)) {
      Instance& instance = part + 1 < parts ? *whole : *last;
      const Instance::Arena arena(instance);
      const Pointers& own = pointers_of(part);
      instance.run({arena.data(), own.inputs.data(), own.outputs.data()}, 0, 1, alone);
    }
  };
  team(std::min(threads, parts), std::ref(body));
}

void Plan::run(std::span<const Outside> inputs, std::span<const void* const> data,
               std::span<void* const> outputs, int64_t threads, const Team& team) {
  if (batch_of(inputs) == 0) return;
  threads = std::min(threads, known(inputs)->most_threads);
  run_as(strategy_for(inputs, threads), inputs, data, outputs, threads, team);
}

double Plan::time_of(const Strategy& strategy, std::span<const Outside> inputs, int64_t threads,
                     const Team& team) {
  std::vector<AlignedMemory> memory;
  const auto zeros = [&](const Outside& outside) {
    const int64_t bytes = outside.shape.images * image_bytes(outside);
    memory.push_back(aligned_memory(bytes + kArenaSlack));
    std::memset(memory.back().get(), 0, static_cast<size_t>(bytes + kArenaSlack));
    return memory.back().get();
  };
  std::vector<const void*> data;
  std::vector<void*> results;
  for (const Outside& input : inputs) data.push_back(zeros(input));
  for (const Outside& output : outputs(inputs)) results.push_back(zeros(output));
  const auto start = std::chrono::steady_clock::now();
  run_as(strategy, inputs, data, results, threads, team);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Plan::tune(std::span<const Outside> inputs, int64_t threads, const Team& team) {
  constexpr int64_t kMostImages = 8;  // at a time
  const int64_t batch = batch_of(inputs);
  if (batch == 0) return;
  threads = std::min(threads, known(inputs)->most_threads);
  std::vector<Strategy> candidates;
  if (batch < threads || batch == 1) {
    candidates.push_back({batch, true});
  } else {
    for (int64_t images = 1; images <= std::min(batch, kMostImages); images *= 2) {
      candidates.push_back({images, threads == 1});
    }
  }
  // An empty tuning makes the next instance of that size tune itself.
  for (const Strategy& candidate : candidates) {
    const int64_t team_size = candidate.together ? threads : 1;
    const Key& key = key_of(kInstance, inputs, candidate.images, team_size);
    const std::scoped_lock lock(mutex_);
    tuning_.try_emplace(key);
    instances_.remove_if([&](const auto& entry) { return entry.first == key; });
  }
  Strategy best = candidates.front();
  if (candidates.size() > 1) {
    // As many images as keep all threads busy with every candidate, in turns.
    const std::vector<Outside> some =
        with_images(inputs, std::min(batch, candidates.back().images * threads));
    constexpr int kRounds = 3;
    std::vector<double> least(candidates.size(), std::numeric_limits<double>::infinity());
    for (int round = 0; round < kRounds; ++round) {
      for (size_t i = 0; i < candidates.size(); ++i) {
        if (round == 0) time_of(candidates[i], some, threads, team);  // makes its instance
        least[i] = std::min(least[i], time_of(candidates[i], some, threads, team));
      }
    }
    double time = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < candidates.size(); ++i) {
      if (least[i] < 0.98 * time) {
        time = least[i];
        best = candidates[i];
      }
    }
  } else {
    instance(inputs, best.images, best.together ? threads : 1, team);
  }
  const std::scoped_lock lock(mutex_);
  tuning_[key_of(kStrategy, inputs, batch, threads)] = {best.images, best.together ? 1 : 0};
}

PlanReport Plan::report(std::span<const Outside> inputs, int64_t threads, const Team& team,
                        bool profile) {
  const int64_t batch = std::max<int64_t>(batch_of(inputs), 1);
  threads = std::min(threads, known(with_images(inputs, batch))->most_threads);
  const Strategy strategy = strategy_for(with_images(inputs, batch), threads);
  const int64_t team_size = strategy.together ? threads : 1;
  const std::shared_ptr<Instance> used = instance(inputs, strategy.images, team_size, team);
  const std::vector<Shape> shapes = program_.shapes(with_images(inputs, strategy.images));
  const std::vector<double> times =
      profile ? used->profile(team_size, team, 10) : std::vector<double>();
  const std::vector<int64_t> choices = used->choices();
  PlanReport report;
  report.arena_bytes = used->arena_bytes();
  report.packed_bytes = packed_bytes_;
  for (size_t i = 0; i < program_.nodes.size(); ++i) {
    const Step& step = *program_.nodes[i].step;
    StepReport row;
    row.name = data_.steps[i].name;
    row.kind = data_.steps[i].kind;
    row.kernel = step.kernel();
    row.shape = shapes[program_.inputs.size() + i];
    row.bytes = used->output_of(i).bytes() + step.packed_bytes();
    row.multiplications = program_.multiplications(i, shapes);
    row.choice_count = choices[i];
    if (profile) row.milliseconds = times[i];
    report.steps.push_back(row);
  }
  return report;
}

}  // namespace qtoolkit::engine
