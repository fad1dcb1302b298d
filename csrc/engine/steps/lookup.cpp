// A function of one value.
#include <array>
#include <cstring>

#include "engine/rows.h"
#include "engine/step.h"
#include "kernels/kernels.h"

namespace qtoolkit::engine {
namespace {

constexpr size_t kEntries = 256;
using Table = std::array<uint8_t, kEntries>;

class LookupTask : public Task {
 public:
  LookupTask(const Table& table, const View& x, const View& y) : table_(table), x_(x), y_(y) {}

  int64_t units() const override { return row_units(y_); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    for_row_spans(y_, begin, end, [&](int64_t first, int64_t rows) {
      const kernels::LookupArgs args{.x = x_.read(memory) + x_.row_offset(first),
                                     .y = y_.write(memory) + y_.row_offset(first),
                                     .table = table_.data(),
                                     .channels = y_.shape.width * y_.shape.channels,
                                     .x_row_stride = x_.row_stride,
                                     .y_row_stride = y_.row_stride};
      kernels::lookup(args, 0, rows);
    });
  }

 private:
  const Table& table_;
  View x_, y_;
};

class Lookup : public Step {
 public:
  Lookup(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    attributes.input_qparams("input", inputs[0]);
    zero_point_ = attributes.qparams("output").zero_point;
    const Constant table = attributes.constant("table", DType::uint8, 1);
    require(table.elements() == kEntries, "'table' must have 256 elements, got ", table.elements());
    std::memcpy(table_.data(), table.data.get(), kEntries);
  }
  ValueInfo output() const override { return {Type::codes, zero_point_}; }
  Shape output_shape(std::span<const Shape> inputs) const override { return inputs[0]; }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<LookupTask>(table_, binding.inputs[0], binding.output);
  }
  std::string kernel() const override { return "lookup"; }

 private:
  Table table_;
  int32_t zero_point_ = 0;
};

QT_ENGINE_STEP(lookup, Lookup);

}  // namespace
}  // namespace qtoolkit::engine
