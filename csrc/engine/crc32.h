// CRC-32 as zlib, PNG and Ethernet have it (polynomial 0xEDB88320): damage of files.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace qtoolkit::engine {

inline uint32_t crc32(std::span<const uint8_t> bytes) {
  // tables[k][b]: what a byte b changes with k bytes after it, so that eight go at once.
  static const auto tables = [] {
    std::array<std::array<uint32_t, 256>, 8> result{};
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t crc = b;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1u)));
      result[0][b] = crc;
    }
    for (size_t k = 1; k < 8; ++k) {
      for (size_t b = 0; b < 256; ++b) {
        result[k][b] = (result[k - 1][b] >> 8) ^ result[0][result[k - 1][b] & 0xFF];
      }
    }
    return result;
  }();
  uint32_t crc = 0xFFFFFFFFu;
  size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    uint32_t next = 0;
    for (size_t k = 0; k < 8; ++k) {
      const uint32_t of_crc = k < 4 ? (crc >> (8 * k)) & 0xFF : 0;
      next ^= tables[7 - k][bytes[i + k] ^ of_crc];
    }
    crc = next;
  }
  for (; i < bytes.size(); ++i) crc = (crc >> 8) ^ tables[0][(crc ^ bytes[i]) & 0xFF];
  return ~crc;
}

}  // namespace qtoolkit::engine
