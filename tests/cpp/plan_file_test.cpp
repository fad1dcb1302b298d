// Plan files: what was written is read, and nothing else is.
#include "engine/plan_file.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "engine/crc32.h"
#include "engine_programs.h"

namespace qtoolkit::engine {
namespace {

using kernels::Random;
using Bytes = std::vector<uint8_t>;

constexpr size_t kHeaderBytes = 40;

std::vector<float> image() { return Random(5).reals(3 * 17 * 17, -2.0f, 2.0f); }

template <class T>
T get(const Bytes& bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

template <class T>
void set(Bytes& bytes, size_t offset, T value) {
  std::memcpy(bytes.data() + offset, &value, sizeof(T));
}

size_t metadata_size(const Bytes& bytes) { return get<uint64_t>(bytes, 24); }

// Makes sizes and CRCs of header and metadata right, so that what follows them is read.
void repair(Bytes& bytes, size_t metadata_bytes) {
  set<uint64_t>(bytes, 16, bytes.size());
  set<uint64_t>(bytes, 24, metadata_bytes);
  set(bytes, 12, crc32(std::span(bytes).subspan(kHeaderBytes, metadata_bytes)));
  set(bytes, 36, crc32(std::span(bytes).first(36)));
}

std::string refusal(const Bytes& bytes) {
  try {
    plan_from_bytes(bytes);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

void expect_refusal(const Bytes& bytes, const std::string& part) {
  const std::string text = refusal(bytes);
  EXPECT_NE(text.find(part), std::string::npos) << text;
}

void expect_equal(const ProgramData& a, const ProgramData& b) {
  EXPECT_EQ(a.version, b.version);
  EXPECT_EQ(a.cpu, b.cpu);
  EXPECT_EQ(a.input_ranks, b.input_ranks);
  EXPECT_EQ(a.input_types, b.input_types);
  EXPECT_EQ(a.input_zero_points, b.input_zero_points);
  EXPECT_EQ(a.outputs, b.outputs);
  ASSERT_EQ(a.steps.size(), b.steps.size());
  for (size_t i = 0; i < a.steps.size(); ++i) {
    const StepData &x = a.steps[i], &y = b.steps[i];
    EXPECT_EQ(x.kind, y.kind);
    EXPECT_EQ(x.name, y.name);
    EXPECT_EQ(x.inputs, y.inputs);
    EXPECT_EQ(x.integers, y.integers);
    ASSERT_EQ(x.constants.size(), y.constants.size());
    for (const auto& [name, constant] : x.constants) {
      const Constant& other = y.constants.at(name);
      EXPECT_EQ(constant.dtype, other.dtype);
      ASSERT_EQ(constant.shape, other.shape);
      const auto size = static_cast<size_t>(constant.elements() * bytes_of(constant.dtype));
      EXPECT_EQ(std::memcmp(constant.data.get(), other.data.get(), size), 0) << name;
    }
  }
  ASSERT_EQ(a.tuning.size(), b.tuning.size());
  for (size_t i = 0; i < a.tuning.size(); ++i) {
    EXPECT_EQ(a.tuning[i].key, b.tuning[i].key);
    EXPECT_EQ(a.tuning[i].choices, b.tuning[i].choices);
  }
}

TEST(PlanFile, Crc32IsTheStandardOne) {
  const std::string text = "123456789";
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  EXPECT_EQ(crc32({bytes, 9}), 0xCBF43926u);
  EXPECT_EQ(crc32({bytes, 8}), 0x9AE0DAAFu);
  EXPECT_EQ(crc32({bytes, size_t{0}}), 0u);
}

TEST(PlanFile, GivesWhatWasWritten) {
  ProgramData data = small_network();
  data.cpu = "a CPU";
  data.tuning = {{{0, 1, -7, INT64_MAX}, {3}}, {{}, {INT64_MIN, 64, -64, -65, 63}}};
  data.steps[2].name = "";
  expect_equal(plan_from_bytes(plan_bytes(data)), data);
}

TEST(PlanFile, GivesTheSameBits) {
  Plan plan(small_network());
  Plan loaded(plan_from_bytes(plan_bytes(plan.data())));
  EXPECT_EQ(run_plan(loaded, image(), 1, 3, 17, 1), run_plan(plan, image(), 1, 3, 17, 1));
}

TEST(PlanFile, IsWrittenAndReadWhole) {
  const std::filesystem::path folder =
      std::filesystem::path(testing::TempDir()) / "qtoolkit_plan_file";
  std::filesystem::create_directories(folder);
  const std::string path = folder / "a.qtplan";
  for (int round = 0; round < 2; ++round) write_plan_file(small_network(), path);
  expect_equal(read_plan_file(path), small_network());
  EXPECT_EQ(std::filesystem::file_size(path), plan_bytes(small_network()).size());
  const std::filesystem::directory_iterator files(folder);
  EXPECT_EQ(std::distance(begin(files), end(files)), 1);
  EXPECT_THROW(write_plan_file(small_network(), folder / "none" / "a.qtplan"), std::runtime_error);
  EXPECT_THROW(read_plan_file(folder / "b.qtplan"), std::runtime_error);
  EXPECT_THROW(read_plan_file(folder), std::runtime_error);
  std::ofstream(path, std::ios::binary | std::ios::app) << "more";
  try {
    read_plan_file(path);
    ADD_FAILURE() << "accepted";
  } catch (const std::invalid_argument& error) {
    EXPECT_EQ(std::string(error.what()).find(path), 0u) << error.what();
  }
  std::filesystem::remove_all(folder);
}

TEST(PlanFile, HoldsSharedWeightsOnceAndLittleElse) {
  ProgramData data = small_network();
  size_t weights = 0;
  for (const StepData& step : data.steps) {
    for (const auto& [name, constant] : step.constants) {
      weights += static_cast<size_t>(constant.elements() * bytes_of(constant.dtype));
    }
  }
  const size_t size = plan_bytes(data).size();
  EXPECT_LT(size, weights + 2500);
  data.steps.push_back(data.steps[1]);
  EXPECT_LT(plan_bytes(data).size(), size + 150);
}

TEST(PlanFileErrors, SayWhatIsWrong) {
  const Bytes valid = plan_bytes(small_network());
  const size_t metadata = metadata_size(valid);
  expect_refusal({}, "no plan file: it has 0 bytes");
  expect_refusal(Bytes(1000, 'x'), "does not begin like one");
  Bytes other = valid;
  other[8] = 2;
  expect_refusal(other, "version 2; this qtoolkit reads version 1");
  other = valid;
  other[20] ^= 1;
  expect_refusal(other, "CRC of its header");
  other = valid;
  other[kHeaderBytes + 7] ^= 1;
  expect_refusal(other, "CRC of its metadata");
  other = valid;
  other.back() ^= 1;
  expect_refusal(other, "CRC of a constant");
  other = valid;
  other.push_back(0);
  expect_refusal(other, "not whole");
  repair(other, metadata);
  expect_refusal(other, "1 bytes follow the contents");
  other = valid;
  repair(other, metadata);
  EXPECT_EQ(refusal(other), "accepted");
  repair(other, metadata + 1);
  EXPECT_NE(refusal(other), "accepted");
  set<uint64_t>(other, 24, other.size());
  set(other, 36, crc32(std::span(other).first(36)));
  expect_refusal(other, "bytes of metadata do not fit");
}

// Lengths are compared with the bytes that are there before memory is taken.
TEST(PlanFileErrors, HugeLengthsTakeNoMemory) {
  const Bytes valid = plan_bytes(small_network());
  const size_t metadata = metadata_size(valid);
  // 2^40 as the first integer, the number of contents, in the place of the bytes that it takes.
  Bytes other = valid;
  for (size_t i = 0; i < 5; ++i) other[kHeaderBytes + i] = 0x80;
  other[kHeaderBytes + 5] = 0x40;
  repair(other, metadata);
  expect_refusal(other, "a list of 1099511627776 elements in");
  // No integer has more than 64 bits.
  for (size_t i = 0; i < 12; ++i) other[kHeaderBytes + i] = 0xFF;
  repair(other, metadata);
  expect_refusal(other, "more than 64 bits");
}

TEST(PlanFileErrors, EveryTruncationIsRefused) {
  const Bytes valid = plan_bytes(small_network());
  for (size_t size = 0; size < valid.size(); size += size < 4000 ? 1 : 97) {
    Bytes bytes(valid.begin(), valid.begin() + static_cast<std::ptrdiff_t>(size));
    EXPECT_NE(refusal(bytes), "accepted") << size;
    if (size <= kHeaderBytes) continue;
    repair(bytes, std::min(metadata_size(valid), size - kHeaderBytes));
    EXPECT_NE(refusal(bytes), "accepted") << size;
  }
}

TEST(PlanFileErrors, EveryChangedByteIsNoticed) {
  const Bytes valid = plan_bytes(small_network());
  for (size_t i = 0; i < valid.size(); i += i < 3000 ? 1 : 61) {
    Bytes bytes = valid;
    bytes[i] ^= static_cast<uint8_t>(1 << (i % 8));
    EXPECT_NE(refusal(bytes), "accepted") << i;
  }
}

// Changes bytes of the metadata, a few at a time.
void damage(Bytes& metadata, Random& random) {
  const uint8_t interesting[] = {0, 1, 2, 3, 0x3F, 0x40, 0x7E, 0x7F, 0x80, 0x81, 0xFE, 0xFF};
  for (int64_t changes = random.integer(1, 4); changes > 0; --changes) {
    const int64_t last = static_cast<int64_t>(metadata.size()) - 1;
    const auto at = metadata.begin() + random.integer(0, last);
    switch (random.integer(0, 4)) {
      case 0:
        *at = interesting[random.integer(0, 11)];
        break;
      case 1:
        *at ^= static_cast<uint8_t>(1 << random.integer(0, 7));
        break;
      case 2:
        metadata.insert(at, interesting[random.integer(0, 11)]);
        break;
      case 3:
        metadata.erase(at, std::min(at + random.integer(1, 8), metadata.end()));
        break;
      default:
        std::swap(*at, metadata[static_cast<size_t>(random.integer(0, last))]);
    }
    if (metadata.empty()) metadata.push_back(0);
  }
}

// Files whose CRCs are right and whose metadata are not: refused or run, under a sanitizer without
// touching what is not theirs.
TEST(PlanFileErrors, DamagedMetadataAreRefusedOrRun) {
  const Bytes valid = plan_bytes(small_network());
  const auto begin = valid.begin() + kHeaderBytes;
  const auto end = begin + static_cast<std::ptrdiff_t>(metadata_size(valid));
  const std::vector<Outside> inputs = {{shape_of({1, 3, 17, 17}), Type::float32, true}};
  const char* const text = std::getenv("QTOOLKIT_STRESS_SECONDS");
  const std::chrono::duration<double> time(text == nullptr ? 0.5 : std::atof(text));
  const auto stop = std::chrono::steady_clock::now() + time;
  Random random(11);
  int64_t refused = 0, loaded = 0, ran = 0;
  while (std::chrono::steady_clock::now() < stop || refused + loaded < 3000) {
    Bytes metadata(begin, end);
    damage(metadata, random);
    Bytes bytes(valid.begin(), begin);
    bytes.insert(bytes.end(), metadata.begin(), metadata.end());
    bytes.insert(bytes.end(), end, valid.end());
    repair(bytes, metadata.size());
    ProgramData data;
    try {
      data = plan_from_bytes(bytes);  // without std::bad_alloc: it takes what the file has
      ++loaded;
    } catch (const std::invalid_argument&) {
      ++refused;
      continue;
    }
    try {
      Plan plan(std::move(data));
      constexpr int64_t kMostBytes = int64_t{1} << 26;  // large paddings only cost time
      const int64_t arena = plan.report(inputs, 1, run_threads, false).arena_bytes;
      if (arena > kMostBytes || plan.description().input_types != std::vector<int64_t>{0}) continue;
      run_plan(plan, image(), 1, 3, 17, 1);
      ++ran;
    } catch (const std::invalid_argument&) {
    }
  }
  EXPECT_GT(refused, 1000);
  EXPECT_GT(loaded, 50);
  EXPECT_GT(ran, 10);
}

}  // namespace
}  // namespace qtoolkit::engine
