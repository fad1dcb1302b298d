// A kind of step: a file in engine/steps with a class and one QT_ENGINE_STEP line.
//
// A Step holds what is known before any shape. bind() gives a Task, which holds what follows from
// the shapes and is run many times, by several threads at once.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/attributes.h"
#include "engine/value.h"

namespace qtoolkit::engine {

class Task {
 public:
  virtual ~Task() = default;

  // The work is units() units; threads take ranges of them. They may depend on the choice.
  virtual int64_t units() const = 0;
  virtual void run(const Memory& memory, int64_t begin, int64_t end) const = 0;

  // Ways to do the same work, of which the tuner takes the fastest. Every way gives the same bits.
  virtual int64_t choices() const { return 1; }
  virtual void choose(int64_t /*choice*/) {}
};

struct Binding {
  std::vector<View> inputs;
  View output;
};

class Step {
 public:
  virtual ~Step() = default;

  virtual ValueInfo output() const = 0;
  // Throws if the step cannot take such inputs.
  virtual Shape output_shape(std::span<const Shape> inputs) const = 0;
  // The border that the step wants around an input, given its shape.
  virtual Border input_border(size_t /*input*/) const { return {}; }
  // True if an output of the plan is to be NCHW in memory, not NHWC.
  virtual bool planar_output() const { return false; }
  // True if an output of the plan holds int8 codes.
  virtual bool signed_output() const { return false; }
  virtual std::unique_ptr<Task> bind(const Binding& binding) const = 0;
  // A constant in the layout of the kernels, in memory that the plan gives: it starts at a multiple
  // of 64 bytes and lives as long as the step. pack() reads the constant from the attributes, of
  // which the plan then keeps no copy; unpack() gives it back.
  virtual int64_t packed_bytes() const { return 0; }
  virtual const char* packed_constant() const { return ""; }
  virtual void pack(uint8_t* /*memory*/) {}
  virtual std::shared_ptr<const void> unpack() const { return nullptr; }

  // For reports.
  virtual std::string kernel() const = 0;
  virtual int64_t multiplications(std::span<const Shape> /*inputs*/) const { return 0; }
};

using MakeStep = std::unique_ptr<Step> (*)(Attributes& attributes,
                                           std::span<const ValueInfo> inputs);

// Called once for each kind, before main.
bool register_step(const char* kind, MakeStep make);
// Makes a step; throws std::invalid_argument that names it if anything in the data is wrong.
std::unique_ptr<Step> make_step(const StepData& data, std::span<const ValueInfo> inputs);

#define QT_ENGINE_STEP(kind, Class)                                                    \
  [[maybe_unused]] const bool registered_##Class =                                     \
      register_step(#kind, [](Attributes& attributes, std::span<const ValueInfo> in) { \
        return std::unique_ptr<Step>(std::make_unique<Class>(attributes, in));         \
      })

}  // namespace qtoolkit::engine
