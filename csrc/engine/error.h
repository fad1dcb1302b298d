// Errors of the engine: std::invalid_argument that says what was wrong and where.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace qtoolkit::engine {

// Throws std::invalid_argument with the parts as its text, unless the condition holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// Sizes that come from outside: no product may overflow.
inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t result = 0;
  require(!__builtin_mul_overflow(a, b, &result), "a size of ", a, " times ", b, " overflows");
  return result;
}

}  // namespace qtoolkit::engine
