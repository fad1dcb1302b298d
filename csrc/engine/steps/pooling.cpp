// Pooling.
#include <limits>

#include "engine/step.h"
#include "kernels/kernels.h"
#include "kernels/windows.h"

namespace qtoolkit::engine {
namespace {

using kernels::Spans;
using kernels::Window;

struct Windows {
  Window rows, columns;
};

Windows read_windows(Attributes& attributes, bool dilated) {
  constexpr int64_t kMost = int64_t{1} << 24;
  const auto kernel = attributes.integers("kernel_size", 2, 1, kMost);
  const auto stride = attributes.integers("stride", 2, 1, kMost);
  const auto padding = attributes.integers("padding", 2, 0, kMost);
  std::vector<int64_t> dilation = {1, 1};
  if (dilated) dilation = attributes.integers("dilation", 2, 1, kMost);
  const bool ceil_mode = attributes.flag("ceil_mode");
  for (size_t i = 0; i < 2; ++i) {
    require(padding[i] <= kernel[i] / 2, "padding must be at most half the kernel");
  }
  return {{kernel[0], stride[0], padding[0], dilation[0], ceil_mode},
          {kernel[1], stride[1], padding[1], dilation[1], ceil_mode}};
}

Shape pooled(const Shape& x, const Windows& windows) {
  const auto count = [](int64_t size, const Window& window) {
    require(
        window.extent() <= size + 2 * window.padding + (window.ceil_mode ? window.stride - 1 : 0),
        "the window of ", window.extent(), " is larger than the padded input");
    return kernels::window_count(size, window);
  };
  require(x.rank == 4, "takes 4 dimensions, got ", x.rank);
  Shape y = x;
  y.height = count(x.height, windows.rows);
  y.width = count(x.width, windows.columns);
  return y;
}

class MaxPoolTask : public Task {
 public:
  MaxPoolTask(const Windows& windows, const View& x, const View& y)
      : x_(x),
        y_(y),
        rows_(kernels::max_pool_spans(x.shape.height, y.shape.height, windows.rows)),
        columns_(kernels::max_pool_spans(x.shape.width, y.shape.width, windows.columns)) {
    args_.channels = y.shape.channels;
    args_.out_height = y.shape.height;
    args_.out_width = y.shape.width;
    args_.x_row_stride = x.row_stride;
    args_.x_image_stride = x.image_stride;
    args_.y_row_stride = y.row_stride;
    args_.y_image_stride = y.image_stride;
    args_.row_begin = rows_.begin.data();
    args_.row_end = rows_.end.data();
    args_.row_step = windows.rows.dilation;
    args_.column_begin = columns_.begin.data();
    args_.column_end = columns_.end.data();
    args_.column_step = windows.columns.dilation;
  }
  int64_t units() const override { return y_.shape.rows(); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    kernels::MaxPool2dArgs args = args_;
    args.x = x_.read(memory);
    args.y = y_.write(memory);
    kernels::max_pool2d(args, begin, end);
  }

 private:
  View x_, y_;
  Spans rows_, columns_;
  kernels::MaxPool2dArgs args_;
};

class MaxPool2d : public Step {
 public:
  MaxPool2d(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    value_ = inputs[0];
    windows_ = read_windows(attributes, /*dilated=*/true);
  }
  ValueInfo output() const override { return value_; }
  Shape output_shape(std::span<const Shape> inputs) const override {
    return pooled(inputs[0], windows_);
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<MaxPoolTask>(windows_, binding.inputs[0], binding.output);
  }
  std::string kernel() const override { return "max_pool2d"; }

 private:
  ValueInfo value_;
  Windows windows_;
};

class AvgPoolTask : public Task {
 public:
  AvgPoolTask(const kernels::AvgPool2dArgs& args, Spans rows, Spans columns, const View& x,
              const View& y)
      : args_(args), x_(x), y_(y), rows_(std::move(rows)), columns_(std::move(columns)) {
    constexpr int64_t kMostPixels = std::numeric_limits<int32_t>::max() / 255;
    require(columns_.longest() == 0 || rows_.longest() <= kMostPixels / columns_.longest(),
            "a window of ", rows_.longest(), " x ", columns_.longest(),
            " pixels could overflow the int32 sum");
    args_.channels = x.shape.channels;
    args_.out_height = static_cast<int64_t>(rows_.begin.size());
    args_.out_width = static_cast<int64_t>(columns_.begin.size());
    args_.x_row_stride = x.row_stride;
    args_.x_image_stride = x.image_stride;
    args_.y_row_stride = y.row_stride;
    args_.y_image_stride = y.image_stride;
    args_.row_begin = rows_.begin.data();
    args_.row_end = rows_.end.data();
    args_.column_begin = columns_.begin.data();
    args_.column_end = columns_.end.data();
    args_.row_divisor = rows_.divisor.data();
    args_.column_divisor = columns_.divisor.data();
  }
  int64_t units() const override { return x_.shape.images * args_.out_height; }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    kernels::AvgPool2dArgs args = args_;
    args.x = x_.read(memory);
    args.y = y_.write(memory);
    kernels::avg_pool2d(args, begin, end);
  }

 private:
  kernels::AvgPool2dArgs args_;
  View x_, y_;
  Spans rows_, columns_;
};

// What average poolings share: the change of scale.
class Average : public Step {
 public:
  ValueInfo output() const override { return {Type::codes, args_.zero_point}; }
  std::string kernel() const override { return "avg_pool2d"; }

 protected:
  Average(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    const QParams x = attributes.input_qparams("input", inputs[0]);
    const QParams y = attributes.qparams("output");
    checked_multiplier(x.scale, y.scale);
    args_.multiplier = static_cast<double>(x.scale) / y.scale;
    args_.x_zero_point = x.zero_point;
    args_.zero_point = y.zero_point;
    args_.lo = y.lo;
    args_.hi = y.hi;
  }
  std::unique_ptr<Task> task(const Binding& binding, Spans rows, Spans columns) const {
    return std::make_unique<AvgPoolTask>(args_, std::move(rows), std::move(columns),
                                         binding.inputs[0], binding.output);
  }

 private:
  kernels::AvgPool2dArgs args_;
};

class AvgPool2d : public Average {
 public:
  AvgPool2d(Attributes& attributes, std::span<const ValueInfo> inputs)
      : Average(attributes, inputs) {
    windows_ = read_windows(attributes, /*dilated=*/false);
    count_include_pad_ = attributes.flag("count_include_pad");
    if (attributes.has("divisor")) {
      divisor_ = attributes.integer("divisor", 1, std::numeric_limits<int32_t>::max());
    }
  }
  Shape output_shape(std::span<const Shape> inputs) const override {
    return pooled(inputs[0], windows_);
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    const Shape& x = binding.inputs[0].shape;
    const Shape& y = binding.output.shape;
    Spans rows = kernels::avg_pool_spans(x.height, y.height, windows_.rows, count_include_pad_);
    Spans columns = kernels::avg_pool_spans(x.width, y.width, windows_.columns, count_include_pad_);
    if (divisor_ > 0) {
      rows.divisor.assign(rows.divisor.size(), divisor_);
      columns.divisor.assign(columns.divisor.size(), 1);
    }
    return task(binding, std::move(rows), std::move(columns));
  }

 private:
  Windows windows_;
  bool count_include_pad_ = true;
  int64_t divisor_ = 0;  // 0: the window's size
};

class AdaptiveAvgPool2d : public Average {
 public:
  AdaptiveAvgPool2d(Attributes& attributes, std::span<const ValueInfo> inputs)
      : Average(attributes, inputs),
        size_(attributes.integers("output_size", 2, 1, int64_t{1} << 24)),
        flattens_(attributes.flag("flatten")) {
    require(!flattens_ || (size_[0] == 1 && size_[1] == 1), "flattens a 1 x 1 output only");
  }
  Shape output_shape(std::span<const Shape> inputs) const override {
    const Shape& x = inputs[0];
    require(x.rank == 4 && x.height > 0 && x.width > 0, "takes 4 dimensions, not empty");
    return {flattens_ ? 2 : 4, x.images, size_[0], size_[1], x.channels};
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    const Shape& x = binding.inputs[0].shape;
    return task(binding, kernels::adaptive_pool_spans(x.height, size_[0]),
                kernels::adaptive_pool_spans(x.width, size_[1]));
  }

 private:
  std::vector<int64_t> size_;
  bool flattens_;
};

QT_ENGINE_STEP(max_pool2d, MaxPool2d);
QT_ENGINE_STEP(avg_pool2d, AvgPool2d);
QT_ENGINE_STEP(adaptive_avg_pool2d, AdaptiveAvgPool2d);

}  // namespace
}  // namespace qtoolkit::engine
