// Speed of the convolution kernels on one core, for every layer of three networks: GMAC/s, and the
// share of the most multiply-adds that this CPU can do with the path's instruction, which is
// measured between the calls. At the end the shares of whole networks.
//
//   conv2d_benchmark [--path=avx2] [Google Benchmark's options, such as
//   --benchmark_filter=resnet18]

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "kernels/path.h"
#include "layers.h"
#include "peak.h"
#include "problem.h"

namespace qtoolkit::benchmarks {
namespace {

double seconds() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

double median(std::vector<double>& values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// The shares of a network's layers that have been measured, by name and kind of weights.
using Shares = std::map<std::string, std::map<const Layer*, double>>;

void run(benchmark::State& state, const Layer& layer, bool cold, Shares& results) {
  Problem problem(layer, cold);
  const kernels::Kernel kernel =
      layer.depthwise() ? kernels::Kernel::conv2d_depthwise : kernels::Kernel::conv2d;
  const std::optional<Peak> peak = peak_of(kernels::selected_path(kernel));
  problem.call();
  const double first = seconds();
  problem.call();
  // So many calls that reading the clock takes no part of the time.
  const int calls = 1 + static_cast<int>(2e-5 / std::max(seconds() - first, 1e-7));
  const double macs = static_cast<double>(layer.macs());
  std::vector<double> speeds, shares;
  for (auto _ : state) {
    const double start = seconds();
    if (peak) peak->run();
    const double middle = seconds();
    for (int i = 0; i < calls; ++i) problem.call();
    const double time = (seconds() - middle) / calls;
    state.SetIterationTime(time);
    speeds.push_back(macs / time);
    if (peak) shares.push_back(macs / time / (peak->macs / (middle - start)));
  }
  state.counters["GMAC/s"] = median(speeds) * 1e-9;
  if (!peak) return;
  const double share = median(shares);
  state.counters["share"] = share;
  results[std::string(layer.network) + (cold ? ", cold weights" : ", warm")][&layer] = share;
}

// Multiply-adds, and those that the peak would have done in the same time.
struct Sum {
  double macs = 0, peak_macs = 0;
  double percent() const { return 100 * macs / peak_macs; }
};

void print(const Shares& results) {
  for (const auto& [name, shares] : results) {
    Sum all, dense;
    for (const auto& [layer, share] : shares) {
      const double macs = static_cast<double>(layer->count * layer->macs());
      for (Sum* sum : {&all, &dense}) {
        if (sum == &dense && layer->depthwise()) continue;
        sum->macs += macs;
        sum->peak_macs += macs / share;
      }
    }
    std::printf("%s: %zu shapes, %.1f %% of the peak", name.c_str(), shares.size(), all.percent());
    if (all.macs > dense.macs) {
      std::printf("; without the depthwise ones %.1f %% in %.0f %% of the time", dense.percent(),
                  100 * dense.peak_macs / all.peak_macs);
    }
    std::printf("\n");
  }
}

// Takes --path=<name> out of the arguments.
void force_wanted_path(int& argc, char** argv) {
  constexpr const char kOption[] = "--path=";
  const auto is_path = [&](const char* argument) {
    return std::strncmp(argument, kOption, sizeof(kOption) - 1) == 0;
  };
  for (int i = 1; i < argc; ++i) {
    if (is_path(argv[i])) kernels::force_path(kernels::path_of(argv[i] + sizeof(kOption) - 1));
  }
  argc = static_cast<int>(std::remove_if(argv + 1, argv + argc, is_path) - argv);
}

int main(int argc, char** argv) {
  force_wanted_path(argc, argv);
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  const kernels::Path path = kernels::selected_path(kernels::Kernel::conv2d);
  const std::optional<Peak> peak = peak_of(path);
  std::printf("conv2d: %s, share of %s\n", std::string(kernels::name(path)).c_str(),
              peak ? peak->instruction : "no known peak");
  Shares results;
  for (const Layer& layer : kLayers) {
    for (bool cold : {false, true}) {
      const std::string name =
          std::string(layer.network) + "/" + layer.name() + (cold ? "/cold" : "/warm");
      benchmark::RegisterBenchmark(
          name.c_str(),
          [&layer, cold, &results](benchmark::State& state) { run(state, layer, cold, results); })
          ->UseManualTime()
          ->Unit(benchmark::kMicrosecond)
          ->MinTime(0.02);
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  print(results);
  return 0;
}

}  // namespace
}  // namespace qtoolkit::benchmarks

int main(int argc, char** argv) { return qtoolkit::benchmarks::main(argc, argv); }
