// Plan files: a ProgramData as bytes, the same on every machine.
//
//   offset  bytes
//        0      8  0x89 "QTPLAN" 0x0A
//        8      4  version of this layout, 1
//       12      4  CRC-32 of the metadata
//       16      8  bytes of the file
//       24      8  bytes of the metadata
//       32      4  zero
//       36      4  CRC-32 of the 36 bytes before
//       40         the metadata; after it the contents of the constants, one after the other
//
// Numbers of the header are little-endian. The metadata are integers, each zigzag-coded (0, -1, 1,
// -2, ...) in groups of seven bits, the lowest first, a set top bit meaning that more follow
// (LEB128). A list is its length and its elements, and a text is the list of its bytes. In order:
//
//   contents    list of (bytes, CRC-32); several constants may have the same contents
//   texts       list of texts; below, a text is its number here
//   program     version, CPU
//   inputs      list of (rank, type, zero point)
//   steps       list of (kind, name, list of inputs,
//                        list of (name, list of integers),
//                        list of (name, DType, list of sizes, number of its contents))
//   outputs     list
//   tuning      list of (list: key, list: choices)
//
// What the numbers mean is the program's business: see program.h.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/program.h"

namespace qtoolkit::engine {

// Contents that several constants share are in it once.
std::vector<uint8_t> plan_bytes(const ProgramData& data);

// Checks every length, offset and number before it is used, and every CRC: it takes no more memory
// than a small multiple of the bytes given. The result shares no memory with them. Throws
// std::invalid_argument that says what is wrong.
ProgramData plan_from_bytes(std::span<const uint8_t> bytes);

// The file appears whole or not at all: it is written under another name and renamed. Throws
// std::runtime_error that names the file.
void write_plan_file(const ProgramData& data, const std::string& path);

// Throws std::runtime_error if the file cannot be read and std::invalid_argument if it is damaged;
// both name it.
ProgramData read_plan_file(const std::string& path);

}  // namespace qtoolkit::engine
