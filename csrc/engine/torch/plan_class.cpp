// The plan as a TorchScript class and the operator that runs it: the only part of the engine that
// knows PyTorch.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <omp.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>

#include "engine/plan.h"
#include "engine/plan_file.h"
#include "ops/checks.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace qtoolkit::engine {
namespace {

using at::Tensor;

// ValueError instead of std::invalid_argument.
template <class Call>
auto checked(const Call& call, const char* where = "qtoolkit::run_plan: ") {
  try {
    return call();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, where, error.what());
  }
}

// --- threads
// ---------------------------------------------------------------------------------------

// OpenMP's threads do not outlive a fork, and waiting for them would never end.
std::atomic<bool> forked{false};

int64_t team_size() {
#if defined(__unix__) || defined(__APPLE__)
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forked = true; }); });
#endif
  return at::in_parallel_region() || forked ? 1 : at::get_num_threads();
}

// PyTorch's own threads: the team that at::parallel_for uses.
void run_team(int64_t threads, const std::function<void(int64_t, int64_t)>& body) {
  if (threads == 1) return body(0, 1);
  std::exception_ptr error;
  std::mutex mutex;
#pragma omp parallel num_threads(static_cast <int>(threads))
  {
    try {
      body(omp_get_thread_num(), omp_get_num_threads());
    } catch (...) {
      const std::scoped_lock lock(mutex);
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// --- tensors
// ---------------------------------------------------------------------------------------

Constant constant_of(const Tensor& tensor) {
  Constant constant;
  switch (tensor.scalar_type()) {
    case at::kByte:
      constant.dtype = DType::uint8;
      break;
    case at::kChar:
      constant.dtype = DType::int8;
      break;
    case at::kInt:
      constant.dtype = DType::int32;
      break;
    case at::kFloat:
      constant.dtype = DType::float32;
      break;
    default:
      require(false, "a constant of the type ", c10::toString(tensor.scalar_type()));
  }
  require(tensor.device().is_cpu() && tensor.layout() == at::kStrided,
          "the constants of a plan are dense tensors on the CPU");
  constant.shape = tensor.sizes().vec();
  auto dense = std::make_shared<Tensor>(tensor.contiguous());
  constant.data = std::shared_ptr<const void>(dense, dense->const_data_ptr());
  return constant;
}

Tensor tensor_of(const Constant& constant) {
  constexpr at::ScalarType kConstantTypes[] = {at::kByte, at::kChar, at::kInt, at::kFloat};
  // Not written to: a plan gives its constants away only to be saved or copied.
  auto* data = const_cast<void*>(constant.data.get());
  return at::from_blob(
      data, constant.shape, [owner = constant.data](void*) {},
      at::TensorOptions().dtype(kConstantTypes[static_cast<size_t>(constant.dtype)]));
}

// Of the inputs and outputs, by the number that stands for them in ProgramData.
constexpr at::ScalarType kTypes[] = {at::kFloat, at::kByte, at::kChar};

int64_t type_number(const Outside& outside) {
  if (outside.type == Type::float32) return 0;
  return outside.is_signed ? 2 : 1;
}

Outside outside_of(const Tensor& tensor, int64_t rank, int64_t type, size_t number) {
  const at::ScalarType wanted = kTypes[type];
  TORCH_CHECK_TYPE(tensor.scalar_type() == wanted, "qtoolkit::run_plan: input ", number,
                   " must be ", c10::toString(wanted), ", got ", ops::describe(tensor));
  TORCH_CHECK_VALUE(tensor.dim() == rank, "qtoolkit::run_plan: input ", number, " must have ", rank,
                    " dimensions, got ", ops::describe(tensor));
  Outside outside;
  outside.shape = shape_of(tensor.sizes().vec());
  outside.type = type == 0 ? Type::float32 : Type::codes;
  outside.planar = rank == 4 && !tensor.is_contiguous(at::MemoryFormat::ChannelsLast);
  return outside;
}

Tensor empty_output(const Outside& outside) {
  const at::ScalarType type = kTypes[type_number(outside)];
  const auto format = outside.shape.rank == 4 && !outside.planar ? at::MemoryFormat::ChannelsLast
                                                                 : at::MemoryFormat::Contiguous;
  return at::empty(outside.shape.sizes(), at::TensorOptions().dtype(type), format);
}

// --- the class
// -------------------------------------------------------------------------------------

// What is pickled. Tuples of at most three, as GCC 12 warns of PyTorch's conversion of longer ones.
// Version, CPU, and rank, type and zero point of each input.
using Head = std::tuple<int64_t, std::string, std::vector<std::vector<int64_t>>>;
// Of each step: kind, name and inputs; integers; constants.
using Steps = std::tuple<std::tuple<std::vector<std::string>, std::vector<std::string>,
                                    std::vector<std::vector<int64_t>>>,
                         c10::List<c10::Dict<std::string, std::vector<int64_t>>>,
                         c10::List<c10::Dict<std::string, Tensor>>>;
// Outputs; keys and choices of the tuning.
using Tail = std::tuple<std::vector<int64_t>, std::vector<std::vector<int64_t>>,
                        std::vector<std::vector<int64_t>>>;
using State = std::tuple<Head, Steps, Tail>;

ProgramData data_of(const State& state) {
  const auto& [head, steps, tail] = state;
  const auto& [version, cpu, inputs] = head;
  const auto& [texts, integers, constants] = steps;
  const auto& [kinds, names, step_inputs] = texts;
  const auto& [outputs, keys, choices] = tail;
  ProgramData data;
  data.version = version;
  data.cpu = cpu;
  for (const std::vector<int64_t>& input : inputs) {
    require(input.size() == 3, "an input of a plan is rank, type and zero point");
    data.input_ranks.push_back(input[0]);
    data.input_types.push_back(input[1]);
    data.input_zero_points.push_back(input[2]);
  }
  const size_t count = kinds.size();
  require(names.size() == count && step_inputs.size() == count && integers.size() == count &&
              constants.size() == count && keys.size() == choices.size(),
          "the lists of a plan differ in length");
  for (size_t i = 0; i < count; ++i) {
    StepData step;
    step.kind = kinds[i];
    step.name = names[i];
    step.inputs = step_inputs[i];
    const c10::Dict<std::string, std::vector<int64_t>> own_integers = integers.get(i);
    for (const auto& entry : own_integers) step.integers[entry.key()] = entry.value();
    const c10::Dict<std::string, Tensor> own_constants = constants.get(i);
    for (const auto& entry : own_constants) {
      step.constants[entry.key()] = constant_of(entry.value());
    }
    data.steps.push_back(std::move(step));
  }
  data.outputs = outputs;
  for (size_t i = 0; i < keys.size(); ++i) data.tuning.push_back({keys[i], choices[i]});
  return data;
}

// Weights that several steps share are saved once.
class SharedTensors {
 public:
  Tensor unique(const Tensor& tensor) {
    for (const Tensor& other : seen_) {
      if (other.scalar_type() == tensor.scalar_type() && other.sizes() == tensor.sizes() &&
          at::equal(other, tensor)) {
        return other;
      }
    }
    if (tensor.numel() > 1) seen_.push_back(tensor);
    return tensor;
  }

 private:
  std::vector<Tensor> seen_;
};

State state_of(const ProgramData& data) {
  std::vector<std::vector<int64_t>> inputs, step_inputs, keys, choices;
  std::vector<std::string> kinds, names;
  c10::List<c10::Dict<std::string, std::vector<int64_t>>> integers;
  c10::List<c10::Dict<std::string, Tensor>> constants;
  for (size_t i = 0; i < data.input_ranks.size(); ++i) {
    inputs.push_back({data.input_ranks[i], data.input_types[i], data.input_zero_points[i]});
  }
  SharedTensors shared;
  for (const StepData& step : data.steps) {
    kinds.push_back(step.kind);
    names.push_back(step.name);
    step_inputs.push_back(step.inputs);
    c10::Dict<std::string, std::vector<int64_t>> own_integers;
    for (const auto& [name, values] : step.integers) own_integers.insert(name, values);
    integers.push_back(own_integers);
    c10::Dict<std::string, Tensor> own_constants;
    for (const auto& [name, constant] : step.constants) {
      own_constants.insert(name, shared.unique(tensor_of(constant)));
    }
    constants.push_back(own_constants);
  }
  for (const TuningData& tuning : data.tuning) {
    keys.push_back(tuning.key);
    choices.push_back(tuning.choices);
  }
  return {{data.version, data.cpu, inputs},
          {{kinds, names, step_inputs}, integers, constants},
          {data.outputs, keys, choices}};
}

// Of each step: name, kind and kernel; sizes of the output; bytes, multiplications and ways to run;
// and milliseconds. Then the bytes of the arena and of the packed weights.
using Report = std::tuple<
    std::tuple<std::vector<std::string>, std::vector<std::string>, std::vector<std::string>>,
    std::tuple<std::vector<std::vector<int64_t>>, std::vector<std::vector<int64_t>>,
               std::vector<double>>,
    std::tuple<int64_t, int64_t>>;

class PlanHolder : public torch::CustomClassHolder {
 public:
  explicit PlanHolder(const State& state)
      : plan_(checked([&] { return std::make_unique<Plan>(data_of(state)); })) {}
  explicit PlanHolder(ProgramData data) : plan_(std::make_unique<Plan>(std::move(data))) {}

  State state() const { return state_of(plan_->data()); }

  void save(const std::string& path) const { write_plan_file(plan_->data(), path); }
  static c10::intrusive_ptr<PlanHolder> load(const std::string& path) {
    return checked([&] { return c10::make_intrusive<PlanHolder>(read_plan_file(path)); }, "");
  }

  std::vector<Outside> outside_inputs(const std::vector<Tensor>& inputs) const {
    const ProgramData& data = plan_->description();
    TORCH_CHECK_VALUE(inputs.size() == plan_->input_count(), "qtoolkit::run_plan: this plan takes ",
                      plan_->input_count(), " inputs, got ", inputs.size());
    std::vector<Outside> result;
    for (size_t i = 0; i < inputs.size(); ++i) {
      result.push_back(outside_of(inputs[i], data.input_ranks[i], data.input_types[i], i));
    }
    return result;
  }

  std::vector<Tensor> run(const std::vector<Tensor>& inputs) const {
    const std::vector<Outside> outside = outside_inputs(inputs);
    std::vector<Tensor> dense;
    std::vector<const void*> data;
    for (size_t i = 0; i < inputs.size(); ++i) {
      dense.push_back(outside[i].shape.rank == 4 && !outside[i].planar ? inputs[i]
                                                                       : inputs[i].contiguous());
      data.push_back(dense.back().const_data_ptr());
    }
    return checked([&] {
      std::vector<Tensor> results;
      std::vector<void*> pointers;
      for (const Outside& output : plan_->outputs(outside)) {
        results.push_back(empty_output(output));
        pointers.push_back(results.back().mutable_data_ptr());
      }
      plan_->run(outside, data, pointers, team_size(), run_team);
      return results;
    });
  }

  // What inputs of such types and sizes give, for traces without data. Each of both: the type (as
  // in ProgramData), 1 for channels_last, and the sizes.
  std::vector<std::vector<int64_t>> outputs(const std::vector<std::vector<int64_t>>& inputs) const {
    const ProgramData& data = plan_->description();
    std::vector<Outside> outside;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const std::vector<int64_t>& input = inputs[i];
      const int64_t rank = static_cast<int64_t>(input.size()) - 2;
      TORCH_CHECK_VALUE(i < data.input_ranks.size(), "qtoolkit::run_plan: this plan takes ",
                        data.input_ranks.size(), " inputs, got ", inputs.size());
      TORCH_CHECK_TYPE(input.size() > 1 && input[0] == data.input_types[i],
                       "qtoolkit::run_plan: input ", i, " must be ",
                       c10::toString(kTypes[data.input_types[i]]));
      TORCH_CHECK_VALUE(rank == data.input_ranks[i], "qtoolkit::run_plan: input ", i, " must have ",
                        data.input_ranks[i], " dimensions, got ", rank);
      outside.push_back({.shape = shape_of({input.begin() + 2, input.end()}),
                         .type = input[0] == 0 ? Type::float32 : Type::codes,
                         .planar = rank == 4 && input[1] == 0});
    }
    return checked([&] {
      std::vector<std::vector<int64_t>> results;
      for (const Outside& output : plan_->outputs(outside)) {
        results.push_back({type_number(output), output.shape.rank == 4 && !output.planar ? 1 : 0});
        for (const int64_t size : output.shape.sizes()) results.back().push_back(size);
      }
      return results;
    });
  }

  void tune(const std::vector<Tensor>& inputs) {
    const std::vector<Outside> outside = outside_inputs(inputs);
    checked([&] {
      plan_->tune(outside, team_size(), run_team);
      return 0;
    });
  }

  Report report(const std::vector<Tensor>& inputs, bool profile) {
    const std::vector<Outside> outside = outside_inputs(inputs);
    const PlanReport found =
        checked([&] { return plan_->report(outside, team_size(), run_team, profile); });
    Report result;
    auto& [texts, numbers, totals] = result;
    auto& [names, kinds, kernels] = texts;
    auto& [shapes, counts, times] = numbers;
    for (const StepReport& step : found.steps) {
      names.push_back(step.name);
      kinds.push_back(step.kind);
      kernels.push_back(step.kernel);
      shapes.push_back(step.shape.sizes());
      counts.push_back({step.bytes, step.multiplications, step.choice_count});
      times.push_back(step.milliseconds);
    }
    totals = {found.arena_bytes, found.packed_bytes};
    return result;
  }

  // What torch.compile keeps a compiled function for. A number of its own: an address may come
  // again.
  std::tuple<std::tuple<std::string, std::string>> flatten() const {
    return {{"identity", std::to_string(identity_)}};
  }

  int64_t instances() const { return static_cast<int64_t>(plan_->instances()); }

 private:
  static inline std::atomic<int64_t> made_{0};

  std::unique_ptr<Plan> plan_;
  const int64_t identity_ = made_++;
};

using PlanPointer = c10::intrusive_ptr<PlanHolder>;

std::vector<Tensor> run_plan_cpu(const PlanPointer& plan, const std::vector<Tensor>& inputs) {
  return plan->run(inputs);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.class_<PlanHolder>("Plan")
      .def(torch::init<State>())
      .def("tune", &PlanHolder::tune)
      .def("report", &PlanHolder::report)
      .def("instances", &PlanHolder::instances)
      .def("outputs", &PlanHolder::outputs)
      .def("state", &PlanHolder::state)
      // What torch.export and torch.compile ask of a class: see qtoolkit/ops/plan.py.
      .def("__obj_flatten__", &PlanHolder::flatten)
      .def("__eq__",
           [](const PlanPointer& self, const PlanPointer& other) { return self == other; })
      .def("save", &PlanHolder::save)
      .def_static("load", &PlanHolder::load)
      .def_pickle([](const PlanPointer& self) { return self->state(); },
                  [](const State& state) { return c10::make_intrusive<PlanHolder>(state); });
  m.def("run_plan(__torch__.torch.classes.qtoolkit.Plan plan, Tensor[] inputs) -> Tensor[]",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("run_plan", run_plan_cpu); }

}  // namespace qtoolkit::engine
