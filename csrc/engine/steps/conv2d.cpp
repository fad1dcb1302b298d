// Convolution and, as its case of one tap, the fully connected layer.
#include <algorithm>
#include <cstring>
#include <optional>

#include "engine/step.h"
#include "engine/weight_terms.h"
#include "kernels/kernels.h"

namespace qtoolkit::engine {
namespace {

using kernels::Conv2dArgs;
using kernels::Conv2dShape;

constexpr int64_t kMostSize = int64_t{1} << 24;  // of a kernel, a stride, a padding

// The dense kernel. Units are tiles of pixels in blocks of channels, numbered in chunks of so many
// tiles: all blocks of one chunk, then those of the next. With one chunk for all tiles a block's
// weights are read once; with small chunks the pixels are.
class DenseTask : public Task {
 public:
  DenseTask(const Conv2dArgs& args, const View& x, const View* residual, const View& y,
            int64_t x_offset)
      : args_(args), x_(x), y_(y), x_offset_(x_offset), tiles_(conv2d_tiles(args.shape)) {
    if (residual != nullptr) residual_ = *residual;
    for (int64_t chunk = 2; chunk < tiles_; chunk *= 2) chunks_.push_back(chunk);
    chunks_.push_back(tiles_);
    choose(choices() - 1);
  }

  int64_t units() const override { return (tiles_ + chunk_ - 1) / chunk_ * blocks(); }
  int64_t choices() const override { return static_cast<int64_t>(chunks_.size()); }
  void choose(int64_t choice) override { chunk_ = chunks_[static_cast<size_t>(choice)]; }

  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    Conv2dArgs args = args_;
    args.x = x_.read(memory) + x_offset_;
    args.y = y_.write(memory);
    if (residual_) args.residual = residual_->read(memory);
    for (int64_t unit = begin; unit < end;) {
      const int64_t chunk = unit / blocks();
      const int64_t first = chunk * chunk_;
      const int64_t last = std::min(first + chunk_, tiles_);
      const int64_t block = unit % blocks();
      // Whole blocks that follow each other are one call.
      const int64_t count = chunk_ == tiles_ ? std::min(end - unit, blocks() - block) : 1;
      kernels::conv2d(args, block * tiles_ + first, (block + count - 1) * tiles_ + last);
      unit += count;
    }
  }

 private:
  int64_t blocks() const { return args_.shape.groups * args_.shape.blocks_per_group(); }

  Conv2dArgs args_;
  View x_, y_;
  std::optional<View> residual_;
  int64_t x_offset_;  // bytes from the first pixel to the first tap
  int64_t tiles_;
  std::vector<int64_t> chunks_;
  int64_t chunk_ = 1;
};

class DepthwiseTask : public Task {
 public:
  DepthwiseTask(const Conv2dArgs& args, const View& x, const View* residual, const View& y,
                int64_t x_offset)
      : args_(args), x_(x), y_(y), x_offset_(x_offset) {
    if (residual != nullptr) residual_ = *residual;
  }

  int64_t units() const override { return y_.shape.rows(); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    Conv2dArgs args = args_;
    args.x = x_.read(memory) + x_offset_;
    args.y = y_.write(memory);
    if (residual_) args.residual = residual_->read(memory);
    kernels::conv2d_depthwise(args, begin, end);
  }

 private:
  Conv2dArgs args_;
  View x_, y_;
  std::optional<View> residual_;
  int64_t x_offset_;
};

// True if rows and images follow each other without a border.
bool gapless(const View& view) {
  return view.row_stride == view.shape.width * view.pixel_stride &&
         view.image_stride == view.shape.height * view.row_stride;
}

class Convolution : public Step {
 public:
  Convolution(Attributes& attributes, std::span<const ValueInfo> inputs)
      : Convolution(attributes, inputs, /*is_linear=*/false) {}

  ValueInfo output() const override {
    return output_ ? ValueInfo{Type::codes, output_->zero_point} : ValueInfo{Type::float32, 0};
  }

  Border input_border(size_t input) const override {
    return input == 0 ? Border{padding_[0], padding_[1]} : Border{};
  }

  Shape output_shape(std::span<const Shape> inputs) const override {
    const Shape& x = inputs[0];
    require(x.channels == shape_.groups * shape_.in_channels, "takes ",
            shape_.groups * shape_.in_channels, " channels, got ", x.channels);
    Shape y = x;
    y.channels = shape_.groups * shape_.out_channels;
    if (is_linear_) {
      require(x.rank < 4, "a linear layer takes 2 or 3 dimensions");
    } else {
      require(x.rank == 4, "a convolution takes 4 dimensions, got ", x.rank);
      y.height = output_size(x.height, 0, shape_.kernel_height, shape_.dilation_height);
      y.width = output_size(x.width, 1, shape_.kernel_width, shape_.dilation_width);
    }
    if (residual_) require(inputs[1] == y, "the residual must have the shape of the output");
    return y;
  }

  std::unique_ptr<Task> bind(const Binding& binding) const override {
    const View& x = binding.inputs[0];
    const View* residual = residual_ ? &binding.inputs[1] : nullptr;
    const View& y = binding.output;
    Conv2dArgs args;
    args.shape = shape_;
    args.shape.images = y.shape.images;
    args.shape.out_height = y.shape.height;
    args.shape.out_width = y.shape.width;
    args.x_pixel_stride = x.pixel_stride;
    args.x_row_stride = x.row_stride;
    args.x_image_stride = x.image_stride;
    args.packed = packed_;
    args.layout = layout_;
    args.offset = terms_.offset.data();
    args.multiplier = terms_.multiplier.data();
    args.output = output_ ? kernels::Conv2dOutput::codes : kernels::Conv2dOutput::float32;
    args.y_pixel_stride = y.pixel_stride;
    args.y_row_stride = y.row_stride;
    args.y_image_stride = y.image_stride;
    args.relu = relu_ && !output_;
    if (output_) {
      args.zero_point = output_->zero_point;
      args.lo = relu_ ? std::max(output_->lo, output_->zero_point) : output_->lo;
      args.hi = output_->hi;
    }
    if (residual != nullptr) {
      args.residual_pixel_stride = residual->pixel_stride;
      args.residual_row_stride = residual->row_stride;
      args.residual_image_stride = residual->image_stride;
      args.residual_zero_point = residual_->zero_point;
      args.residual_multiplier = checked_multiplier(residual_->scale, output_->scale);
    }
    const int64_t x_offset = -padding_[0] * x.row_stride - padding_[1] * x.pixel_stride;
    if (depthwise_) return std::make_unique<DepthwiseTask>(args, x, residual, y, x_offset);
    const bool one_tap = shape_.kernel_height == 1 && shape_.kernel_width == 1 &&
                         shape_.stride_height == 1 && shape_.stride_width == 1;
    if (one_tap && gapless(x) && gapless(y) && (residual == nullptr || gapless(*residual))) {
      flatten(args);
    }
    return std::make_unique<DenseTask>(args, x, residual, y, x_offset);
  }

  int64_t packed_bytes() const override { return packed_bytes_; }

  const char* packed_constant() const override { return "weight"; }

  void pack(uint8_t* memory) override {
    auto* packed = reinterpret_cast<int8_t*>(memory);
    const auto* weight = static_cast<const int8_t*>(weight_.data.get());
    if (depthwise_) {
      kernels::pack_conv2d_depthwise_weight(shape_, weight, packed);
    } else {
      kernels::pack_conv2d_weight(layout_, shape_, weight, packed);
    }
    packed_ = packed;
    weight_.data.reset();
  }

  std::shared_ptr<const void> unpack() const override {
    const std::shared_ptr<int8_t[]> weight(new int8_t[static_cast<size_t>(shape_.weights())]);
    if (depthwise_) {
      kernels::unpack_conv2d_depthwise_weight(shape_, packed_, weight.get());
    } else {
      kernels::unpack_conv2d_weight(layout_, shape_, packed_, weight.get());
    }
    return weight;
  }

  std::string kernel() const override { return depthwise_ ? "conv2d_depthwise" : "conv2d"; }

  int64_t multiplications(std::span<const Shape> inputs) const override {
    return output_shape(inputs).elements() * shape_.in_channels * shape_.kernel_height *
           shape_.kernel_width;
  }

 protected:
  Convolution(Attributes& attributes, std::span<const ValueInfo> inputs, bool is_linear)
      : is_linear_(is_linear) {
    relu_ = attributes.flag("relu");
    if (attributes.has("output_scale")) output_ = attributes.qparams("output");
    const bool has_residual = attributes.has("residual_scale");
    require_codes(inputs, has_residual ? 2 : 1);
    input_ = attributes.input_qparams("input", inputs[0]);
    if (has_residual) {
      require(output_.has_value(), "a residual needs an output of codes");
      residual_ = attributes.input_qparams("residual", inputs[1]);
      checked_multiplier(residual_->scale, output_->scale);
    }
    read_weight(attributes);
  }

 private:
  void read_weight(Attributes& attributes) {
    weight_ = attributes.constant("weight", DType::int8, is_linear_ ? 2 : 4);
    const std::vector<int64_t>& sizes = weight_.shape;
    for (const int64_t size : sizes) {
      require(size > 0 && size <= kMostSize, "the weight has a size of ", size);
    }
    if (!is_linear_) {
      const auto stride = attributes.integers("stride", 2, 1, kMostSize);
      const auto dilation = attributes.integers("dilation", 2, 1, kMostSize);
      padding_ = attributes.integers("padding", 2, 0, kMostSize);
      shape_.groups = attributes.integer("groups", 1, sizes[0]);
      shape_.stride_height = stride[0];
      shape_.stride_width = stride[1];
      shape_.dilation_height = dilation[0];
      shape_.dilation_width = dilation[1];
      shape_.kernel_height = sizes[2];
      shape_.kernel_width = sizes[3];
    }
    require(sizes[0] % shape_.groups == 0, "the output channels do not divide into ", shape_.groups,
            " groups");
    shape_.in_channels = sizes[1];
    shape_.out_channels = sizes[0] / shape_.groups;
    depthwise_ = shape_.groups > 1 && shape_.in_channels == 1 && shape_.out_channels == 1;
    require_sums_fit(shape_);

    const WeightTerms terms(attributes, sizes[0]);
    const auto* weight = static_cast<const int8_t*>(weight_.data.get());
    packed_bytes_ = shape_.weights();
    if (!depthwise_) {
      layout_ = kernels::conv2d_layout(shape_);
      packed_bytes_ = kernels::conv2d_packed_bytes(layout_, shape_, weight);
    }
    terms_ = terms.of(shape_, depthwise_, input_, output_, weight);
  }

  int64_t output_size(int64_t size, size_t axis, int64_t kernel, int64_t dilation) const {
    const int64_t extent = (kernel - 1) * dilation + 1;
    const int64_t padded = size + 2 * padding_[axis];
    require(extent <= padded, "the kernel's ", extent, " is larger than the padded input's ",
            padded);
    const int64_t stride = axis == 0 ? shape_.stride_height : shape_.stride_width;
    return (padded - extent) / stride + 1;
  }

  // All pixels as one row: tiles then do not end with an image's rows.
  static void flatten(Conv2dArgs& args) {
    Conv2dShape& shape = args.shape;
    shape.out_width = shape.pixels();
    shape.images = shape.out_height = 1;
    args.x_row_stride = args.x_image_stride = shape.out_width * args.x_pixel_stride;
    args.y_row_stride = args.y_image_stride = shape.out_width * args.y_pixel_stride;
    args.residual_row_stride = args.residual_image_stride =
        shape.out_width * args.residual_pixel_stride;
  }

  bool is_linear_ = false;
  bool relu_ = false;
  bool depthwise_ = false;
  QParams input_;
  std::optional<QParams> output_, residual_;
  std::vector<int64_t> padding_ = {0, 0};
  Conv2dShape shape_;
  Constant weight_;  // its data until pack()
  kernels::Conv2dLayout layout_ = kernels::Conv2dLayout::quads;
  int64_t packed_bytes_ = 0;
  const int8_t* packed_ = nullptr;
  kernels::ChannelTerms terms_;
};

class Linear : public Convolution {
 public:
  Linear(Attributes& attributes, std::span<const ValueInfo> inputs)
      : Convolution(attributes, inputs, /*is_linear=*/true) {}
};

QT_ENGINE_STEP(conv2d, Convolution);
QT_ENGINE_STEP(linear, Linear);

}  // namespace
}  // namespace qtoolkit::engine
