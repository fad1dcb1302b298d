// Layer norm and softmax of the channels of each pixel.
#include <bit>
#include <cmath>
#include <optional>
#include <vector>

#include "engine/rows.h"
#include "engine/step.h"
#include "kernels/kernels.h"

namespace qtoolkit::engine {
namespace {

// A kernel that takes rows, on the pixels of each row of pixels.
template <class Args, void (*kKernel)(const Args&, int64_t, int64_t)>
class PixelsTask : public Task {
 public:
  PixelsTask(const Args& args, const View& x, const View& y) : args_(args), x_(x), y_(y) {
    args_.length = x.shape.channels;
    args_.x_row_stride = x.pixel_stride;
    args_.y_row_stride = y.pixel_stride;
  }

  int64_t units() const override { return row_units(y_); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    Args args = args_;
    for_rows(y_, begin, end, [&](int64_t row) {
      args.x = x_.read(memory) + x_.row_offset(row);
      uint8_t* const y = y_.write(memory) + y_.row_offset(row) * y_.element_bytes();
      if (y_.type == Type::codes) {
        args.y = y;
      } else {
        args.y_float = reinterpret_cast<float*>(y);
      }
      kKernel(args, 0, y_.shape.width);
    });
  }

 private:
  Args args_;
  View x_, y_;
};

ValueInfo info_of(const std::optional<QParams>& output) {
  return output ? ValueInfo{Type::codes, output->zero_point} : ValueInfo{Type::float32, 0};
}

class LayerNorm : public Step {
 public:
  LayerNorm(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    const QParams x = attributes.input_qparams("input", inputs[0]);
    if (attributes.has("output_scale")) output_ = attributes.qparams("output");
    const float y_scale = output_ ? output_->scale : 1.0f;
    weight_ = in_steps(attributes.constant("weight", DType::float32, 1), y_scale);
    bias_ = in_steps(attributes.constant("bias", DType::float32, 1), y_scale);
    require(weight_.size() == bias_.size(), "weight and bias must be of one length");
    constexpr size_t kLongest = size_t{1} << 23;
    require(!weight_.empty() && weight_.size() <= kLongest, "takes 1 to ", kLongest,
            " channels, got ", weight_.size());
    // The bits of a float64.
    args_.eps = std::bit_cast<double>(attributes.integer("eps", 0, INT64_MAX));
    require(std::isfinite(args_.eps), "eps must be finite");
    args_.weight = weight_.data();
    args_.bias = bias_.data();
    args_.x_scale = x.scale;
    args_.x_zero_point = x.zero_point;
    if (!output_) return;
    args_.zero_point = output_->zero_point;
    args_.lo = output_->lo;
    args_.hi = output_->hi;
  }
  ValueInfo output() const override { return info_of(output_); }
  Shape output_shape(std::span<const Shape> inputs) const override {
    require(inputs[0].rank < 4, "takes 2 or 3 dimensions");
    require(inputs[0].channels == static_cast<int64_t>(weight_.size()), "takes ", weight_.size(),
            " channels, got ", inputs[0].channels);
    return inputs[0];
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<PixelsTask<kernels::LayerNormArgs, kernels::layer_norm>>(
        args_, binding.inputs[0], binding.output);
  }
  std::string kernel() const override { return "layer_norm"; }

 private:
  static std::vector<float> in_steps(const Constant& parameter, float y_scale) {
    std::vector<float> result;
    for (int64_t c = 0; c < parameter.elements(); ++c) {
      result.push_back(
          checked_multiplier(static_cast<const float*>(parameter.data.get())[c], y_scale));
    }
    return result;
  }

  std::optional<QParams> output_;
  std::vector<float> weight_, bias_;
  kernels::LayerNormArgs args_;
};

class Softmax : public Step {
 public:
  Softmax(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    const QParams x = attributes.input_qparams("input", inputs[0]);
    args_.table = kernels::softmax_table(x.scale);
    if (!attributes.has("output_scale")) return;
    output_ = attributes.qparams("output");
    args_.y_scale = output_->scale;
    args_.zero_point = output_->zero_point;
    args_.lo = output_->lo;
    args_.hi = output_->hi;
  }
  ValueInfo output() const override { return info_of(output_); }
  Shape output_shape(std::span<const Shape> inputs) const override { return inputs[0]; }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<PixelsTask<kernels::SoftmaxArgs, kernels::softmax>>(
        args_, binding.inputs[0], binding.output);
  }
  std::string kernel() const override { return "softmax"; }

 private:
  std::optional<QParams> output_;
  kernels::SoftmaxArgs args_;
};

QT_ENGINE_STEP(layer_norm, LayerNorm);
QT_ENGINE_STEP(softmax, Softmax);

}  // namespace
}  // namespace qtoolkit::engine
