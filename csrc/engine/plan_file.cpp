#include "engine/plan_file.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <type_traits>
#include <utility>

#include "engine/crc32.h"
#include "engine/error.h"

namespace qtoolkit::engine {
namespace {

static_assert(std::endian::native == std::endian::little,
              "constants are written as they lie in memory, which is little-endian");

constexpr std::array<uint8_t, 8> kMagic = {0x89, 'Q', 'T', 'P', 'L', 'A', 'N', '\n'};
constexpr uint32_t kLayoutVersion = 1;
constexpr int64_t kHeaderBytes = 40;

// --- the header
// ------------------------------------------------------------------------------------

struct Header {
  int64_t file_bytes = 0, metadata_bytes = 0;
  uint32_t metadata_crc = 0;
};

template <class T>
void put(std::vector<uint8_t>& to, T value) {
  const auto bytes = std::bit_cast<std::array<uint8_t, sizeof(T)>>(value);
  to.insert(to.end(), bytes.begin(), bytes.end());
}

template <class T>
T get(std::span<const uint8_t> from, size_t offset) {
  T value;
  std::memcpy(&value, from.data() + offset, sizeof(T));
  return value;
}

std::vector<uint8_t> header_bytes(const Header& header) {
  std::vector<uint8_t> bytes(kMagic.begin(), kMagic.end());
  put(bytes, kLayoutVersion);
  put(bytes, header.metadata_crc);
  put(bytes, header.file_bytes);
  put(bytes, header.metadata_bytes);
  put(bytes, uint32_t{0});
  put(bytes, crc32(bytes));
  return bytes;
}

Header read_header(std::span<const uint8_t> bytes, int64_t file_bytes) {
  require(std::equal(kMagic.begin(), kMagic.end(), bytes.begin()),
          "this is no plan file: it does not begin like one");
  const auto version = get<uint32_t>(bytes, 8);
  require(version == kLayoutVersion, "a plan file of version ", version,
          "; this qtoolkit reads version ", kLayoutVersion,
          ": update qtoolkit, or write the file again with this one");
  require(get<uint32_t>(bytes, 36) == crc32(bytes.first(36)) && get<uint32_t>(bytes, 32) == 0,
          "the plan file is damaged: the CRC of its header differs");
  Header header;
  header.metadata_crc = get<uint32_t>(bytes, 12);
  header.file_bytes = get<int64_t>(bytes, 16);
  header.metadata_bytes = get<int64_t>(bytes, 24);
  require(header.file_bytes == file_bytes, "the plan file is not whole: it says that it has ",
          header.file_bytes, " bytes, and has ", file_bytes);
  require(header.metadata_bytes >= 0 && header.metadata_bytes <= file_bytes - kHeaderBytes,
          "the plan file is damaged: ", header.metadata_bytes, " bytes of metadata do not fit");
  return header;
}

// --- the metadata
// ----------------------------------------------------------------------------------

class MetadataWriter {
 public:
  void integer(int64_t value) {
    uint64_t rest = (static_cast<uint64_t>(value) << 1) ^ static_cast<uint64_t>(value >> 63);
    for (; rest >= 0x80; rest >>= 7) bytes_.push_back(static_cast<uint8_t>(rest | 0x80));
    bytes_.push_back(static_cast<uint8_t>(rest));
  }
  void count(size_t value) { integer(static_cast<int64_t>(value)); }
  void list(const std::vector<int64_t>& values) {
    count(values.size());
    for (const int64_t value : values) integer(value);
  }
  void text(const std::string& value) {
    count(value.size());
    bytes_.insert(bytes_.end(), value.begin(), value.end());
  }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

 private:
  std::vector<uint8_t> bytes_;
};

class MetadataReader {
 public:
  explicit MetadataReader(std::span<const uint8_t> bytes) : rest_(bytes) {}

  int64_t integer() {
    uint64_t value = 0;
    for (unsigned int shift = 0;; shift += 7) {
      const uint8_t next = byte();
      require(shift < 63 || next <= 1, "an integer has more than 64 bits");
      value |= static_cast<uint64_t>(next & 0x7F) << shift;
      if (next < 0x80) break;
    }
    return static_cast<int64_t>(value >> 1) ^ -static_cast<int64_t>(value & 1);
  }
  // The length of a list, whose elements take at least a byte each.
  size_t count() {
    const int64_t value = integer();
    require(value >= 0 && value <= static_cast<int64_t>(rest_.size()), "a list of ", value,
            " elements in ", rest_.size(), " bytes");
    return static_cast<size_t>(value);
  }
  // The number of an element of a list that has so many.
  size_t index(size_t size) {
    const int64_t value = integer();
    require(value >= 0 && value < static_cast<int64_t>(size), "the number ", value,
            " of an element of a list of ", size);
    return static_cast<size_t>(value);
  }
  // Each element is what read() gives.
  template <class Read>
  auto list_of(const Read& read) {
    std::vector<std::invoke_result_t<Read>> result;
    for (size_t left = count(); left > 0; --left) result.push_back(read());
    return result;
  }
  std::vector<int64_t> list() {
    return list_of([&] { return integer(); });
  }
  std::string text() {
    const size_t size = count();
    std::string result(rest_.begin(), rest_.begin() + static_cast<std::ptrdiff_t>(size));
    rest_ = rest_.subspan(size);
    return result;
  }
  bool at_end() const { return rest_.empty(); }

 private:
  uint8_t byte() {
    require(!rest_.empty(), "the metadata end too early");
    const uint8_t result = rest_.front();
    rest_ = rest_.subspan(1);
    return result;
  }

  std::span<const uint8_t> rest_;
};

// --- texts and contents that occur once
// -------------------------------------------------------------

class Texts {
 public:
  int64_t number(const std::string& text) {
    const auto [entry, is_new] = numbers_.try_emplace(text, static_cast<int64_t>(all_.size()));
    if (is_new) all_.push_back(text);
    return entry->second;
  }
  const std::vector<std::string>& all() const { return all_; }

 private:
  std::map<std::string, int64_t> numbers_;
  std::vector<std::string> all_;
};

std::span<const uint8_t> contents_of(const Constant& constant) {
  return {static_cast<const uint8_t*>(constant.data.get()),
          static_cast<size_t>(constant.elements() * bytes_of(constant.dtype))};
}

class AllContents {
 public:
  struct One {
    std::span<const uint8_t> bytes;
    uint32_t crc;
  };

  int64_t number(const Constant& constant) {
    const One one{contents_of(constant), crc32(contents_of(constant))};
    for (size_t i = 0; i < all_.size(); ++i) {
      if (all_[i].crc == one.crc && std::ranges::equal(all_[i].bytes, one.bytes)) {
        return static_cast<int64_t>(i);
      }
    }
    all_.push_back(one);
    return static_cast<int64_t>(all_.size()) - 1;
  }
  const std::vector<One>& all() const { return all_; }

 private:
  std::vector<One> all_;
};

// --- reading
// ---------------------------------------------------------------------------------------

// Gives the next bytes of the file, as many as fit.
using Source = std::function<void(std::span<uint8_t>)>;

struct Contents {
  int64_t bytes = 0;
  uint32_t crc = 0;
  bool is_used = false;
  std::shared_ptr<const void> data = nullptr;
};

std::vector<Contents> read_contents_list(MetadataReader& reader, int64_t bytes_left) {
  std::vector<Contents> result = reader.list_of([&] {
    const int64_t bytes = reader.integer();
    const int64_t crc = reader.integer();
    require(bytes >= 0 && bytes <= bytes_left, "contents of ", bytes, " bytes in ", bytes_left);
    require(crc >= 0 && crc <= int64_t{0xFFFFFFFF}, "a CRC-32 of ", crc);
    bytes_left -= bytes;
    return Contents{.bytes = bytes, .crc = static_cast<uint32_t>(crc)};
  });
  require(bytes_left == 0, bytes_left, " bytes follow the contents of all constants");
  return result;
}

Constant read_constant(MetadataReader& reader, std::vector<Contents>& contents) {
  Constant constant;
  constant.dtype = static_cast<DType>(reader.index(4));
  constant.shape = reader.list();
  int64_t bytes = bytes_of(constant.dtype);
  for (const int64_t size : constant.shape) {
    require(size >= 0, "a constant has a negative size");
    bytes = checked_product(bytes, size);
  }
  Contents& own = contents[reader.index(contents.size())];
  require(own.bytes == bytes, "a constant of ", bytes, " bytes has contents of ", own.bytes);
  own.is_used = true;
  constant.data = own.data;
  return constant;
}

ProgramData read_program(MetadataReader& reader, std::vector<Contents>& contents) {
  const std::vector<std::string> texts = reader.list_of([&] { return reader.text(); });
  const auto text = [&] { return texts[reader.index(texts.size())]; };
  ProgramData data;
  data.version = reader.integer();
  data.cpu = text();
  for (size_t left = reader.count(); left > 0; --left) {
    data.input_ranks.push_back(reader.integer());
    data.input_types.push_back(reader.integer());
    data.input_zero_points.push_back(reader.integer());
  }
  data.steps = reader.list_of([&] {
    StepData step;
    step.kind = text();
    step.name = text();
    step.inputs = reader.list();
    for (size_t left = reader.count(); left > 0; --left) {
      const std::string name = text();
      require(step.integers.emplace(name, reader.list()).second, "step '", step.name, "' has '",
              name, "' twice");
    }
    for (size_t left = reader.count(); left > 0; --left) {
      const std::string name = text();
      require(step.constants.emplace(name, read_constant(reader, contents)).second, "step '",
              step.name, "' has '", name, "' twice");
    }
    return step;
  });
  data.outputs = reader.list();
  data.tuning = reader.list_of([&] {
    std::vector<int64_t> key = reader.list();
    return TuningData{std::move(key), reader.list()};
  });
  require(reader.at_end(), "bytes follow the metadata");
  for (const Contents& one : contents) require(one.is_used, "contents that no constant has");
  return data;
}

ProgramData read(const Source& source, int64_t file_bytes) {
  std::array<uint8_t, kHeaderBytes> first{};
  require(file_bytes >= kHeaderBytes, "this is no plan file: it has ", file_bytes, " bytes");
  source(first);
  const Header header = read_header(first, file_bytes);
  std::vector<uint8_t> metadata(static_cast<size_t>(header.metadata_bytes));
  source(metadata);
  require(crc32(metadata) == header.metadata_crc,
          "the plan file is damaged: the CRC of its metadata differs");
  try {
    MetadataReader reader(metadata);
    std::vector<Contents> contents =
        read_contents_list(reader, file_bytes - kHeaderBytes - header.metadata_bytes);
    for (Contents& one : contents) {
      const auto size = static_cast<size_t>(one.bytes);
      const std::shared_ptr<uint8_t[]> data(new uint8_t[size]);
      source({data.get(), size});
      require(crc32({data.get(), size}) == one.crc, "the CRC of a constant differs");
      one.data = std::shared_ptr<const void>(data, data.get());
    }
    return read_program(reader, contents);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("the plan file is damaged: ") + error.what());
  }
}

}  // namespace

std::vector<uint8_t> plan_bytes(const ProgramData& data) {
  Texts texts;
  AllContents contents;
  MetadataWriter program;
  program.integer(data.version);
  program.integer(texts.number(data.cpu));
  program.count(data.input_ranks.size());
  for (size_t i = 0; i < data.input_ranks.size(); ++i) {
    program.integer(data.input_ranks[i]);
    program.integer(data.input_types[i]);
    program.integer(data.input_zero_points[i]);
  }
  program.count(data.steps.size());
  for (const StepData& step : data.steps) {
    program.integer(texts.number(step.kind));
    program.integer(texts.number(step.name));
    program.list(step.inputs);
    program.count(step.integers.size());
    for (const auto& [name, values] : step.integers) {
      program.integer(texts.number(name));
      program.list(values);
    }
    program.count(step.constants.size());
    for (const auto& [name, constant] : step.constants) {
      program.integer(texts.number(name));
      program.integer(static_cast<int64_t>(constant.dtype));
      program.list(constant.shape);
      program.integer(contents.number(constant));
    }
  }
  program.list(data.outputs);
  program.count(data.tuning.size());
  for (const TuningData& tuning : data.tuning) {
    program.list(tuning.key);
    program.list(tuning.choices);
  }

  MetadataWriter lists;
  Header header;
  lists.count(contents.all().size());
  for (const AllContents::One& one : contents.all()) {
    lists.count(one.bytes.size());
    lists.integer(one.crc);
    header.file_bytes += static_cast<int64_t>(one.bytes.size());
  }
  lists.count(texts.all().size());
  for (const std::string& text : texts.all()) lists.text(text);

  std::vector<uint8_t> metadata = lists.bytes();
  metadata.insert(metadata.end(), program.bytes().begin(), program.bytes().end());
  header.metadata_bytes = static_cast<int64_t>(metadata.size());
  header.metadata_crc = crc32(metadata);
  header.file_bytes += kHeaderBytes + header.metadata_bytes;

  std::vector<uint8_t> bytes = header_bytes(header);
  bytes.reserve(static_cast<size_t>(header.file_bytes));
  bytes.insert(bytes.end(), metadata.begin(), metadata.end());
  for (const AllContents::One& one : contents.all()) {
    bytes.insert(bytes.end(), one.bytes.begin(), one.bytes.end());
  }
  return bytes;
}

ProgramData plan_from_bytes(std::span<const uint8_t> bytes) {
  std::span<const uint8_t> rest = bytes;
  const Source source = [&](std::span<uint8_t> to) {
    std::copy_n(rest.begin(), to.size(), to.begin());
    rest = rest.subspan(to.size());
  };
  return read(source, static_cast<int64_t>(bytes.size()));
}

void write_plan_file(const ProgramData& data, const std::string& path) {
  const std::vector<uint8_t> bytes = plan_bytes(data);
  const std::filesystem::path temporary =
      path + "." + std::to_string(std::random_device{}()) + ".part";
  std::ofstream file(temporary, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  file.close();
  std::error_code error;
  if (file) std::filesystem::rename(temporary, path, error);
  if (!file || error) {
    const std::string reason = error ? error.message() : "is the folder there, with space?";
    std::filesystem::remove(temporary, error);
    throw std::runtime_error(path + ": cannot be written: " + reason);
  }
}

ProgramData read_plan_file(const std::string& path) {
  std::error_code error;
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) throw std::runtime_error(path + ": " + error.message());
  std::ifstream file(path, std::ios::binary);
  const Source source = [&](std::span<uint8_t> to) {
    file.read(reinterpret_cast<char*>(to.data()), static_cast<std::streamsize>(to.size()));
    if (!file) throw std::runtime_error(path + ": cannot be read");
  };
  try {
    return read(source, static_cast<int64_t>(size));
  } catch (const std::invalid_argument& invalid) {
    throw std::invalid_argument(path + ": " + invalid.what());
  }
}

}  // namespace qtoolkit::engine
