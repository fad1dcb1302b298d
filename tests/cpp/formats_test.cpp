#include "core/formats.h"

#include <gtest/gtest.h>

#include <set>
#include <stdexcept>
#include <string>

namespace qtoolkit {
namespace {

TEST(Formats, RangesFitTheirBits) {
  std::set<std::string_view> names;
  for (const Format& format : formats()) {
    EXPECT_TRUE(names.insert(format.name).second) << format.name << " twice";
    EXPECT_EQ(format.quant_max - format.quant_min, (1 << format.bits) - 1) << format.name;
    EXPECT_EQ(format.quant_min, format.name[0] == 'u' ? 0 : -(1 << (format.bits - 1)))
        << format.name;
  }
  EXPECT_EQ(names.count("uint8"), 1u);
  EXPECT_EQ(names.count("int8"), 1u);
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
