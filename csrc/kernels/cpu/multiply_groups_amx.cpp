// Tiles of 16 channels times tiles of 16 rows: unpacked weights lie as the instruction wants its
// unsigned operand, and quads of activations as it wants the signed one.
#include "kernels/cpu/multiply_groups_avx512.h"
#include "kernels/cpu/tiles_amx.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::amx {
namespace {

using namespace avx512vnni;

constexpr int kTile = 16;                     // channels, and rows of activations, of a tile
constexpr int64_t kMostRows = 64;             // of activations at once,
constexpr int64_t kMostChannels = 4 * kTile;  // and channels: with both the sums stay in L1
constexpr int64_t kTileBytes = 64;            // of a channel that are multiplied at once
constexpr int64_t kPieceNumbers = 512;        // of a channel that are unpacked at once
constexpr int64_t kSums = kTile * kTile;

// Tiles 0 to 3 hold sums [first or second channels][first or second rows], 4 and 5 weights, 6 and 7
// activations.
void configure() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = kTile;
  }
  config.load();
}

// What is multiplied at once: numbers [channels][stride], of which the last step is filled up with
// zeros, and quads of the first 16 rows, the next rows x_stride bytes later.
struct Piece {
  const uint8_t* numbers;
  int64_t stride, steps;
  const int8_t* x;
  int64_t x_stride;
};

// The sums of up to 2 x 2 tiles, of which each begins with what stands at `start`: rows of it
// start_row bytes apart, tiles start_tile numbers.
template <int kChannelTiles, int kRowTiles>
inline __attribute__((always_inline)) void multiply_tiles(const Piece& piece, const int32_t* start,
                                                          int64_t start_row,
                                                          const int64_t (&start_tile)[2],
                                                          int32_t* sums,
                                                          const int64_t (&sums_tile)[2]) {
  const int64_t second = kTile * piece.stride;
  load_tile<0>(start, start_row);
  if (kRowTiles == 2) load_tile<1>(start + start_tile[1], start_row);
  if (kChannelTiles == 2) load_tile<2>(start + start_tile[0], start_row);
  if (kChannelTiles == 2 && kRowTiles == 2) {
    load_tile<3>(start + start_tile[0] + start_tile[1], start_row);
  }
  for (int64_t step = 0; step < piece.steps; ++step) {
    const uint8_t* const numbers = piece.numbers + step * kTileBytes;
    const int8_t* const x = piece.x + step * kTileBytes * kTile;
    load_tile<4>(numbers, piece.stride);
    load_tile<6>(x, 64);
    dot<0, 4, 6>();
    if (kRowTiles == 2) {
      load_tile<7>(x + piece.x_stride, 64);
      dot<1, 4, 7>();
    }
    if (kChannelTiles == 2) {
      load_tile<5>(numbers + second, piece.stride);
      dot<2, 5, 6>();
      if (kRowTiles == 2) dot<3, 5, 7>();
    }
  }
  store_tile<0>(sums, kTile * 4);
  if (kRowTiles == 2) store_tile<1>(sums + sums_tile[1], kTile * 4);
  if (kChannelTiles == 2) store_tile<2>(sums + sums_tile[0], kTile * 4);
  if (kChannelTiles == 2 && kRowTiles == 2)
    store_tile<3>(sums + sums_tile[0] + sums_tile[1], kTile * 4);
}

// Up to kMostChannels channels.
template <class Unpack>
class ManyRows {
 public:
  ManyRows(const MultiplyGroupsArgs& args, int64_t block, int64_t blocks)
      : args_(args), weight_(args.weight), blocks_(blocks), unpack_(args.weight) {
    for (int64_t b = 0; b < blocks; ++b) {
      const BlockRows rows(weight_, block + b);
      for (int i = 0; i < kTile; ++i) channel_[b * kTile + i] = rows.channel(i);
    }
    first_block_ = block;
  }

  void run() {
    for (int64_t m = 0; m < args_.rows; m += kMostRows) {
      run(m, args_.rows - m < kMostRows ? args_.rows - m : kMostRows);
    }
  }

 private:
  using Floats = float[kMostChannels][kMostRows];
  static constexpr int64_t kPieceBytes = kPieceNumbers / Unpack::kPlanes;  // of packed codes

  void run(int64_t first_row, int64_t count) {
    const int64_t groups = weight_.groups(), x_stride = grouped_quads(weight_) * 64;
    const int64_t tiles = (count + kTile - 1) / kTile, first_tile = first_row / kTile;
    alignas(64) Floats acc;
    for (auto& row : acc) {
      for (int64_t t = 0; t < tiles; ++t) _mm512_store_ps(row + t * kTile, _mm512_setzero_ps());
    }
    for (int64_t g = 0; g < groups; ++g) {
      const GroupPart part = group_part(weight_, g);
      for (int64_t byte = 0; byte < part.bytes; byte += kPieceBytes) {
        const int64_t bytes = part.bytes - byte < kPieceBytes ? part.bytes - byte : kPieceBytes;
        const int64_t width = bytes * Unpack::kPlanes;
        const int64_t stride = (width + kTileBytes - 1) / kTileBytes * kTileBytes;
        unpack(part, byte, bytes, width, stride);
        const int64_t quad = part.first_quad + byte * Unpack::kPlanes / 4;
        const Piece piece{.numbers = numbers_,
                          .stride = stride,
                          .steps = stride / kTileBytes,
                          .x = args_.x + first_tile * x_stride + quad * 64,
                          .x_stride = x_stride};
        multiply(piece, g, first_tile, tiles, byte == 0, byte + bytes == part.bytes, acc);
      }
    }
    for (int64_t b = 0; b < blocks_; ++b) {
      store_rows(args_, BlockRows(weight_, first_block_ + b), acc[b * kTile], kMostRows, first_row,
                 count);
    }
  }

  void unpack(const GroupPart& part, int64_t byte, int64_t bytes, int64_t width, int64_t stride) {
    const int64_t at = part.first_byte + byte;
    const int64_t ahead = prefetch_distance(weight_, at, blocks_ * kTile);
    const int64_t real = part.real_bytes - byte < bytes ? part.real_bytes - byte : bytes;
    for (int64_t i = 0; i < blocks_ * kTile; ++i) {
      const uint8_t* const codes = weight_.codes + channel_[i] * weight_.row_stride + at;
      uint8_t* const to = numbers_ + i * stride;
      for (int64_t line = 0; line < bytes; line += 64) {
        _mm_prefetch(codes + ahead + line, _MM_HINT_T0);
      }
      if (width < stride) _mm512_store_si512(to + stride - kTileBytes, _mm512_setzero_si512());
      unpack_row(unpack_, codes, real, bytes, to);
    }
  }

  void multiply(const Piece& piece, int64_t g, int64_t first_tile, int64_t tiles, bool first,
                bool last, Floats& acc) {
    const int64_t groups = weight_.groups();
    alignas(64) int32_t start[kMostRows];
    const __m512i zero = _mm512_set1_epi32(weight_.zero_point != nullptr ? 0 : -weight_.zero);
    for (int64_t t = 0; t < tiles; ++t) {
      const int32_t* const x_sums = args_.x_sums + ((first_tile + t) * groups + g) * kTile;
      _mm512_store_si512(start + t * kTile, _mm512_mullo_epi32(_mm512_loadu_si512(x_sums), zero));
    }
    for (int64_t b = 0; b < blocks_; b += 2) {
      for (int64_t t = 0; t < tiles; t += 2) {
        Piece here = piece;
        here.numbers += b * kTile * piece.stride;
        here.x += t * piece.x_stride;
        int32_t* const sums = sums_ + (b * kMostTiles + t) * kSums;
        static constexpr int64_t kSumsTile[2] = {kMostTiles * kSums, kSums};
        static constexpr int64_t kStartTile[2] = {0, kTile};
        const int32_t* const from = first ? start + t * kTile : sums;
        const int64_t row = first ? 0 : 64;
        const auto& tile = first ? kStartTile : kSumsTile;
        const bool two_channels = b + 1 < blocks_, two_rows = t + 1 < tiles;
        if (two_channels && two_rows) {
          multiply_tiles<2, 2>(here, from, row, tile, sums, kSumsTile);
        } else if (two_channels) {
          multiply_tiles<2, 1>(here, from, row, tile, sums, kSumsTile);
        } else if (two_rows) {
          multiply_tiles<1, 2>(here, from, row, tile, sums, kSumsTile);
        } else {
          multiply_tiles<1, 1>(here, from, row, tile, sums, kSumsTile);
        }
        if (!last) continue;
        for (int64_t i = b; i < blocks_ && i < b + 2; ++i) {
          for (int64_t j = t; j < tiles && j < t + 2; ++j) {
            accumulate(sums_ + (i * kMostTiles + j) * kSums, i, g, first_tile, j, acc);
          }
        }
      }
    }
  }

  inline __attribute__((always_inline)) void accumulate(const int32_t* sums, int64_t block,
                                                        int64_t g, int64_t first_tile, int64_t tile,
                                                        Floats& acc) const {
    const int64_t groups = weight_.groups();
    const int64_t from = ((first_tile + tile) * groups + g) * kTile;
    const __m512 x_scale = _mm512_loadu_ps(args_.x_scale + from);
    const __m512i x_sums = _mm512_loadu_si512(args_.x_sums + from);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t at = channel_[block * kTile + i] * groups + g;
      __m512i sum = _mm512_load_si512(sums + i * kTile);
      if (weight_.zero_point != nullptr) {
        const __m512i zero = _mm512_set1_epi32(weight_.zero_point[at]);
        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(x_sums, zero));
      }
      const __m512 factor = _mm512_mul_ps(x_scale, _mm512_set1_ps(weight_.scale[at]));
      float* const to = &acc[block * kTile + i][tile * kTile];
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, _mm512_load_ps(to)));
    }
  }

  static constexpr int64_t kMostTiles = kMostRows / kTile;

  const MultiplyGroupsArgs& args_;
  const GroupedWeight& weight_;
  int64_t first_block_ = 0, blocks_;
  Unpack unpack_;
  int64_t channel_[kMostChannels];
  alignas(64) int32_t sums_[kMostChannels / kTile * kMostTiles * kSums];
  alignas(64) uint8_t numbers_[kMostChannels * kPieceNumbers];
};

}  // namespace

void multiply_groups(const MultiplyGroupsArgs& args, int64_t begin, int64_t end) {
  if (args.lanes == 1) return avx512vnni::multiply_groups(args, begin, end);
  configure();
  with_unpack(args.weight, [&]<class Unpack>(const Unpack&) {
    constexpr int64_t kBlocks = kMostChannels / kTile;
    for (int64_t block = begin; block < end; block += kBlocks) {
      ManyRows<Unpack>(args, block, end - block < kBlocks ? end - block : kBlocks).run();
    }
  });
  _tile_release();
}

}  // namespace qtoolkit::kernels::amx
