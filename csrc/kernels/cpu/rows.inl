// How the paths of a kernel with two operands walk over its rows: the including file opens the
// path's namespace. No include guard and no includes, on purpose.

namespace {

// Rows of `count` codes that share one row of b.
struct SharedRows {
  const uint8_t* a;
  const uint8_t* b;
  uint8_t* y;
  int64_t count, rows, a_stride, y_stride;
};

constexpr int64_t kTileBytes = 4096;

// The fewest rows whose codes fill whole vectors of 64, 0 if they do not fit the tile.
int64_t rows_of_tile(int64_t channels) {
  int64_t rows = 64;
  for (int64_t rest = channels; rows > 1 && rest % 2 == 0; rest /= 2) rows /= 2;
  return channels * rows <= kTileBytes ? rows : 0;
}

// Calls take(SharedRows) for parts that are rows [begin, end) together. Rows without gaps become
// long ones, as short rows would waste most of a vector; a row of b that they share is repeated for
// that in a tile.
template <class Args, class Take>
void walk_rows(const Args& args, int64_t begin, int64_t end, Take take) {
  const int64_t channels = args.channels;
  if (begin >= end || channels == 0) return;
  const bool gapless = args.a_row_stride == channels && args.y_row_stride == channels;
  const uint8_t* a = args.a + begin * args.a_row_stride;
  const uint8_t* b = args.b + begin * args.b_row_stride;
  uint8_t* y = args.y + begin * args.y_row_stride;
  const int64_t rows = end - begin;
  if (gapless && !args.b_single && args.b_row_stride == channels) {
    return take(SharedRows{a, b, y, rows * channels, 1, 0, 0});
  }
  if (args.b_row_stride != 0) {
    for (int64_t row = 0; row < rows; ++row) {
      take(SharedRows{a + row * args.a_row_stride, b + row * args.b_row_stride,
                      y + row * args.y_row_stride, channels, 1, 0, 0});
    }
    return;
  }
  if (gapless && args.b_single) return take(SharedRows{a, b, y, rows * channels, 1, 0, 0});
  const int64_t tile_rows = gapless ? rows_of_tile(channels) : 0;
  if (tile_rows < 2 || rows < 2 * tile_rows) {
    return take(SharedRows{a, b, y, channels, rows, args.a_row_stride, args.y_row_stride});
  }
  uint8_t tile[kTileBytes];
  const int64_t length = tile_rows * channels;
  for (int64_t i = 0; i < length; ++i) tile[i] = i < channels ? b[i] : tile[i - channels];
  const int64_t tiles = rows / tile_rows;
  take(SharedRows{a, tile, y, length, tiles, length, length});
  if (const int64_t rest = rows % tile_rows; rest != 0) {
    take(SharedRows{a + tiles * length, tile, y + tiles * length, rest * channels, 1, 0, 0});
  }
}

}  // namespace
