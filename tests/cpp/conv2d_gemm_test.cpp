// The convolution of the CUDA kernels, with its threads run one after another on the host.

#include "kernels/conv2d_gemm.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <random>
#include <vector>

namespace qtoolkit::kernels::gemm {
namespace {

struct Case {
  int64_t images, height, width, groups, in_channels, out_channels, kernel_height, kernel_width;
  int64_t stride = 1, padding = 0, dilation = 1;
};

const Case kCases[] = {
    {1, 8, 8, 1, 16, 64, 1, 1},         {2, 9, 7, 1, 32, 70, 3, 3, 1, 1},
    {1, 14, 14, 1, 3, 64, 7, 7, 2, 3},  {3, 5, 5, 1, 48, 5, 3, 3, 2, 1},
    {1, 11, 6, 2, 5, 9, 3, 2, 1, 1, 2}, {2, 6, 6, 4, 16, 16, 3, 3, 1, 1},
    {65, 1, 1, 1, 100, 130, 1, 1},      {1, 4, 4, 6, 1, 1, 3, 3, 1, 1},
    {1, 3, 3, 1, 1, 1, 3, 3, 1, 2, 1},  {1, 9, 9, 1, 20, 33, 2, 4, 3, 1},
};

int64_t size_of(int64_t size, int64_t kernel, const Case& c) {
  return (size + 2 * c.padding - (kernel - 1) * c.dilation - 1) / c.stride + 1;
}

Problem problem_of(const Case& c) {
  Problem p;
  p.images = c.images;
  p.height = c.height;
  p.width = c.width;
  p.out_height = size_of(c.height, c.kernel_height, c);
  p.out_width = size_of(c.width, c.kernel_width, c);
  p.groups = c.groups;
  p.in_channels = c.in_channels;
  p.out_channels = c.out_channels;
  p.kernel_height = c.kernel_height;
  p.kernel_width = c.kernel_width;
  p.stride_height = p.stride_width = c.stride;
  p.padding_height = p.padding_width = c.padding;
  p.dilation_height = p.dilation_width = c.dilation;
  return p;
}

// Bytes at a multiple of 16.
class Bytes {
 public:
  Bytes(int64_t count, std::mt19937& random) : words_((count + 15) / 16) {
    for (int64_t i = 0; i < count; ++i) data()[i] = static_cast<uint8_t>(random());
  }
  uint8_t* data() { return words_.front().bytes; }

 private:
  std::vector<Vector> words_;
};

uint32_t word_at(const uint8_t* tile, int byte) {
  uint32_t word = 0;
  std::memcpy(&word, tile + byte, sizeof(word));
  return word;
}

int32_t element(uint32_t word, int64_t byte, bool is_signed) {
  const auto code = static_cast<uint8_t>(word >> (8 * byte));
  return is_signed ? static_cast<int8_t>(code) : code;
}

// mma.sync.aligned.m16n8k32: D = A * B + C. Where the elements lie is written here as in the PTX
// ISA's text: with groupID = lane / 4 and threadID = lane % 4,
//   A: row = groupID for elements i of 0-3 and 8-11, else groupID + 8;
//      column = threadID * 4 + i % 4, and 16 more for i >= 8
//   B: row = threadID * 4 + i % 4, and 16 more for i >= 4; column = groupID
//   C: row = groupID for i < 2, else groupID + 8; column = threadID * 2 + i % 2
void mma(std::array<std::array<int32_t, 4>, kWarp>& c,
         const std::array<std::array<uint32_t, 4>, kWarp>& a,
         const std::array<std::array<uint32_t, 2>, kWarp>& b, bool a_signed) {
  int32_t left[16][32], right[32][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < 16; ++i) {
      const bool upper = i < 4 || (i >= 8 && i < 12);
      const int row = upper ? group : group + 8;
      const int column = thread * 4 + i % 4 + (i >= 8 ? 16 : 0);
      left[row][column] = element(a[lane][i / 4], i % 4, a_signed);
    }
    for (int i = 0; i < 8; ++i) {
      right[thread * 4 + i % 4 + (i >= 4 ? 16 : 0)][group] = element(b[lane][i / 4], i % 4, true);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
      auto sum = static_cast<uint32_t>(c[lane][i]);
      for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(left[row][k] * right[k][column]);
      c[lane][i] = static_cast<int32_t>(sum);
    }
  }
}

// The sums of all pixels and channels, as the blocks of the kernel compute them.
std::vector<int32_t> run_blocks(const Problem& p, const uint8_t* x, bool x_signed, uint8_t zero,
                                const int8_t* weight) {
  const int64_t all_channels = p.groups * p.out_channels;
  std::vector<int32_t> sums(static_cast<size_t>(p.pixels() * all_channels), 0x55555555);
  for (int64_t group = 0; group < p.groups; ++group) {
    for (int64_t row0 = 0; row0 < p.pixels(); row0 += kTileRows) {
      for (int64_t column0 = 0; column0 < p.out_channels; column0 += kTileColumns) {
        std::vector<std::array<std::array<int32_t, 4>, kWarp>> accs(
            (kThreads / kWarp) * kRowProducts * kColumnProducts, {{}});
        for (int64_t k = 0; k < p.depth(); k += kDepth) {
          alignas(16) uint8_t codes[kTileBytes], weights[kTileBytes];
          std::memset(codes, 0xAA, sizeof(codes));
          std::memset(weights, 0xAA, sizeof(weights));
          for (int thread = 0; thread < kThreads; ++thread) {
            const int row = loaded_row(thread), byte = loaded_byte(thread);
            const Pixel pixel = pixel_at(p, row0 + row);
            const Vector c = load_codes(p, x, pixel, group, k + byte, zero);
            const Vector w = load_weights(p, weight, group, column0 + row, k + byte);
            std::memcpy(codes + row * kPitch + byte, &c, sizeof(c));
            std::memcpy(weights + row * kPitch + byte, &w, sizeof(w));
          }
          size_t product = 0;
          for (int warp = 0; warp < kThreads / kWarp; ++warp) {
            for (int i = 0; i < kRowProducts; ++i) {
              for (int j = 0; j < kColumnProducts; ++j, ++product) {
                std::array<std::array<uint32_t, 4>, kWarp> a;
                std::array<std::array<uint32_t, 2>, kWarp> b;
                for (int lane = 0; lane < kWarp; ++lane) {
                  for (int word = 0; word < 4; ++word) {
                    a[lane][word] =
                        word_at(codes, codes_word(warp_row(warp) + i * kProductRows, lane, word));
                  }
                  for (int word = 0; word < 2; ++word) {
                    b[lane][word] = word_at(
                        weights, weights_word(warp_column(warp) + j * kProductColumns, lane, word));
                  }
                }
                mma(accs[product], a, b, x_signed);
              }
            }
          }
        }
        size_t product = 0;
        for (int warp = 0; warp < kThreads / kWarp; ++warp) {
          for (int i = 0; i < kRowProducts; ++i) {
            for (int j = 0; j < kColumnProducts; ++j, ++product) {
              for (int lane = 0; lane < kWarp; ++lane) {
                for (int s = 0; s < 4; ++s) {
                  const int64_t pixel = row0 + sum_row(warp_row(warp) + i * kProductRows, lane, s);
                  const int64_t channel =
                      column0 + sum_column(warp_column(warp) + j * kProductColumns, lane, s);
                  if (pixel >= p.pixels() || channel >= p.out_channels) continue;
                  sums[pixel * all_channels + group * p.out_channels + channel] =
                      accs[product][lane][s];
                }
              }
            }
          }
        }
      }
    }
  }
  return sums;
}

// The definition: x padded with its zero point.
int32_t defined_sum(const Problem& p, const uint8_t* x, bool x_signed, int32_t zero_point,
                    const int8_t* weight, int64_t pixel, int64_t channel) {
  const int64_t image = pixel / (p.out_height * p.out_width);
  const int64_t y = pixel / p.out_width % p.out_height, z = pixel % p.out_width;
  const int64_t group = channel / p.out_channels;
  int64_t sum = 0;
  for (int64_t ky = 0; ky < p.kernel_height; ++ky) {
    for (int64_t kx = 0; kx < p.kernel_width; ++kx) {
      for (int64_t i = 0; i < p.in_channels; ++i) {
        const int64_t row = y * p.stride_height - p.padding_height + ky * p.dilation_height;
        const int64_t column = z * p.stride_width - p.padding_width + kx * p.dilation_width;
        int32_t code = zero_point;
        if (row >= 0 && row < p.height && column >= 0 && column < p.width) {
          const uint8_t byte =
              x[((image * p.height + row) * p.width + column) * p.groups * p.in_channels +
                group * p.in_channels + i];
          code = x_signed ? static_cast<int8_t>(byte) : byte;
        }
        sum += (code - zero_point) *
               weight[((channel * p.kernel_height + ky) * p.kernel_width + kx) * p.in_channels + i];
      }
    }
  }
  return static_cast<int32_t>(sum);
}

class ConvGemm : public ::testing::TestWithParam<Case> {};

TEST_P(ConvGemm, GivesTheDefinitionsSums) {
  for (bool vectors : {true, false}) {
    for (bool x_signed : {false, true}) {
      std::mt19937 random(7);
      Problem p = problem_of(GetParam());
      p.choose_vectors(vectors);
      Bytes x(p.images * p.height * p.width * p.channels(), random);
      Bytes weight_bytes(p.groups * p.out_channels * p.depth(), random);
      const auto* weight = reinterpret_cast<const int8_t*>(weight_bytes.data());
      const int32_t zero_point = x_signed ? -37 : 201;
      const std::vector<int32_t> sums =
          run_blocks(p, x.data(), x_signed, static_cast<uint8_t>(zero_point), weight);
      const int64_t channels = p.groups * p.out_channels;
      for (int64_t pixel = 0; pixel < p.pixels(); ++pixel) {
        for (int64_t channel = 0; channel < channels; ++channel) {
          int32_t total = 0;  // of the channel's weights
          for (int64_t k = 0; k < p.depth(); ++k) total += weight[channel * p.depth() + k];
          const int32_t expected =
              defined_sum(p, x.data(), x_signed, zero_point, weight, pixel, channel);
          ASSERT_EQ(sums[pixel * channels + channel] - zero_point * total, expected)
              << "pixel " << pixel << ", channel " << channel;
          ASSERT_EQ(direct_sum(p, x.data(), x_signed, zero_point, weight, pixel_at(p, pixel),
                               channel / p.out_channels, channel % p.out_channels),
                    expected);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, ConvGemm, ::testing::ValuesIn(kCases));

TEST(ConvGemmTiles, LanesOfAWarpReadDifferentBanks) {
  for (int word = 0; word < 4; ++word) {
    std::array<bool, 32> taken{};
    for (int lane = 0; lane < kWarp; ++lane) {
      const int bank = codes_word(16, lane, word) / 4 % 32;
      EXPECT_FALSE(taken[static_cast<size_t>(bank)]);
      taken[static_cast<size_t>(bank)] = true;
    }
  }
}

}  // namespace
}  // namespace qtoolkit::kernels::gemm
