// What a plan is made of and saved as: plain data, in the order of execution. Nothing in it is
// trusted; Plan::Plan checks all of it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace qtoolkit::engine {

enum class DType : uint8_t { uint8, int8, int32, float32 };

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::uint8 || dtype == DType::int8 ? 1 : 4;
}

// A dense tensor. `data` holds elements() * bytes_of(dtype) bytes.
struct Constant {
  DType dtype = DType::uint8;
  std::vector<int64_t> shape;
  std::shared_ptr<const void> data;

  int64_t elements() const {
    int64_t result = 1;
    for (const int64_t size : shape) result *= size;
    return result;
  }
};

using Integers = std::map<std::string, std::vector<int64_t>>;
using Constants = std::map<std::string, Constant>;

// One step computes one value from others.
struct StepData {
  std::string kind;  // a registered one, see step.h
  std::string name;  // of the layer, for reports
  std::vector<int64_t> inputs;
  Integers integers = {};
  Constants constants = {};
};

// What was measured to be fastest for one size of the inputs.
struct TuningData {
  std::vector<int64_t> key;
  std::vector<int64_t> choices;
};

// The values are numbered: the inputs first, then one for each step.
struct ProgramData {
  static constexpr int64_t kVersion = 1;
  int64_t version = kVersion;
  std::vector<int64_t> input_ranks;        // of the float32 or uint8 inputs
  std::vector<int64_t> input_types;        // 0: float32, 1: uint8 codes, 2: int8 codes
  std::vector<int64_t> input_zero_points;  // of codes
  std::vector<StepData> steps;
  std::vector<int64_t> outputs;
  std::string cpu;  // on which `tuning` was measured
  std::vector<TuningData> tuning;
};

}  // namespace qtoolkit::engine
