// The usual depthwise convolutions: 3x3 and 5x5 with a stride of 1 or 2, and 7x7, without dilation.
//
// Two output rows are computed together, two pixels and 64 channels at a time. Bytes are
// interleaved to quads (conv2d_depthwise_scheme.h) once, for all outputs of both rows, and pass
// through memory, as there are more than registers. Everything here runs on the two vector ports,
// so the limit is the number of their instructions; for 64 outputs of a 3x3 layer with a stride of
// 1:
//    4  interleaving, 8 for two rows (stride 2: 11)
//   12  vpdpbusd
//   15  to codes: 3 for each of 4 registers, and 3 packs (20 with a zero point or bounds)
// that is 31 instructions or 15.5 cycles (stride 2: 19; 5x5: 27). Measured with 64
// channels: 17.7 cycles (26; 38). What made the difference:
// - the upper bound needs no vminps where no product can leave int32;
// - one register of channels is finished before the next one is begun: each quad and each weight is
//   loaded once, and offsets and multipliers stay in registers. 92 loads for 124 instructions cost
//   a fifth, as the dot products come in bursts;
// - the quads of the next two pixels are made between the registers of these two, because the
//   scheduler's window is too short to find them behind the conversion to codes.
#pragma once

#include <immintrin.h>

#include "kernels/conv2d.h"
#include "kernels/cpu/conv2d_depthwise_scheme.h"
#include "kernels/cpu/conv2d_depthwise_vectors.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

// A run of outputs in each of kParts places of a row, at 64 / kParts channels.
template <int kParts>
struct Places {
  const uint8_t* x[kParts];
  uint8_t* y[kParts];
};

template <class S>
struct Prepared {
  __m512i weight[2][S::kDots][kRegisters];
  __m512i offset[kRegisters];
  __m512 multiplier[kRegisters];
};

struct Bounds {
  __m512i zero_point;       // int16
  __m512i low, high, flip;  // uint8
  bool any;                 // false: the saturation of the packs is all that is needed
};

template <class S, int kParts, int kRows>
struct Run {
  const Prepared<S>& block;
  const Bounds& bounds;
  __m512i (*quads)[S::kLength][kRegisters];  // [strip]
  int64_t x_row_stride, x_pixel_stride, y_row_stride, y_pixel_stride;
  int64_t count;
  __m512i offset[kRegisters];
  __m512 multiplier[kRegisters];
  struct Pair {
    __m512i low, high;
  };
  Pair left[S::kStrips];  // of the next quad, where quads are chained

  using Pointers = const uint8_t* [kParts];

  // All parts of a column of the input or output.
  template <class Byte>
  struct Column {
    Byte* at[kParts];
  };
  template <class Byte>
  __attribute__((always_inline)) static Column<Byte> column(Byte* const (&x)[kParts],
                                                            int64_t offset) {
    Column<Byte> result;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      result.at[i] = x[i] + offset;
      // Or GCC keeps a sum for every column and row.
      asm("" : "+r"(result.at[i]));
    }
    return result;
  }

  // Row kRow of it; with one row of outputs there are fewer.
  template <int kRow>
  __attribute__((always_inline)) __m512i tap(const Column<const uint8_t>& column) const {
    constexpr int kThere = kRows == 1 && kRow >= S::kKernel ? S::kKernel - 1 : kRow;
    __m512i result = load(column.at, kThere * x_row_stride);
    // Or GCC loads it again for its second use.
    asm("" : "+v"(result));
    return result;
  }

  __attribute__((always_inline)) static Pair pair(__m512i tap0, __m512i tap1) {
    return {_mm512_unpacklo_epi8(tap0, tap1), _mm512_unpackhi_epi8(tap0, tap1)};
  }

  // A strip's next quad, whose first column is at x + first and the last one at x + last.
  template <int kStrip>
  __attribute__((always_inline)) void make(const Pointers& x, int64_t first, int64_t last,
                                           int64_t index) {
    constexpr Strip kIs = S::kList[kStrip];
    Pair a, b;
    if constexpr (kIs.quad == Quad::column) {
      const auto c = column(x, first);
      a = pair(tap<kIs.row>(c), tap<kIs.row + 1>(c));
      b = pair(tap<kIs.row + 2>(c), tap<kIs.row + 3>(c));
    } else if constexpr (S::chained(kStrip)) {
      a = left[kStrip];
      b = left[kStrip] = right_pair<kStrip>(x, last, first + 2 * x_pixel_stride);
    } else {
      const auto c0 = column(x, first), c1 = column(x, last);
      a = pair(tap<kIs.row>(c0), tap<kIs.row + 1>(c0));
      b = pair(tap<kIs.row>(c1), tap<kIs.row + 1>(c1));
    }
    __m512i* const quad = quads[kStrip][index];
    quad[0] = _mm512_unpacklo_epi16(a.low, b.low);
    quad[1] = _mm512_unpackhi_epi16(a.low, b.low);
    quad[2] = _mm512_unpacklo_epi16(a.high, b.high);
    quad[3] = _mm512_unpackhi_epi16(a.high, b.high);
  }
  template <int kStrip>
  __attribute__((always_inline)) Pair right_pair(const Pointers& x, int64_t last, int64_t before) {
    constexpr Strip kIs = S::kList[kStrip];
    const auto c = column(x, last);
    if constexpr (kIs.quad == Quad::square) return pair(tap<kIs.row>(c), tap<kIs.row + 1>(c));
    return pair(tap<kIs.row>(column(x, before)), tap<kIs.row>(c));
  }

  // The last quad of a strip that the output `pixel` needs; x: at the pixel's first column.
  template <int kStrip>
  __attribute__((always_inline)) void make_for(const Pointers& x, int64_t pixel, bool end) {
    if constexpr (kRows == 2 || S::uses(0, kStrip)) {
      constexpr int kAhead = S::lookahead(kStrip);
      const int64_t first = kAhead * S::kStride * x_pixel_stride;
      const int64_t last = first + (columns_of(S::kList[kStrip].quad) - 1) * x_pixel_stride;
      make<kStrip>(x, first, end ? last - x_pixel_stride : last, pixel + kAhead);
    }
  }
  // All but the last quads that the first output needs.
  template <int kStrip = 0>
  __attribute__((always_inline)) void make_first(const Pointers& x) {
    if constexpr (kStrip < S::kStrips) {
      if constexpr (kRows == 2 || S::uses(0, kStrip)) {
        constexpr int kColumns = columns_of(S::kList[kStrip].quad);
        if constexpr (S::chained(kStrip)) {
          left[kStrip] = right_pair<kStrip>(x, (kColumns - 1 - S::kStride) * x_pixel_stride, 0);
        }
        for (int i = 0; i < S::lookahead(kStrip); ++i) {
          const int64_t first = i * S::kStride * x_pixel_stride;
          make<kStrip>(x, first, first + (kColumns - 1) * x_pixel_stride, i);
        }
      }
      make_first<kStrip + 1>(x);
    }
  }
  // Part kPart of kParts of what the outputs `pixel` and `pixel` + 1 need, if there are so many.
  template <int kPart, int kAll, int kMade = 0>
  __attribute__((always_inline)) void make_part(const Pointers& x, int64_t pixel) {
    constexpr int kQuads = 2 * S::kStrips;
    if constexpr (kMade < kQuads) {
      if constexpr (kMade * kAll / kQuads == kPart) {
        constexpr int kPixel = kMade / S::kStrips;
        if (pixel + kPixel < count) {
          make_for<kMade % S::kStrips>(column(x, kPixel * S::kStride * x_pixel_stride).at,
                                       pixel + kPixel, pixel + kPixel + 1 == count);
        }
      }
      make_part<kPart, kAll, kMade + 1>(x, pixel);
    }
  }

  // Adds register kRegister's products.
  template <int kRegister, int kPixels, int kStrip = 0, int kDot = 0>
  __attribute__((always_inline)) void multiply(int64_t pixel,
                                               const __m512i (&x)[S::kStrips][S::kReach + kPixels],
                                               __m512i (&acc)[kPixels][kRows]) const {
    if constexpr (kStrip == S::kStrips) {
      return;
    } else if constexpr (kDot == S::dots(kStrip)) {
      multiply<kRegister, kPixels, kStrip + 1, 0>(pixel, x, acc);
    } else {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        if (S::uses(r, kStrip)) {
          const __m512i w =
              r == 0 ? load_at<((S::first_dot(kStrip) + kDot) * kRegisters + kRegister) * 64>(
                           block.weight)
                     : load_at<((S::kDots + S::first_dot(kStrip) + kDot) * kRegisters + kRegister) *
                               64>(block.weight);
#pragma GCC unroll 2
          for (int p = 0; p < kPixels; ++p) {
            dot(acc[p][r], x[kStrip][p + kDot * S::step(kStrip)], w);
          }
        }
      }
      multiply<kRegister, kPixels, kStrip, kDot + 1>(pixel, x, acc);
    }
  }
  template <int kRegister, int kPixels, int kStrip = 0, int kIndex = 0>
  __attribute__((always_inline)) void load_quads(
      int64_t pixel, __m512i (&x)[S::kStrips][S::kReach + kPixels]) const {
    if constexpr (kStrip == S::kStrips) {
      return;
    } else if constexpr (kIndex == S::lookahead(kStrip) + kPixels) {
      load_quads<kRegister, kPixels, kStrip + 1, 0>(pixel, x);
    } else {
      if constexpr ((kRows == 2 || S::uses(0, kStrip)) && S::needs(kStrip, kIndex, kPixels)) {
        x[kStrip][kIndex] = load_at<((kStrip * S::kLength + kIndex) * kRegisters + kRegister) * 64>(
            quads[0][pixel]);
      }
      load_quads<kRegister, kPixels, kStrip, kIndex + 1>(pixel, x);
    }
  }

  // One register's codes as int32, without the bounds.
  template <int kRegister, int kPixels>
  __attribute__((always_inline)) void codes_of(int64_t pixel,
                                               __m512i (&codes)[kPixels][kRows]) const {
    __m512i x[S::kStrips][S::kReach + kPixels];
    load_quads<kRegister, kPixels>(pixel, x);
    __m512i acc[kPixels][kRows];
#pragma GCC unroll 2
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) acc[p][r] = offset[kRegister];
    }
    multiply<kRegister, kPixels>(pixel, x, acc);
#pragma GCC unroll 2
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        codes[p][r] =
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[p][r]), multiplier[kRegister]));
      }
    }
  }

  template <int kPixels>
  __attribute__((always_inline)) void compute(Places<kParts>& places, int64_t pixel) {
    __m512i codes[kRegisters][kPixels][kRows];
    const auto next = column(places.x, kPixels * S::kStride * x_pixel_stride);
    codes_of<0, kPixels>(pixel, codes[0]);
    if (kPixels == 2) make_part<0, 4>(next.at, pixel + 2);
    codes_of<1, kPixels>(pixel, codes[1]);
    if (kPixels == 2) make_part<1, 4>(next.at, pixel + 2);
    codes_of<2, kPixels>(pixel, codes[2]);
    if (kPixels == 2) make_part<2, 4>(next.at, pixel + 2);
    codes_of<3, kPixels>(pixel, codes[3]);
    if (kPixels == 2) make_part<3, 4>(next.at, pixel + 2);
#pragma GCC unroll 2
    for (int p = 0; p < kPixels; ++p) {
      const auto to = column(places.y, p * y_pixel_stride);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        __m512i low = _mm512_packs_epi32(codes[0][p][r], codes[1][p][r]);
        __m512i high = _mm512_packs_epi32(codes[2][p][r], codes[3][p][r]);
        __m512i all;
        if (bounds.any) {
          low = _mm512_adds_epi16(low, bounds.zero_point);
          high = _mm512_adds_epi16(high, bounds.zero_point);
          all = _mm512_max_epu8(_mm512_packus_epi16(low, high), bounds.low);
          all = _mm512_xor_si512(_mm512_min_epu8(all, bounds.high), bounds.flip);
        } else {
          all = _mm512_packus_epi16(low, high);
        }
        store(to.at, r * y_row_stride, all);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      places.x[i] = next.at[i];
      places.y[i] += kPixels * y_pixel_stride;
    }
  }
};

template <class S, int kParts, int kRows>
__attribute__((noinline)) void run_outputs(const Conv2dArgs& args, const Prepared<S>& block,
                                           const Bounds& bounds, Places<kParts> places,
                                           int64_t count) {
  __m512i memory[S::kStrips][S::kLength][kRegisters];
  auto* quads = memory;
  asm("" : "+r"(quads) : : "memory");
  Run<S, kParts, kRows> run = {block,
                               bounds,
                               quads,
                               args.x_row_stride,
                               args.x_pixel_stride,
                               args.y_row_stride,
                               args.y_pixel_stride,
                               count,
                               {load_at<64 * 0>(block.offset), load_at<64 * 1>(block.offset),
                                load_at<64 * 2>(block.offset), load_at<64 * 3>(block.offset)},
                               {_mm512_castsi512_ps(load_at<64 * 0>(block.multiplier)),
                                _mm512_castsi512_ps(load_at<64 * 1>(block.multiplier)),
                                _mm512_castsi512_ps(load_at<64 * 2>(block.multiplier)),
                                _mm512_castsi512_ps(load_at<64 * 3>(block.multiplier))},
                               {}};
  run.make_first(places.x);
  run.template make_part<0, 1>(places.x, 0);
  int64_t pixel = 0;
  for (; pixel + 2 <= count; pixel += 2) run.template compute<2>(places, pixel);
  if (pixel < count) run.template compute<1>(places, pixel);
}

template <class S, int kParts>
__attribute__((noinline)) void prepare(const Conv2dArgs& args, int64_t channel,
                                       Prepared<S>& block) {
  const Conv2dShape& s = args.shape;
  const auto weight_of = [&](int row, int column) {
    if (row < 0 || row >= S::kKernel || column >= S::kKernel) return _mm512_setzero_si512();
    const int8_t* const w = args.packed + (row * S::kKernel + column) * s.groups + channel;
    if (kParts == 1) return _mm512_loadu_si512(w);
    if (kParts == 2) {
      return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
    }
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  };
  for (int r = 0; r < 2; ++r) {
    for (int strip = 0; strip < S::kStrips; ++strip) {
      const int row = S::kList[strip].row - r * S::kStride;
      for (int n = 0; n < S::dots(strip); ++n) {
        const int column = n * S::step(strip) * S::kStride;
        const int covered = n * columns_of(S::kList[strip].quad);  // by the dot products before
        __m512i taps[4];
        for (int i = 0; i < 4; ++i) {
          switch (S::kList[strip].quad) {
            case Quad::column:
              taps[i] = weight_of(row + i, column);
              break;
            case Quad::square:
              taps[i] = weight_of(row + i % 2, column + i / 2);
              break;
            case Quad::row:
              taps[i] = column + i < covered ? _mm512_setzero_si512() : weight_of(row, column + i);
              break;
          }
        }
        interleave(taps[0], taps[1], taps[2], taps[3], block.weight[r][S::first_dot(strip) + n]);
      }
    }
  }
  // Lane l of register i: channels 16 * l + 4 * i + (0 .. 3), again and again for every part.
  constexpr int kOwnLanes = 4 / kParts;
  for (int i = 0; i < kRegisters; ++i) {
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t from = channel + lane % kOwnLanes * 16 + 4 * i;
      __builtin_memcpy(reinterpret_cast<char*>(&block.offset[i]) + 16 * lane, args.offset + from,
                       16);
      __builtin_memcpy(reinterpret_cast<char*>(&block.multiplier[i]) + 16 * lane,
                       args.multiplier + from, 16);
    }
  }
}

// All rows at 64 / kParts channels.
template <class S, int kParts>
__attribute__((noinline)) void run_channels(const Conv2dArgs& args, const Bounds& bounds,
                                            int64_t channel, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  Prepared<S> block;
  prepare<S, kParts>(args, channel, block);
  constexpr int64_t kMost = S::kMost;
  const int64_t runs = (s.out_width + kMost * kParts - 1) / (kMost * kParts);
  const int64_t count = (s.out_width + runs * kParts - 1) / (runs * kParts);
  while (begin < end) {
    const int64_t image = begin / s.out_height, first = begin % s.out_height;
    const int64_t rest = s.out_height - first;
    const int64_t rows = rest < end - begin ? rest : end - begin;
    const uint8_t* const x = args.x + image * args.x_image_stride + channel;
    uint8_t* const y = static_cast<uint8_t*>(args.y) + image * args.y_image_stride + channel;
    for (int64_t run = 0; run < runs; ++run) {
      int64_t start[kParts];
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = (run * kParts + part) * count;
        start[part] = at < s.out_width - count ? at : s.out_width - count;
      }
      for (int64_t row = first; row < first + rows; row += 2) {
        Places<kParts> places;
        for (int part = 0; part < kParts; ++part) {
          places.x[part] = x + row * S::kStride * args.x_row_stride +
                           start[part] * S::kStride * args.x_pixel_stride;
          places.y[part] = y + row * args.y_row_stride + start[part] * args.y_pixel_stride;
        }
        if (row + 2 <= first + rows) {
          run_outputs<S, kParts, 2>(args, block, bounds, places, count);
        } else {
          run_outputs<S, kParts, 1>(args, block, bounds, places, count);
        }
      }
    }
    begin += rows;
  }
}

// Rows [begin, end) of all images.
template <class S>
void run_rows(const Conv2dArgs& args, const Bounds& bounds, int64_t begin, int64_t end) {
  const int64_t groups = args.shape.groups;
  for (int64_t channel = 0; channel < groups;) {
    const int64_t left = groups - channel;
    // The last block may begin earlier and compute some channels again.
    const auto first = [&](int64_t channels) {
      return left < channels ? groups - channels : channel;
    };
    if (left >= 64 || (left > 48 && groups >= 64)) {
      run_channels<S, 1>(args, bounds, first(64), begin, end);
      channel += 64;
    } else if (left >= 32 || (left > 16 && groups >= 32)) {
      run_channels<S, 2>(args, bounds, first(32), begin, end);
      channel += 32;
    } else {
      run_channels<S, 4>(args, bounds, first(16), begin, end);
      channel += 16;
    }
  }
}

template <class S>
void run_scheme(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const int32_t flip = args.lo < 0 ? 128 : 0;
  const Bounds bounds = {_mm512_set1_epi16(static_cast<int16_t>(args.zero_point + flip)),
                         _mm512_set1_epi8(static_cast<char>(args.lo + flip)),
                         _mm512_set1_epi8(static_cast<char>(args.hi + flip)),
                         _mm512_set1_epi8(static_cast<char>(flip)),
                         args.zero_point != 0 || args.lo != 0 || args.hi != 255};
  // Every block of channels reads all lines again, so the rows of a band stay in the second cache.
  constexpr int64_t kBandBytes = 256 << 10;
  const int64_t row_bytes = S::kStride * args.x_row_stride;
  const int64_t band = row_bytes < kBandBytes / 4 ? kBandBytes / row_bytes / 2 * 2 : 2;
  for (int64_t row = begin; row < end; row += band) {
    run_rows<S>(args, bounds, row, row + band < end ? row + band : end);
  }
}

// True if no product can leave int32: no multiplier is 1 or more, or NaN.
inline bool small_multipliers(const Conv2dArgs& args) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __mmask16 large = 0;
  for (int64_t c = 0; c < args.shape.groups; c += 16) {
    const int64_t left = args.shape.groups - c;
    const __mmask16 there = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m512 multiplier = _mm512_maskz_loadu_ps(there, args.multiplier + c);
    large |= _mm512_cmp_ps_mask(_mm512_abs_ps(multiplier), one, _CMP_NLT_UQ);
  }
  return large == 0;
}

// False if the layer is not one of those.
inline bool run_strips(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  if (args.output != Conv2dOutput::codes || args.residual != nullptr || s.groups < 16 ||
      s.kernel_height != s.kernel_width || s.stride_height != s.stride_width ||
      s.dilation_height != 1 || s.dilation_width != 1 || !small_multipliers(args)) {
    return false;
  }
  const int64_t kind = s.kernel_height * 10 + s.stride_height;
  if (kind == 31) return run_scheme<Scheme<3, 1>>(args, begin, end), true;
  if (kind == 32) return run_scheme<Scheme<3, 2>>(args, begin, end), true;
  if (kind == 51) return run_scheme<Scheme<5, 1>>(args, begin, end), true;
  if (kind == 52) return run_scheme<Scheme<5, 2>>(args, begin, end), true;
  if (kind == 71) return run_scheme<Scheme<7, 1>>(args, begin, end), true;
  return false;
}

}  // namespace
}  // namespace qtoolkit::kernels::avx512vnni
