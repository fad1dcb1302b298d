#include <immintrin.h>

#include <array>
#include <utility>

#include "kernels/conv2d_steps.h"
#include "kernels/conv2d_winograd.h"
#include "kernels/cpu/conv2d_block_avx2.h"
#include "kernels/cpu/conv2d_cursor.h"
#include "kernels/cpu/conv2d_quads_avx2.h"
#include "kernels/cpu/conv2d_winograd_avx2.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::avx2 {
namespace {

static_assert(kLanes == kStepChannels && kBlockVectors == kListsPerBlock);
// Twelve accumulators, the weights, the ones, and two registers for what comes between.
constexpr int kMostPixels = 12;

// Adds one step's products at the pixel whose quad of bytes lies at x + at. Written out because
// GCC 12 would load all pixels' quads first and advance one pointer per pixel, for neither of
// which there are registers. The last operand only tells the compiler that memory is read.
inline __attribute__((always_inline)) void add_products(__m256i& acc, const uint8_t* x, int64_t at,
                                                        __m256i weight, __m256i ones) {
  __m256i products;
  asm("vpbroadcastd (%2, %3), %1\n\t"
      "vpmaddubsw %4, %1, %1\n\t"
      "vpmaddwd %5, %1, %1\n\t"
      "vpaddd %1, %0, %0"
      : "+x"(acc), "=&x"(products)
      : "r"(x), "r"(at), "x"(weight), "x"(ones), "m"(*reinterpret_cast<const char(*)[1 << 20]>(x)));
}

// A block's steps at some pixels.
struct Tile {
  const uint8_t* x[kMostPixels];   // first tap of each pixel
  Conv2dPlace place[kMostPixels];  // of the output
  Conv2dMoves moves;
  const int8_t* weight;  // of the first list's first step
  const uint8_t* move;
  const int8_t* end[kListsPerBlock];  // of each list's weights
  const int32_t* offset;
  int vectors;
};

// result[pixel * kChannelBlock + lane]. One octet of channels at as many pixels as fit: so few
// lanes share a step that most are whole, and loads are no limit, at one for three instructions.
template <int kPixels>
void accumulate(const Tile& tile, int32_t* result) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int8_t* weights = tile.weight;
  const uint8_t* move = tile.move;
  const uint8_t* x[kPixels];
#pragma GCC unroll 12
  for (int p = 0; p < kPixels; ++p) x[p] = tile.x[p];
  for (int v = 0; v < tile.vectors; ++v) {
    const __m256i offset =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile.offset + v * kLanes));
    __m256i acc[kPixels];
#pragma GCC unroll 12
    for (int p = 0; p < kPixels; ++p) acc[p] = offset;
    const int8_t* const end = tile.end[v];
    int64_t at = 0;
    do {
      at += tile.moves.bytes[*move++];
      const __m256i weight = _mm256_load_si256(reinterpret_cast<const __m256i*>(weights));
#pragma GCC unroll 12
      for (int p = 0; p < kPixels; ++p) add_products(acc[p], x[p], at, weight, ones);
      _mm_prefetch(reinterpret_cast<const char*>(weights + 2048), _MM_HINT_T0);
      weights += kStepBytes;
    } while (weights != end);
#pragma GCC unroll 12
    for (int p = 0; p < kPixels; ++p) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(result + p * kChannelBlock + v * kLanes),
                          acc[p]);
    }
  }
}

using Accumulate = void(const Tile&, int32_t*);
// [pixels - 1]
template <int... kIndices>
constexpr std::array<Accumulate*, kMostPixels> all_accumulate(
    std::integer_sequence<int, kIndices...>) {
  return {accumulate<kIndices + 1>...};
}
constexpr auto kAccumulate = all_accumulate(std::make_integer_sequence<int, kMostPixels>());

}  // namespace

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  if (args.layout == Conv2dLayout::summed_quads) return portable::conv2d(args, begin, end);
  if (args.layout == Conv2dLayout::quads) {
    return (winograd_fits(args.shape) ? winograd_conv2d : quads_conv2d)(args, begin, end);
  }
  const Conv2dShape& s = args.shape;
  const int64_t tiles = conv2d_tiles(s);
  alignas(32) int32_t acc[kMostPixels * kChannelBlock] = {};
  Tile tile;
  tile.moves = conv2d_moves(s, args.x_row_stride, args.x_pixel_stride);
  for (int64_t unit = begin; unit < end;) {
    const int64_t block = unit / tiles;  // over all groups
    const int64_t group = block / s.blocks_per_group();
    const int64_t first_channel = block % s.blocks_per_group() * kChannelBlock;
    const int64_t channels_left = s.out_channels - first_channel;
    const int64_t channels = channels_left < kChannelBlock ? channels_left : kChannelBlock;
    for (int v = 0; v < kBlockVectors; ++v) {
      const Conv2dSteps steps = conv2d_steps(args.packed, block * kListsPerBlock + v);
      if (v == 0) tile.weight = steps.weight, tile.move = steps.move;
      tile.end[v] = steps.weight + steps.count * kStepBytes;
    }
    tile.offset = args.offset + block * kChannelBlock;
    tile.vectors = static_cast<int>((channels + kLanes - 1) / kLanes);
    const Rule rule = rule_of(args, args.multiplier + block * kChannelBlock,
                              group * s.out_channels + first_channel, channels);
    Store* const store = store_of(args, rule);

    const int64_t block_end = (block + 1) * tiles < end ? (block + 1) * tiles : end;
    const int64_t first_pixel = unit % tiles * kTilePixels;
    const int64_t last_pixel = first_pixel + (block_end - unit) * kTilePixels;
    int64_t pixels = (last_pixel < s.pixels() ? last_pixel : s.pixels()) - first_pixel;
    Cursor<4> cursor(args, first_pixel, group);
    // As few tiles as there can be, of equal size.
    for (int64_t left = (pixels + kMostPixels - 1) / kMostPixels; left > 0; --left) {
      const int count = static_cast<int>((pixels + left - 1) / left);
      pixels -= count;
      cursor.take(count, tile.x, tile.place);
      kAccumulate[static_cast<size_t>(count - 1)](tile, acc);
      store(args, rule, tile.place, acc, count);
    }
    unit = block_end;
  }
}

}  // namespace qtoolkit::kernels::avx2
