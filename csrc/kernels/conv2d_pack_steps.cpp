#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "kernels/conv2d_pack.h"
#include "kernels/conv2d_steps.h"

namespace qtoolkit::kernels {
namespace {

using Bytes = std::array<std::array<int8_t, 4>, kStepChannels>;  // a step's weights

// The weights of one list at one run, from which steps are taken.
class Run {
 public:
  explicit Run(const Conv2dShape& shape)
      : bytes_(shape.run_bytes()),
        last_(4 * shape.run_quads() - 4),
        left_(static_cast<size_t>(last_ + 4)) {}

  void set(int64_t byte, int64_t channel, int8_t weight) {
    left_[static_cast<size_t>(byte)][static_cast<size_t>(channel)] = weight;
  }

  // Calls visit(at, weights) for steps whose weights sum to all that was set, in order of `at`,
  // and leaves nothing.
  template <class Visit>
  void take_all(const Visit& visit) {
    int64_t before = 0;
    const auto move_to = [&](int64_t at) {
      for (; at - before >= kMoveToRun; visit(before, Bytes{})) before += kMoveToRun - 1;
      before = at;
    };
    if (left_[0] == Weights{}) visit(0, Bytes{});
    for (int64_t done = next(0); done < bytes_; done = next(done)) {
      // From the first byte that is left or from the one before it, whichever reaches farther.
      Step step = step_at(std::min(done, last_), done);
      if (step.at == done && done > 0) {
        const Step other = step_at(done - 1, done);
        if (other.reach > step.reach) step = other;
      }
      move_to(step.at);
      visit(step.at, step.weights);
      subtract(step);
    }
    if (last_ - before < 4) return;
    move_to(last_);
    visit(last_, Bytes{});
  }

 private:
  using Weights = std::array<int16_t, kStepChannels>;  // of one byte
  struct Step {
    int64_t at, reach;  // all bytes before `reach` are done with it
    Bytes weights;
  };

  int64_t next(int64_t byte) const {
    while (byte < bytes_ && left_[static_cast<size_t>(byte)] == Weights{}) ++byte;
    return byte;
  }

  // The step at `at` with as much as it can hold of the bytes from `done` on: of each pair all of
  // the first one's weights and what goes with them of the second's.
  Step step_at(int64_t at, int64_t done) const {
    Step step{at, at + 4, {}};
    for (int64_t i = 0; i < 4; i += 2) {
      for (size_t channel = 0; channel < kStepChannels; ++channel) {
        const auto left = [&](int64_t byte) {
          return byte < done ? 0 : int32_t{left_[static_cast<size_t>(byte)][channel]};
        };
        const int32_t first = left(at + i), second = left(at + i + 1);
        const int32_t taken = std::clamp(second, -kStepPairBound - std::min(first, 0),
                                         kStepPairBound - std::max(first, 0));
        step.weights[channel][static_cast<size_t>(i)] = static_cast<int8_t>(first);
        step.weights[channel][static_cast<size_t>(i + 1)] = static_cast<int8_t>(taken);
        if (taken != second) step.reach = std::min(step.reach, at + i + 1);
      }
    }
    return step;
  }

  void subtract(const Step& step) {
    for (size_t i = 0; i < 4; ++i) {
      Weights& left = left_[static_cast<size_t>(step.at) + i];
      for (size_t channel = 0; channel < kStepChannels; ++channel) {
        left[channel] = static_cast<int16_t>(left[channel] - step.weights[channel][i]);
      }
    }
  }

  int64_t bytes_, last_;  // of the run; where the last step may begin
  std::vector<Weights> left_;
};

// The list's channels that exist, and where their weights lie in the canonical weight.
struct List {
  const Conv2dShape& s;
  int64_t first, channels;  // the first over all groups

  List(const Conv2dShape& shape, int64_t list) : s(shape) {
    const int64_t lists = s.blocks_per_group() * kListsPerBlock;
    const int64_t in_group = list % lists * kStepChannels;
    first = list / lists * s.out_channels + in_group;
    channels = std::clamp<int64_t>(s.out_channels - in_group, 0, kStepChannels);
  }

  int64_t index(int64_t channel, int64_t run, int64_t byte) const {
    const int64_t tap = run * (s.kernel_width / s.runs_per_row()) + byte / s.in_channels;
    return ((first + channel) * s.in_channels + byte % s.in_channels) * s.kernel_height *
               s.kernel_width +
           tap;
  }
};

// Of the first weight from the first packed byte.
int64_t weights_at(const Conv2dShape& shape) {
  const int64_t bytes = conv2d_step_lists(shape) * static_cast<int64_t>(sizeof(Conv2dStepList));
  return (bytes + 63) / 64 * 64;
}

// Calls visit(list, move, weights) for all steps, in the order in which they are kept.
template <class Visit>
void for_each_step(const Conv2dShape& s, const int8_t* weight, const Visit& visit) {
  Run left(s);
  for (int64_t i = 0; i < conv2d_step_lists(s); ++i) {
    const List list(s, i);
    if (list.channels == 0) continue;
    int64_t skipped = 0;  // bytes of the run before, in front of its last quad
    for (int64_t run = 0; run < s.kernel_height * s.runs_per_row(); ++run) {
      for (int64_t channel = 0; channel < kStepChannels; ++channel) {
        for (int64_t byte = 0; byte < s.run_bytes(); ++byte) {
          left.set(byte, channel,
                   channel < list.channels ? weight[list.index(channel, run, byte)] : int8_t{0});
        }
      }
      // The move to the run's first step.
      int64_t move =
          run == 0 ? 0 : (run % s.runs_per_row() == 0 ? kMoveToRow : kMoveToRun) + skipped;
      int64_t before = 0;
      left.take_all([&](int64_t at, const Bytes& weights) {
        visit(i, static_cast<uint8_t>(move + at - before), weights);
        move = 0;
        before = at;
      });
      skipped = 4 * s.run_quads() - 4 - before;
    }
  }
}

}  // namespace

int64_t step_packed_bytes(const Conv2dShape& shape, const int8_t* weight) {
  int64_t steps = 0;
  for_each_step(shape, weight, [&](int64_t, uint8_t, const Bytes&) { ++steps; });
  return (weights_at(shape) + steps * (kStepBytes + 1) + 63) / 64 * 64;
}

void pack_steps(const Conv2dShape& shape, const int8_t* weight, int8_t* packed) {
  std::vector<int64_t> counts(static_cast<size_t>(conv2d_step_lists(shape)));
  std::vector<uint8_t> moves;
  int8_t* const weights = packed + weights_at(shape);
  for_each_step(shape, weight, [&](int64_t list, uint8_t move, const Bytes& bytes) {
    std::memcpy(weights + std::ssize(moves) * kStepBytes, bytes.data(), kStepBytes);
    moves.push_back(move);
    ++counts[static_cast<size_t>(list)];
  });
  int8_t* const all_moves = weights + std::ssize(moves) * kStepBytes;
  std::memcpy(all_moves, moves.data(), moves.size());
  std::fill(packed, weights, int8_t{0});
  int64_t done = 0;
  for (int8_t* to = packed; const int64_t count : counts) {
    const Conv2dStepList list{count, weights + done * kStepBytes - to, all_moves + done - to};
    std::memcpy(to, &list, sizeof(list));
    to += sizeof(list);
    done += count;
  }
}

void unpack_steps(const Conv2dShape& shape, const int8_t* packed, int8_t* weight) {
  const Conv2dShape& s = shape;
  std::fill_n(weight, s.groups * s.out_channels * s.in_channels * s.kernel_height * s.kernel_width,
              int8_t{0});
  for (int64_t i = 0; i < conv2d_step_lists(s); ++i) {
    const List list(s, i);
    const Conv2dSteps steps = conv2d_steps(packed, i);
    int64_t run = 0, at = 0;
    for (int64_t step = 0; step < steps.count; ++step) {
      const bool next = steps.move[step] >= kMoveToRun;
      run += next;
      at = next ? 0 : at + steps.move[step];
      for (int64_t channel = 0; channel < list.channels; ++channel) {
        const int8_t* const from = steps.weight + step * kStepBytes + channel * 4;
        for (int64_t k = 0; k < 4 && at + k < s.run_bytes(); ++k) {
          int8_t& to = weight[list.index(channel, run, at + k)];
          to = static_cast<int8_t>(to + from[k]);
        }
      }
    }
  }
}

}  // namespace qtoolkit::kernels
