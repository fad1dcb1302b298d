// Runs an exported INT8 classifier without Python: prints each image's top class and the latency.
//
//   classify MODEL.pt [--batch FILE.pt] [--shape N,C,H,W] [--expect FILE.pt] [--threads T]
//            [--rounds R]

#include <ATen/Parallel.h>
#include <torch/script.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace {

struct Options {
  std::string model;
  std::string batch;   // a tensor written by torch.save; random images if empty
  std::string expect;  // the outputs that the batch must give, bit for bit
  std::vector<int64_t> shape{1, 3, 224, 224};
  int64_t threads = 0;  // 0: PyTorch's choice
  int64_t rounds = 20;
};

constexpr std::string_view kUsage =
    "usage: classify MODEL.pt [options]\n"
    "  --batch FILE.pt    images, a float tensor [N, C, H, W] written by torch.save\n"
    "  --shape N,C,H,W    random images of this shape where no batch is given (1,3,224,224)\n"
    "  --expect FILE.pt   outputs that must come out, bit for bit\n"
    "  --threads T        CPU threads\n"
    "  --rounds R         timed runs (20)\n";

int64_t parse_number(std::string_view option, std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1) {
    throw std::invalid_argument(std::string(option) + " needs a positive number, got '" +
                                std::string(text) + "'");
  }
  return value;
}

std::vector<int64_t> parse_shape(std::string_view text) {
  std::vector<int64_t> shape;
  while (true) {
    const size_t comma = text.find(',');
    shape.push_back(parse_number("--shape", text.substr(0, comma)));
    if (comma == std::string_view::npos) return shape;
    text.remove_prefix(comma + 1);
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (!name.starts_with("--")) {
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
    } else if (name == "--expect") {
      options.expect = value;
    } else if (name == "--shape") {
      options.shape = parse_shape(value);
    } else if (name == "--threads") {
      options.threads = parse_number(name, value);
    } else if (name == "--rounds") {
      options.rounds = parse_number(name, value);
    } else {
      throw std::invalid_argument("unknown option " + std::string(name));
    }
  }
  if (options.model.empty()) throw std::invalid_argument("no model file given");
  return options;
}

// LibTorch's messages go on with a backtrace; the first line says what is wrong.
std::string first_line(const std::exception& error) {
  const std::string_view text = error.what();
  return std::string(text.substr(0, text.find('\n')));
}

void require_file(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error(path + ": no such file");
}

torch::jit::Module load_model(const std::string& path) {
  require_file(path);
  try {
    torch::jit::Module model = torch::jit::load(path);
    model.eval();
    return model;
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": not a complete TorchScript file (" + first_line(error) +
                             "); export it again");
  }
}

torch::Tensor load_tensor(const std::string& path) {
  require_file(path);
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  try {
    return torch::jit::pickle_load(bytes).toTensor();
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": not a tensor written by torch.save (" + first_line(error) +
                             ")");
  }
}

torch::Tensor run(torch::jit::Module& model, const torch::Tensor& images) {
  torch::jit::IValue output;
  try {
    output = model.forward({images});
  } catch (const std::exception& error) {
    throw std::runtime_error("the model does not run on images of shape " +
                             c10::str(images.sizes()) + ": " + error.what());
  }
  if (!output.isTensor() || output.toTensor().dim() != 2) {
    throw std::runtime_error("the model is no classifier: its output is not a tensor [N, classes]");
  }
  return output.toTensor();
}

double median_ms(torch::jit::Module& model, const torch::Tensor& images, int64_t rounds) {
  std::vector<double> times;
  for (int64_t round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    run(model, images);
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    times.push_back(time.count());
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

void classify(const Options& options) {
  if (options.threads > 0) at::set_num_threads(static_cast<int>(options.threads));
  const c10::InferenceMode inference;
  torch::jit::Module model = load_model(options.model);
  const torch::Tensor images =
      options.batch.empty() ? torch::rand(options.shape) : load_tensor(options.batch);

  torch::Tensor scores = run(model, images);
  const torch::Tensor classes = scores.argmax(1);
  for (int64_t i = 0; i < classes.size(0); ++i) {
    const int64_t top = classes[i].item<int64_t>();
    std::printf("image %lld: class %lld (score %.4f)\n", static_cast<long long>(i),
                static_cast<long long>(top), scores[i][top].item<float>());
  }
  if (!options.expect.empty()) {
    if (!torch::equal(scores, load_tensor(options.expect))) {
      throw std::runtime_error("the outputs differ from those in " + options.expect);
    }
    std::printf("outputs equal to %s, bit for bit\n", options.expect.c_str());
  }
  for (int warm_up = 0; warm_up < 3; ++warm_up) run(model, images);
  std::printf("latency: median %.2f ms of %lld runs, batch %lld, %d threads\n",
              median_ms(model, images, options.rounds), static_cast<long long>(options.rounds),
              static_cast<long long>(images.size(0)), at::get_num_threads());
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  try {
    options = parse(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n%s", error.what(), kUsage.data());
    return 2;
  }
  try {
    classify(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
