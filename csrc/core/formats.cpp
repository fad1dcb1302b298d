#include "core/formats.h"

#include <array>
#include <stdexcept>
#include <string>

namespace qtoolkit {
namespace {

constexpr std::array kFormats = {
#define QT_FORMAT(name, kind, ...) Format{#name, #kind, __VA_ARGS__},
#include "core/formats.inc"
#undef QT_FORMAT
};

}  // namespace

std::span<const Format> formats() { return kFormats; }

const Format& format_of(std::string_view name) {
  std::string known;
  for (const Format& format : kFormats) {
    if (format.name == name) return format;
    known += known.empty() ? "" : ", ";
    known += format.name;
  }
  throw std::invalid_argument("unknown number format '" + std::string(name) +
                              "'; known formats: " + known);
}

}  // namespace qtoolkit
