// Speed of the convolution kernels on one core, for ResNet-18's and MobileNetV2's layers at
// 224 x 224 and some of ResNet-18's at 64 x 64 and in batches: microseconds, GMAC/s and, on a CPU
// with AVX512-VNNI, the share of its measured peak.
//
//   conv2d_kernel [path]     one of kernels/path.h's names; the selected path if absent

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kernels/conv2d.h"
#include "kernels/path.h"

namespace k = qtoolkit::kernels;

namespace {

double seconds() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

#if defined(__x86_64__)
// Twenty independent vpdpbusd of 64 multiply-adds, in a loop that touches no memory.
constexpr int64_t kPeakLoops = 100'000;
constexpr int64_t kPeakMacs = kPeakLoops * 20 * 64;
__attribute__((target("avx512f,avx512vnni"))) void run_at_peak() {
  for (int64_t i = 0; i < kPeakLoops; ++i) {
#define QT_DOT(n) "vpdpbusd %%zmm1, %%zmm0, %%zmm" #n "\n\t"
    asm volatile(QT_DOT(2) QT_DOT(3) QT_DOT(4) QT_DOT(5) QT_DOT(6) QT_DOT(7) QT_DOT(8) QT_DOT(9)
                     QT_DOT(10) QT_DOT(11) QT_DOT(12) QT_DOT(13) QT_DOT(14) QT_DOT(15) QT_DOT(16)
                         QT_DOT(17) QT_DOT(18) QT_DOT(19) QT_DOT(20) QT_DOT(21)::
                             : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                               "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
                               "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21");
#undef QT_DOT
  }
}
#endif

struct Timing {
  double seconds = 1e9;   // of one call
  double peak_gmacs = 0;  // 0 where there is no vpdpbusd
};

// The best of many short batches of calls, with the peak measured between them: the clock of a
// shared machine moves, and other programs take its time away.
Timing measure(const std::function<void()>& call) {
  call();
  double start = seconds();
  call();
  const int calls = 1 + static_cast<int>(5e-4 / std::max(seconds() - start, 1e-7));
  Timing timing;
  for (int batch = 0; batch < 100; ++batch) {
    start = seconds();
    for (int i = 0; i < calls; ++i) call();
    timing.seconds = std::min(timing.seconds, (seconds() - start) / calls);
#if defined(__x86_64__)
    if (!k::supported(k::Path::avx512vnni)) continue;
    start = seconds();
    run_at_peak();
    const double gmacs = static_cast<double>(kPeakMacs) / (seconds() - start) * 1e-9;
    timing.peak_gmacs = std::max(timing.peak_gmacs, gmacs);
#endif
  }
  return timing;
}

template <class T>
struct AlignedAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kAlignment); }
  bool operator==(const AlignedAllocator&) const = default;
};

struct Layer {
  const char* name;
  int64_t size, in, out, kernel, stride;  // size of the output
  bool residual;
  bool depthwise = false;
  int64_t images = 1;
};

constexpr Layer kLayers[] = {
    {"stem 7x7/2 3->64 @112", 112, 3, 64, 7, 2, false},
    {"3x3 64 @56", 56, 64, 64, 3, 1, true},
    {"3x3/2 64->128 @28", 28, 64, 128, 3, 2, false},
    {"1x1/2 64->128 @28", 28, 64, 128, 1, 2, false},
    {"3x3 128 @28", 28, 128, 128, 3, 1, true},
    {"3x3/2 128->256 @14", 14, 128, 256, 3, 2, false},
    {"1x1/2 128->256 @14", 14, 128, 256, 1, 2, false},
    {"3x3 256 @14", 14, 256, 256, 3, 1, true},
    {"3x3/2 256->512 @7", 7, 256, 512, 3, 2, false},
    {"1x1/2 256->512 @7", 7, 256, 512, 1, 2, false},
    {"3x3 512 @7", 7, 512, 512, 3, 1, true},
    {"linear 512->1000", 1, 512, 1000, 1, 1, false},
    {"3x3 64 @16", 16, 64, 64, 3, 1, true},
    {"3x3 128 @8, 4 images", 8, 128, 128, 3, 1, true, false, 4},
    {"3x3 256 @4, 16 images", 4, 256, 256, 3, 1, true, false, 16},
    {"3x3 512 @2, 32 images", 2, 512, 512, 3, 1, true, false, 32},
    {"3x3 512 @7, 8 images", 7, 512, 512, 3, 1, true, false, 8},
    {"1x1 24->144 @56", 56, 24, 144, 1, 1, false},
    {"1x1 96->576 @14", 14, 96, 576, 1, 1, false},
    {"depthwise 3x3 32 @112", 112, 32, 32, 3, 1, false, true},
    {"depthwise 3x3/2 96 @56", 56, 96, 96, 3, 2, false, true},
    {"depthwise 3x3 384 @14", 14, 384, 384, 3, 1, false, true},
    {"depthwise 3x3 960 @7", 7, 960, 960, 3, 1, false, true},
};

void report(const Layer& layer) {
  k::Conv2dArgs args;
  k::Conv2dShape& s = args.shape;
  s.images = layer.images;
  s.out_height = s.out_width = layer.size;
  s.groups = layer.depthwise ? layer.in : 1;
  s.in_channels = layer.depthwise ? 1 : layer.in;
  s.out_channels = layer.depthwise ? 1 : layer.out;
  s.kernel_height = s.kernel_width = layer.kernel;
  s.stride_height = s.stride_width = layer.stride;

  std::mt19937 random(1);
  const int64_t side = (layer.size - 1) * layer.stride + layer.kernel;
  std::vector<uint8_t> x(layer.images * side * side * layer.in + k::kOverread);
  for (uint8_t& code : x) code = static_cast<uint8_t>(random());
  const int64_t taps = layer.kernel * layer.kernel;
  const int64_t reduction = taps * s.in_channels;
  std::vector<int8_t> weight(layer.out * reduction);
  for (int8_t& code : weight) code = static_cast<int8_t>(random());
  // As PyTorch allocates it: at a cache line, which is worth 10 to 20 % here.
  std::vector<int8_t, AlignedAllocator<int8_t>> packed(std::max(s.packed_bytes(), taps * s.groups));
  std::vector<int32_t> offset(s.padded_channels(), 7);
  std::vector<float> multiplier(s.padded_channels(), 1e-3f);
  std::vector<uint8_t> y(s.pixels() * layer.out), residual(y.size(), 100);

  args.x = x.data();
  args.x_pixel_stride = layer.in;
  args.x_row_stride = side * layer.in;
  args.x_image_stride = side * args.x_row_stride;
  args.weight = weight.data();
  args.packed = packed.data();
  args.offset = offset.data();
  args.multiplier = multiplier.data();
  args.y = y.data();
  args.y_pixel_stride = layer.out;
  args.y_row_stride = layer.size * args.y_pixel_stride;
  args.y_image_stride = layer.size * args.y_row_stride;
  args.zero_point = 128;
  if (layer.residual) {
    args.residual = residual.data();
    args.residual_pixel_stride = layer.out;
    args.residual_row_stride = args.y_row_stride;
    args.residual_image_stride = args.y_image_stride;
    args.residual_zero_point = 90;
    args.residual_multiplier = 0.3f;
  }

  Timing timing;
  if (layer.depthwise) {
    k::pack_conv2d_depthwise_weight(s, weight.data(), packed.data());
    timing = measure([&] { k::conv2d_depthwise(args, 0, s.out_height); });
  } else {
    k::pack_conv2d_weight(s, weight.data(), packed.data());
    timing = measure([&] { k::conv2d(args, 0, k::conv2d_units(s)); });
  }
  const double gmacs = static_cast<double>(y.size() * reduction) / timing.seconds * 1e-9;
  std::printf("%-24s %9.1f us %8.1f GMAC/s", layer.name, timing.seconds * 1e6, gmacs);
  if (timing.peak_gmacs > 0) {
    std::printf("  %5.1f %% of %.1f", 100 * gmacs / timing.peak_gmacs, timing.peak_gmacs);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) k::force_path(k::path_of(argv[1]));
  std::printf("path %s\n", std::string(k::name(k::selected_path(k::Kernel::conv2d))).c_str());
  for (const Layer& layer : kLayers) report(layer);
}
