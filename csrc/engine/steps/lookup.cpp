// Functions of one value, by a table.
#include <array>

#include "engine/rows.h"
#include "engine/step.h"
#include "kernels/kernels.h"

namespace qtoolkit::engine {
namespace {

class LookupTask : public Task {
 public:
  // The table lives as long as the step.
  LookupTask(const uint8_t* table, const View& x, const View& y) : table_(table), x_(x), y_(y) {}

  int64_t units() const override { return row_units(y_); }
  void run(const Memory& memory, int64_t begin, int64_t end) const override {
    kernels::LookupArgs args;
    args.table = table_;
    args.channels = args.x_row_stride = args.y_row_stride = y_.shape.width * y_.shape.channels;
    for_rows(y_, begin, end, [&](int64_t row) {
      args.x = x_.read(memory) + x_.row_offset(row);
      args.y = y_.write(memory) + y_.row_offset(row);
      kernels::lookup(args, 0, 1);
    });
  }

 private:
  const uint8_t* table_;
  View x_, y_;
};

class Lookup : public Step {
 public:
  Lookup(Attributes& attributes, std::span<const ValueInfo> inputs) {
    require_codes(inputs, 1);
    require(attributes.integer("input_zero_point", -128, 255) +
                    (attributes.flag("input_signed") ? 128 : 0) ==
                inputs[0].zero_point,
            "'input_zero_point' is not that of the value");
    output_ = attributes.qparams("output");
    const Constant table = attributes.constant("table", DType::uint8, 1);
    require(table.elements() == 256, "the table must hold 256 codes, got ", table.elements());
    const auto* codes = static_cast<const uint8_t*>(table.data.get());
    // The table is by the bytes of the user's codes; those of int8 codes differ from a plan's in
    // their highest bit.
    const size_t in_flip = attributes.flag("input_signed") ? 0x80 : 0;
    const uint8_t out_flip = attributes.flag("output_signed") ? 0x80 : 0;
    for (size_t code = 0; code < 256; ++code) table_[code] = codes[code ^ in_flip] ^ out_flip;
  }
  ValueInfo output() const override { return {Type::codes, output_.zero_point}; }
  Shape output_shape(std::span<const Shape> inputs) const override { return inputs[0]; }
  std::unique_ptr<Task> bind(const Binding& binding) const override {
    return std::make_unique<LookupTask>(table_.data(), binding.inputs[0], binding.output);
  }
  std::string kernel() const override { return "lookup"; }

 private:
  QParams output_;
  std::array<uint8_t, 256> table_;
};

QT_ENGINE_STEP(lookup, Lookup);

}  // namespace
}  // namespace qtoolkit::engine
