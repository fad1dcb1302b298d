// The products of the AMX convolution: tiles of pixels times tiles of weights, and meanwhile the
// sums before become outputs, as the vector units are idle. Everything is internal.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/conv2d_output_avx512.h"
#include "kernels/cpu/tiles_amx.h"

namespace qtoolkit::kernels::amx {
namespace {

using avx512vnni::kLanes;
using avx512vnni::Rule;
using avx512vnni::SimpleResidual;

constexpr int kRows = 16;           // most pixels of a tile
constexpr int kPixels = 2 * kRows;  // most pixels that are multiplied with a block at once
constexpr int kMostQuads = 16;      // of a tile's row
constexpr int64_t kQuadBytes = 4 * kChannelBlock;                // of packed weights
constexpr int64_t kSumsBytes = kChannelBlock * sizeof(int32_t);  // of a pixel
constexpr int64_t kStepWeights = kMostQuads * kQuadBytes;
constexpr int kSums = kPixels * kChannelBlock;

// Tiles 0 to 3 hold sums, of [first or second tile of pixels][first or second half of the
// channels], 4 and 5 pixels, 6 and 7 weights. For tiles of `rows` pixels and `quads` quads of each.
void configure(int rows, int quads) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool pixels = tile == 4 || tile == 5;
    config.row_bytes[tile] = static_cast<uint16_t>(pixels ? quads * 4 : kLanes * 4);
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : quads);
  }
  config.load();
}

// Up to kPixels output pixels in one or two tiles. The lists are written kRows elements at a time,
// and name the last pixel twice.
struct Group {
  const uint8_t* x[2];  // the tiles' first rows
  int tiles = 0;
  int count = 0;               // pixels
  int64_t y[kPixels + kRows];  // places in the output and in the residual
  int64_t residual[kPixels + kRows];
  int32_t sums[kPixels + kRows];  // places in the sums
};

constexpr int kMostSegments = 128;
// The bytes of a pixel's taps lie in segments, in each of which steps of one tile row follow each
// other.
struct Reduction {
  int segments;
  int64_t steps, step_bytes, step_weights, segment_weights;
  // If the steps are longer than a segment, its last one begins earlier than after the one before:
  // this far from the segment's first byte. Block::last has its weights.
  bool overlaps;
  int64_t last_step;
  int64_t row_stride;  // between a tile's pixels
  // So many pairs of pixels become outputs in each of the last steps. In the last ones, so that the
  // memory of their sums is in the first level cache when the next sums are stored there: with 36
  // steps stores that missed it took a sixth of the time.
  int64_t pairs_per_step, late_steps;
  int64_t offset[kMostSegments];
};

// A block of channels.
struct Block {
  const int8_t* w;
  const int8_t* last;  // of every segment's last step, zeros for what the step before had
  const int32_t* offset;
  Rule rule;
};

// Weights to bring into the second level cache meanwhile.
struct Prefetch {
  const int8_t* from;
  int64_t lines_per_step;
};

// Sums that wait to become outputs: those of the first tile of pixels in memory, those of the
// second in registers. Storing all four tiles at once took twice as long.
struct Pending {
  const Group* group;
  const Block* block;
};

inline __attribute__((always_inline)) void store_first(int32_t* sums) {
  store_tile<0>(sums, kSumsBytes);
  store_tile<1>(sums + kLanes, kSumsBytes);
}
inline __attribute__((always_inline)) void store_second(int32_t* sums) {
  store_tile<2>(sums + kRows * kChannelBlock, kSumsBytes);
  store_tile<3>(sums + kRows * kChannelBlock + kLanes, kSumsBytes);
}

// Outputs by avx512vnni::simple_codes()' rule. Two pixels at a time, with what they need in
// registers: memory operands would take the load ports from the tiles.
template <bool kZeroPoint, SimpleResidual kResidual>
class Simple {
 public:
  static constexpr bool kOverlaps = true;

  inline __attribute__((always_inline)) Simple(const Conv2dArgs& args, const Pending& pending)
      : group_(*pending.group),
        multiplier0_(pending.block->rule.multiplier[0]),
        multiplier1_(pending.block->rule.multiplier[1]),
        offset0_(_mm512_loadu_si512(pending.block->offset)),
        offset1_(_mm512_loadu_si512(pending.block->offset + kLanes)),
        zero_point_(pending.block->rule.zero_point),
        order_(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)),
        y_(static_cast<uint8_t*>(args.y) + pending.block->rule.channel),
        lanes0_(pending.block->rule.lanes[0]),
        lanes1_(pending.block->rule.lanes[1]) {
    if (kResidual == SimpleResidual::none) return;
    const Rule& rule = pending.block->rule;
    residual_ = static_cast<const uint8_t*>(args.residual) + rule.channel;
    residual_base_ = _mm512_castsi512_ps(rule.residual_base);
    residual_bytes_ = rule.residual_bytes;
    residual_offset_ = rule.residual_offset;
    residual_multiplier_ = rule.residual_multiplier;
  }

  // Pixels `first` and the next.
  inline __attribute__((always_inline)) void store(int64_t first, const int32_t* sums) const {
    const __m512i codes = _mm512_permutexvar_epi32(
        order_, _mm512_packus_epi16(words(first, sums), words(first + 1, sums)));
    const __mmask32 lanes = lanes0_ | static_cast<__mmask32>(lanes1_) << kLanes;
    _mm256_mask_storeu_epi8(y_ + group_.y[first], lanes, _mm512_castsi512_si256(codes));
    _mm256_mask_storeu_epi8(y_ + group_.y[first + 1], lanes, _mm512_extracti64x4_epi64(codes, 1));
  }

 private:
  inline __attribute__((always_inline)) __m512i words(int64_t p, const int32_t* sums) const {
    const int32_t* const from = sums + group_.sums[p];
    const uint8_t* const residual =
        kResidual == SimpleResidual::none ? nullptr : residual_ + group_.residual[p];
    const __m512i words =
        _mm512_packs_epi32(code(from, offset0_, multiplier0_, residual, lanes0_),
                           code(from + kLanes, offset1_, multiplier1_, residual + kLanes, lanes1_));
    return kZeroPoint ? _mm512_adds_epi16(words, zero_point_) : words;
  }

  inline __attribute__((always_inline)) __m512i code(const int32_t* sums, __m512i offset,
                                                     __m512 multiplier, const uint8_t* residual,
                                                     __mmask16 lanes) const {
    const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums), offset);
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), multiplier);
    if (kResidual != SimpleResidual::none) {
      __m512i bytes;
      if (__builtin_expect(lanes == 0xffff, 1)) {
        // GCC 12 would load and broadcast with two instructions.
        asm("vbroadcasti32x4 %1, %0"
            : "=v"(bytes)
            : "m"(*reinterpret_cast<const __m128i_u*>(residual)));
      } else {
        bytes = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8(lanes, residual));
      }
      __m512 centred = residual_base_;
      const __mmask64 lowest = 0x1111111111111111;
      asm("vpshufb %2, %1, %0%{%3%}"
          : "+v"(centred)
          : "v"(bytes), "v"(residual_bytes_), "Yk"(lowest));
      if (kResidual == SimpleResidual::folded) {
        centred = _mm512_fmsub_ps(centred, residual_multiplier_, residual_offset_);
      } else {
        centred = _mm512_mul_ps(_mm512_sub_ps(centred, residual_offset_), residual_multiplier_);
      }
      value = _mm512_add_ps(value, centred);
    }
    return _mm512_cvtps_epi32(value);
  }

  const Group& group_;
  __m512 multiplier0_, multiplier1_;
  __m512i offset0_, offset1_, zero_point_, order_;
  uint8_t* y_;
  __mmask16 lanes0_, lanes1_;
  const uint8_t* residual_ = nullptr;
  __m512 residual_base_ = {}, residual_offset_ = {}, residual_multiplier_ = {};
  __m512i residual_bytes_ = {};
};

// All other outputs, after the products.
class Any {
 public:
  static constexpr bool kOverlaps = false;

  Any(const Conv2dArgs& args, const Pending& pending) : args_(args), pending_(pending) {}

  void store_all(const int32_t* sums) const {
    const Group& group = *pending_.group;
    const Block& block = *pending_.block;
    alignas(64) int32_t with_offset[kSums];
    Conv2dPlace place[kPixels];
    for (int p = 0; p < group.count; ++p) {
      place[p] = {group.y[p], group.residual[p]};
      for (int v = 0; v < kChannelBlock; v += kLanes) {
        const __m512i sum = _mm512_load_si512(sums + group.sums[p] + v);
        _mm512_store_si512(with_offset + p * kChannelBlock + v,
                           _mm512_add_epi32(sum, _mm512_loadu_si512(block.offset + v)));
      }
    }
    avx512vnni::store_of(args_, block.rule)(args_, block.rule, place, with_offset, group.count);
  }

 private:
  const Conv2dArgs& args_;
  const Pending& pending_;
};

// The sums of a group and a block, which become the pending ones; those that were become outputs.
template <class Output, int kTiles>
void multiply(const Conv2dArgs& args, const Reduction& reduction, const Group& group,
              const Block& block, Prefetch prefetch, Pending& pending, int32_t* sums) {
  const Output output(args, pending);
  const int64_t pairs_before = reduction.pairs_per_step / 2;
  const int64_t pairs_after = reduction.pairs_per_step - pairs_before;
  const int64_t count = pending.group->count;
  const int64_t second = group.x[1] - group.x[0];
  const int8_t* w = block.w;
  const int8_t* last = block.last;
  int64_t next = 0;
  const auto store_pairs = [&](int64_t pairs) __attribute__((always_inline)) {
    if constexpr (Output::kOverlaps) {
      for (; pairs > 0 && next < count; --pairs, next += 2) output.store(next, sums);
    }
  };
  clear_tile<0>();
  clear_tile<1>();
  bool started = false;
  int64_t steps_left = reduction.segments * reduction.steps;
  for (int segment = 0; segment < reduction.segments; ++segment) {
    const uint8_t* const segment_x = group.x[0] + reduction.offset[segment];
    for (int64_t step = 0; step < reduction.steps; ++step) {
      const bool overlaps = reduction.overlaps && step + 1 == reduction.steps;
      const uint8_t* const x =
          segment_x + (overlaps ? reduction.last_step : step * reduction.step_bytes);
      const int8_t* const from = overlaps ? last : w + step * reduction.step_weights;
      load_tile<4>(x, reduction.row_stride);
      load_tile<6>(from, kQuadBytes);
      load_tile<7>(from + kQuadBytes / 2, kQuadBytes);
      dot<0, 4, 6>();
      dot<1, 4, 7>();
      if (!started) {
        started = true;
        if (Output::kOverlaps && pending.group->tiles == 2) store_second(sums);
        if (kTiles == 2) {
          clear_tile<2>();
          clear_tile<3>();
        }
      }
      for (int64_t i = 0; i < prefetch.lines_per_step; ++i, prefetch.from += 64) {
        _mm_prefetch(prefetch.from, _MM_HINT_T1);
      }
      const bool late = steps_left <= reduction.late_steps;
      --steps_left;
      if (late) store_pairs(pairs_before);
      if (kTiles == 2) {
        load_tile<5>(x + second, reduction.row_stride);
        dot<2, 5, 6>();
        dot<3, 5, 7>();
      }
      if (late) store_pairs(pairs_after);
    }
    w += reduction.segment_weights;
    last += kStepWeights;
  }
  store_first(sums);
  pending = {&group, &block};
  if constexpr (!Output::kOverlaps) {
    if (kTiles == 2) store_second(sums);
    output.store_all(sums);
  }
}

// The pending sums become outputs.
template <class Output>
void finish(const Conv2dArgs& args, const Pending& pending, int32_t* sums) {
  if constexpr (Output::kOverlaps) {
    if (pending.group->tiles == 2) store_second(sums);
    const Output output(args, pending);
    for (int64_t next = 0; next < pending.group->count; next += 2) output.store(next, sums);
  }
}

struct Functions {
  void (*multiply[2])(const Conv2dArgs&, const Reduction&, const Group&, const Block&, Prefetch,
                      Pending&, int32_t*);  // of one tile and of two
  void (*finish)(const Conv2dArgs&, const Pending&, int32_t*);
};
template <class Output>
constexpr Functions functions() {
  return {{multiply<Output, 1>, multiply<Output, 2>}, finish<Output>};
}
template <bool kZeroPoint>
Functions simple_functions(SimpleResidual residual) {
  switch (residual) {
    case SimpleResidual::none:
      return functions<Simple<kZeroPoint, SimpleResidual::none>>();
    case SimpleResidual::folded:
      return functions<Simple<kZeroPoint, SimpleResidual::folded>>();
    default:
      return functions<Simple<kZeroPoint, SimpleResidual::any>>();
  }
}

}  // namespace
}  // namespace qtoolkit::kernels::amx
