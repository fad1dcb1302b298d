// The table of number formats, made from formats.inc.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace qtoolkit {

// A row of formats.inc, which says what the columns mean.
struct Format {
  std::string_view name;
  std::string_view kind;
  int bits;
  int32_t quant_min;
  int32_t quant_max;
  int mantissa_bits;
  int min_exponent;
  double max_value;
  int block_size;
  std::string_view scale_format;
};

// All formats, in the order of formats.inc.
std::span<const Format> formats();

// The format of that name; throws std::invalid_argument that lists the known names.
const Format& format_of(std::string_view name);

}  // namespace qtoolkit
