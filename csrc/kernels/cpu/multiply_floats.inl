// The product of float32 rows with a weight of few bits, compiled once for every instruction set:
// the including file opens the path's namespace and gives
//   Lanes                         16 floats, with load(p), store(p, a), fma(a, b, c) and
//                                 add_halves(a), the sum of its lanes
//   kTileRows, tile_channels(r)   what a tile of accumulators covers, the latter for r rows
// No include guard and no includes, on purpose.

namespace {

constexpr int64_t kPanelBlocks = 4;  // of a channel's row that are float32 at a time: 16 KiB in all
constexpr int64_t kMostRows = 48;    // of activations, for which a panel is unpacked once

// Adds to acc[row][kFloatChannels][lane] what `steps` vectors of channels from `first` on and of
// rows give.
template <int kRows, int kChannels>
inline void multiply_tile(const float* weights, int64_t weights_stride, const float* x,
                          int64_t x_stride, int64_t steps, float* acc) {
  Lanes sums[kRows][kChannels];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c) {
      sums[r][c] = load(acc + (r * kFloatChannels + c) * kFloatLanes);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    Lanes w[kChannels];
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c) {
      w[c] = load(weights + c * weights_stride + step * kFloatLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Lanes row = load(x + r * x_stride + step * kFloatLanes);
#pragma GCC unroll 8
      for (int c = 0; c < kChannels; ++c) sums[r][c] = fma(w[c], row, sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c) {
      store(acc + (r * kFloatChannels + c) * kFloatLanes, sums[r][c]);
    }
  }
}

// All channels of a panel for up to kTileRows rows.
template <int kRows>
void multiply_rows(int64_t rows, const float* weights, int64_t weights_stride, const float* x,
                   int64_t x_stride, int64_t steps, float* acc) {
  if constexpr (kRows > 0) {
    if (rows < kRows) {
      return multiply_rows<kRows - 1>(rows, weights, weights_stride, x, x_stride, steps, acc);
    }
    constexpr int kChannels = tile_channels(kRows);
    for (int64_t c = 0; c < kFloatChannels; c += kChannels) {
      multiply_tile<kRows, kChannels>(weights + c * weights_stride, weights_stride, x, x_stride,
                                      steps, acc + c * kFloatLanes);
    }
  }
}

// What takes the place of a block of codes in the next panel, which is further on in the row or in
// the next block of channels.
inline void prefetch_next(const FloatWeight& weight, int64_t channel, int64_t block) {
  const int64_t bytes = kFloatBlock * weight.bits / 8, at = block * bytes;
  const int64_t next = at + kPanelBlocks * bytes;
  const int64_t row = next < weight.row_stride ? channel : channel + kFloatChannels;
  const int64_t from = next < weight.row_stride ? next : next - weight.row_stride;
  const uint8_t* const codes = weight.codes + row * weight.row_stride + from;
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(codes + line);
}

// Up to kMostRows rows with one block of channels; unpack(channel, block, to) as unpack_any.
template <class Unpack>
void multiply_panels(const MultiplyFloatsArgs& args, const Unpack& unpack, int64_t first_row,
                     int64_t rows, int64_t first_channel) {
  const FloatWeight& weight = args.weight;
  constexpr int64_t kStride = kPanelBlocks * kFloatBlock;
  alignas(64) float panel[kFloatChannels * kStride];
  alignas(64) float acc[kMostRows * kFloatChannels * kFloatLanes];
  __builtin_memset(acc, 0,
                   sizeof(float) * static_cast<size_t>(rows * kFloatChannels * kFloatLanes));
  const int64_t left = weight.channels - first_channel, x_stride = weight.blocks() * kFloatBlock;
  const int64_t channels = left < kFloatChannels ? left : kFloatChannels;
  for (int64_t block = 0; block < weight.blocks(); block += kPanelBlocks) {
    const int64_t rest = weight.blocks() - block;
    const int64_t blocks = rest < kPanelBlocks ? rest : kPanelBlocks;
    for (int64_t c = 0; c < kFloatChannels; ++c) {
      // Channels beyond the last one repeat it; their sums are not stored.
      const int64_t n = first_channel + (c < channels ? c : channels - 1);
      for (int64_t i = 0; i < blocks; ++i) {
        prefetch_next(weight, n, block + i);
        unpack(n, block + i, panel + c * kStride + i * kFloatBlock);
      }
    }
    const float* const x = args.x + first_row * x_stride + block * kFloatBlock;
    for (int64_t m = 0; m < rows; m += kTileRows) {
      multiply_rows<kTileRows>(rows - m, panel, kStride, x + m * x_stride, x_stride,
                               blocks * kFloatRun, acc + m * kFloatChannels * kFloatLanes);
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t c = 0; c < channels; ++c) {
      const float sum = add_halves(load(acc + (m * kFloatChannels + c) * kFloatLanes));
      const int64_t n = first_channel + c;
      args.y[(first_row + m) * args.y_row_stride + n] =
          args.bias != nullptr ? sum + args.bias[n] : sum;
    }
  }
}

template <class Unpack>
void multiply_all_panels(const MultiplyFloatsArgs& args, const Unpack& unpack, int64_t begin,
                         int64_t end) {
  for (int64_t m = 0; m < args.rows; m += kMostRows) {
    const int64_t rows = args.rows - m < kMostRows ? args.rows - m : kMostRows;
    for (int64_t block = begin; block < end; ++block) {
      multiply_panels(args, unpack, m, rows, block * kFloatChannels);
    }
  }
}

}  // namespace
