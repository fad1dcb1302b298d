// Runs a TorchScript file of an INT8 classifier with LibTorch, without Python.
//
//   classify MODEL.pt [--batch FILE.pt] [--shape N,C,H,W] [--compare FILE.pt] [--threads T]
//            [--clients C] [--rounds R]

#include <ATen/Parallel.h>
#include <torch/script.h>

#include "common.h"

namespace {

constexpr const char* kUsage =
    "usage: classify MODEL.pt [options]\n"
    "  --batch FILE.pt    images, a float tensor [N, C, H, W] written by torch.save\n"
    "  --shape N,C,H,W    random images of this shape where no batch is given (1,3,224,224)\n"
    "  --compare FILE.pt  outputs that must come out, bit for bit\n"
    "  --threads T        threads for one run (PyTorch's choice)\n"
    "  --clients C        threads that run the one model at the same time (1)\n"
    "  --rounds R         timed runs of each client (20)\n";

// LibTorch's messages go on with a backtrace; the first line says what is wrong.
std::string first_line(const std::exception& error) {
  const std::string_view text = error.what();
  return std::string(text.substr(0, text.find('\n')));
}

torch::jit::Module load_model(const std::string& path) {
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error(path + ": no such file");
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
  const std::vector<char> bytes = read_file(path);
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

void classify(const Options& options) {
  if (options.threads > 0) at::set_num_threads(static_cast<int>(options.threads));
  const c10::InferenceMode inference;
  torch::jit::Module model = load_model(options.model);
  const torch::Tensor images =
      options.batch.empty() ? torch::rand(options.shape) : load_tensor(options.batch);

  const torch::Tensor scores = run(model, images).to(torch::kFloat).contiguous();
  print_classes(scores.const_data_ptr<float>(), scores.size(0), scores.size(1));
  if (!options.compare.empty()) {
    if (!torch::equal(scores, load_tensor(options.compare))) {
      throw std::runtime_error("the outputs differ from those in " + options.compare);
    }
    std::printf("outputs equal to %s, bit for bit\n", options.compare.c_str());
  }
  measure(options, images.size(0), at::get_num_threads(), [&] {
    // The mode is a thread's own.
    return [&, mode = std::make_unique<c10::InferenceMode>()] {
      return torch::equal(run(model, images), scores);
    };
  });
}

}  // namespace

int main(int argc, char** argv) { return run_main(argc, argv, kUsage, classify); }
