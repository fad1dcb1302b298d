// What the two programs share: options, the printed classes, and the time of many runs.
#pragma once

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

struct Options {
  std::string model;
  std::string batch;    // random images if empty
  std::string compare;  // the outputs that the batch must give, bit for bit
  std::vector<int64_t> shape{1, 3, 224, 224};
  int64_t threads = 0;  // for one run; 0: as the program likes
  int64_t clients = 1;  // threads that run the model at the same time
  int64_t rounds = 20;
};

inline int64_t parse_number(std::string_view option, std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1) {
    throw std::invalid_argument(std::string(option) + " needs a positive number, got '" +
                                std::string(text) + "'");
  }
  return value;
}

inline std::vector<int64_t> parse_shape(std::string_view text) {
  std::vector<int64_t> shape;
  while (true) {
    const size_t comma = text.find(',');
    shape.push_back(parse_number("--shape", text.substr(0, comma)));
    if (comma == std::string_view::npos) return shape;
    text.remove_prefix(comma + 1);
  }
}

inline Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (name.substr(0, 2) != "--") {
      if (!options.model.empty()) {
        throw std::invalid_argument("one model at a time, got also '" + std::string(name) + "'");
      }
      options.model = name;
      continue;
    }
    if (i + 1 == argc) throw std::invalid_argument(std::string(name) + " needs a value");
    const std::string_view value = argv[++i];
    if (name == "--batch") {
      options.batch = value;
    } else if (name == "--compare") {
      options.compare = value;
    } else if (name == "--shape") {
      options.shape = parse_shape(value);
    } else if (name == "--threads") {
      options.threads = parse_number(name, value);
    } else if (name == "--clients") {
      options.clients = parse_number(name, value);
    } else if (name == "--rounds") {
      options.rounds = parse_number(name, value);
    } else {
      throw std::invalid_argument("unknown option " + std::string(name));
    }
  }
  if (options.model.empty()) throw std::invalid_argument("no model file given");
  return options;
}

inline std::vector<char> read_file(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error(path + ": no such file");
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// `scores` is [images, classes].
inline void print_classes(const float* scores, int64_t images, int64_t classes) {
  for (int64_t i = 0; i < images; ++i) {
    const float* const own = scores + i * classes;
    const auto top = std::max_element(own, own + classes) - own;
    std::printf("image %lld: class %lld (score %.4f)\n", static_cast<long long>(i),
                static_cast<long long>(top), own[top]);
  }
}

// Lets options.clients threads run the model at the same time, options.rounds times each, and
// prints the median latency and the images a second of all. make_run() gives a thread what it
// calls; it returns true if a run gave the outputs of the first run.
template <class MakeRun>
void measure(const Options& options, int64_t batch, int64_t threads, const MakeRun& make_run) {
  std::vector<double> times;
  std::mutex mutex;
  std::exception_ptr error;
  const auto client = [&] {
    try {
      auto run = make_run();
      std::vector<double> own;
      for (int64_t round = -3; round < options.rounds; ++round) {
        const auto start = std::chrono::steady_clock::now();
        if (!run()) throw std::runtime_error("two runs gave different outputs");
        const std::chrono::duration<double, std::milli> time =
            std::chrono::steady_clock::now() - start;
        if (round >= 0) own.push_back(time.count());
      }
      const std::scoped_lock lock(mutex);
      times.insert(times.end(), own.begin(), own.end());
    } catch (...) {
      const std::scoped_lock lock(mutex);
      error = std::current_exception();
    }
  };
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int64_t i = 1; i < options.clients; ++i) others.emplace_back(client);
  client();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  const auto images = static_cast<double>(options.clients * (options.rounds + 3) * batch);
  std::printf(
      "latency: median %.2f ms of %lld runs, batch %lld, %lld threads, %lld clients; %.0f "
      "images/s\n",
      times[times.size() / 2], static_cast<long long>(times.size()), static_cast<long long>(batch),
      static_cast<long long>(threads), static_cast<long long>(options.clients),
      images / seconds.count());
}

// Parses, runs and reports errors: 2 for wrong options, 1 for all else.
template <class Run>
int run_main(int argc, char** argv, const char* usage, const Run& run) {
  Options options;
  try {
    options = parse(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n%s", error.what(), usage);
    return 2;
  }
  try {
    run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
