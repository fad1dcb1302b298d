// The AVX-512 convolution of one tap at few pixels, that is a linear layer of few rows: its time is
// that of reading the weights. Everything is internal: files of different instruction sets include
// it.
//
// One core reads as fast as lines can be on their way at once. Several blocks of channels read side
// by side, and software prefetches, take 45 MB of weights from memory in 2.3 ms where one block
// after the other takes 3.5, and from a last-level cache that holds them in 1.50 instead of 1.55
// (in huge pages; in small ones 2.7 instead of 8, and 1.5 instead of 2.2).
#pragma once

#include <immintrin.h>

#include <array>
#include <utility>

#include "kernels/cpu/conv2d_output_avx512.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

constexpr int kAtOnce = 14;  // pixels: 28 sums, two weights and an activation
constexpr int kFewPixels = 2 * kAtOnce;
// Fewer weights than this are in a near cache, or soon will be.
constexpr int64_t kFewPixelsBytes = int64_t{16} << 10;
constexpr int64_t kQuadBytes = 4 * kChannelBlock;  // of a block's weights

// See dot() in conv2d_avx512vnni.cpp.
inline __attribute__((always_inline)) void add_products(__m512i& acc, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

// Where to read ahead while a block's weights pass: kLines lines for each quad, from `first` on;
// from the quad `turn` on, `jump` bytes further.
struct Ahead {
  const int8_t* first;
  int64_t turn, jump;
};

// sums[block][pixel][channel] of kPixels rows of codes and kBlocks blocks of channels, whose
// weights and offsets follow each other. The next blocks' weights lie at the same distance from
// `ahead`.
template <int kPixels, int kBlocks, int kLines>
void multiply_few(const uint8_t* const* x, const int8_t* w, int64_t quads, const int32_t* offset,
                  const Ahead& ahead, int32_t* sums) {
  constexpr int kVectors = 2 * kBlocks;
  const int64_t block_bytes = quads * kQuadBytes;
  __m512i acc[kVectors][kPixels];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 14
    for (int p = 0; p < kPixels; ++p) acc[v][p] = _mm512_loadu_si512(offset + v * kLanes);
  }
  const int8_t* next = ahead.first;
  for (int64_t quad = 0; quad < quads; ++quad, w += kQuadBytes, next += 64 * kLines) {
    if (__builtin_expect(quad == ahead.turn, 0)) next += ahead.jump;
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 2
      for (int line = 0; line < kLines; ++line) {
        _mm_prefetch(next + b * block_bytes + 64 * line, _MM_HINT_T0);
      }
    }
    const auto code = [&](int p) __attribute__((always_inline)) {
      return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x[p] + 4 * quad));
    };
    const auto weight = [&](int v) __attribute__((always_inline)) {
      return _mm512_loadu_si512(w + v / 2 * block_bytes + v % 2 * 64);
    };
    if constexpr (kBlocks == 1) {
      const __m512i first = weight(0), second = weight(1);
#pragma GCC unroll 14
      for (int p = 0; p < kPixels; ++p) {
        const __m512i codes = code(p);
        add_products(acc[0][p], codes, first);
        add_products(acc[1][p], codes, second);
      }
    } else {
      __m512i codes[kPixels];
#pragma GCC unroll 14
      for (int p = 0; p < kPixels; ++p) codes[p] = code(p);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m512i weights = weight(v);
#pragma GCC unroll 14
        for (int p = 0; p < kPixels; ++p) add_products(acc[v][p], codes[p], weights);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 14
    for (int p = 0; p < kPixels; ++p) {
      _mm512_store_si512(sums + (v / 2 * kPixels + p) * kChannelBlock + v % 2 * kLanes, acc[v][p]);
    }
  }
}

using MultiplyFew = void(const uint8_t* const*, const int8_t*, int64_t, const int32_t*,
                         const Ahead&, int32_t*);
// [pixels - 1]
template <int kBlocks, int kLines, int... kIndices>
constexpr std::array<MultiplyFew*, sizeof...(kIndices)> all_multiply_few(
    std::integer_sequence<int, kIndices...>) {
  return {multiply_few<kIndices + 1, kBlocks, kLines>...};
}
constexpr auto kFourBlocks = all_multiply_few<4, 2>(std::make_integer_sequence<int, 3>());
constexpr auto kTwoBlocks = all_multiply_few<2, 2>(std::make_integer_sequence<int, 6>());
constexpr auto kOneBlock = all_multiply_few<1, 2>(std::make_integer_sequence<int, kAtOnce>());
constexpr auto kOneBlockOfTwoPasses =
    all_multiply_few<1, 1>(std::make_integer_sequence<int, kAtOnce>());

// Whole blocks of channels at few pixels; see few_pixels().
class FewPixels {
 public:
  explicit FewPixels(const Conv2dArgs& args)
      : args_(args),
        pixels_(static_cast<int>(args.shape.pixels())),
        quads_(args.shape.run_quads()),
        block_bytes_(quads_ * kQuadBytes) {
    for (int p = 0; p < pixels_; ++p) {
      x_[p] = conv2d_input(args, p);
      place_[p] = conv2d_place(args, p);
    }
  }

  void run(int64_t block, int64_t end) {
    if (pixels_ > kAtOnce) {
      for (; block < end; ++block) run_two_passes(block);
      return;
    }
    const int at_once = pixels_ <= 3 ? 4 : pixels_ <= 6 ? 2 : 1;
    for (; end - block >= at_once && at_once > 1; block += at_once) {
      run(block, at_once, (at_once == 4 ? kFourBlocks.data() : kTwoBlocks.data())[pixels_ - 1]);
    }
    for (; block < end; ++block) run(block, 1, kOneBlock[pixels_ - 1]);
  }

 private:
  // Within a block's weights, and at their end in those of the blocks after these.
  static constexpr int64_t kDistance = 1024;

  const int8_t* weights(int64_t block) const { return args_.packed + block * block_bytes_; }

  void run(int64_t block, int blocks, MultiplyFew* multiply) {
    const Ahead ahead = {weights(block) + kDistance, quads_ - kDistance / kQuadBytes,
                         (blocks - 1) * block_bytes_};
    multiply(x_, weights(block), quads_, args_.offset + block * kChannelBlock, ahead, sums_);
    for (int b = 0; b < blocks; ++b) {
      store(block + b, sums_ + b * pixels_ * kChannelBlock, 0, pixels_);
    }
  }

  // The second pass finds the weights in the second level cache; each reads half of the next block.
  void run_two_passes(int64_t block) {
    const int first = (pixels_ + 1) / 2;
    Ahead ahead = {weights(block + 1), -1, 0};
    const int32_t* const offset = args_.offset + block * kChannelBlock;
    for (int begin = 0; begin < pixels_; begin += first) {
      const int count = pixels_ - begin < first ? pixels_ - begin : first;
      kOneBlockOfTwoPasses[count - 1](x_ + begin, weights(block), quads_, offset, ahead, sums_);
      store(block, sums_, begin, count);
      ahead.first += block_bytes_ / 2;
    }
  }

  void store(int64_t block, const int32_t* sums, int begin, int count) const {
    const int64_t channel = block * kChannelBlock;
    const int64_t left = args_.shape.out_channels - channel;
    const Rule rule = rule_of(args_, args_.multiplier + channel, channel,
                              left < kChannelBlock ? left : kChannelBlock);
    store_of(args_, rule)(args_, rule, place_ + begin, sums, count);
  }

  const Conv2dArgs& args_;
  int pixels_;
  int64_t quads_, block_bytes_;
  const uint8_t* x_[kFewPixels];
  Conv2dPlace place_[kFewPixels];
  alignas(64) int32_t sums_[kAtOnce * kChannelBlock];
};

// Computes units [begin, end) if they are whole blocks of a linear layer with few rows and many
// weights; else it returns false.
inline bool few_pixels(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  const int64_t tiles = conv2d_tiles(s);
  if (begin >= end || s.pixels() > kFewPixels || s.groups != 1 || s.kernel_height != 1 ||
      s.kernel_width != 1 || s.run_quads() * kQuadBytes < kFewPixelsBytes || begin % tiles != 0 ||
      end % tiles != 0) {
    return false;
  }
  FewPixels(args).run(begin / tiles, end / tiles);
  return true;
}

}  // namespace
}  // namespace qtoolkit::kernels::avx512vnni
