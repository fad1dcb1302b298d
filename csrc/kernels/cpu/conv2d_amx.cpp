// Convolution with int8 matrix tiles. Pixels are read where they lie: a tile's row is a piece of a
// run of taps, and its rows are pixels at equal distances.
#include "kernels/conv2d_input.h"
#include "kernels/cpu/conv2d_multiply_amx.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::amx {
namespace {

int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }
int64_t at_least(int64_t value, int64_t least) { return value > least ? value : least; }
int64_t tiles_of(int64_t pixels) { return (pixels + kRows - 1) / kRows; }

// Blocks of one group of channels at a range of pixels.
struct Part {
  int64_t first_block, last_block;  // over all groups
  int64_t first_pixel, last_pixel;
};

// The pixels from one on.
struct Walk {
  int64_t image, row, column;
  int64_t position;  // in the line
  const uint8_t* x;
  Conv2dPlace place;
};

class Call {
 public:
  explicit Call(const Conv2dArgs& args) : args_(args), s_(args.shape) {
    pixel_step_ = s_.stride_width * args.x_pixel_stride;
    row_step_ = s_.stride_height * args.x_row_stride;
    set_reduction();
    set_lines();
    const __m512i count = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    for (int i = 0; i < 2; ++i) {
      const __m512i index = _mm512_add_epi64(count, _mm512_set1_epi64(8 * i));
      y_steps_[i] = _mm512_mullo_epi64(index, _mm512_set1_epi64(args.y_pixel_stride));
      residual_steps_[i] = _mm512_mullo_epi64(index, _mm512_set1_epi64(args.residual_pixel_stride));
    }
  }

  // False where avx512vnni is faster: with one pixel, and with so few products in a step that it
  // needs fewer of its instructions, which multiply 16 channels, than 16 of a step's cycles.
  bool pays() const {
    if (args_.layout != Conv2dLayout::quads || quads_ == 0 || s_.pixels() == 1) return false;
    const int64_t vectors = s_.out_channels > kLanes ? 2 : 1;
    return vectors * s_.run_quads() >= 5 * reduction_.steps;
  }

  void configure_tiles() const { configure(rows_, quads_); }

  void run(const Part& part) {
    // Blocks whose weights stay in the second level cache together.
    int64_t most = at_most((int64_t{1} << 20) / block_bytes_, kMostBlocks);
    if (reduction_.overlaps) most = at_most(most, kMostLast / reduction_.segments);
    most = at_least(most, 1);
    // A block's weights stay in the first level cache for some groups, as their input would for all
    // blocks where the taps of different pixels overlap; without taps beside the pixel's own one
    // group after the other is better, whose outputs stay there, but if the weights come from
    // memory, there should be time to bring the next block's.
    const int64_t weights = (part.last_block - part.first_block) * block_bytes_;
    chunk_ = reduction_.segments == 1 && weights <= (3 << 16) ? 1 : kMostGroups;
    for (int64_t block = part.first_block; block < part.last_block; block += most) {
      run_blocks(
          {block, at_most(block + most, part.last_block), part.first_pixel, part.last_pixel});
    }
  }

 private:
  // A line is a sequence of input positions pixel_step_ apart in which a tile may begin anywhere:
  // the pixels of an output row; or those of an image or of all images, with what lies between
  // their rows, where that is a whole number of positions.
  enum class Line : uint8_t { row, image, all };

  static constexpr int64_t kMostBlocks = 16;
  static constexpr int kMostGroups = 8;
  static constexpr int64_t kMostLast = 32;  // steps' weights that are copied

  void set_reduction() {
    const int64_t segments = s_.kernel_height * s_.runs_per_row();
    const int64_t quads = s_.run_quads();
    const int64_t steps = (quads + kMostQuads - 1) / kMostQuads;
    reduction_.overlaps = quads % steps != 0;
    if (segments > (reduction_.overlaps ? kMostLast : kMostSegments)) return;
    quads_ = static_cast<int>(reduction_.overlaps ? kMostQuads : quads / steps);
    reduction_.segments = static_cast<int>(segments);
    reduction_.steps = steps;
    reduction_.step_bytes = quads_ * 4;
    reduction_.step_weights = quads_ * kQuadBytes;
    reduction_.segment_weights = quads * kQuadBytes;
    reduction_.last_step = (quads - quads_) * 4;
    reduction_.row_stride = pixel_step_;
    for (int64_t i = 0; i < segments; ++i) {
      reduction_.offset[i] = i / s_.runs_per_row() * s_.dilation_height * args_.x_row_stride +
                             i % s_.runs_per_row() * s_.dilation_width * args_.x_pixel_stride;
    }
    reduction_.pairs_per_step = (kRows + all_steps() - 1) / all_steps();
    reduction_.late_steps = (kRows + reduction_.pairs_per_step - 1) / reduction_.pairs_per_step;
    block_bytes_ = segments * reduction_.segment_weights;
  }
  int64_t all_steps() const { return reduction_.segments * reduction_.steps; }

  void set_lines() {
    const int64_t row_tiles = tiles_of(s_.out_width);
    line_ = Line::row;
    line_length_ = s_.out_width;
    rows_ = static_cast<int>((s_.out_width + row_tiles - 1) / row_tiles);
    if (row_step_ % pixel_step_ != 0) return;
    row_period_ = row_step_ / pixel_step_;
    const int64_t image = (s_.out_height - 1) * row_period_ + s_.out_width;
    if (tiles_of(image) >= s_.out_height * row_tiles) return;
    line_ = Line::image;
    line_length_ = image;
    if (s_.images > 1 && args_.x_image_stride % pixel_step_ == 0) {
      image_period_ = args_.x_image_stride / pixel_step_;
      const int64_t all = (s_.images - 1) * image_period_ + image;
      if (tiles_of(all) <= s_.images * tiles_of(image)) {
        line_ = Line::all;
        line_length_ = all;
      }
    }
    rows_ = static_cast<int>(at_most(line_length_, kRows));
  }

  int64_t position(const Walk& walk) const {
    int64_t result = walk.column;
    if (line_ != Line::row) result += walk.row * row_period_;
    if (line_ == Line::all) result += walk.image * image_period_;
    return result;
  }

  Walk walk_from(int64_t pixel, int64_t channel_group) const {
    Walk walk;
    walk.column = pixel % s_.out_width;
    walk.row = pixel / s_.out_width % s_.out_height;
    walk.image = pixel / s_.out_width / s_.out_height;
    walk.position = position(walk);
    walk.x = conv2d_input(args_, pixel) + channel_group * s_.in_channels;
    walk.place = conv2d_place(args_, pixel);
    return walk;
  }

  // By `count` pixels of a row. True at the end of a line.
  bool advance(Walk& walk, int64_t count) const {
    walk.column += count;
    if (walk.column < s_.out_width) {
      walk.position += count;
      walk.x += count * pixel_step_;
      walk.place.y += count * args_.y_pixel_stride;
      walk.place.residual += count * args_.residual_pixel_stride;
      return false;
    }
    const int64_t back = count - s_.out_width;  // to the row's first pixel
    walk.column = 0;
    walk.row += 1;
    walk.x += row_step_ + back * pixel_step_;
    walk.place.y += args_.y_row_stride + back * args_.y_pixel_stride;
    walk.place.residual += args_.residual_row_stride + back * args_.residual_pixel_stride;
    bool ends = line_ == Line::row;
    if (walk.row == s_.out_height) {
      walk.row = 0;
      walk.image += 1;
      walk.x += args_.x_image_stride - s_.out_height * row_step_;
      walk.place.y += args_.y_image_stride - s_.out_height * args_.y_row_stride;
      walk.place.residual +=
          args_.residual_image_stride - s_.out_height * args_.residual_row_stride;
      ends = line_ != Line::all;
    }
    walk.position = position(walk);
    return ends;
  }

  // Fills the group with up to `most` of the next pixels and returns how many.
  int64_t take(Walk& walk, int64_t most, Group& group) const {
    group.count = 0;
    for (group.tiles = 0; group.tiles < 2 && group.count < most;) {
      const int tile = group.tiles++;
      // A tile that would reach past the line's end begins earlier, at pixels of the tile before.
      const int64_t start = at_most(walk.position, line_length_ - rows_);
      group.x[tile] = walk.x - (walk.position - start) * pixel_step_;
      bool line_ends = false;
      while (!line_ends && group.count < most) {
        const int64_t row = walk.position - start;
        if (row >= rows_) break;
        const int64_t count =
            at_most(at_most(s_.out_width - walk.column, rows_ - row), most - group.count);
        list(walk.place, tile * kRows + row, count, group);
        line_ends = advance(walk, count);
      }
    }
    group.y[group.count] = group.y[group.count - 1];
    group.residual[group.count] = group.residual[group.count - 1];
    group.sums[group.count] = group.sums[group.count - 1];
    return group.count;
  }

  // Adds up to kRows pixels of an output row whose sums begin with row `row`.
  void list(Conv2dPlace place, int64_t row, int64_t count, Group& group) const {
    const auto add = [](int64_t* to, int64_t first, const __m512i(&steps)[2]) {
      const __m512i base = _mm512_set1_epi64(first);
      _mm512_storeu_si512(to, _mm512_add_epi64(base, steps[0]));
      _mm512_storeu_si512(to + 8, _mm512_add_epi64(base, steps[1]));
    };
    add(group.y + group.count, place.y, y_steps_);
    if (args_.residual != nullptr) {
      add(group.residual + group.count, place.residual, residual_steps_);
    }
    const __m512i rows = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i base = _mm512_set1_epi32(static_cast<int>(row * kChannelBlock));
    static_assert(kChannelBlock == 1 << 5);
    _mm512_storeu_si512(group.sums + group.count,
                        _mm512_add_epi32(base, _mm512_slli_epi32(rows, 5)));
    group.count += static_cast<int>(count);
  }

  void run_blocks(const Part& part) {
    const int64_t blocks = part.last_block - part.first_block;
    const Functions functions = set_blocks(part);
    Walk walk = walk_from(part.first_pixel, part.first_block / s_.blocks_per_group());
    int64_t left = part.last_pixel - part.first_pixel;
    // A ring of groups, as the last one of some is pending while the next ones are filled.
    constexpr int kRing = kMostGroups + 1;
    groups_[kMostGroups].count = groups_[kMostGroups].tiles = 0;
    Pending pending = {&groups_[kMostGroups], blocks_};
    int first = 0;
    bool cold = true;
    while (left > 0) {
      int count = 0;
      for (; count < chunk_ && left > 0; ++count) {
        left -= take(walk, left, groups_[(first + count) % kRing]);
      }
      for (int64_t b = 0; b < blocks; ++b) {
        for (int i = 0; i < count; ++i) {
          const Group& group = groups_[(first + i) % kRing];
          Prefetch prefetch = {nullptr, 0};
          if (cold) prefetch = next_block(b, i, count);
          functions.multiply[group.tiles - 1](args_, reduction_, group, blocks_[b], prefetch,
                                              pending, sums_);
        }
      }
      first = (first + count) % kRing;
      cold = false;
    }
    functions.finish(args_, pending, sums_);
  }

  // Part `index` of `count` of the block after block `b`. Behind the last one lie the weights of
  // the next call, if it reads on there: without them a linear layer of 16 rows waited for a
  // quarter of its weights.
  Prefetch next_block(int64_t b, int index, int count) const {
    const int64_t steps = all_steps();
    const int64_t lines = block_bytes_ / 64;
    const int64_t lines_per_step = (lines + steps * count - 1) / (steps * count);
    return {blocks_[b].w + block_bytes_ + lines_per_step * steps * index * 64, lines_per_step};
  }

  Functions set_blocks(const Part& part) {
    bool simple = args_.output == Conv2dOutput::codes;
    for (int64_t index = part.first_block; index < part.last_block; ++index) {
      const int64_t channel = index % s_.blocks_per_group() * kChannelBlock;
      Block& block = blocks_[index - part.first_block];
      block.w = args_.packed + index * block_bytes_;
      block.offset = args_.offset + index * kChannelBlock;
      if (reduction_.overlaps) copy_last(block, index - part.first_block);
      block.rule = avx512vnni::rule_of(args_, args_.multiplier + index * kChannelBlock,
                                       index / s_.blocks_per_group() * s_.out_channels + channel,
                                       at_most(s_.out_channels - channel, kChannelBlock));
      simple = simple && block.rule.simple;
    }
    if (!simple) return functions<Any>();
    const SimpleResidual residual = blocks_[0].rule.simple_residual;
    return args_.zero_point == 0 ? simple_functions<false>(residual)
                                 : simple_functions<true>(residual);
  }

  void copy_last(Block& block, int64_t index) {
    int8_t* to = last_ + index * reduction_.segments * kStepWeights;
    block.last = to;
    const int64_t done = (reduction_.steps * kMostQuads - s_.run_quads()) * kQuadBytes;
    for (int segment = 0; segment < reduction_.segments; ++segment, to += kStepWeights) {
      const int8_t* const from = block.w + segment * reduction_.segment_weights +
                                 (reduction_.steps - 1) * reduction_.step_weights;
      __builtin_memset(to, 0, static_cast<size_t>(done));
      __builtin_memcpy(to + done, from, static_cast<size_t>(kStepWeights - done));
    }
  }

  const Conv2dArgs& args_;
  const Conv2dShape& s_;
  int64_t pixel_step_, row_step_;  // bytes of the input between output pixels and rows
  int64_t block_bytes_ = 0;
  int quads_ = 0;  // of a tile row
  Line line_ = Line::row;
  int64_t line_length_ = 0;                    // positions
  int64_t row_period_ = 0, image_period_ = 0;  // positions
  int chunk_ = 1;
  int rows_ = 0;  // of a tile of pixels
  __m512i y_steps_[2], residual_steps_[2];
  Reduction reduction_;
  Block blocks_[kMostBlocks];
  Group groups_[kMostGroups + 1];
  alignas(64) int32_t sums_[kSums];
  alignas(64) int8_t last_[kMostLast * kStepWeights];
};

}  // namespace

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  Call call(args);
  if (!call.pays()) {
    avx512vnni::conv2d(args, begin, end);
    return;
  }
  if (begin >= end) return;
  call.configure_tiles();
  const Conv2dShape& s = args.shape;
  const int64_t tiles = conv2d_tiles(s);
  while (begin < end) {
    const int64_t block = begin / tiles;
    const int64_t first = begin % tiles;
    const int64_t last = at_most(first + (end - begin), tiles);
    int64_t blocks = 1;
    if (first == 0) {
      const int64_t of_group = s.blocks_per_group() - block % s.blocks_per_group();
      blocks = at_least(at_most((end - begin) / tiles, of_group), 1);
    }
    call.run({block, block + blocks, first * kTilePixels, at_most(last * kTilePixels, s.pixels())});
    begin += blocks * (last - first);
  }
  // A thread with tiles in use is switched more slowly.
  _tile_release();
}

}  // namespace qtoolkit::kernels::amx
