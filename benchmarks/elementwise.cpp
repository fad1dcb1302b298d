// Speed of the element-wise kernels on one core, on codes that lie in the first-level cache and in
// the second: codes a nanosecond, and the share of what memcpy reaches there.
//
//   elementwise_benchmark [path]     one of kernels/path.h's names; the selected path if absent

#include "kernels/elementwise.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/path.h"

namespace k = qtoolkit::kernels;

namespace {

double seconds() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// The best of many short batches: other programs take time away.
double seconds_of(const std::function<void()>& call) {
  call();
  double best = 1e9;
  for (int batch = 0; batch < 50; ++batch) {
    constexpr int kCalls = 20;
    const double start = seconds();
    for (int i = 0; i < kCalls; ++i) call();
    best = std::min(best, (seconds() - start) / kCalls);
  }
  return best;
}

struct Case {
  std::string name;
  std::function<void()> call;
};

void run(int64_t pixels, int64_t channels) {
  const int64_t size = pixels * channels;
  std::vector<uint8_t> a(size), b(size), y(size), table(256);
  for (int64_t i = 0; i < size; ++i) a[i] = static_cast<uint8_t>(i * 37), b[i] = a[i] ^ 85;
  const float multiplier = 0.004f;
  const k::LookupArgs lookup{.x = a.data(),
                             .y = y.data(),
                             .table = table.data(),
                             .channels = 1,
                             .x_row_stride = 1,
                             .y_row_stride = 1};
  const k::MulArgs mul{.a = a.data(),
                       .b = b.data(),
                       .y = y.data(),
                       .a_zero_point = 3,
                       .b_zero_point = 100,
                       .multiplier = multiplier,
                       .zero_point = 100};
  k::MulArgs gate = mul;
  gate.channels = gate.a_row_stride = gate.y_row_stride = channels;
  gate.b_row_stride = 0;
  const k::AddArgs add{.a = a.data(),
                       .b = b.data(),
                       .y = y.data(),
                       .a_zero_point = 3,
                       .b_zero_point = 100,
                       .a_multiplier = 0.3f,
                       .b_multiplier = 0.4f};
  const k::RequantizeArgs requantize{.x = a.data(),
                                     .y = y.data(),
                                     .channels = 1,
                                     .x_row_stride = 1,
                                     .y_row_stride = 1,
                                     .multiplier = &multiplier};
  const Case cases[] = {
      {"lookup", [&] { k::lookup(lookup, 0, size); }},
      {"mul", [&] { k::mul(mul, 0, size); }},
      {"mul by [N,C,1,1]", [&] { k::mul(gate, 0, pixels); }},
      {"add", [&] { k::add(add, 0, size); }},
      {"requantize", [&] { k::requantize(requantize, 0, size); }},
  };
  const double copy =
      seconds_of([&] { std::memcpy(y.data(), a.data(), static_cast<size_t>(size)); });
  std::printf("%ld pixels of %ld channels, %ld KiB\n", static_cast<long>(pixels),
              static_cast<long>(channels), static_cast<long>(size / 1024));
  std::printf("  %-18s %6.1f codes/ns\n", "memcpy", static_cast<double>(size) / copy * 1e-9);
  for (const Case& one : cases) {
    const double time = seconds_of(one.call);
    std::printf("  %-18s %6.1f codes/ns  %4.2f of memcpy\n", one.name.c_str(),
                static_cast<double>(size) / time * 1e-9, copy / time);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) k::force_path(k::path_of(argv[1]));
  run(49, 240);
  run(196, 72);
  run(784, 672);
}
