// The table of number formats, made from formats.inc.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace qtoolkit {

struct Format {
  std::string_view name;
  int bits;
  int32_t quant_min;
  int32_t quant_max;
};

// All formats, in the order of formats.inc.
std::span<const Format> formats();

// The format of that name; throws std::invalid_argument that lists the known names.
const Format& format_of(std::string_view name);

}  // namespace qtoolkit
