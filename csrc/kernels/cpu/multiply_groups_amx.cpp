// Tiles of 16 channels times tiles of 16 rows: unpacked weights, less their zero point, lie as the
// instruction wants its first operand, and quads of activations as it wants the second one.
#include "kernels/cpu/multiply_groups_avx512.h"
#include "kernels/cpu/tiles_amx.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::amx {
namespace {

using namespace avx512vnni;

constexpr int kTile = 16;                     // channels, and rows of activations, of a tile
constexpr int64_t kMostRows = 128;            // of activations at once,
constexpr int64_t kMostChannels = 2 * kTile;  // and channels: with both the sums stay in L1
constexpr int64_t kTileBytes = 64;            // of a channel that are multiplied at once
constexpr int64_t kPieceNumbers = 512;        // of a channel that are unpacked at once, at most
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

// Unpack with `zero` taken from every number.
template <class Unpack>
struct Centred {
  static constexpr int kPlanes = Unpack::kPlanes;
  const Unpack& unpack;
  __m512i zero;

  template <int kPlane>
  inline __attribute__((always_inline)) __m512i plane(__m512i codes) const {
    return _mm512_sub_epi8(unpack.template plane<kPlane>(codes), zero);
  }
};

// What is multiplied at once: one piece of a group.
struct Place {
  GroupPart part;
  int64_t g, byte, bytes;  // of the packed codes

  bool first() const { return byte == 0; }
  bool last() const { return byte + bytes == part.bytes; }
};

// Sums of tiles that are to be scaled and added.
struct Pending {
  const int32_t* sums[2][2];  // of a channel tile and a row tile
  int channel_tiles = 0, row_tiles = 0;
  int64_t block, tile, g;
};

// Multiplies up to 2 x 2 tiles, which begin with 0 or with `sums`, for `steps` steps: weights
// `second` bytes apart and tiles of activations x_stride.
template <int kChannelTiles, int kRowTiles>
inline __attribute__((always_inline)) void multiply_tiles(const int8_t* numbers, int64_t stride,
                                                          const int8_t* x, int64_t x_stride,
                                                          int64_t steps, bool begin,
                                                          int32_t* const (&sums)[2][2]) {
  if (begin) {
    clear_tile<0>();
    if (kRowTiles == 2) clear_tile<1>();
    if (kChannelTiles == 2) clear_tile<2>();
    if (kChannelTiles == 2 && kRowTiles == 2) clear_tile<3>();
  } else {
    load_tile<0>(sums[0][0], kTile * 4);
    if (kRowTiles == 2) load_tile<1>(sums[0][1], kTile * 4);
    if (kChannelTiles == 2) load_tile<2>(sums[1][0], kTile * 4);
    if (kChannelTiles == 2 && kRowTiles == 2) load_tile<3>(sums[1][1], kTile * 4);
  }
  for (int64_t step = 0; step < steps; ++step, numbers += kTileBytes, x += kTileBytes * kTile) {
    load_tile<4>(numbers, stride);
    load_tile<6>(x, 64);
    dot_signed<0, 4, 6>();
    if (kRowTiles == 2) {
      load_tile<7>(x + x_stride, 64);
      dot_signed<1, 4, 7>();
    }
    if (kChannelTiles == 2) {
      load_tile<5>(numbers + kTile * stride, stride);
      dot_signed<2, 5, 6>();
      if (kRowTiles == 2) dot_signed<3, 5, 7>();
    }
  }
}

template <int kChannelTiles, int kRowTiles>
inline __attribute__((always_inline)) void store_tiles(int32_t* const (&sums)[2][2]) {
  store_tile<0>(sums[0][0], kTile * 4);
  if (kRowTiles == 2) store_tile<1>(sums[0][1], kTile * 4);
  if (kChannelTiles == 2) store_tile<2>(sums[1][0], kTile * 4);
  if (kChannelTiles == 2 && kRowTiles == 2) store_tile<3>(sums[1][1], kTile * 4);
}

// Up to kMostChannels channels. Between products of tiles the sums of the tiles before are scaled
// and the piece that follows is unpacked, which takes about as long as the products. On a Sapphire
// Rapids core the two did not overlap in a loop (14 ns of tiles, 16 ns of vectors, 35 ns together).
template <class Unpack>
class ManyRows {
 public:
  ManyRows(const MultiplyGroupsArgs& args, int64_t block, int64_t blocks)
      : args_(args),
        weight_(args.weight),
        first_block_(block),
        blocks_(blocks),
        x_stride_(grouped_quads(args.weight) * 64),
        unpack_(args.weight) {
    for (int64_t b = 0; b < blocks; ++b) {
      const BlockRows rows(weight_, block + b);
      for (int i = 0; i < kTile; ++i) {
        channel_[b * kTile + i] = rows.channel(i);
        codes_[b * kTile + i] = rows.codes(i);
      }
    }
  }

  void run() {
    for (int64_t m = 0; m < args_.rows; m += kMostRows) {
      run(m, args_.rows - m < kMostRows ? args_.rows - m : kMostRows);
    }
  }

 private:
  using Floats = float[kMostChannels / kTile][kMostRows / kTile][kTile][kTile];
  // Packed codes of a piece: whole chunks, that as numbers stay in L1.
  static constexpr int64_t kPieceBytes =
      Unpack::kPlanes == 8 ? kGroupedChunk : kPieceNumbers / 2 / Unpack::kPlanes;
  static constexpr int64_t kMostTiles = kMostRows / kTile;
  static constexpr int64_t kScaleGroups = 16;
  // Numbers of 8 bits have 128 taken away, others their zero point: what fits in int8.
  static constexpr bool kBytes = Unpack::kPlanes == 1;

  void run(int64_t first_row, int64_t count) {
    const int64_t tiles = (count + kTile - 1) / kTile;
    first_tile_ = first_row / kTile;
    alignas(64) Floats acc;
    for (int64_t b = 0; b < blocks_; ++b) {
      for (int64_t i = 0; i < tiles * kTile; ++i) {
        _mm512_store_ps(acc[b][i / kTile][i % kTile], _mm512_setzero_ps());
      }
    }
    Pending pending{};
    Place place = place_of(group_part(weight_, 0), 0, 0);
    unpack(place, 0, blocks_ * kTile, numbers_[0]);
    for (int parity = 0;; parity ^= 1) {
      const bool more = !place.last() || place.g + 1 < weight_.groups();
      const Place next = more ? following(place) : place;
      if (place.first() && place.g % kScaleGroups == 0) {
        accumulate(pending, acc);
        load_scales(place.g);
      }
      multiply(place, next, more, parity, tiles, pending, acc);
      if (!more) break;
      place = next;
    }
    accumulate(pending, acc);
    for (int64_t b = 0; b < blocks_; ++b) {
      const BlockRows rows(weight_, first_block_ + b);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t left = count - t * kTile;
        store_rows(args_, rows, acc[b][t][0], kTile, first_row + t * kTile,
                   left < kTile ? left : kTile);
      }
    }
  }

  static Place place_of(const GroupPart& part, int64_t g, int64_t byte) {
    const int64_t left = part.bytes - byte;
    return {part, g, byte, left < kPieceBytes ? left : kPieceBytes};
  }
  Place following(const Place& place) const {
    if (!place.last()) {
      return place_of(place.part, place.g, place.byte + place.bytes);
    }
    return place_of(group_part(weight_, place.g + 1), place.g + 1, 0);
  }
  static int64_t stride_of(const Place& place) {
    return (place.bytes * Unpack::kPlanes + kTileBytes - 1) / kTileBytes * kTileBytes;
  }

  void load_scales(int64_t g) {
    for (int64_t b = 0; b < blocks_; ++b) {
      BlockRows(weight_, first_block_ + b).scales(g, scale_[b]);
    }
  }

  // One piece of all tiles; meanwhile the one that follows is unpacked.
  void multiply(const Place& place, const Place& next, bool more, int parity, int64_t tiles,
                Pending& pending, Floats& acc) {
    const int64_t stride = stride_of(place);
    const int64_t quad = place.part.first_quad + place.byte * Unpack::kPlanes / 4;
    const int64_t steps = ((blocks_ + 1) / 2) * ((tiles + 1) / 2);
    const int64_t rows = (blocks_ * kTile + steps - 1) / steps;
    int64_t unpacked = 0;
    for (int64_t b = 0; b < blocks_; b += 2) {
      for (int64_t t = 0; t < tiles; t += 2) {
        const int8_t* const numbers = numbers_[parity] + b * kTile * stride;
        const int8_t* const x = args_.x + (first_tile_ + t) * x_stride_ + quad * 64;
        const auto meanwhile = [&]() __attribute__((always_inline)) {
          accumulate(pending, acc);
          if (more) {
            const int64_t left = blocks_ * kTile - unpacked;
            const int64_t here = left < rows ? left : rows;
            unpack(next, unpacked, unpacked + here, numbers_[parity ^ 1]);
            unpacked += here;
          }
        };
        const auto step = [&]<int kChannelTiles, int kRowTiles>() __attribute__((always_inline)) {
          int32_t* sums[2][2];
          for (int64_t i = 0; i < 2; ++i) {
            for (int64_t j = 0; j < 2; ++j) sums[i][j] = sums_of(place, b + i, t + j);
          }
          multiply_tiles<kChannelTiles, kRowTiles>(numbers, stride, x, x_stride_,
                                                   stride / kTileBytes, place.first(), sums);
          meanwhile();
          store_tiles<kChannelTiles, kRowTiles>(sums);
          pending = {{{sums[0][0], sums[0][1]}, {sums[1][0], sums[1][1]}},
                     place.last() ? kChannelTiles : 0,
                     kRowTiles,
                     b,
                     t,
                     place.g};
        };
        if (b + 1 < blocks_) {
          t + 1 < tiles ? step.template operator()<2, 2>() : step.template operator()<2, 1>();
        } else {
          t + 1 < tiles ? step.template operator()<1, 2>() : step.template operator()<1, 1>();
        }
        slot_ ^= 1;
      }
    }
  }

  // Where the sums of a tile go: of a whole group to one of two places by turns, else they stay.
  int32_t* sums_of(const Place& place, int64_t block, int64_t tile) {
    if (place.first() && place.last()) {
      return slots_[slot_] + ((block % 2) * 2 + tile % 2) * kSums;
    }
    return sums_ + (block * kMostTiles + tile) * kSums;
  }

  void unpack(const Place& place, int64_t begin, int64_t end, int8_t* numbers) const {
    const int64_t left = place.part.real_bytes - place.byte;
    if (left < place.bytes || place.bytes % kGroupedChunk != 0) {
      return unpack_rows(place, begin, end, numbers);
    }
    if (place.bytes == kGroupedChunk) {  // such as 4 bits in groups of 128
      return unpack_chunks(place, kGroupedChunk, begin, end, numbers);
    }
    unpack_chunks(place, place.bytes, begin, end, numbers);
  }

  // Whole chunks.
  inline __attribute__((always_inline)) void unpack_chunks(const Place& place, int64_t bytes,
                                                           int64_t begin, int64_t end,
                                                           int8_t* numbers) const {
    const int64_t at = place.part.first_byte + place.byte, stride = bytes * Unpack::kPlanes;
    const uint8_t* const* const rows = codes_;
    const auto run = [&](auto&& zero_of) __attribute__((always_inline)) {
      for (int64_t i = begin; i < end; ++i) {
        const uint8_t* const codes = rows[i] + at;
        const Centred<Unpack> unpack{unpack_, zero_of(i)};
        for (int64_t byte = 0; byte < bytes; byte += kGroupedChunk) {
          int8_t* const to = numbers + i * stride + byte * Unpack::kPlanes;
          const __m512i chunk = _mm512_loadu_si512(codes + byte);
          for_each_plane<Unpack::kPlanes>([&]<int kPlane>() __attribute__((always_inline)) {
            _mm512_store_si512(to + kPlane * kGroupedChunk, unpack.template plane<kPlane>(chunk));
          });
        }
      }
    };
    if (kBytes || weight_.zero_point == nullptr) {
      const __m512i zero = constant_zero();
      run([&](int64_t) __attribute__((always_inline)) { return zero; });
    } else {
      run([&](int64_t i) __attribute__((always_inline)) { return zero_of(i, place.g); });
    }
  }

  // Any part of a row.
  void unpack_rows(const Place& place, int64_t begin, int64_t end, int8_t* numbers) const {
    const int64_t at = place.part.first_byte + place.byte;
    const int64_t stride = stride_of(place), width = place.bytes * Unpack::kPlanes;
    const int64_t left = place.part.real_bytes - place.byte;
    const int64_t real = left < place.bytes ? left : place.bytes;
    const bool constant = kBytes || weight_.zero_point == nullptr;
    for (int64_t i = begin; i < end; ++i) {
      int8_t* const to = numbers + i * stride;
      if (width < stride) _mm512_store_si512(to + stride - kTileBytes, _mm512_setzero_si512());
      unpack_row(Centred<Unpack>{unpack_, constant ? constant_zero() : zero_of(i, place.g)},
                 codes_[i] + at, real, place.bytes, reinterpret_cast<uint8_t*>(to));
    }
  }

  inline __attribute__((always_inline)) __m512i constant_zero() const {
    return _mm512_set1_epi8(static_cast<char>(kBytes ? 128 : weight_.zero));
  }
  inline __attribute__((always_inline)) __m512i zero_of(int64_t i, int64_t g) const {
    return _mm512_set1_epi8(
        static_cast<char>(weight_.zero_point[channel_[i] * weight_.groups() + g]));
  }

  inline __attribute__((always_inline)) void accumulate(Pending& pending, Floats& acc) const {
    for (int i = 0; i < pending.channel_tiles; ++i) {
      for (int j = 0; j < pending.row_tiles; ++j) {
        accumulate(pending.sums[i][j], pending.block + i, pending.g, pending.tile + j, acc);
      }
    }
    pending.channel_tiles = 0;
  }

  inline __attribute__((always_inline)) void accumulate(const int32_t* sums, int64_t block,
                                                        int64_t g, int64_t tile,
                                                        Floats& acc) const {
    const int64_t groups = weight_.groups();
    const int64_t from = ((first_tile_ + tile) * groups + g) * kTile;
    const __m512 x_scale = _mm512_loadu_ps(args_.x_scale + from);
    const float* const scale = scale_[block][g % kScaleGroups];
    float* const to = acc[block][tile][0];
    const bool correct = kBytes && (weight_.zero_point != nullptr || weight_.zero != 128);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) {
      __m512i sum = _mm512_load_si512(sums + i * kTile);
      if (correct) {
        const int64_t at = channel_[block * kTile + i] * groups + g;
        const int32_t zero = weight_.zero_point != nullptr ? weight_.zero_point[at] : weight_.zero;
        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_loadu_si512(args_.x_sums + from),
                                                       _mm512_set1_epi32(zero - 128)));
      }
      const __m512 factor = _mm512_mul_ps(x_scale, _mm512_set1_ps(scale[i]));
      float* const here = to + i * kTile;
      _mm512_store_ps(here, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, _mm512_load_ps(here)));
    }
  }

  const MultiplyGroupsArgs& args_;
  const GroupedWeight& weight_;
  int64_t first_block_, blocks_, first_tile_ = 0, x_stride_;
  Unpack unpack_;
  int slot_ = 0;
  int64_t channel_[kMostChannels];
  const uint8_t* codes_[kMostChannels];
  alignas(64) float scale_[kMostChannels / kTile][kScaleGroups][kTile];
  alignas(64) int32_t slots_[2][4 * kSums];
  alignas(64) int8_t numbers_[2][kMostChannels * kPieceNumbers];
  alignas(64) int32_t sums_[kMostChannels / kTile * kMostTiles * kSums];
};

// Whether numbers less their zero points fit in int8.
bool zero_points_fit(const GroupedWeight& weight, int64_t block, int64_t blocks) {
  if (weight.zero_point == nullptr) return true;
  const int64_t first = block * kTile, last = first + blocks * kTile;
  const int64_t end = last < weight.channels ? last : weight.channels;
  uint8_t largest = 0;
  for (int64_t i = first * weight.groups(); i < end * weight.groups(); ++i) {
    largest = largest < weight.zero_point[i] ? weight.zero_point[i] : largest;
  }
  return largest <= 128;
}

}  // namespace

void multiply_groups(const MultiplyGroupsArgs& args, int64_t begin, int64_t end) {
  if (args.lanes == 1) return avx512vnni::multiply_groups(args, begin, end);
  configure();
  with_unpack(args.weight, [&]<class Unpack>(const Unpack&) {
    constexpr int64_t kBlocks = kMostChannels / kTile;
    for (int64_t block = begin; block < end; block += kBlocks) {
      const int64_t blocks = end - block < kBlocks ? end - block : kBlocks;
      if (Unpack::kPlanes > 1 && !zero_points_fit(args.weight, block, blocks)) {
        avx512vnni::multiply_groups(args, block, block + blocks);
      } else {
        ManyRows<Unpack>(args, block, blocks).run();
      }
    }
  });
  _tile_release();
}

}  // namespace qtoolkit::kernels::amx
