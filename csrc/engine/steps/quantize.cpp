// Where values enter and leave a plan: float32 to codes, codes to float32, and codes of the user's
// tensors to those of the plan and back.
#include <algorithm>
#include <vector>

#include "engine/rows.h"
#include "engine/step.h"
#include "kernels/kernels.h"

namespace qtoolkit::engine {
namespace {

class QuantizeTask : public Task {
 public:
  QuantizeTask(const View& x, const View& y, const QParams& output) : x_(x), y_(y) {
    args_.channels = y.shape.channels;
    args_.width = y.shape.width;
    args_.height = y.shape.height;
    args_.x_image_stride = x.image_stride;
    args_.x_row_stride = x.row_stride;
    args_.x_column_stride = x.pixel_stride;
    args_.x_channel_stride = x.channel_stride;
    args_.y_row_stride = y.row_stride;
    args_.y_pixel_stride = y.pixel_stride;
    args_.y_image_stride = y.image_stride;
    args_.scale = output.scale;
    args_.zero_point = output.zero_point;
    args_.quant_min = output.lo;
    args_.quant_max = output.hi;
  }

  int64_t units() const override { return y_.shape.rows(); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    kernels::QuantizeImageArgs args = args_;
    args.x = reinterpret_cast<const float*>(x_.read(memory));
    args.y = y_.write(memory);
    kernels::quantize_image(args, begin, end);
  }

 private:
  kernels::QuantizeImageArgs args_;
  View x_, y_;
};

class Quantize : public Step {
 public:
  Quantize(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require(inputs.size() == 1 && inputs[0].type == Type::float32, "takes one float32 input");
    output_ = attributes.qparams("output");
  }
  ValueInfo output() const override { return {Type::codes, output_.zero_point}; }
  Shape output_shape(std::span<const Shape> inputs) const override { return inputs[0]; }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<QuantizeTask>(binding.inputs[0], binding.output, output_);
  }
  std::string kernel() const override { return "quantize_image"; }

 private:
  QParams output_;
};

class DequantizeTask : public Task {
 public:
  DequantizeTask(const View& x, const View& y, const QParams& input) : x_(x), y_(y) {
    args_.height = x.shape.height;
    args_.width = x.shape.width;
    args_.channels = x.shape.channels;
    args_.x_image_stride = x.image_stride;
    args_.x_row_stride = x.row_stride;
    args_.x_pixel_stride = x.pixel_stride;
    args_.y_image_stride = y.image_stride;
    args_.y_channel_stride = y.channel_stride;
    args_.y_row_stride = y.row_stride;
    args_.y_column_stride = y.pixel_stride;
    args_.scale = input.scale;
    args_.zero_point = input.zero_point;
  }

  int64_t units() const override { return y_.shape.rows(); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    kernels::DequantizeImageArgs args = args_;
    args.x = x_.read(memory);
    args.y = reinterpret_cast<float*>(y_.write(memory));
    kernels::dequantize_image(args, begin, end);
  }

 private:
  kernels::DequantizeImageArgs args_;
  View x_, y_;
};

class Dequantize : public Step {
 public:
  Dequantize(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    input_ = attributes.input_qparams("input", inputs[0]);
    planar_ = attributes.flag("contiguous");
  }
  ValueInfo output() const override { return {Type::float32, 0}; }
  Shape output_shape(std::span<const Shape> inputs) const override { return inputs[0]; }
  bool planar_output() const override { return planar_; }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<DequantizeTask>(binding.inputs[0], binding.output, input_);
  }
  std::string kernel() const override { return "dequantize_image"; }

 private:
  QParams input_;
  bool planar_ = false;
};

// Bytes from one place to another, int8 codes to unsigned ones or back.
class CopyTask : public Task {
 public:
  CopyTask(const View& x, const View& y, bool flips) : x_(x), y_(y), flip_(flips ? 0x80 : 0) {}

  int64_t units() const override { return row_units(y_); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    for_rows(y_, begin, end, [&](int64_t row) {
      const uint8_t* from = x_.read(memory) + x_.row_offset(row);
      uint8_t* to = y_.write(memory) + y_.row_offset(row);
      if (x_.dense_pixels()) {
        const int64_t count = x_.shape.width * x_.shape.channels;
        for (int64_t i = 0; i < count; ++i) to[i] = from[i] ^ flip_;
        return;
      }
      for (int64_t pixel = 0; pixel < x_.shape.width; ++pixel) {
        for (int64_t c = 0; c < x_.shape.channels; ++c) {
          to[pixel * y_.pixel_stride + c] =
              from[pixel * x_.pixel_stride + c * x_.channel_stride] ^ flip_;
        }
      }
    });
  }

 private:
  View x_, y_;
  uint8_t flip_;
};

// Codes of the user's tensor to those of the plan, and back. The value keeps its zero point.
class Copy : public Step {
 public:
  Copy(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    value_ = inputs[0];
    is_signed_ = attributes.flag("signed");
  }
  ValueInfo output() const override { return value_; }
  Shape output_shape(std::span<const Shape> inputs) const override { return inputs[0]; }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<CopyTask>(binding.inputs[0], binding.output, is_signed_);
  }
  bool signed_output() const override { return is_signed_; }
  std::string kernel() const override { return "copy"; }

 private:
  ValueInfo value_;
  bool is_signed_ = false;
};

QT_ENGINE_STEP(quantize, Quantize);
QT_ENGINE_STEP(dequantize, Dequantize);
QT_ENGINE_STEP(copy, Copy);

}  // namespace
}  // namespace qtoolkit::engine
