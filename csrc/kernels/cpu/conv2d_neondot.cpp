// sdot multiplies signed bytes by signed ones: it gets the codes less 128, which flips their
// highest bit, and 128 times the sum of a channel's weights is added to its offset, modulo 2^32 as
// all sums. It takes four bytes of a pixel from any quarter of a register, so 16 bytes of input are
// loaded at once and serve four quads of every channel.
#include <arm_neon.h>

#include "kernels/cpu/conv2d_cursor.h"
#include "kernels/cpu/conv2d_output_neon.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::neondot {
namespace {

constexpr int kBlockVectors = static_cast<int>(kChannelBlock) / kLanes;
constexpr int64_t kQuadBytes = 4 * kChannelBlock;  // weights of a quad
// Of the 32 registers 24 are sums at six pixels and four vectors of channels, six the pixels'
// input, and two the weights by turns: 22 loads for 96 products. With eight vectors of channels it
// would be 35 for as many.
constexpr int kMostPixels = 6;
// At so few pixels four vectors of channels would be fewer sums than are needed to hide the latency
// of a product (about four cycles, two products a cycle).
constexpr int kFewPixels = 3;

// The taps of every output, in the order of the packed weights.
struct Taps {
  int64_t rows, runs, quads;   // quads of a run
  int64_t row_step, run_step;  // bytes of the input
};

// The inner loop is written out, and volatile to stay in this order: of the intrinsics GCC 12 loads
// weights ahead into registers that there are not, and moves sums to the stack and back.
template <int64_t kOffset>
inline __attribute__((always_inline)) int8x16_t load_weight(const int8_t* w) {
  int8x16_t weight;
  asm volatile("ldr %q0, %1"
               : "=w"(weight)
               : "m"(*reinterpret_cast<const int8_t(*)[16]>(w + kOffset)));
  return weight;
}
template <int kQuad>
inline __attribute__((always_inline)) void add_product(int32x4_t& acc, int8x16_t weight,
                                                       uint8x16_t codes) {
  asm volatile("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(weight), "w"(codes), "i"(kQuad));
}
// In every byte; made again in each turn, for a register that the weights then use.
inline __attribute__((always_inline)) uint8x16_t highest_bit() {
  uint8x16_t bit;
  asm volatile("movi %0.16b, #128" : "=w"(bit));
  return bit;
}

// The products of kCount quads from the kStep / kVectors-th on; `weight` is of step kStep. The next
// weights are loaded before the products.
template <int kStep, int kCount, int kPixels, int kVectors>
inline __attribute__((always_inline)) void add_products(int32x4_t (&acc)[kVectors][kPixels],
                                                        const uint8x16_t (&codes)[kPixels],
                                                        const int8_t* w, int8x16_t weight) {
  constexpr int kQuad = kStep / kVectors, kVector = kStep % kVectors, kNext = kStep + 1;
  int8x16_t next = weight;
  if constexpr (kNext < kCount * kVectors) {
    next = load_weight<kNext / kVectors * kQuadBytes + kNext % kVectors * 16>(w);
  }
#pragma GCC unroll 6
  for (int p = 0; p < kPixels; ++p) add_product<kQuad>(acc[kVector][p], weight, codes[p]);
  if constexpr (kNext < kCount * kVectors) add_products<kNext, kCount>(acc, codes, w, next);
}

// result[pixel * kChannelBlock + lane] of kVectors vectors of channels, whose weights and first
// sums begin at w and start.
template <int kPixels, int kVectors>
void accumulate(const Taps& taps, const uint8_t* const* pixels, const int8_t* w,
                const int32_t* start, int32_t* result) {
  int32x4_t acc[kVectors][kPixels];
  const uint8_t* x[kPixels];
#pragma GCC unroll 6
  for (int p = 0; p < kPixels; ++p) {
    x[p] = pixels[p];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[v][p] = vld1q_s32(start + v * kLanes);
  }
  for (int64_t row = 0; row < taps.rows; ++row) {
    for (int64_t run = 0; run < taps.runs; ++run) {
      int64_t at = row * taps.row_step + run * taps.run_step;
      int64_t quads = taps.quads;
      for (; quads >= 4; quads -= 4, at += 16, w += 4 * kQuadBytes) {
        uint8x16_t codes[kPixels];
        const uint8x16_t bit = highest_bit();
#pragma GCC unroll 6
        for (int p = 0; p < kPixels; ++p) codes[p] = veorq_u8(vld1q_u8(x[p] + at), bit);
        add_products<0, 4>(acc, codes, w, load_weight<0>(w));
      }
      for (; quads > 0; --quads, at += 4, w += kQuadBytes) {
        uint8x16_t codes[kPixels];
        const uint8x16_t bit = highest_bit();
#pragma GCC unroll 6
        for (int p = 0; p < kPixels; ++p) {
          uint32_t quad;
          __builtin_memcpy(&quad, x[p] + at, sizeof(quad));
          codes[p] = veorq_u8(vreinterpretq_u8_u32(vdupq_n_u32(quad)), bit);
        }
        add_products<0, 1>(acc, codes, w, load_weight<0>(w));
      }
    }
  }
#pragma GCC unroll 6
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      vst1q_s32(result + p * kChannelBlock + v * kLanes, acc[v][p]);
    }
  }
}

using Accumulate = void(const Taps&, const uint8_t* const*, const int8_t*, const int32_t*,
                        int32_t*);
// [pixels - 1], at four vectors of channels and at a whole block.
constexpr Accumulate* kAccumulateHalf[kMostPixels] = {accumulate<1, 4>, accumulate<2, 4>,
                                                      accumulate<3, 4>, accumulate<4, 4>,
                                                      accumulate<5, 4>, accumulate<6, 4>};
constexpr Accumulate* kAccumulateBlock[kFewPixels] = {accumulate<1, 8>, accumulate<2, 8>,
                                                      accumulate<3, 8>};

// 128 times the sums of a block's weights, where they were packed without them.
void sum_weights(const int8_t* w, int64_t quads, int32_t* sums) {
  int32x4_t acc[kBlockVectors] = {};
  for (int64_t quad = 0; quad < quads; ++quad, w += kQuadBytes) {
#pragma GCC unroll 8
    for (int v = 0; v < kBlockVectors; ++v) {
      acc[v] = vdotq_s32(acc[v], vld1q_s8(w + 16 * v), vdupq_n_s8(1));
    }
  }
  for (int v = 0; v < kBlockVectors; ++v) vst1q_s32(sums + v * kLanes, vshlq_n_s32(acc[v], 7));
}

// A block of channels and how its sums become outputs.
struct Block {
  int64_t channel, channels;  // the first, over all groups; those that exist
  const float* multiplier;
};

// Float32 or int32 outputs.
template <bool kFloat>
void store_words(const Conv2dArgs& args, const Block& block, const Conv2dPlace* place,
                 const int32_t* acc, int pixels) {
  for (int p = 0; p < pixels; ++p, acc += kChannelBlock) {
    int32_t* const y = static_cast<int32_t*>(args.y) + place[p].y + block.channel;
    for (int64_t c = 0; c < block.channels; c += kLanes) {
      int32x4_t sum = vld1q_s32(acc + c);
      if (kFloat) {
        const float32x4_t value = vmulq_f32(vcvtq_f32_s32(sum), vld1q_f32(block.multiplier + c));
        sum = vreinterpretq_s32_f32(value);
        // Not a maximum, which would turn -0 to 0.
        if (args.relu) sum = vbicq_s32(sum, vreinterpretq_s32_u32(vcltzq_f32(value)));
      }
      if (const int64_t left = block.channels - c; left >= kLanes) {
        vst1q_s32(y + c, sum);
      } else {
        __builtin_memcpy(y + c, &sum, static_cast<size_t>(left) * sizeof(int32_t));
      }
    }
  }
}

template <bool kResidual>
void store_block_codes(const Conv2dArgs& args, const Block& block, const Conv2dPlace* place,
                       const int32_t* acc, int pixels) {
  const SumsToCodes rule(args);
  for (int64_t first = 0; first < block.channels; first += kCodes) {
    float32x4_t multiplier[4];
    for (int i = 0; i < 4; ++i) multiplier[i] = vld1q_f32(block.multiplier + first + i * kLanes);
    const int64_t left = block.channels - first;
    const bool whole = left >= kCodes;
    for (int p = 0; p < pixels; ++p) {
      int32x4_t sums[4];
      for (int i = 0; i < 4; ++i) {
        sums[i] = vld1q_s32(acc + p * kChannelBlock + first + i * kLanes);
      }
      uint8x16_t residual = vdupq_n_u8(0);
      if (kResidual) {
        const uint8_t* const from =
            static_cast<const uint8_t*>(args.residual) + place[p].residual + block.channel + first;
        residual = whole ? vld1q_u8(from) : load_codes(from, left);
      }
      const uint8x16_t codes = rule.codes<kResidual>(sums, multiplier, residual);
      uint8_t* const to = static_cast<uint8_t*>(args.y) + place[p].y + block.channel + first;
      whole ? vst1q_u8(to, codes) : store_codes(to, left, codes);
    }
  }
}

// Writes the outputs of `pixels` pixels, whose sums lie at acc[pixel * kChannelBlock + lane].
using Store = void(const Conv2dArgs&, const Block&, const Conv2dPlace* place, const int32_t* acc,
                   int pixels);
Store* store_of(const Conv2dArgs& args) {
  if (args.output == Conv2dOutput::float32) return store_words<true>;
  if (args.output == Conv2dOutput::int32) return store_words<false>;
  return args.residual != nullptr ? store_block_codes<true> : store_block_codes<false>;
}

}  // namespace

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  if (args.layout == Conv2dLayout::steps) return portable::conv2d(args, begin, end);
  const Conv2dShape& s = args.shape;
  const Taps taps = {.rows = s.kernel_height,
                     .runs = s.runs_per_row(),
                     .quads = s.run_quads(),
                     .row_step = s.dilation_height * args.x_row_stride,
                     .run_step = s.dilation_width * args.x_pixel_stride};
  const bool summed = args.layout == Conv2dLayout::summed_quads;
  const int64_t block_quads = taps.rows * taps.runs * taps.quads;
  const int64_t block_bytes = block_quads * kQuadBytes + (summed ? kBlockSumBytes : 0);
  const int64_t tiles = conv2d_tiles(s);
  Store* const store = store_of(args);
  int32_t acc[kMostPixels * kChannelBlock] = {};
  const uint8_t* x[kMostPixels];
  Conv2dPlace place[kMostPixels];
  for (int64_t unit = begin; unit < end;) {
    const int64_t index = unit / tiles;  // of the block, over all groups
    const int64_t group = index / s.blocks_per_group();
    const int64_t first_channel = index % s.blocks_per_group() * kChannelBlock;
    const int64_t channels_left = s.out_channels - first_channel;
    const Block block = {group * s.out_channels + first_channel,
                         channels_left < kChannelBlock ? channels_left : kChannelBlock,
                         args.multiplier + index * kChannelBlock};
    const int8_t* w = args.packed + index * block_bytes;
    int32_t start[kChannelBlock];
    if (summed) {
      __builtin_memcpy(start, w, sizeof(start));
      w += kBlockSumBytes;
    } else {
      sum_weights(w, block_quads, start);
    }
    for (int64_t lane = 0; lane < kChannelBlock; ++lane) {
      start[lane] = wrapping_add(start[lane], args.offset[index * kChannelBlock + lane]);
    }

    const int64_t block_end = (index + 1) * tiles < end ? (index + 1) * tiles : end;
    const int64_t first_pixel = unit % tiles * kTilePixels;
    const int64_t last_pixel = first_pixel + (block_end - unit) * kTilePixels;
    int64_t pixels = (last_pixel < s.pixels() ? last_pixel : s.pixels()) - first_pixel;
    Cursor<3> cursor(args, first_pixel, group);
    // As few tiles as there can be, of equal size.
    for (int64_t left = (pixels + kMostPixels - 1) / kMostPixels; left > 0; --left) {
      const int count = static_cast<int>((pixels + left - 1) / left);
      pixels -= count;
      cursor.take(count, x, place);
      constexpr int64_t kHalf = kChannelBlock / 2;
      if (count <= kFewPixels && block.channels > kHalf) {
        kAccumulateBlock[count - 1](taps, x, w, start, acc);
      } else {
        for (int64_t c = 0; c < block.channels; c += kHalf) {
          kAccumulateHalf[count - 1](taps, x, w + 4 * c, start + c, acc + c);
        }
      }
      store(args, block, place, acc, count);
    }
    unit = block_end;
  }
}

}  // namespace qtoolkit::kernels::neondot
