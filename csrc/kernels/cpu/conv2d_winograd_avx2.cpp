#include "kernels/cpu/conv2d_winograd_avx2.h"

#include <immintrin.h>

#include <array>
#include <utility>

#include "kernels/conv2d_input.h"
#include "kernels/conv2d_winograd.h"
#include "kernels/cpu/conv2d_block_avx2.h"
#include "kernels/scratch.h"

// vpmaddwd and vpaddd make 16 multiply-adds of what they are given here, where the path's other
// three instructions make 32, but there are fewer by a factor of 2.25.
namespace qtoolkit::kernels::avx2 {
namespace {

constexpr int64_t kPositions = 16;  // of a transformed tile: 4 x 4
constexpr int64_t kVectorBytes = 32;
constexpr int64_t kGap = 64;
// Bytes from the weights that are used to those that are fetched. Nine places are read in turn.
constexpr int64_t kAhead = 1024;
// Pairs of 16-bit values that one vpmaddwd multiplies by broadcast ones: a pair of input channels
// in each of eight output channels.
constexpr int64_t kPairBytes = 4;
constexpr int64_t kTiles = 64;  // that are worked on at once, at most
constexpr int kMostTiles = 6;   // with two octets of channels twelve accumulators
constexpr int64_t kHalves = 2;  // of a block, two octets each

// A tile: 2 x 2 output pixels, of which those outside the map or the range are not written.
struct Tile {
  int64_t image, row, column;
};

// The even and the odd bytes, as 16-bit values.
struct Words {
  __m256i even, odd;
};
inline Words words_of_codes(const uint8_t* from) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm256_and_si256(bytes, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(bytes, 8)};
}
inline Words words_of_weights(const int8_t* from) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}

inline __m256i add(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
inline __m256i subtract(__m256i a, __m256i b) { return _mm256_sub_epi16(a, b); }

// 2 G times a column.
inline void transform_weights(const __m256i (&g)[3], __m256i (&u)[4]) {
  const __m256i outer = add(g[0], g[2]);
  u[0] = add(g[0], g[0]);
  u[1] = add(outer, g[1]);
  u[2] = subtract(outer, g[1]);
  u[3] = add(g[2], g[2]);
}
// B' times a column.
inline void transform_codes(const __m256i (&d)[4], __m256i (&v)[4]) {
  v[0] = subtract(d[0], d[2]);
  v[1] = add(d[1], d[2]);
  v[2] = subtract(d[2], d[1]);
  v[3] = subtract(d[1], d[3]);
}

// Memory for transformed weights, codes and sums.
struct Buffers {
  int64_t channels;    // of the input
  int64_t most_tiles;  // at once
  // With gaps between positions, which keep them from sharing the sets of a cache.
  uint8_t* u;     // [block][kPositions][kHalves][pair][2][kVectorBytes]
  uint8_t* v;     // [kPositions][tile][pair][kPairBytes]
  int32_t* sums;  // [tile][kPositions][kChannelBlock]

  int64_t pairs() const { return channels / 2; }
  int64_t half_bytes() const { return pairs() * 2 * kVectorBytes; }
  int64_t u_step() const { return kHalves * half_bytes() + kGap; }  // between positions
  int64_t block_bytes() const { return kPositions * u_step(); }
  int64_t tile_bytes() const { return pairs() * kPairBytes; }
  int64_t v_step() const { return most_tiles * tile_bytes() + kGap; }
};

// The weights of one block. Of each 32 input channels first the even and then the odd pairs, as
// transform_tile leaves them.
void transform_block(const Buffers& buffers, const int8_t* w, uint8_t* u) {
  const int64_t quads = buffers.channels / 4;
  const int64_t tap_bytes = quads * 4 * kChannelBlock;
  for (int64_t quad = 0; quad < quads; ++quad) {
    constexpr int64_t kQuads = kWinogradChannels / 4;
    const int64_t pair = quad / kQuads * 2 * kQuads + quad % kQuads;
    for (int64_t vector = 0; vector < kBlockVectors; ++vector) {
      Words words[3][3];
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int8_t* const from =
            w + tap * tap_bytes + quad * 4 * kChannelBlock + vector * kVectorBytes;
        if (vector % 2 == 0) {
          _mm_prefetch(reinterpret_cast<const char*>(from + kAhead), _MM_HINT_T0);
        }
        words[tap % 3][tap / 3] = words_of_weights(from);
      }
      for (int64_t odd = 0; odd < 2; ++odd) {
        __m256i columns[3][4];
        for (int j = 0; j < 3; ++j) {
          __m256i g[3];
          for (int i = 0; i < 3; ++i) g[i] = odd ? words[j][i].odd : words[j][i].even;
          transform_weights(g, columns[j]);
        }
        uint8_t* to = u + vector / 2 * buffers.half_bytes() +
                      ((pair + odd * kQuads) * 2 + vector % 2) * kVectorBytes;
        for (int i = 0; i < 4; ++i) {
          const __m256i row[3] = {columns[0][i], columns[1][i], columns[2][i]};
          __m256i result[4];
          transform_weights(row, result);
          for (int j = 0; j < 4; ++j, to += buffers.u_step()) {
            _mm256_store_si256(reinterpret_cast<__m256i*>(to), result[j]);
          }
        }
      }
    }
  }
}

// The 4 x 4 input pixels of a tile: x[row] is the first of each row, those past the image's last
// row or column are any that can be read.
void transform_tile(const Buffers& buffers, const uint8_t* const (&x)[4],
                    const int64_t (&column)[4], uint8_t* v) {
  const int64_t position = buffers.v_step();
  for (int64_t channel = 0; channel < buffers.channels; channel += kWinogradChannels, v += 64) {
    for (int64_t odd = 0; odd < 2; ++odd) {
      const auto column_of = [&](int64_t j, __m256i(&result)[4]) {
        __m256i d[4];
        for (int i = 0; i < 4; ++i) {
          const Words words = words_of_codes(x[i] + column[j] + channel);
          d[i] = odd ? words.odd : words.even;
        }
        transform_codes(d, result);
      };
      const auto store = [&](int64_t i, int64_t j, __m256i value) {
        _mm256_store_si256(
            reinterpret_cast<__m256i*>(v + odd * kVectorBytes + (i * 4 + j) * position), value);
      };
      // In an order in which few columns are needed at once.
      __m256i first[4], second[4], third[4], fourth[4];
      column_of(2, third);
      column_of(0, first);
      for (int i = 0; i < 4; ++i) store(i, 0, subtract(first[i], third[i]));
      column_of(1, second);
      for (int i = 0; i < 4; ++i) store(i, 1, add(second[i], third[i]));
      for (int i = 0; i < 4; ++i) store(i, 2, subtract(third[i], second[i]));
      column_of(3, fourth);
      for (int i = 0; i < 4; ++i) store(i, 3, subtract(second[i], fourth[i]));
    }
  }
}

// Adds the products of a pair of channels, broadcast from x + at, by two octets' weights. Written
// out for the reasons given in conv2d_avx2.cpp.
inline __attribute__((always_inline)) void add_products(__m256i (&acc)[2], const uint8_t* x,
                                                        int64_t at, __m256i first, __m256i second) {
  __m256i pair, products;
  asm("vpbroadcastd (%4, %5), %2\n\t"
      "vpmaddwd %6, %2, %3\n\t"
      "vpaddd %3, %0, %0\n\t"
      "vpmaddwd %7, %2, %2\n\t"
      "vpaddd %2, %1, %1"
      : "+x"(acc[0]), "+x"(acc[1]), "=&x"(pair), "=&x"(products)
      : "r"(x), "r"(at), "x"(first), "x"(second),
        "m"(*reinterpret_cast<const char(*)[1 << 20]>(x)));
}

// sums[tile][kPositions][kChannelBlock] of some tiles at one block, whose weights u are.
template <int kTiles>
void multiply(const Buffers& buffers, const uint8_t* v, const uint8_t* u, int32_t* sums) {
  const uint8_t* x[kTiles];
#pragma GCC unroll 6
  for (int t = 0; t < kTiles; ++t) x[t] = v + t * buffers.tile_bytes();
  const int64_t v_step = buffers.v_step(), u_step = buffers.u_step();
  const int64_t tile_bytes = buffers.tile_bytes();
  for (int64_t position = 0; position < kPositions; ++position, u += u_step) {
    const uint8_t* from = u;
    for (int64_t half = 0; half < kHalves; ++half, sums += 2 * kLanes) {
      __m256i acc[kTiles][2];
#pragma GCC unroll 6
      for (int t = 0; t < kTiles; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_si256();
      const int64_t end = position * v_step + tile_bytes;
      for (int64_t at = position * v_step; at != end; at += kPairBytes, from += 2 * kVectorBytes) {
        const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
        const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(from) + 1);
#pragma GCC unroll 6
        for (int t = 0; t < kTiles; ++t) add_products(acc[t], x[t], at, first, second);
      }
#pragma GCC unroll 6
      for (int t = 0; t < kTiles; ++t) {
        auto* const to = reinterpret_cast<__m256i*>(sums + t * kPositions * kChannelBlock);
        _mm256_store_si256(to, acc[t][0]);
        _mm256_store_si256(to + 1, acc[t][1]);
      }
    }
  }
}

using Multiply = void(const Buffers&, const uint8_t*, const uint8_t*, int32_t*);
// [tiles - 1]
template <int... kIndices>
constexpr std::array<Multiply*, kMostTiles> all_multiply(std::integer_sequence<int, kIndices...>) {
  return {multiply<kIndices + 1>...};
}
constexpr auto kMultiply = all_multiply(std::make_integer_sequence<int, kMostTiles>());

// Parts of equal size, as few as there can be.
template <class Visit>
void for_each_part(int64_t size, int64_t most, const Visit& visit) {
  int64_t begin = 0;
  for (int64_t left = (size + most - 1) / most; left > 0; --left) {
    const int64_t count = (size - begin + left - 1) / left;
    visit(begin, count);
    begin += count;
  }
}

// acc[2 * row + column][kChannelBlock] of a tile: A' times its sums times A.
void transform_sums(const int32_t* sums, const int32_t* offset, int32_t* acc) {
  for (int64_t vector = 0; vector < kBlockVectors; ++vector) {
    const auto at = [&](int64_t i, int64_t j) {
      return _mm256_load_si256(
          reinterpret_cast<const __m256i*>(sums + (i * 4 + j) * kChannelBlock + vector * kLanes));
    };
    __m256i rows[2][4];
    for (int64_t j = 0; j < 4; ++j) {
      const __m256i m1 = at(1, j), m2 = at(2, j);
      rows[0][j] = _mm256_add_epi32(at(0, j), _mm256_add_epi32(m1, m2));
      rows[1][j] = _mm256_sub_epi32(_mm256_sub_epi32(m1, m2), at(3, j));
    }
    const __m256i start =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offset + vector * kLanes));
    for (int64_t i = 0; i < 2; ++i) {
      const __m256i(&m)[4] = rows[i];
      const __m256i results[2] = {_mm256_add_epi32(m[0], _mm256_add_epi32(m[1], m[2])),
                                  _mm256_sub_epi32(_mm256_sub_epi32(m[1], m[2]), m[3])};
      for (int64_t j = 0; j < 2; ++j) {
        const __m256i sum = _mm256_add_epi32(_mm256_srai_epi32(results[j], 2), start);
        _mm256_store_si256(
            reinterpret_cast<__m256i*>(acc + (2 * i + j) * kChannelBlock + vector * kLanes), sum);
      }
    }
  }
}

// The tiles that cover output pixels [begin, end), counted over all images.
class Tiles {
 public:
  Tiles(const Conv2dShape& shape, int64_t begin, int64_t end)
      : height_(shape.out_height),
        width_(shape.out_width),
        last_image_((end - 1) / (height_ * width_)),
        last_row_((end - 1) / width_ % height_),
        next_{begin / (height_ * width_), begin / width_ % height_, 0} {
    const int64_t columns = (width_ + 1) / 2;
    for (int64_t image = next_.image; image <= last_image_; ++image) {
      const int64_t first = image == next_.image ? next_.row : 0;
      count_ += (rows_of(image) - first + 1) / 2 * columns;
    }
  }

  int64_t count() const { return count_; }

  Tile next() {
    const Tile tile = next_;
    next_.column += 2;
    if (next_.column >= width_) {
      next_.column = 0;
      next_.row += 2;
      if (next_.row >= rows_of(next_.image)) {
        next_.row = 0;
        ++next_.image;
      }
    }
    return tile;
  }

 private:
  int64_t rows_of(int64_t image) const { return image == last_image_ ? last_row_ + 1 : height_; }

  int64_t height_, width_, last_image_, last_row_;
  Tile next_;
  int64_t count_ = 0;
};

// Computes blocks of one group at a range of output pixels.
class Work {
 public:
  Work(const Conv2dArgs& args, const Buffers& buffers) : args_(args), buffers_(buffers) {}

  // Blocks [first, first + blocks) at output pixels [begin, end).
  void run(int64_t first, int64_t blocks, int64_t begin, int64_t end) {
    const Conv2dShape& s = args_.shape;
    const int64_t group = first / s.blocks_per_group();
    for (int64_t block = 0; block < blocks; ++block) {
      transform_block(buffers_, args_.packed + (first + block) * 9 * s.in_channels * kChannelBlock,
                      buffers_.u + block * buffers_.block_bytes());
    }
    // The codes that are transformed already.
    const bool known = whole_ && group == group_ && begin == begin_ && end == end_;
    Tiles walk(s, begin, end);
    group_ = group;
    begin_ = begin;
    end_ = end;
    whole_ = walk.count() <= buffers_.most_tiles;
    for_each_part(walk.count(), buffers_.most_tiles, [&](int64_t, int64_t count) {
      Tile tiles[kTiles];
      for (int64_t i = 0; i < count; ++i) {
        tiles[i] = walk.next();
        if (!known) transform_input(tiles[i], buffers_.v + i * buffers_.tile_bytes());
      }
      for (int64_t block = 0; block < blocks; ++block) {
        for_each_part(count, kMostTiles, [&](int64_t from, int64_t part) {
          kMultiply[static_cast<size_t>(part - 1)](
              buffers_, buffers_.v + from * buffers_.tile_bytes(),
              buffers_.u + block * buffers_.block_bytes(),
              buffers_.sums + from * kPositions * kChannelBlock);
        });
        store(first + block, tiles, count);
      }
    });
  }

 private:
  void transform_input(const Tile& tile, uint8_t* v) const {
    const Conv2dShape& s = args_.shape;
    const uint8_t* x = args_.x + tile.image * args_.x_image_stride + group_ * s.in_channels;
    const uint8_t* rows[4];
    int64_t columns[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t row = tile.row + i, column = tile.column + i;
      rows[i] = x + (row < s.out_height + 2 ? row : s.out_height + 1) * args_.x_row_stride;
      columns[i] = (column < s.out_width + 2 ? column : s.out_width + 1) * args_.x_pixel_stride;
    }
    transform_tile(buffers_, rows, columns, v);
  }

  void store(int64_t block, const Tile* tiles, int64_t count) const {
    const Conv2dShape& s = args_.shape;
    const int64_t first_channel = block % s.blocks_per_group() * kChannelBlock;
    const int64_t left = s.out_channels - first_channel;
    const Rule rule = rule_of(args_, args_.multiplier + block * kChannelBlock,
                              group_ * s.out_channels + first_channel,
                              left < kChannelBlock ? left : kChannelBlock);
    Store* const write = store_of(args_, rule);
    alignas(32) int32_t acc[4 * kChannelBlock];
    for (int64_t i = 0; i < count; ++i) {
      const Tile& tile = tiles[i];
      transform_sums(buffers_.sums + i * kPositions * kChannelBlock,
                     args_.offset + block * kChannelBlock, acc);
      for (int64_t row = tile.row; row < tile.row + 2 && row < s.out_height; ++row) {
        // The pixels in the map and in the range.
        const int64_t line = (tile.image * s.out_height + row) * s.out_width;
        const int64_t after =
            line + (tile.column + 2 < s.out_width ? tile.column + 2 : s.out_width);
        const int64_t from = line + tile.column > begin_ ? line + tile.column : begin_;
        const int64_t to = after < end_ ? after : end_;
        if (from >= to) continue;
        Conv2dPlace place[2];
        for (int64_t pixel = from; pixel < to; ++pixel) {
          place[pixel - from] = conv2d_place(args_, tile.image, row, pixel - line);
        }
        const int64_t skip = (row - tile.row) * 2 + from - line - tile.column;
        write(args_, rule, place, acc + skip * kChannelBlock, static_cast<int>(to - from));
      }
    }
  }

  const Conv2dArgs& args_;
  const Buffers& buffers_;
  // Of the codes that are transformed.
  int64_t group_ = 0, begin_ = 0, end_ = 0;
  bool whole_ = false;  // all of them at once
};

}  // namespace

void winograd_conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  // The transformed weights of so many blocks, and the tiles that are worked on at once, stay in
  // the second-level cache.
  constexpr int64_t kWeightBytes = 512 << 10;
  constexpr int64_t kTileChannels = 16384;
  Buffers buffers;
  buffers.channels = s.in_channels;
  const int64_t tiles = kTileChannels / s.in_channels;
  buffers.most_tiles = tiles < kMostTiles ? kMostTiles : tiles < kTiles ? tiles : kTiles;
  const int64_t fitting = kWeightBytes / buffers.block_bytes();
  const int64_t most = fitting > 1 ? fitting : 1;
  const int64_t blocks = s.blocks_per_group() < most ? s.blocks_per_group() : most;
  const int64_t u_bytes = blocks * buffers.block_bytes();
  const int64_t v_bytes = kPositions * buffers.v_step();
  const int64_t sum_bytes =
      buffers.most_tiles * kPositions * kChannelBlock * static_cast<int64_t>(sizeof(int32_t));
  buffers.u = thread_scratch(u_bytes + v_bytes + sum_bytes);
  buffers.v = buffers.u + u_bytes;
  buffers.sums = reinterpret_cast<int32_t*>(buffers.v + v_bytes);

  Work work(args, buffers);
  const int64_t all = conv2d_tiles(s);  // units of a block
  for (int64_t unit = begin; unit < end;) {
    const int64_t block = unit / all;  // over all groups
    const int64_t first = unit % all;
    const int64_t last = end - unit < all - first ? first + (end - unit) : all;
    // Blocks of which all pixels are wanted go together.
    int64_t count = 1;
    if (first == 0 && last == all) {
      const int64_t left = s.blocks_per_group() - block % s.blocks_per_group();
      const int64_t whole = (end - unit) / all;
      count = whole < left ? whole : left;
      count = count < blocks ? count : blocks;
    }
    const int64_t last_pixel = last * kTilePixels;
    work.run(block, count, first * kTilePixels, last_pixel < s.pixels() ? last_pixel : s.pixels());
    unit += count * (last - first);
  }
}

}  // namespace qtoolkit::kernels::avx2
