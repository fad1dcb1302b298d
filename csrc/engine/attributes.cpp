#include "engine/attributes.h"

#include "engine/step.h"

namespace qtoolkit::engine {

std::vector<int64_t> Attributes::integers(const std::string& name, size_t count, int64_t least,
                                          int64_t most) {
  const auto found = data_.integers.find(name);
  require(found != data_.integers.end(), "has no integers '", name, "'");
  require(found->second.size() == count, "'", name, "' must be ", count, " integers, got ",
          found->second.size());
  for (const int64_t value : found->second) {
    require(value >= least && value <= most, "'", name, "' must lie in [", least, ", ", most,
            "], got ", value);
  }
  read_.insert(name);
  return found->second;
}

Constant Attributes::constant(const std::string& name, DType dtype, size_t rank) {
  const auto found = data_.constants.find(name);
  require(found != data_.constants.end(), "has no constant '", name, "'");
  const Constant& constant = found->second;
  require(constant.dtype == dtype, "the constant '", name, "' has the wrong type");
  require(constant.shape.size() == rank, "the constant '", name, "' must have ", rank,
          " dimensions, got ", constant.shape.size());
  int64_t elements = 1;
  for (const int64_t size : constant.shape) {
    require(size >= 0, "the constant '", name, "' has a negative size");
    elements = checked_product(elements, size);
  }
  require(elements == 0 || constant.data != nullptr, "the constant '", name, "' has no data");
  read_.insert(name);
  return constant;
}

float Attributes::scale(const std::string& name) {
  const Constant constant = this->constant(name, DType::float32, 0);
  const float value = *static_cast<const float*>(constant.data.get());
  require(std::isfinite(value) && value > 0, "'", name, "' must be positive and finite, got ",
          value);
  return value;
}

QParams Attributes::qparams(const std::string& name) {
  const std::vector<int64_t> range = integers(name + "_range", 2, -128, 255);
  require(range[0] <= range[1] && (range[0] >= 0 || range[1] <= 127), "'", name,
          "_range' must lie in [-128, 127] or [0, 255], got ", range[0], " and ", range[1]);
  const int64_t shift = range[0] < 0 ? 128 : 0;
  QParams result;
  result.scale = scale(name + "_scale");
  result.zero_point =
      static_cast<int32_t>(integer(name + "_zero_point", -shift, shift == 0 ? 255 : 127) + shift);
  result.lo = static_cast<int32_t>(range[0] + shift);
  result.hi = static_cast<int32_t>(range[1] + shift);
  return result;
}

QParams Attributes::input_qparams(const std::string& name, const ValueInfo& value) {
  const QParams result = qparams(name);
  require(result.zero_point == value.zero_point, "'", name,
          "_zero_point' is not that of the value");
  return result;
}

void Attributes::check_all_read() const {
  for (const auto& [name, value] : data_.integers) {
    require(read_.contains(name), "does not know the integers '", name, "'");
  }
  for (const auto& [name, value] : data_.constants) {
    require(read_.contains(name), "does not know the constant '", name, "'");
  }
}

float checked_multiplier(double numerator, double denominator) {
  const auto result = static_cast<float>(numerator / denominator);
  require(std::isfinite(result), "the factor ", numerator, " / ", denominator,
          " overflows float32; check the scales");
  return result;
}

namespace {

std::map<std::string, MakeStep>& registry() {
  static std::map<std::string, MakeStep> steps;
  return steps;
}

}  // namespace

bool register_step(const char* kind, MakeStep make) {
  return registry().emplace(kind, make).second;
}

std::unique_ptr<Step> make_step(const StepData& data, std::span<const ValueInfo> inputs) {
  const auto found = registry().find(data.kind);
  require(found != registry().end(), "this version of qtoolkit has no step '", data.kind,
          "'; the plan is from a newer one, or damaged");
  try {
    Attributes attributes(data);
    std::unique_ptr<Step> step = found->second(attributes, inputs);
    attributes.check_all_read();
    return step;
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("step '" + data.name + "' (" + data.kind + "): " + error.what());
  }
}

}  // namespace qtoolkit::engine
