// Multiplication, also by one value for each channel of an image: squeeze-and-excitation.
#include <algorithm>

#include "engine/rows.h"
#include "engine/step.h"
#include "kernels/kernels.h"

namespace qtoolkit::engine {
namespace {

using kernels::MulArgs;

bool is_gate(const Shape& gate, const Shape& x) {
  Shape one_pixel = x;
  one_pixel.height = one_pixel.width = 1;
  return x.rank == 4 && gate == one_pixel;
}

class MulTask : public Task {
 public:
  // a has the output's shape, b too or one pixel.
  MulTask(const MulArgs& args, const View& a, const View& b, const View& y)
      : args_(args), a_(a), b_(b), y_(y) {}

  int64_t units() const override { return row_units(y_); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    const bool gated = b_.shape != y_.shape;
    // Without a border the pixels of several rows follow each other.
    const bool gapless =
        a_.row_stride == y_.shape.width * y_.shape.channels && y_.row_stride == a_.row_stride;
    MulArgs args = args_;
    args.channels = gated ? y_.shape.channels : y_.shape.width * y_.shape.channels;
    args.a_row_stride = gated ? a_.pixel_stride : a_.row_stride;
    args.b_row_stride = gated ? 0 : b_.row_stride;
    args.y_row_stride = gated ? y_.pixel_stride : y_.row_stride;
    for_row_spans(y_, begin, end, [&](int64_t first, int64_t rows) {
      const int64_t calls = gated && !gapless ? rows : 1;
      for (int64_t row = first; row < first + calls; ++row) {
        args.a = a_.read(memory) + a_.row_offset(row);
        args.b = b_.read(memory) +
                 (gated ? row / y_.shape.height * b_.image_stride : b_.row_offset(row));
        args.y = y_.write(memory) + y_.row_offset(row);
        kernels::mul(args, 0, gated ? rows / calls * y_.shape.width : rows);
      }
    });
  }

 private:
  MulArgs args_;
  View a_, b_, y_;
};

class Mul : public Step {
 public:
  Mul(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 2);
    const QParams a = attributes.input_qparams("a", inputs[0]);
    const QParams b = attributes.input_qparams("b", inputs[1]);
    const QParams y = attributes.qparams("output");
    args_.a_zero_point = a.zero_point;
    args_.b_zero_point = b.zero_point;
    args_.multiplier = checked_multiplier(static_cast<double>(a.scale) * b.scale, y.scale);
    args_.zero_point = y.zero_point;
    args_.lo = attributes.flag("relu") ? std::max(y.lo, y.zero_point) : y.lo;
    args_.hi = y.hi;
  }
  ValueInfo output() const override { return {Type::codes, args_.zero_point}; }
  Shape output_shape(std::span<const Shape> inputs) const override {
    if (inputs[0] == inputs[1] || is_gate(inputs[1], inputs[0])) return inputs[0];
    require(is_gate(inputs[0], inputs[1]),
            "takes two inputs of one shape, or one of a single pixel an image");
    return inputs[1];
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    const View &a = binding.inputs[0], &b = binding.inputs[1];
    if (a.shape == binding.output.shape) {
      return std::make_unique<MulTask>(args_, a, b, binding.output);
    }
    MulArgs swapped = args_;
    std::swap(swapped.a_zero_point, swapped.b_zero_point);
    return std::make_unique<MulTask>(swapped, b, a, binding.output);
  }
  std::string kernel() const override { return "mul"; }

 private:
  MulArgs args_;
};

QT_ENGINE_STEP(mul, Mul);

}  // namespace
}  // namespace qtoolkit::engine
