// Small programs for the tests of the engine.
#pragma once

#include <bit>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/plan.h"
#include "paths.h"

namespace qtoolkit::engine {

template <class T>
Constant constant(DType dtype, std::vector<int64_t> shape, const std::vector<T>& values) {
  Constant result;
  result.dtype = dtype;
  result.shape = std::move(shape);
  auto data = std::make_shared<std::vector<T>>(values);
  result.data = std::shared_ptr<const void>(data, data->data());
  return result;
}

inline void set_qparams(StepData& step, const std::string& name, float scale, int64_t zero_point,
                        int64_t lo = 0, int64_t hi = 255) {
  step.constants[name + "_scale"] = constant<float>(DType::float32, {}, {scale});
  step.integers[name + "_zero_point"] = {zero_point};
  step.integers[name + "_range"] = {lo, hi};
}

// A value's quantization in these programs.
struct Scale {
  float scale;
  int64_t zero_point;
};

// Builds a program step by step; each call returns the number of the new value.
class Builder {
 public:
  explicit Builder(uint64_t seed = 1) : random_(seed) {
    data_.input_ranks = {4};
    data_.input_types = {0};
    data_.input_zero_points = {0};
    scales_ = {{1.0f, 0}};
  }

  int64_t quantize(int64_t x, Scale y) {
    StepData step{.kind = "quantize", .name = "quantize", .inputs = {x}};
    set_qparams(step, "output", y.scale, y.zero_point);
    return add(step, y);
  }

  // y.scale 0: float32.
  int64_t conv2d(int64_t x, int64_t in, int64_t out, int64_t kernel, int64_t stride, Scale y,
                 int64_t residual = -1, int64_t groups = 1, bool relu = false) {
    StepData step{.kind = "conv2d", .name = "conv", .inputs = {x}};
    step.integers = {{"stride", {stride, stride}},
                     {"padding", {kernel / 2, kernel / 2}},
                     {"dilation", {1, 1}},
                     {"groups", {groups}},
                     {"relu", {relu ? 1 : 0}}};
    add_weight(step, {out, in / groups, kernel, kernel});
    set_qparams(step, "input", scale(x).scale, scale(x).zero_point);
    if (residual >= 0) {
      step.inputs.push_back(residual);
      set_qparams(step, "residual", scale(residual).scale, scale(residual).zero_point);
    }
    if (y.scale != 0) set_qparams(step, "output", y.scale, y.zero_point);
    return add(step, y);
  }

  // Twice the size.
  int64_t conv_transpose2d(int64_t x, int64_t in, int64_t out, Scale y) {
    StepData step{.kind = "conv_transpose2d", .name = "up", .inputs = {x}};
    step.integers = {{"stride", {2, 2}},   {"padding", {1, 1}}, {"output_padding", {1, 1}},
                     {"dilation", {1, 1}}, {"groups", {1}},     {"relu", {0}}};
    add_weight(step, {in, out, 3, 3}, out);
    set_qparams(step, "input", scale(x).scale, scale(x).zero_point);
    set_qparams(step, "output", y.scale, y.zero_point);
    return add(step, y);
  }

  int64_t layer_norm(int64_t x, int64_t channels, Scale y) {
    StepData step{.kind = "layer_norm", .name = "norm", .inputs = {x}};
    step.integers["eps"] = {std::bit_cast<int64_t>(1e-5)};
    for (const char* name : {"weight", "bias"}) {
      step.constants[name] =
          constant(DType::float32, {channels}, random_.reals(channels, -1.0f, 1.0f));
    }
    set_qparams(step, "input", scale(x).scale, scale(x).zero_point);
    set_qparams(step, "output", y.scale, y.zero_point);
    return add(step, y);
  }

  int64_t softmax(int64_t x, Scale y) {
    StepData step{.kind = "softmax", .name = "softmax", .inputs = {x}};
    set_qparams(step, "input", scale(x).scale, scale(x).zero_point);
    set_qparams(step, "output", y.scale, y.zero_point);
    return add(step, y);
  }

  int64_t max_pool2d(int64_t x) {
    StepData step{.kind = "max_pool2d", .name = "pool", .inputs = {x}};
    step.integers = {{"kernel_size", {3, 3}},
                     {"stride", {2, 2}},
                     {"padding", {1, 1}},
                     {"dilation", {1, 1}},
                     {"ceil_mode", {0}}};
    return add(step, scale(x));
  }

  int64_t add2(int64_t a, int64_t b, Scale y) {
    StepData step{.kind = "add", .name = "add", .inputs = {a, b}};
    step.integers["relu"] = {0};
    set_qparams(step, "a", scale(a).scale, scale(a).zero_point);
    set_qparams(step, "b", scale(b).scale, scale(b).zero_point);
    set_qparams(step, "output", y.scale, y.zero_point);
    return add(step, y);
  }

  int64_t mul(int64_t a, int64_t b, Scale y) {
    StepData step{.kind = "mul", .name = "mul", .inputs = {a, b}};
    step.integers["relu"] = {0};
    set_qparams(step, "a", scale(a).scale, scale(a).zero_point);
    set_qparams(step, "b", scale(b).scale, scale(b).zero_point);
    set_qparams(step, "output", y.scale, y.zero_point);
    return add(step, y);
  }

  int64_t lookup(int64_t x, Scale y) {
    StepData step{.kind = "lookup", .name = "lookup", .inputs = {x}};
    step.constants["table"] = constant(DType::uint8, {256}, random_.codes(256));
    set_qparams(step, "input", scale(x).scale, scale(x).zero_point);
    set_qparams(step, "output", y.scale, y.zero_point);
    return add(step, y);
  }

  int64_t cat(const std::vector<int64_t>& xs, Scale y) {
    StepData step{.kind = "cat", .name = "cat", .inputs = xs};
    for (size_t i = 0; i < xs.size(); ++i) {
      set_qparams(step, "input" + std::to_string(i), scale(xs[i]).scale, scale(xs[i]).zero_point);
    }
    set_qparams(step, "output", y.scale, y.zero_point);
    return add(step, y);
  }

  int64_t global_average(int64_t x, Scale y, bool flatten = true) {
    StepData step{.kind = "adaptive_avg_pool2d", .name = "mean", .inputs = {x}};
    step.integers = {{"output_size", {1, 1}}, {"flatten", {flatten ? 1 : 0}}};
    set_qparams(step, "input", scale(x).scale, scale(x).zero_point);
    set_qparams(step, "output", y.scale, y.zero_point);
    return add(step, y);
  }

  int64_t linear(int64_t x, int64_t in, int64_t out) {
    StepData step{.kind = "linear", .name = "fc", .inputs = {x}};
    step.integers["relu"] = {0};
    add_weight(step, {out, in});
    set_qparams(step, "input", scale(x).scale, scale(x).zero_point);
    return add(step, {0, 0});
  }

  int64_t dequantize(int64_t x) {
    StepData step{.kind = "dequantize", .name = "dequantize", .inputs = {x}};
    step.integers["contiguous"] = {1};
    set_qparams(step, "input", scale(x).scale, scale(x).zero_point);
    return add(step, {0, 0});
  }

  ProgramData data(std::vector<int64_t> outputs) const {
    ProgramData result = data_;
    result.outputs = std::move(outputs);
    return result;
  }

 private:
  int64_t add(const StepData& step, Scale y) {
    data_.steps.push_back(step);
    scales_.push_back(y);
    return static_cast<int64_t>(scales_.size()) - 1;
  }
  Scale scale(int64_t value) const { return scales_[static_cast<size_t>(value)]; }

  // `channels`: of the output, the first size if 0.
  void add_weight(StepData& step, const std::vector<int64_t>& shape, int64_t channels = 0) {
    if (channels == 0) channels = shape[0];
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    std::vector<int8_t> weight(static_cast<size_t>(count));
    for (int8_t& w : weight) w = static_cast<int8_t>(random_.integer(-127, 127));
    std::vector<int32_t> bias(static_cast<size_t>(channels));
    for (int32_t& b : bias) b = static_cast<int32_t>(random_.integer(-2000, 2000));
    step.constants["weight"] = constant(DType::int8, shape, weight);
    step.constants["bias"] = constant(DType::int32, {channels}, bias);
    step.constants["weight_scale"] =
        constant(DType::float32, {channels}, random_.reals(channels, 0.001f, 0.004f));
  }

  ProgramData data_;
  std::vector<Scale> scales_;
  kernels::Random random_;
};

// A small residual network with all that a real one has.
inline ProgramData small_network() {
  Builder b;
  const int64_t x = b.quantize(0, {0.02f, 117});
  const int64_t stem = b.conv2d(x, 3, 16, 3, 2, {0.03f, 0}, -1, 1, true);
  const int64_t pool = b.max_pool2d(stem);
  const int64_t c1 = b.conv2d(pool, 16, 24, 3, 1, {0.04f, 12});
  const int64_t c2 = b.conv2d(pool, 16, 24, 1, 1, {0.05f, 101});
  const int64_t act = b.lookup(c1, {0.04f, 12});
  const int64_t product = b.mul(act, c2, {0.05f, 100});
  const int64_t depthwise = b.conv2d(act, 24, 24, 3, 1, {0.03f, 140}, c2, 24);
  const int64_t sum = b.add2(depthwise, c2, {0.06f, 77});
  const int64_t cat = b.cat({sum, product}, {0.05f, 90});
  const int64_t wide = b.conv2d(cat, 48, 40, 5, 2, {0.05f, 3}, -1, 2, true);
  const int64_t squeezed = b.global_average(wide, {0.02f, 0}, false);
  const int64_t gate = b.lookup(squeezed, {0.004f, 0});
  const int64_t gated = b.mul(gate, wide, {0.02f, 20});
  const int64_t local = b.conv2d(gated, 40, 40, 3, 1, {0.02f, 30}, -1, 40);
  const int64_t up = b.conv_transpose2d(local, 40, 24, {0.03f, 120});
  const int64_t mean = b.global_average(up, {0.02f, 100});
  const int64_t norm = b.layer_norm(mean, 24, {0.02f, 110});
  const int64_t both = b.cat({norm, b.softmax(norm, {0.004f, 0})}, {0.02f, 110});
  return b.data({b.linear(both, 48, 10), b.dequantize(sum)});
}

// Each thread a std::thread, so that sanitizers see where they start and end.
inline void run_threads(int64_t threads, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back([&, i] { body(i, threads); });
  body(0, threads);
  for (std::thread& other : others) other.join();
}

// Runs a plan on an image batch [images, channels, size, size]; the outputs one after the other.
inline std::vector<float> run_plan(Plan& plan, const std::vector<float>& x, int64_t images,
                                   int64_t channels, int64_t size, int64_t threads) {
  const std::vector<Outside> inputs = {
      {shape_of({images, channels, size, size}), Type::float32, true}};
  std::vector<std::vector<float>> results;
  std::vector<void*> pointers;
  for (const Outside& output : plan.outputs(inputs)) {
    results.emplace_back(static_cast<size_t>(output.shape.elements()));
  }
  for (std::vector<float>& result : results) pointers.push_back(result.data());
  const void* const data[] = {x.data()};
  plan.run(inputs, data, pointers, threads, run_threads);
  std::vector<float> all;
  for (const std::vector<float>& result : results) {
    all.insert(all.end(), result.begin(), result.end());
  }
  return all;
}

}  // namespace qtoolkit::engine
