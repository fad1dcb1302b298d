// Steps that only move codes: the value keeps its zero point.
#include <cstring>
#include <optional>

#include "engine/rows.h"
#include "engine/step.h"
#include "kernels/kernels.h"
#include "kernels/resample.h"
#include "kernels/shuffle_plan.h"

namespace qtoolkit::engine {
namespace {

class MovingStep : public Step {
 public:
  ValueInfo output() const override { return value_; }

 protected:
  explicit MovingStep(std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    value_ = inputs[0];
  }
  ValueInfo value_;
};

void require_image(const Shape& x) { require(x.rank == 4, "takes 4 dimensions, got ", x.rank); }

// --- whole pixels: padding and nearest upsampling
// ---------------------------------------------------

class GatherTask : public Task {
 public:
  GatherTask(const View& x, const View& y, std::vector<int64_t> rows, std::vector<int64_t> columns)
      : x_(x), y_(y), rows_(std::move(rows)), columns_(std::move(columns)) {
    args_.x_image_stride = x.image_stride;
    args_.x_row_stride = x.row_stride;
    args_.y_image_stride = y.image_stride;
    args_.y_row_stride = y.row_stride;
    args_.channels = y.shape.channels;
    args_.out_height = y.shape.height;
    args_.out_width = y.shape.width;
    args_.row_from = rows_.data();
    args_.column_from = columns_.data();
    args_.fill = static_cast<uint8_t>(y.zero_point);
  }
  int64_t units() const override { return y_.shape.rows(); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    kernels::GatherPixelsArgs args = args_;
    args.x = x_.read(memory);
    args.y = y_.write(memory);
    kernels::gather_pixels(args, begin, end);
  }

 private:
  View x_, y_;
  std::vector<int64_t> rows_, columns_;
  kernels::GatherPixelsArgs args_;
};

class Pad : public MovingStep {
 public:
  Pad(Attributes& attributes, std::span<const ValueInfo> inputs) : MovingStep(inputs) {
    constexpr int64_t kMost = int64_t{1} << 24;
    // Left, right, top, bottom; negative ones cut.
    pad_ = attributes.integers("pad", 4, -kMost, kMost);
    mode_ = static_cast<kernels::Padding>(attributes.integer("mode", 0, 3));
  }
  Shape output_shape(std::span<const Shape> inputs) const override {
    require_image(inputs[0]);
    Shape y = inputs[0];
    y.width = size(y.width, pad_[0], pad_[1]);
    y.height = size(y.height, pad_[2], pad_[3]);
    return y;
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    const Shape& x = binding.inputs[0].shape;
    return std::make_unique<GatherTask>(binding.inputs[0], binding.output,
                                        kernels::padded_sources(x.height, pad_[2], pad_[3], mode_),
                                        kernels::padded_sources(x.width, pad_[0], pad_[1], mode_));
  }
  std::string kernel() const override { return "gather_pixels"; }

 private:
  int64_t size(int64_t size, int64_t before, int64_t after) const {
    for (const int64_t side : {before, after}) {
      const bool fits = mode_ == kernels::Padding::constant ||
                        mode_ == kernels::Padding::replicate || side < size ||
                        (mode_ == kernels::Padding::circular && side == size);
      require(fits, "padding of ", side, " is too much for ", size);
    }
    const int64_t result = size + before + after;
    require(result > 0 && (size > 0 || mode_ == kernels::Padding::constant),
            "padding leaves nothing of ", size);
    return result;
  }

  std::vector<int64_t> pad_;
  kernels::Padding mode_ = kernels::Padding::constant;
};

// How upsampling finds its output's size: by factors, or to a size that follows from them.
struct Factors {
  double height = 1.0, width = 1.0;
  bool recompute = false;

  explicit Factors(Attributes& attributes) {
    const Constant factors = attributes.constant("factors", DType::float32, 1);
    require(factors.elements() == 2, "'factors' must hold two numbers");
    const auto* values = static_cast<const float*>(factors.data.get());
    height = values[0];
    width = values[1];
    for (const double factor : {height, width}) {
      require(factor > 0 && factor <= 4096, "'factors' must lie in (0, 4096], got ", factor);
    }
    recompute = attributes.flag("recompute");
  }
  Shape output(const Shape& x) const {
    require_image(x);
    Shape y = x;
    y.height = static_cast<int64_t>(static_cast<double>(x.height) * height);
    y.width = static_cast<int64_t>(static_cast<double>(x.width) * width);
    require(x.height > 0 && x.width > 0 && y.height > 0 && y.width > 0, "leaves nothing");
    return y;
  }
  std::optional<double> rows() const { return recompute ? std::nullopt : std::optional(height); }
  std::optional<double> columns() const { return recompute ? std::nullopt : std::optional(width); }
};

class UpsampleNearest2d : public MovingStep {
 public:
  UpsampleNearest2d(Attributes& attributes, std::span<const ValueInfo> inputs)
      : MovingStep(inputs), factors_(attributes), exact_(attributes.flag("exact")) {}
  Shape output_shape(std::span<const Shape> inputs) const override {
    return factors_.output(inputs[0]);
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    const View& x = binding.inputs[0];
    const View& y = binding.output;
    return std::make_unique<GatherTask>(
        x, y, kernels::nearest_sources(x.shape.height, y.shape.height, factors_.rows(), exact_),
        kernels::nearest_sources(x.shape.width, y.shape.width, factors_.columns(), exact_));
  }
  std::string kernel() const override { return "gather_pixels"; }

 private:
  Factors factors_;
  bool exact_;
};

// --- codes of pixels: shuffles
// ----------------------------------------------------------------------

class ShuffleTask : public Task {
 public:
  ShuffleTask(const View& x, const View& y, const kernels::ShuffleCodesArgs& args,
              kernels::CodeShuffle plan)
      : x_(x), y_(y), plan_(std::move(plan)), args_(args) {
    args_.x_image_stride = x.image_stride;
    args_.y_image_stride = y.image_stride;
    args_.pieces = plan_.pieces.data();
    args_.piece_count = static_cast<int64_t>(plan_.pieces.size());
    args_.windows = plan_.windows.data();
  }
  int64_t units() const override { return x_.shape.images * args_.rows; }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    kernels::ShuffleCodesArgs args = args_;
    args.x = x_.read(memory);
    args.y = y_.write(memory);
    kernels::shuffle_codes(args, begin, end);
  }

 private:
  View x_, y_;
  kernels::CodeShuffle plan_;
  kernels::ShuffleCodesArgs args_;
};

class ChannelShuffle : public MovingStep {
 public:
  ChannelShuffle(Attributes& attributes, std::span<const ValueInfo> inputs)
      : MovingStep(inputs), groups_(attributes.integer("groups", 1, 1 << 15)) {}
  Shape output_shape(std::span<const Shape> inputs) const override {
    require_image(inputs[0]);
    require(inputs[0].channels % groups_ == 0, groups_, " groups do not divide ",
            inputs[0].channels, " channels");
    return inputs[0];
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    const View& x = binding.inputs[0];
    const View& y = binding.output;
    kernels::ShuffleCodesArgs args;
    args.rows = x.shape.height;
    args.columns = x.shape.width;
    args.x_block_stride = x.pixel_stride;
    args.x_row_stride = x.row_stride;
    args.y_block_stride = y.pixel_stride;
    args.y_row_stride = y.row_stride;
    return std::make_unique<ShuffleTask>(x, y, args,
                                         kernels::channel_shuffle(x.shape.channels, groups_));
  }
  std::string kernel() const override { return "shuffle_codes"; }

 private:
  int64_t groups_;
};

class PixelShuffle : public MovingStep {
 public:
  PixelShuffle(Attributes& attributes, std::span<const ValueInfo> inputs)
      : MovingStep(inputs), factor_(attributes.integer("factor", 1, 1 << 10)) {}
  Shape output_shape(std::span<const Shape> inputs) const override {
    require_image(inputs[0]);
    Shape y = inputs[0];
    require(y.channels % (factor_ * factor_) == 0, factor_, " squared does not divide ", y.channels,
            " channels");
    y.channels /= factor_ * factor_;
    y.height = checked_product(y.height, factor_);
    y.width = checked_product(y.width, factor_);
    return y;
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    const View& x = binding.inputs[0];
    const View& y = binding.output;
    kernels::ShuffleCodesArgs args;
    args.rows = x.shape.height;
    args.columns = x.shape.width;
    args.x_block_stride = x.pixel_stride;
    args.x_row_stride = x.row_stride;
    args.y_block_stride = factor_ * y.pixel_stride;
    args.y_row_stride = factor_ * y.row_stride;
    return std::make_unique<ShuffleTask>(
        x, y, args, kernels::pixel_shuffle(y.shape.channels, factor_, y.row_stride));
  }
  std::string kernel() const override { return "shuffle_codes"; }

 private:
  int64_t factor_;
};

class PixelUnshuffle : public MovingStep {
 public:
  PixelUnshuffle(Attributes& attributes, std::span<const ValueInfo> inputs)
      : MovingStep(inputs), factor_(attributes.integer("factor", 1, 1 << 10)) {}
  Shape output_shape(std::span<const Shape> inputs) const override {
    require_image(inputs[0]);
    Shape y = inputs[0];
    require(y.height % factor_ == 0 && y.width % factor_ == 0, factor_,
            " does not divide height and width");
    y.channels = checked_product(y.channels, factor_ * factor_);
    y.height /= factor_;
    y.width /= factor_;
    return y;
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    const View& x = binding.inputs[0];
    const View& y = binding.output;
    kernels::ShuffleCodesArgs args;
    args.rows = y.shape.height;
    args.columns = y.shape.width;
    args.x_block_stride = factor_ * x.pixel_stride;
    args.x_row_stride = factor_ * x.row_stride;
    args.y_block_stride = y.pixel_stride;
    args.y_row_stride = y.row_stride;
    return std::make_unique<ShuffleTask>(
        x, y, args, kernels::pixel_unshuffle(x.shape.channels, factor_, x.row_stride));
  }
  std::string kernel() const override { return "shuffle_codes"; }

 private:
  int64_t factor_;
};

// --- some of the channels
// ---------------------------------------------------------------------------

class SliceTask : public Task {
 public:
  SliceTask(const View& x, const View& y, int64_t first) : x_(x), y_(y), first_(first) {}
  int64_t units() const override { return row_units(y_); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    const auto count = static_cast<size_t>(y_.shape.channels);
    for_rows(y_, begin, end, [&](int64_t row) {
      const uint8_t* from = x_.read(memory) + x_.row_offset(row) + first_;
      uint8_t* to = y_.write(memory) + y_.row_offset(row);
      for (int64_t i = 0; i < y_.shape.width; ++i) {
        std::memcpy(to + i * y_.pixel_stride, from + i * x_.pixel_stride, count);
      }
    });
  }

 private:
  View x_, y_;
  int64_t first_;
};

// Channels [first, first + count).
class Slice : public MovingStep {
 public:
  Slice(Attributes& attributes, std::span<const ValueInfo> inputs)
      : MovingStep(inputs),
        first_(attributes.integer("first", 0, int64_t{1} << 32)),
        count_(attributes.integer("count", 1, int64_t{1} << 32)) {}
  Shape output_shape(std::span<const Shape> inputs) const override {
    require(first_ + count_ <= inputs[0].channels, "channels ", first_, " to ", first_ + count_,
            " of ", inputs[0].channels);
    Shape y = inputs[0];
    y.channels = count_;
    return y;
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<SliceTask>(binding.inputs[0], binding.output, first_);
  }
  std::string kernel() const override { return "copy"; }

 private:
  int64_t first_, count_;
};

// --- bilinear upsampling, which computes
// ------------------------------------------------------------

class BilinearTask : public Task {
 public:
  BilinearTask(const View& x, const View& y, std::vector<kernels::LinearSource> rows,
               std::vector<kernels::LinearSource> columns, int32_t lo, int32_t hi)
      : x_(x), y_(y), rows_(std::move(rows)), columns_(std::move(columns)) {
    args_.x_image_stride = x.image_stride;
    args_.x_row_stride = x.row_stride;
    args_.y_image_stride = y.image_stride;
    args_.y_row_stride = y.row_stride;
    args_.channels = y.shape.channels;
    args_.out_height = y.shape.height;
    args_.out_width = y.shape.width;
    args_.rows = rows_.data();
    args_.columns = columns_.data();
    args_.x_zero_point = x.zero_point;
    args_.zero_point = y.zero_point;
    args_.lo = lo;
    args_.hi = hi;
  }
  int64_t units() const override { return y_.shape.rows(); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    kernels::UpsampleBilinear2dArgs args = args_;
    args.x = x_.read(memory);
    args.y = y_.write(memory);
    kernels::upsample_bilinear2d(args, begin, end);
  }

 private:
  View x_, y_;
  std::vector<kernels::LinearSource> rows_, columns_;
  kernels::UpsampleBilinear2dArgs args_;
};

class UpsampleBilinear2d : public Step {
 public:
  UpsampleBilinear2d(Attributes& attributes, std::span<const ValueInfo> inputs)
      : factors_(attributes), align_corners_(attributes.flag("align_corners")) {
    require_codes(inputs, 1);
    x_zero_point_ = inputs[0].zero_point;
    const QParams x = attributes.input_qparams("input", inputs[0]);
    y_ = attributes.qparams("output");
    factor_ = checked_multiplier(x.scale, y_.scale);
  }
  ValueInfo output() const override { return {Type::codes, y_.zero_point}; }
  Shape output_shape(std::span<const Shape> inputs) const override {
    return factors_.output(inputs[0]);
  }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    View x = binding.inputs[0];
    x.zero_point = x_zero_point_;
    const View& y = binding.output;
    auto rows =
        kernels::linear_sources(x.shape.height, y.shape.height, factors_.rows(), align_corners_);
    auto columns =
        kernels::linear_sources(x.shape.width, y.shape.width, factors_.columns(), align_corners_);
    for (kernels::LinearSource& column : columns) {
      column.first_weight *= factor_;
      column.second_weight *= factor_;
    }
    return std::make_unique<BilinearTask>(x, y, std::move(rows), std::move(columns), y_.lo, y_.hi);
  }
  std::string kernel() const override { return "upsample_bilinear2d"; }

 private:
  Factors factors_;
  bool align_corners_;
  int32_t x_zero_point_ = 0;
  QParams y_;
  float factor_ = 1.0f;
};

QT_ENGINE_STEP(pad, Pad);
QT_ENGINE_STEP(upsample_nearest2d, UpsampleNearest2d);
QT_ENGINE_STEP(channel_shuffle, ChannelShuffle);
QT_ENGINE_STEP(pixel_shuffle, PixelShuffle);
QT_ENGINE_STEP(pixel_unshuffle, PixelUnshuffle);
QT_ENGINE_STEP(slice, Slice);
QT_ENGINE_STEP(upsample_bilinear2d, UpsampleBilinear2d);

}  // namespace
}  // namespace qtoolkit::engine
