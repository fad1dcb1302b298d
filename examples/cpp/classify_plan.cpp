// Runs a plan file, which qtoolkit.save_plan wrote: neither PyTorch nor Python is needed.
//
//   classify_plan MODEL.qtplan [--batch FILE] [--shape N,C,H,W] [--compare FILE] [--threads T]
//                 [--clients C] [--rounds R]

#include <qtoolkit/plan.h>

#include <optional>
#include <random>

#include "common.h"

namespace {

constexpr const char* kUsage =
    "usage: classify_plan MODEL.qtplan [options]\n"
    "  --batch FILE      images, float32 numbers in the order [N, C, H, W], as numpy's tofile\n"
    "                    writes them (random images)\n"
    "  --shape N,C,H,W   their shape (1,3,224,224)\n"
    "  --compare FILE    outputs, float32 numbers, that must come out bit for bit\n"
    "  --threads T       threads for one run (1)\n"
    "  --clients C       threads that run the one plan at the same time (1)\n"
    "  --rounds R        timed runs of each client (20)\n";

std::vector<float> read_floats(const std::string& path, size_t count) {
  const std::vector<char> bytes = read_file(path);
  if (bytes.size() != count * sizeof(float)) {
    throw std::runtime_error(path + ": has " + std::to_string(bytes.size()) + " bytes, needs " +
                             std::to_string(count * sizeof(float)));
  }
  std::vector<float> result(count);
  std::memcpy(result.data(), bytes.data(), bytes.size());
  return result;
}

std::vector<float> random_images(size_t count) {
  std::mt19937 random(0);
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  std::vector<float> result(count);
  for (float& value : result) value = uniform(random);
  return result;
}

// What one client has of its own: the memory of its outputs and its threads. The plan is shared.
class Client {
 public:
  Client(const qtoolkit::Plan& plan, const std::vector<qtoolkit::TensorInfo>& inputs,
         const std::vector<float>& images, int64_t threads)
      : plan_(plan), inputs_(inputs), images_(images) {
    scores_.resize(plan.outputs(inputs)[0].elements());
    if (threads > 1) pool_.emplace(static_cast<int>(threads));
  }

  const std::vector<float>& run() {
    if (pool_) {
      plan_.run(inputs_, {images_.data()}, {scores_.data()}, *pool_);
    } else {
      plan_.run(inputs_, {images_.data()}, {scores_.data()});
    }
    return scores_;
  }

 private:
  const qtoolkit::Plan& plan_;
  const std::vector<qtoolkit::TensorInfo>& inputs_;
  const std::vector<float>& images_;
  std::vector<float> scores_;
  std::optional<qtoolkit::ThreadPool> pool_;
};

bool equal_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void classify(const Options& options) {
  const qtoolkit::Plan plan(options.model);
  const std::vector<qtoolkit::TensorInfo> inputs = {{qtoolkit::DType::float32, options.shape}};
  const std::vector<qtoolkit::TensorInfo> outputs = plan.outputs(inputs);
  if (outputs.size() != 1 || outputs[0].shape.size() != 2 ||
      outputs[0].dtype != qtoolkit::DType::float32) {
    throw std::runtime_error("the model is no classifier: its output is not a tensor [N, classes]");
  }
  const size_t pixels = inputs[0].elements();
  const std::vector<float> images =
      options.batch.empty() ? random_images(pixels) : read_floats(options.batch, pixels);

  const int64_t threads = std::max<int64_t>(options.threads, 1);
  const std::vector<float> scores = Client(plan, inputs, images, threads).run();
  print_classes(scores.data(), outputs[0].shape[0], outputs[0].shape[1]);
  if (!options.compare.empty()) {
    if (!equal_bits(scores, read_floats(options.compare, scores.size()))) {
      throw std::runtime_error("the outputs differ from those in " + options.compare);
    }
    std::printf("outputs equal to %s, bit for bit\n", options.compare.c_str());
  }
  std::printf("kernels: %s\n", qtoolkit::cpu_path().c_str());
  measure(options, options.shape[0], threads, [&] {
    return [client = std::make_unique<Client>(plan, inputs, images, threads), &scores] {
      return equal_bits(client->run(), scores);
    };
  });
}

}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, kUsage, classify); }
