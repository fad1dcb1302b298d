#include "core/formats.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <stdexcept>
#include <string>

namespace qtoolkit {
namespace {

TEST(Formats, NamesDiffer) {
  std::set<std::string_view> names;
  for (const Format& format : formats()) {
    EXPECT_TRUE(names.insert(format.name).second) << format.name << " twice";
  }
}

TEST(Formats, IntegersFillTheirBits) {
  int count = 0;
  for (const Format& format : formats()) {
    if (format.kind != "integer") continue;
    ++count;
    EXPECT_EQ(format.quant_max - format.quant_min, (1 << format.bits) - 1) << format.name;
    EXPECT_EQ(format.quant_min, format.name[0] == 'u' ? 0 : -(1 << (format.bits - 1)))
        << format.name;
  }
  EXPECT_EQ(count, 12);
}

// A sign, exponents from min_exponent on and a mantissa; max_value is reached inside the bits.
TEST(Formats, FloatsFitTheirBits) {
  int count = 0;
  for (const Format& format : formats()) {
    const bool blocks = format.kind == "block_float";
    EXPECT_EQ(format.block_size > 0, blocks) << format.name;
    EXPECT_EQ(!format.scale_format.empty(), blocks) << format.name;
    EXPECT_EQ(format.mantissa_bits > 0, blocks || format.kind == "float") << format.name;
    if (format.mantissa_bits == 0) continue;
    ++count;
    const int exponents = 1 << (format.bits - 1 - format.mantissa_bits);
    const int max_exponent = std::ilogb(format.max_value);
    // One exponent is that of zero, and IEEE formats keep another one for infinity and NaN.
    const int used = max_exponent - format.min_exponent + 2;
    EXPECT_TRUE(used == exponents || used == exponents - 1) << format.name;
    const double steps = std::ldexp(format.max_value, format.mantissa_bits - max_exponent);
    EXPECT_EQ(steps, std::floor(steps)) << format.name;
  }
  EXPECT_EQ(count, 7);
}

TEST(Formats, AreFoundByName) {
  for (const Format& format : formats()) EXPECT_EQ(&format_of(format.name), &format);
  EXPECT_EQ(format_of("int8").quant_min, -128);
  EXPECT_EQ(format_of("int8").quant_max, 127);
  EXPECT_EQ(format_of("uint4").quant_max, 15);
}

TEST(Formats, UnknownNamesListTheKnownOnes) {
  try {
    format_of("int7");
    FAIL() << "no exception";
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("'int7'"), std::string::npos) << message;
    for (const Format& format : formats()) {
      EXPECT_NE(message.find(format.name), std::string::npos) << message;
    }
  }
}

}  // namespace
}  // namespace qtoolkit
