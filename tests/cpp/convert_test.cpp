#include "kernels/convert.h"

#include <gtest/gtest.h>

#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

QT_FOR_EACH_PATH(ToFloat, to_float);
QT_FOR_EACH_PATH(FromFloat, from_float);

std::vector<uint32_t> to_float_on(Path path, bool bfloat16, const std::vector<uint16_t>& halves) {
  const auto size = static_cast<int64_t>(halves.size());
  std::vector<float> result(halves.size());
  const ConvertArgs args{
      .bfloat16 = bfloat16, .half_in = halves.data(), .float_out = result.data()};
  run_on(path, Kernel::to_float, [&] {
    to_float(args, 0, size / 3);
    to_float(args, size / 3, size);
  });
  std::vector<uint32_t> bits;
  for (const float value : result) bits.push_back(std::bit_cast<uint32_t>(value));
  return bits;
}

std::vector<uint16_t> from_float_on(Path path, bool bfloat16, const std::vector<float>& floats) {
  const auto size = static_cast<int64_t>(floats.size());
  std::vector<uint16_t> result(floats.size());
  const ConvertArgs args{
      .bfloat16 = bfloat16, .float_in = floats.data(), .half_out = result.data()};
  run_on(path, Kernel::from_float, [&] {
    from_float(args, 0, size / 3);
    from_float(args, size / 3, size);
  });
  return result;
}

std::vector<uint16_t> all_halves() {
  std::vector<uint16_t> halves;
  for (uint32_t bits = 0; bits < 65536; ++bits) halves.push_back(static_cast<uint16_t>(bits));
  return halves;
}

TEST_P(ToFloat, GivesTheReferencesBitsOfAllNumbers) {
  for (const bool bfloat16 : {false, true}) {
    EXPECT_EQ(to_float_on(GetParam(), bfloat16, all_halves()),
              to_float_on(Path::reference, bfloat16, all_halves()));
  }
}

// Random bits, numbers around every 16-bit one, and those half-way to the next.
std::vector<float> awkward_floats(bool bfloat16) {
  std::vector<float> result;
  Random random(1);
  for (int i = 0; i < 100'000; ++i) result.push_back(std::bit_cast<float>(random.bits()));
  const std::vector<uint32_t> exact = to_float_on(Path::reference, bfloat16, all_halves());
  const uint32_t half_step = bfloat16 ? 0x8000u : 0x1000u;
  for (const uint32_t bits : exact) {
    for (const uint32_t offset : {0u, 1u, half_step - 1, half_step, half_step + 1}) {
      result.push_back(std::bit_cast<float>(bits + offset));
    }
  }
  for (int step = 0; step < 5000; ++step) {  // subnormal float16, in quarters of a step
    result.push_back(std::ldexp(static_cast<float>(step), -26));
    result.push_back(-std::ldexp(static_cast<float>(step), -26));
  }
  return result;
}

TEST_P(FromFloat, GivesTheReferencesBits) {
  for (const bool bfloat16 : {false, true}) {
    const std::vector<float> floats = awkward_floats(bfloat16);
    EXPECT_EQ(from_float_on(GetParam(), bfloat16, floats),
              from_float_on(Path::reference, bfloat16, floats));
  }
}

TEST_P(FromFloat, UndoesToFloat) {
  for (const bool bfloat16 : {false, true}) {
    const std::vector<uint16_t> halves = all_halves();
    std::vector<float> floats;
    for (const uint32_t bits : to_float_on(GetParam(), bfloat16, halves)) {
      floats.push_back(std::bit_cast<float>(bits));
    }
    const std::vector<uint16_t> back = from_float_on(GetParam(), bfloat16, floats);
    for (size_t i = 0; i < halves.size(); ++i) {
      const uint16_t quiet = bfloat16 ? 0x40 : 0x200;
      EXPECT_EQ(back[i], std::isnan(floats[i]) ? halves[i] | quiet : halves[i]);
    }
  }
}

TEST_P(FromFloat, HandComputedValues) {
  const std::vector<float> floats = {1.0f,     -2.5f,    65504.0f,   65519.9f, 65520.0f, -INFINITY,
                                     0x1p-24f, 0x1p-25f, 0x1.8p-24f, 0x1p-14f, -0.0f,    FLT_MAX};
  EXPECT_EQ(from_float_on(GetParam(), false, floats),
            (std::vector<uint16_t>{0x3c00, 0xc100, 0x7bff, 0x7bff, 0x7c00, 0xfc00, 1, 0, 2, 0x400,
                                   0x8000, 0x7c00}));
  EXPECT_EQ(from_float_on(GetParam(), true, {1.0f, 0x1.01p0f, 0x1.03p0f, FLT_MAX, -FLT_TRUE_MIN}),
            (std::vector<uint16_t>{0x3f80, 0x3f80, 0x3f82, 0x7f80, 0x8000}));
}

}  // namespace
}  // namespace qtoolkit::kernels
