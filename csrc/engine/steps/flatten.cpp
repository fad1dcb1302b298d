// [N, C, H, W] to [N, C * H * W], in the user's order: channels first.
#include "engine/step.h"

namespace qtoolkit::engine {
namespace {

class FlattenTask : public Task {
 public:
  FlattenTask(const View& x, const View& y) : x_(x), y_(y) {}
  int64_t units() const override { return x_.shape.images; }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    const Shape& shape = x_.shape;
    for (int64_t image = begin; image < end; ++image) {
      const uint8_t* from = x_.read(memory) + image * x_.image_stride;
      uint8_t* to = y_.write(memory) + image * y_.image_stride;
      for (int64_t row = 0; row < shape.height; ++row) {
        for (int64_t column = 0; column < shape.width; ++column) {
          const uint8_t* pixel = from + row * x_.row_stride + column * x_.pixel_stride;
          uint8_t* first = to + row * shape.width + column;
          for (int64_t c = 0; c < shape.channels; ++c) {
            first[c * shape.height * shape.width] = pixel[c];
          }
        }
      }
    }
  }

 private:
  View x_, y_;
};

class Flatten : public Step {
 public:
  Flatten(Attributes&, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    value_ = inputs[0];
  }
  ValueInfo output() const override { return value_; }
  Shape output_shape(std::span<const Shape> inputs) const override {
    const Shape& x = inputs[0];
    require(x.rank != 3, "takes 2 or 4 dimensions");
    const int64_t channels = checked_product(checked_product(x.height, x.width), x.channels);
    return {2, x.images, 1, 1, channels};
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<FlattenTask>(binding.inputs[0], binding.output);
  }
  std::string kernel() const override { return "copy"; }

 private:
  ValueInfo value_;
};

QT_ENGINE_STEP(flatten, Flatten);

}  // namespace
}  // namespace qtoolkit::engine
