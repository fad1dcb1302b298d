// Reads the attributes of a step, checking each.
#pragma once

#include <cmath>
#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/program.h"
#include "engine/value.h"

namespace qtoolkit::engine {

// The quantization of a value, with codes as they are inside a plan (unsigned).
struct QParams {
  float scale = 1.0f;
  int32_t zero_point = 0;
  int32_t lo = 0, hi = 255;
};

class Attributes {
 public:
  explicit Attributes(const StepData& data) : data_(data) {}

  const StepData& data() const { return data_; }

  bool has(const std::string& name) const {
    return data_.integers.contains(name) || data_.constants.contains(name);
  }
  // Exactly `count` integers, each in [least, most].
  std::vector<int64_t> integers(const std::string& name, size_t count, int64_t least, int64_t most);
  int64_t integer(const std::string& name, int64_t least, int64_t most) {
    return integers(name, 1, least, most)[0];
  }
  bool flag(const std::string& name) { return integer(name, 0, 1) != 0; }

  // A constant of that type and rank, its data present.
  Constant constant(const std::string& name, DType dtype, size_t rank);
  float scale(const std::string& name);

  // `<name>_scale`, `<name>_zero_point`, `<name>_range` (two integers: the lowest and highest code,
  // which may be narrower than the format).
  QParams qparams(const std::string& name);
  // The same of a value that is an input; its zero point must be the one that the value has.
  QParams input_qparams(const std::string& name, const ValueInfo& value);

  // Throws if an attribute was not read: a newer version may mean something by it.
  void check_all_read() const;

 private:
  const StepData& data_;
  std::set<std::string> read_;
};

// float(numerator / denominator), which must be finite.
float checked_multiplier(double numerator, double denominator);

// Throws unless a value is codes.
inline void require_codes(std::span<const ValueInfo> inputs, size_t count) {
  require(inputs.size() == count, "takes ", count, " inputs, got ", inputs.size());
  for (const ValueInfo& input : inputs) require(input.type == Type::codes, "takes codes");
}

}  // namespace qtoolkit::engine
