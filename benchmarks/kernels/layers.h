// The convolutions and linear layers of three networks at 224 x 224, batch 1.
#pragma once

#include <cstdint>
#include <string>

namespace qtoolkit::benchmarks {

enum class Kind : uint8_t { plain, relu, residual, residual_relu, depthwise, linear };

struct Layer {
  const char* network;
  int count;  // how many of them the network has
  int64_t kernel, stride, in, out;
  int64_t size;  // of the output, in pixels along each side
  Kind kind = Kind::relu;

  bool depthwise() const { return kind == Kind::depthwise; }
  bool residual() const { return kind == Kind::residual || kind == Kind::residual_relu; }
  // Zero is the least code of what a ReLU gives.
  bool relu() const { return kind != Kind::plain && kind != Kind::residual; }
  int64_t macs() const { return size * size * out * kernel * kernel * (depthwise() ? 1 : in); }
  std::string name() const {
    const std::string channels = std::to_string(in) + "_" + std::to_string(out);
    if (kind == Kind::linear) return "linear_" + channels;
    const std::string side = std::to_string(kernel);
    return (depthwise() ? "depthwise" : "conv") + side + "x" + side +
           (stride == 1 ? "_" : "s" + std::to_string(stride) + "_") + channels + "_at" +
           std::to_string(size) + (residual() ? "_residual" : "");
  }
};

inline constexpr const char* kNetworks[] = {"resnet18", "resnet50", "mobilenet_v2"};

// network, count, kernel, stride, in, out, size, kind
inline constexpr Layer kLayers[] = {
    {"resnet18", 1, 7, 2, 3, 64, 112},
    {"resnet18", 2, 3, 1, 64, 64, 56},
    {"resnet18", 2, 3, 1, 64, 64, 56, Kind::residual_relu},
    {"resnet18", 1, 3, 2, 64, 128, 28},
    {"resnet18", 1, 1, 2, 64, 128, 28, Kind::plain},
    {"resnet18", 1, 3, 1, 128, 128, 28},
    {"resnet18", 2, 3, 1, 128, 128, 28, Kind::residual_relu},
    {"resnet18", 1, 3, 2, 128, 256, 14},
    {"resnet18", 1, 1, 2, 128, 256, 14, Kind::plain},
    {"resnet18", 1, 3, 1, 256, 256, 14},
    {"resnet18", 2, 3, 1, 256, 256, 14, Kind::residual_relu},
    {"resnet18", 1, 3, 2, 256, 512, 7},
    {"resnet18", 1, 1, 2, 256, 512, 7, Kind::plain},
    {"resnet18", 1, 3, 1, 512, 512, 7},
    {"resnet18", 2, 3, 1, 512, 512, 7, Kind::residual_relu},
    {"resnet18", 1, 1, 1, 512, 1000, 1, Kind::linear},

    {"resnet50", 1, 7, 2, 3, 64, 112},
    {"resnet50", 1, 1, 1, 64, 64, 56},
    {"resnet50", 3, 3, 1, 64, 64, 56},
    {"resnet50", 1, 1, 1, 64, 256, 56, Kind::plain},
    {"resnet50", 3, 1, 1, 64, 256, 56, Kind::residual_relu},
    {"resnet50", 2, 1, 1, 256, 64, 56},
    {"resnet50", 1, 1, 1, 256, 128, 56},
    {"resnet50", 1, 3, 2, 128, 128, 28},
    {"resnet50", 1, 1, 2, 256, 512, 28, Kind::plain},
    {"resnet50", 4, 1, 1, 128, 512, 28, Kind::residual_relu},
    {"resnet50", 3, 1, 1, 512, 128, 28},
    {"resnet50", 3, 3, 1, 128, 128, 28},
    {"resnet50", 1, 1, 1, 512, 256, 28},
    {"resnet50", 1, 3, 2, 256, 256, 14},
    {"resnet50", 1, 1, 2, 512, 1024, 14, Kind::plain},
    {"resnet50", 6, 1, 1, 256, 1024, 14, Kind::residual_relu},
    {"resnet50", 5, 1, 1, 1024, 256, 14},
    {"resnet50", 5, 3, 1, 256, 256, 14},
    {"resnet50", 1, 1, 1, 1024, 512, 14},
    {"resnet50", 1, 3, 2, 512, 512, 7},
    {"resnet50", 1, 1, 2, 1024, 2048, 7, Kind::plain},
    {"resnet50", 3, 1, 1, 512, 2048, 7, Kind::residual_relu},
    {"resnet50", 2, 1, 1, 2048, 512, 7},
    {"resnet50", 2, 3, 1, 512, 512, 7},
    {"resnet50", 1, 1, 1, 2048, 1000, 1, Kind::linear},

    {"mobilenet_v2", 1, 3, 2, 3, 32, 112},
    {"mobilenet_v2", 1, 3, 1, 32, 32, 112, Kind::depthwise},
    {"mobilenet_v2", 1, 1, 1, 32, 16, 112, Kind::plain},
    {"mobilenet_v2", 1, 1, 1, 16, 96, 112},
    {"mobilenet_v2", 1, 3, 2, 96, 96, 56, Kind::depthwise},
    {"mobilenet_v2", 1, 1, 1, 96, 24, 56, Kind::plain},
    {"mobilenet_v2", 2, 1, 1, 24, 144, 56},
    {"mobilenet_v2", 1, 3, 1, 144, 144, 56, Kind::depthwise},
    {"mobilenet_v2", 1, 1, 1, 144, 24, 56, Kind::residual},
    {"mobilenet_v2", 1, 3, 2, 144, 144, 28, Kind::depthwise},
    {"mobilenet_v2", 1, 1, 1, 144, 32, 28, Kind::plain},
    {"mobilenet_v2", 3, 1, 1, 32, 192, 28},
    {"mobilenet_v2", 2, 3, 1, 192, 192, 28, Kind::depthwise},
    {"mobilenet_v2", 2, 1, 1, 192, 32, 28, Kind::residual},
    {"mobilenet_v2", 1, 3, 2, 192, 192, 14, Kind::depthwise},
    {"mobilenet_v2", 1, 1, 1, 192, 64, 14, Kind::plain},
    {"mobilenet_v2", 4, 1, 1, 64, 384, 14},
    {"mobilenet_v2", 4, 3, 1, 384, 384, 14, Kind::depthwise},
    {"mobilenet_v2", 3, 1, 1, 384, 64, 14, Kind::residual},
    {"mobilenet_v2", 1, 1, 1, 384, 96, 14, Kind::plain},
    {"mobilenet_v2", 3, 1, 1, 96, 576, 14},
    {"mobilenet_v2", 2, 3, 1, 576, 576, 14, Kind::depthwise},
    {"mobilenet_v2", 2, 1, 1, 576, 96, 14, Kind::residual},
    {"mobilenet_v2", 1, 3, 2, 576, 576, 7, Kind::depthwise},
    {"mobilenet_v2", 1, 1, 1, 576, 160, 7, Kind::plain},
    {"mobilenet_v2", 3, 1, 1, 160, 960, 7},
    {"mobilenet_v2", 3, 3, 1, 960, 960, 7, Kind::depthwise},
    {"mobilenet_v2", 2, 1, 1, 960, 160, 7, Kind::residual},
    {"mobilenet_v2", 1, 1, 1, 960, 320, 7, Kind::plain},
    {"mobilenet_v2", 1, 1, 1, 320, 1280, 7},
    {"mobilenet_v2", 1, 1, 1, 1280, 1000, 1, Kind::linear},
};

}  // namespace qtoolkit::benchmarks
