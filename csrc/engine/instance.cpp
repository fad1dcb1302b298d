#include "engine/instance.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>

namespace qtoolkit::engine {
namespace {

View outside_view(const Outside& outside, View::Place place, int64_t number) {
  View view = dense_view(outside.shape, outside.type);
  view.place = place;
  view.start = number;
  if (outside.planar) {
    view.pixel_stride = 1;
    view.row_stride = outside.shape.width;
    view.channel_stride = outside.shape.height * outside.shape.width;
  }
  return view;
}

// True if a task that writes `a` and one that reads or writes `b` must not run at the same time.
bool overlap(const View& a, const View& b) {
  if (a.place != b.place) return false;
  if (a.place != View::Place::arena) return a.start == b.start;
  return a.first_byte() < b.first_byte() + b.bytes() && b.first_byte() < a.first_byte() + a.bytes();
}

// Strides and offsets of a value then fit int64_t, borders and all.
void check_size(const Shape& shape) {
  int64_t elements = 1;
  for (const int64_t size : {shape.images, shape.height, shape.width, shape.channels}) {
    require(size >= 0, "a negative size");
    elements = checked_product(elements, size);
    require(elements <= (int64_t{1} << 34), "a tensor of more than 2^34 elements");
  }
}

double now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(time).count();
}

}  // namespace

ValueInfo Program::info(int64_t value) const {
  const auto count = static_cast<int64_t>(inputs.size());
  return value < count ? inputs[static_cast<size_t>(value)]
                       : nodes[static_cast<size_t>(value - count)].step->output();
}

std::vector<Shape> Program::shapes(std::span<const Outside> given) const {
  std::vector<Shape> result;
  for (const Outside& input : given) {
    check_size(input.shape);
    result.push_back(input.shape);
  }
  for (const Node& node : nodes) {
    std::vector<Shape> in;
    for (const int64_t value : node.inputs) in.push_back(result[static_cast<size_t>(value)]);
    try {
      const Shape out = node.step->output_shape(in);
      require(out.images == in[0].images, "a step of a plan may not change the batch");
      check_size(out);
      result.push_back(out);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(node.label + ": " + error.what());
    }
  }
  return result;
}

int64_t Program::multiplications(size_t node, std::span<const Shape> shapes) const {
  std::vector<Shape> in;
  for (const int64_t value : nodes[node].inputs) in.push_back(shapes[static_cast<size_t>(value)]);
  return nodes[node].step->multiplications(in);
}

std::vector<Outside> Program::outside_outputs(std::span<const Shape> shapes) const {
  std::vector<Outside> result;
  for (const int64_t value : outputs) {
    const Shape& shape = shapes[static_cast<size_t>(value)];
    const Node& node = nodes[static_cast<size_t>(value) - inputs.size()];
    result.push_back({shape, info(value).type, shape.rank == 4 && node.step->planar_output(),
                      node.step->signed_output()});
  }
  return result;
}

Instance::Instance(const Program& program, std::span<const Outside> inputs) {
  const std::vector<Shape> shapes = program.shapes(inputs);
  const auto input_count = static_cast<int64_t>(program.inputs.size());

  // The border that each value's readers want, and when it is read last.
  std::vector<Border> borders(shapes.size());
  std::vector<int64_t> last_reader(shapes.size(), -1);
  for (size_t i = 0; i < program.nodes.size(); ++i) {
    const Program::Node& node = program.nodes[i];
    for (size_t k = 0; k < node.inputs.size(); ++k) {
      const auto value = static_cast<size_t>(node.inputs[k]);
      const Border border = node.step->input_border(k);
      borders[value].height = std::max(borders[value].height, border.height);
      borders[value].width = std::max(borders[value].width, border.width);
      last_reader[value] = static_cast<int64_t>(i);
    }
  }

  std::vector<View> values;
  for (size_t i = 0; i < inputs.size(); ++i) {
    require(borders[i] == Border{}, "a step reads an input of the plan with a border");
    values.push_back(outside_view(inputs[i], View::Place::input, static_cast<int64_t>(i)));
    input_bytes_.push_back(values.back().bytes());
  }
  for (size_t i = inputs.size(); i < shapes.size(); ++i) {
    const ValueInfo info = program.info(static_cast<int64_t>(i));
    View view = dense_view(shapes[i], info.type, info.type == Type::codes ? borders[i] : Border{});
    view.zero_point = info.zero_point;
    values.push_back(view);
  }
  const std::vector<Outside> outside = program.outside_outputs(shapes);
  for (size_t i = 0; i < outside.size(); ++i) {
    const auto value = static_cast<size_t>(program.outputs[i]);
    require(borders[value] == Border{}, "a step reads an output of the plan with a border");
    values[value] = outside_view(outside[i], View::Place::output, static_cast<int64_t>(i));
    output_bytes_.push_back(values[value].bytes());
  }

  std::vector<Block> blocks;
  std::vector<size_t> block_of(shapes.size());
  for (size_t value = inputs.size(); value < shapes.size(); ++value) {
    if (values[value].place != View::Place::arena) continue;
    const int64_t writer = static_cast<int64_t>(value) - input_count;
    block_of[value] = blocks.size();
    blocks.push_back({&values[value], {writer, std::max(writer, last_reader[value])}});
  }
  arena_bytes_ = place(blocks);

  for (size_t i = 0; i < program.nodes.size(); ++i) {
    const Program::Node& node = program.nodes[i];
    const size_t value = inputs.size() + i;
    Binding binding;
    for (const int64_t input : node.inputs)
      binding.inputs.push_back(values[static_cast<size_t>(input)]);
    binding.output = values[value];
    Planned planned;
    planned.task = node.step->bind(binding);
    planned.output = values[value];
    planned.fills_border = planned.output.place == View::Place::arena &&
                           bordered_rows(planned.output) > 0 &&
                           blocks[block_of[value]].border_is_shared;
    planned_.push_back(std::move(planned));
  }
  find_waits(program, values);
}

void Instance::find_waits(const Program& program, std::span<const View> values) {
  size_t first = 0;  // step since the last wait
  for (size_t i = 0; i < planned_.size(); ++i) {
    const View& written = planned_[i].output;
    bool waits = false;
    for (size_t j = first; j < i && !waits; ++j) {
      waits = overlap(written, planned_[j].output);
      for (const int64_t input : program.nodes[j].inputs) {
        waits = waits || overlap(written, values[static_cast<size_t>(input)]);
      }
      for (const int64_t input : program.nodes[i].inputs) {
        waits = waits || overlap(planned_[j].output, values[static_cast<size_t>(input)]);
      }
    }
    planned_[i].waits_before = waits;
    if (waits) first = i;
  }
}

void Instance::run_step(const Planned& step, const Memory& memory, int64_t thread,
                        int64_t threads) const {
  if (step.fills_border) {
    const int64_t rows = bordered_rows(step.output);
    fill_border(step.output, memory, rows * thread / threads, rows * (thread + 1) / threads);
  }
  const int64_t units = step.task->units();
  const int64_t begin = units * thread / threads;
  const int64_t end = units * (thread + 1) / threads;
  if (begin < end) step.task->run(memory, begin, end);
}

void Instance::run(const Memory& memory, int64_t thread, int64_t threads, Barrier& barrier) const {
  for (const Planned& step : planned_) {
    if (step.waits_before) barrier.wait(threads);
    run_step(step, memory, thread, threads);
  }
}

std::vector<int64_t> Instance::choices() const {
  std::vector<int64_t> result;
  for (const Planned& step : planned_) result.push_back(step.task->choices());
  return result;
}

void Instance::choose(std::span<const int64_t> choices) {
  require(choices.size() == planned_.size(), "the tuning is of another plan");
  for (size_t i = 0; i < planned_.size(); ++i) {
    require(choices[i] >= 0 && choices[i] < planned_[i].task->choices(),
            "the tuning is of another plan");
    planned_[i].task->choose(choices[i]);
  }
}

std::vector<double> Instance::profile(int64_t threads, const Team& team, int64_t runs) {
  std::vector<double> least(planned_.size(), std::numeric_limits<double>::infinity());
  // Zeros: the arithmetic takes no notice of values.
  std::vector<AlignedMemory> outside;
  const auto zeros = [&](int64_t bytes) {
    outside.push_back(aligned_memory(bytes + kArenaSlack));
    std::memset(outside.back().get(), 0, static_cast<size_t>(bytes + kArenaSlack));
    return outside.back().get();
  };
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  for (const int64_t bytes : input_bytes_) inputs.push_back(zeros(bytes));
  for (const int64_t bytes : output_bytes_) outputs.push_back(zeros(bytes));
  const Arena arena(*this);
  const Memory memory{arena.data(), inputs.data(), outputs.data()};
  Barrier barrier;
  team(threads, [&](int64_t thread, int64_t count) {
    for (int64_t run = 0; run < runs; ++run) {
      for (size_t i = 0; i < planned_.size(); ++i) {
        barrier.wait(count);
        const double start = now();
        run_step(planned_[i], memory, thread, count);
        barrier.wait(count);
        if (thread == 0) least[i] = std::min(least[i], now() - start);
      }
    }
  });
  return least;
}

std::vector<int64_t> Instance::tune(int64_t threads, const Team& team) {
  const std::vector<int64_t> counts = choices();
  const int64_t most = planned_.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
  // The choice of a step in a turn: the last one, which has the largest chunks, first.
  const auto choice_of = [&](size_t step, int64_t turn) {
    return std::max<int64_t>(0, counts[step] - 1 - turn);
  };
  // Each turn tries one choice of every step at once, so that caches are as in a real run. The
  // turns go round several times, because a shared machine is now slow, now fast.
  constexpr int kRounds = 3;
  constexpr int64_t kRuns = 2;
  const size_t count = planned_.size();
  const double never = std::numeric_limits<double>::infinity();
  std::vector<std::vector<double>> least(static_cast<size_t>(most),
                                         std::vector<double>(count, never));
  for (int round = 0; round < kRounds; ++round) {
    for (int64_t turn = 0; turn < most; ++turn) {
      std::vector<int64_t> tried;
      for (size_t i = 0; i < count; ++i) tried.push_back(choice_of(i, turn));
      choose(tried);
      const std::vector<double> times = profile(threads, team, kRuns);
      std::vector<double>& own = least[static_cast<size_t>(turn)];
      for (size_t i = 0; i < count; ++i) own[i] = std::min(own[i], times[i]);
    }
  }
  std::vector<int64_t> best(count, 0);
  for (size_t i = 0; i < count; ++i) {
    double time = never;
    for (int64_t turn = 0; turn < counts[i]; ++turn) {
      // Within the noise the earlier choice stays.
      if (least[static_cast<size_t>(turn)][i] < 0.98 * time) {
        time = least[static_cast<size_t>(turn)][i];
        best[i] = choice_of(i, turn);
      }
    }
  }
  choose(best);
  return best;
}

AlignedMemory Instance::borrow() {
  {
    const std::scoped_lock lock(mutex_);
    if (!free_.empty()) {
      AlignedMemory memory = std::move(free_.back());
      free_.pop_back();
      return memory;
    }
  }
  AlignedMemory arena = aligned_memory(arena_bytes_);
  const Memory memory{arena.get(), nullptr, nullptr};
  for (const Planned& step : planned_) {
    if (step.output.place == View::Place::arena && !step.fills_border) {
      fill_border(step.output, memory, 0, bordered_rows(step.output));
    }
  }
  return arena;
}

void Instance::give_back(AlignedMemory memory) {
  const std::scoped_lock lock(mutex_);
  free_.push_back(std::move(memory));
}

}  // namespace qtoolkit::engine
