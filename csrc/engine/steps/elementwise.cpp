// Addition, and changes of scale: ReLU, batch norm, concatenation.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/rows.h"
#include "engine/step.h"
#include "kernels/kernels.h"

namespace qtoolkit::engine {
namespace {

using kernels::AddArgs;
using kernels::RequantizeArgs;

class AddTask : public Task {
 public:
  AddTask(const AddArgs& args, const Binding& binding)
      : args_(args), a_(binding.inputs[0]), b_(binding.inputs[1]), y_(binding.output) {}

  int64_t units() const override { return row_units(y_); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    AddArgs args = args_;
    for_rows(y_, begin, end, [&](int64_t row) {
      args.a = a_.read(memory) + a_.row_offset(row);
      args.b = b_.read(memory) + b_.row_offset(row);
      args.y = y_.write(memory) + y_.row_offset(row);
      kernels::add(args, 0, y_.shape.width * y_.shape.channels);
    });
  }

 private:
  AddArgs args_;
  View a_, b_, y_;
};

class Add : public Step {
 public:
  Add(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 2);
    const QParams a = attributes.input_qparams("a", inputs[0]);
    const QParams b = attributes.input_qparams("b", inputs[1]);
    const QParams y = attributes.qparams("output");
    args_.a_zero_point = a.zero_point;
    args_.b_zero_point = b.zero_point;
    args_.a_multiplier = checked_multiplier(a.scale, y.scale);
    args_.b_multiplier = checked_multiplier(b.scale, y.scale);
    args_.zero_point = y.zero_point;
    args_.lo = attributes.flag("relu") ? std::max(y.lo, y.zero_point) : y.lo;
    args_.hi = y.hi;
  }
  ValueInfo output() const override { return {Type::codes, args_.zero_point}; }
  Shape output_shape(std::span<const Shape> inputs) const override {
    require(inputs[0] == inputs[1], "takes two inputs of one shape");
    return inputs[0];
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<AddTask>(args_, binding);
  }
  std::string kernel() const override { return "add"; }

 private:
  AddArgs args_;
};

// One input's rows of pixels to rows of the output, at a channel offset.
class RequantizeTask : public Task {
 public:
  // The factors live as long as the step.
  RequantizeTask(const RequantizeArgs& args, const View& x, const View& y) : x_(x), y_(y) {
    add(args, x, 0);
  }
  // For concatenation.
  explicit RequantizeTask(const View& y) : x_(y), y_(y) {}
  void add(RequantizeArgs args, const View& x, int64_t channel) {
    args.channels = x.shape.channels;
    args.x_row_stride = x.pixel_stride;
    args.y_row_stride = y_.pixel_stride;
    parts_.push_back({args, x, channel});
  }

  int64_t units() const override { return row_units(y_); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    for_rows(y_, begin, end, [&](int64_t row) {
      for (const Part& part : parts_) {
        RequantizeArgs args = part.args;
        args.x = part.x.read(memory) + part.x.row_offset(row);
        args.y = y_.write(memory) + y_.row_offset(row) + part.channel;
        kernels::requantize(args, 0, y_.shape.width);
      }
    });
  }

 private:
  struct Part {
    RequantizeArgs args;
    View x;
    int64_t channel;
  };
  View x_, y_;
  std::vector<Part> parts_;
};

// A change of scale, with ReLU where asked.
class Requantize : public Step {
 public:
  Requantize(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    const QParams x = attributes.input_qparams("input", inputs[0]);
    const QParams y = attributes.qparams("output");
    multiplier_ = checked_multiplier(x.scale, y.scale);
    args_.x_zero_point = x.zero_point;
    args_.multiplier = &multiplier_;
    args_.zero_point = y.zero_point;
    args_.lo = attributes.flag("relu") ? std::max(y.lo, y.zero_point) : y.lo;
    args_.hi = y.hi;
  }
  ValueInfo output() const override { return {Type::codes, args_.zero_point}; }
  Shape output_shape(std::span<const Shape> inputs) const override { return inputs[0]; }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<RequantizeTask>(args_, binding.inputs[0], binding.output);
  }
  std::string kernel() const override { return "requantize"; }

 private:
  float multiplier_ = 1.0f;
  RequantizeArgs args_;
};

class BatchNorm : public Step {
 public:
  BatchNorm(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    const QParams x = attributes.input_qparams("input", inputs[0]);
    const QParams y = attributes.qparams("output");
    const Constant weight = attributes.constant("weight", DType::float32, 1);
    const Constant bias = attributes.constant("bias", DType::float32, 1);
    require(weight.elements() == bias.elements(), "weight and bias must be of one length");
    for (int64_t c = 0; c < weight.elements(); ++c) {
      const double w = static_cast<const float*>(weight.data.get())[c];
      const double b = static_cast<const float*>(bias.data.get())[c];
      multiplier_.push_back(checked_multiplier(static_cast<double>(x.scale) * w, y.scale));
      addend_.push_back(checked_multiplier(b, y.scale));
    }
    args_.x_zero_point = x.zero_point;
    args_.channels_apart = true;
    args_.multiplier = multiplier_.data();
    args_.addend = addend_.data();
    args_.zero_point = y.zero_point;
    args_.lo = attributes.flag("relu") ? std::max(y.lo, y.zero_point) : y.lo;
    args_.hi = y.hi;
  }
  ValueInfo output() const override { return {Type::codes, args_.zero_point}; }
  Shape output_shape(std::span<const Shape> inputs) const override {
    require(inputs[0].rank != 3, "takes 2 or 4 dimensions");
    require(inputs[0].channels == static_cast<int64_t>(multiplier_.size()), "takes ",
            multiplier_.size(), " channels, got ", inputs[0].channels);
    return inputs[0];
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<RequantizeTask>(args_, binding.inputs[0], binding.output);
  }
  std::string kernel() const override { return "requantize"; }

 private:
  std::vector<float> multiplier_, addend_;
  RequantizeArgs args_;
};

// Concatenation of channels.
class Cat : public Step {
 public:
  Cat(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require(!inputs.empty(), "needs an input");
    require_codes(inputs, inputs.size());
    const QParams y = attributes.qparams("output");
    multiplier_.resize(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      const QParams x = attributes.input_qparams("input" + std::to_string(i), inputs[i]);
      multiplier_[i] = checked_multiplier(x.scale, y.scale);
      RequantizeArgs args;
      args.x_zero_point = x.zero_point;
      args.multiplier = &multiplier_[i];
      args.zero_point = y.zero_point;
      args.lo = y.lo;
      args.hi = y.hi;
      args_.push_back(args);
    }
    zero_point_ = y.zero_point;
  }
  ValueInfo output() const override { return {Type::codes, zero_point_}; }
  Shape output_shape(std::span<const Shape> inputs) const override {
    Shape y = inputs[0];
    y.channels = 0;
    for (const Shape& x : inputs) {
      Shape same = x;
      same.channels = inputs[0].channels;
      require(same == inputs[0], "the inputs differ in more than their channels");
      require(!__builtin_add_overflow(y.channels, x.channels, &y.channels), "too many channels");
    }
    return y;
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    auto task = std::make_unique<RequantizeTask>(binding.output);
    int64_t channel = 0;
    for (size_t i = 0; i < args_.size(); ++i) {
      task->add(args_[i], binding.inputs[i], channel);
      channel += binding.inputs[i].shape.channels;
    }
    return task;
  }
  std::string kernel() const override { return "requantize"; }

 private:
  std::vector<float> multiplier_;
  std::vector<RequantizeArgs> args_;
  int32_t zero_point_ = 0;
};

QT_ENGINE_STEP(add, Add);
QT_ENGINE_STEP(requantize, Requantize);
QT_ENGINE_STEP(batch_norm, BatchNorm);
QT_ENGINE_STEP(cat, Cat);

}  // namespace
}  // namespace qtoolkit::engine
