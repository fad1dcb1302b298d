// Transposed convolution, as the convolutions of stride 1 that kernels/conv_transpose2d.h tells of.
#include "kernels/conv_transpose2d.h"

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "engine/step.h"
#include "engine/weight_terms.h"
#include "kernels/kernels.h"

namespace qtoolkit::engine {
namespace {

using kernels::Conv2dArgs;
using kernels::Conv2dShape;
using kernels::TransposedAxis;

constexpr int64_t kMostSize = int64_t{1} << 24;  // of a kernel, a padding, a border
constexpr int64_t kMostStride = 64;              // there are up to stride * stride convolutions
constexpr int64_t kAlignment = 64;

// One of the convolutions, for outputs a stride apart.
struct Part {
  kernels::TransposedTaps rows, columns;
  Conv2dShape shape;  // without images and sizes of the output
  kernels::Conv2dLayout layout = kernels::Conv2dLayout::quads;
  int64_t start = 0, bytes = 0;  // in packed memory
  kernels::ChannelTerms terms;
};

class TransposedTask : public Task {
 public:
  struct Call {
    Conv2dArgs args;
    int64_t x_offset, y_offset;  // bytes from the first pixel
    int64_t units;
  };

  TransposedTask(std::vector<Call> calls, bool depthwise, const View& x, const View& y)
      : calls_(std::move(calls)), depthwise_(depthwise), x_(x), y_(y) {}

  int64_t units() const override {
    int64_t result = 0;
    for (const Call& call : calls_) result += call.units;
    return result;
  }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    for (const Call& call : calls_) {
      const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, call.units);
      begin -= call.units;
      end -= call.units;
      if (first >= last) continue;
      Conv2dArgs args = call.args;
      args.x = x_.read(memory) + call.x_offset;
      args.y = y_.write(memory) + call.y_offset;
      if (depthwise_) {
        kernels::conv2d_depthwise(args, first, last);
      } else {
        kernels::conv2d(args, first, last);
      }
    }
  }

 private:
  std::vector<Call> calls_;
  bool depthwise_;
  View x_, y_;
};

class ConvTranspose2d : public Step {
 public:
  ConvTranspose2d(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    input_ = attributes.input_qparams("input", inputs[0]);
    if (attributes.has("output_scale")) output_ = attributes.qparams("output");
    relu_ = attributes.flag("relu");
    read_weight(attributes);
    for (size_t axis = 0; axis < 2; ++axis) border_[axis] = border(axis);
    make_parts(attributes);
  }

  ValueInfo output() const override {
    return output_ ? ValueInfo{Type::codes, output_->zero_point} : ValueInfo{Type::float32, 0};
  }
  Border input_border(size_t /*input*/) const override { return {border_[0], border_[1]}; }

  Shape output_shape(std::span<const Shape> inputs) const override {
    const Shape& x = inputs[0];
    require(x.rank == 4, "takes 4 dimensions, got ", x.rank);
    require(x.channels == groups_ * in_channels_, "takes ", groups_ * in_channels_,
            " channels, got ", x.channels);
    Shape y = x;
    y.channels = groups_ * out_channels_;
    y.height = output_size(x.height, 0);
    y.width = output_size(x.width, 1);
    return y;
  }

  std::unique_ptr<Task> bind(const Binding& binding) const override {
    const View &x = binding.inputs[0], &y = binding.output;
    const auto rows = kernels::transposed_axes(geometry_[0], y.shape.height);
    const auto columns = kernels::transposed_axes(geometry_[1], y.shape.width);
    check_border(rows, x.shape.height, x.border.height);
    check_border(columns, x.shape.width, x.border.width);
    std::vector<TransposedTask::Call> calls;
    for (size_t i = 0; i < rows.size(); ++i) {
      for (size_t j = 0; j < columns.size(); ++j) {
        // Fewer outputs than the stride have the first of the parts.
        const Part& part = parts_[i * static_cast<size_t>(geometry_[1].stride) + j];
        calls.push_back(call_of(part, rows[i], columns[j], x, y));
      }
    }
    return std::make_unique<TransposedTask>(std::move(calls), depthwise_, x, y);
  }

  int64_t packed_bytes() const override { return packed_bytes_; }
  const char* packed_constant() const override { return "weight"; }

  void pack(uint8_t* memory) override {
    packed_ = reinterpret_cast<int8_t*>(memory);
    for (const Part& part : parts_) {
      const std::vector<int8_t> weight = weight_of(part);
      int8_t* const to = reinterpret_cast<int8_t*>(memory) + part.start;
      if (depthwise_) {
        kernels::pack_conv2d_depthwise_weight(part.shape, weight.data(), to);
      } else {
        kernels::pack_conv2d_weight(part.layout, part.shape, weight.data(), to);
      }
    }
    weight_.data.reset();
  }

  std::shared_ptr<const void> unpack() const override {
    const std::shared_ptr<int8_t[]> result(new int8_t[static_cast<size_t>(weight_.elements())]());
    for (const Part& part : parts_) {
      std::vector<int8_t> weight(static_cast<size_t>(part.shape.weights()));
      if (depthwise_) {
        kernels::unpack_conv2d_depthwise_weight(part.shape, packed_ + part.start, weight.data());
      } else {
        kernels::unpack_conv2d_weight(part.layout, part.shape, packed_ + part.start, weight.data());
      }
      kernels::untransposed_weight(part.shape, part.rows, part.columns, geometry_[0].kernel,
                                   geometry_[1].kernel, weight.data(), result.get());
    }
    return result;
  }

  std::string kernel() const override { return depthwise_ ? "conv2d_depthwise" : "conv2d"; }

  int64_t multiplications(std::span<const Shape> inputs) const override {
    return inputs[0].elements() * out_channels_ * geometry_[0].kernel * geometry_[1].kernel;
  }

 private:
  void read_weight(Attributes& attributes) {
    weight_ = attributes.constant("weight", DType::int8, 4);
    const std::vector<int64_t>& sizes = weight_.shape;
    for (const int64_t size : sizes) {
      require(size > 0 && size <= kMostSize, "the weight has a size of ", size);
    }
    const auto stride = attributes.integers("stride", 2, 1, kMostStride);
    const auto dilation = attributes.integers("dilation", 2, 1, kMostSize);
    const auto padding = attributes.integers("padding", 2, 0, kMostSize);
    output_padding_ = attributes.integers("output_padding", 2, 0, kMostSize);
    groups_ = attributes.integer("groups", 1, sizes[0]);
    require(sizes[0] % groups_ == 0, "the input channels do not divide into ", groups_, " groups");
    in_channels_ = sizes[0] / groups_;
    out_channels_ = sizes[1];
    depthwise_ = groups_ > 1 && in_channels_ == 1 && out_channels_ == 1;
    for (size_t axis = 0; axis < 2; ++axis) {
      geometry_[axis] = {.kernel = sizes[axis + 2],
                         .stride = stride[axis],
                         .padding = padding[axis],
                         .dilation = dilation[axis]};
      require(output_padding_[axis] < std::max(stride[axis], dilation[axis]),
              "the output padding must be smaller than the stride or the dilation");
    }
  }

  // May be less than 1.
  int64_t unchecked_size(int64_t size, size_t axis) const {
    const auto& [kernel, stride, padding, dilation] = geometry_[axis];
    return (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding_[axis] + 1;
  }
  int64_t output_size(int64_t size, size_t axis) const {
    require(size > 0, "takes images that are not empty");
    const int64_t result = unchecked_size(size, axis);
    require(result > 0, "an input of ", size, " pixels gives an output of ", result);
    return result;
  }

  // How far outside an input of any size is read. No size reads further than one that has outputs
  // of every part; that one's border does not depend on the size.
  int64_t border(size_t axis) const {
    const auto& [kernel, stride, padding, dilation] = geometry_[axis];
    const int64_t size = 1 + (2 * padding + stride + stride - 1) / stride;
    const auto axes = kernels::transposed_axes(geometry_[axis], unchecked_size(size, axis));
    const kernels::Border border = kernels::transposed_border(axes, size);
    const int64_t result = std::max(border.before, border.after);
    require(result <= kMostSize, "reads ", result, " pixels outside of the input");
    return result;
  }

  static void check_border(const std::vector<TransposedAxis>& axes, int64_t size, int64_t given) {
    const kernels::Border border = kernels::transposed_border(axes, size);
    require(border.before <= given && border.after <= given, "the input's border is too small");
  }

  void make_parts(Attributes& attributes) {
    const WeightTerms terms(attributes, groups_ * out_channels_);
    for (const TransposedAxis& row : kernels::transposed_axes(geometry_[0], geometry_[0].stride)) {
      for (const TransposedAxis& column :
           kernels::transposed_axes(geometry_[1], geometry_[1].stride)) {
        Part part;
        part.rows = row.taps;
        part.columns = column.taps;
        part.shape = {.groups = groups_,
                      .in_channels = in_channels_,
                      .out_channels = out_channels_,
                      .kernel_height = row.kernel,
                      .kernel_width = column.kernel,
                      .dilation_height = row.dilation,
                      .dilation_width = column.dilation};
        require_sums_fit(part.shape);
        const std::vector<int8_t> weight = weight_of(part);
        part.bytes = part.shape.weights();
        if (!depthwise_) {
          part.layout = kernels::conv2d_layout(part.shape);
          part.bytes = kernels::conv2d_packed_bytes(part.layout, part.shape, weight.data());
        }
        part.start = packed_bytes_;
        packed_bytes_ += (part.bytes + kAlignment - 1) / kAlignment * kAlignment;
        part.terms = terms.of(part.shape, depthwise_, input_, output_, weight.data());
        parts_.push_back(std::move(part));
      }
    }
  }

  std::vector<int8_t> weight_of(const Part& part) const {
    std::vector<int8_t> result(static_cast<size_t>(part.shape.weights()));
    kernels::transposed_weight(part.shape, part.rows, part.columns, geometry_[0].kernel,
                               geometry_[1].kernel, static_cast<const int8_t*>(weight_.data.get()),
                               result.data());
    return result;
  }

  TransposedTask::Call call_of(const Part& part, const TransposedAxis& row,
                               const TransposedAxis& column, const View& x, const View& y) const {
    Conv2dArgs args;
    args.shape = part.shape;
    args.shape.images = y.shape.images;
    args.shape.out_height = row.outputs;
    args.shape.out_width = column.outputs;
    args.x_pixel_stride = x.pixel_stride;
    args.x_row_stride = x.row_stride;
    args.x_image_stride = x.image_stride;
    args.packed = packed_ + part.start;
    args.layout = part.layout;
    args.offset = part.terms.offset.data();
    args.multiplier = part.terms.multiplier.data();
    args.output = output_ ? kernels::Conv2dOutput::codes : kernels::Conv2dOutput::float32;
    args.y_pixel_stride = geometry_[1].stride * y.pixel_stride;
    args.y_row_stride = geometry_[0].stride * y.row_stride;
    args.y_image_stride = y.image_stride;
    args.relu = relu_ && !output_;
    if (output_) {
      args.zero_point = output_->zero_point;
      args.lo = relu_ ? std::max(output_->lo, output_->zero_point) : output_->lo;
      args.hi = output_->hi;
    }
    const int64_t x_offset = row.first_input * x.row_stride + column.first_input * x.pixel_stride;
    const int64_t y_offset =
        (row.first_output * y.row_stride + column.first_output * y.pixel_stride) *
        y.element_bytes();
    const int64_t units =
        depthwise_ ? args.shape.images * args.shape.out_height : kernels::conv2d_units(args.shape);
    return {args, x_offset, y_offset, units};
  }

  QParams input_;
  std::optional<QParams> output_;
  bool relu_ = false, depthwise_ = false;
  int64_t groups_ = 1, in_channels_ = 1, out_channels_ = 1;
  std::array<kernels::TransposedGeometry, 2> geometry_;
  std::vector<int64_t> output_padding_;
  std::array<int64_t, 2> border_ = {0, 0};
  Constant weight_;  // its data until pack()
  std::vector<Part> parts_;
  int64_t packed_bytes_ = 0;
  const int8_t* packed_ = nullptr;
};

QT_ENGINE_STEP(conv_transpose2d, ConvTranspose2d);

}  // namespace
}  // namespace qtoolkit::engine
