// Element-wise operators: y[i] = op(x[i], other[i]), with parameters of the channel of element i,
// and a mask that is read or written.
//
// An Op has
//   Param                             the parameters of one channel
//   kTwo                              whether there may be a second input, `other`
//   void start()                      reads from the device what all elements share
//   Param param(int64_t c) const
//   float operator()(float x, float other, const Param& param, bool& bit) const
// `bit` comes with the mask's bit, true without a mask, and leaves with the one to be written.
#pragma once

#include <numeric>

#include "ops/cuda/common.cuh"
#include "ops/layout.h"

namespace qtoolkit::ops {

template <class T>
struct MapArgs {
  const T* x = nullptr;
  const T* other = nullptr;  // or none
  T* y = nullptr;
  const uint8_t* mask_in = nullptr;  // or none
  uint8_t* mask_out = nullptr;       // or none; its bits beyond `count` are set to 0
  int64_t count = 0;
  int64_t whole = 0;  // the first tiles, which can be moved by words
};

// --- where parameters belong ---------------------------------------------------------------------

// All elements have parameters 0.
struct Whole {
  template <class Op>
  struct State {
    typename Op::Param param;
  };
  template <class T, class Op>
  __device__ void start(const Op& op, State<Op>& state, int64_t /*tile*/, int /*lane*/) const {
    state.param = op.param(0);
  }
  template <class T, class Op>
  __device__ void move(const Op& /*op*/, State<Op>& /*state*/, int64_t /*tile*/,
                       int /*lane*/) const {}
  template <class T, class Op, class Body>
  __device__ void each(const Op& /*op*/, const State<Op>& state, int64_t /*tile*/, int /*lane*/,
                       const Body& body) const {
#pragma unroll
    for (int k = 0; k < kShare; ++k) body(k, state.param);
  }
};

// Element i has parameters i % channels. They stay in registers where the tiles of a warp begin at
// the same channel (`fixed`).
struct Across {
  int64_t channels;
  bool fixed;

  template <class Op>
  struct State {
    typename Op::Param params[kShare];
  };
  template <class T, class Op>
  __device__ void start(const Op& op, State<Op>& state, int64_t tile, int lane) const {
    const int64_t first = tile * kTile % channels;
#pragma unroll
    for (int k = 0; k < kShare; ++k) {
      // A 32-bit division costs a fraction of a 64-bit one.
      const int64_t at = first + place<T>(lane, k);
      const int64_t c = at < INT32_MAX && channels < INT32_MAX
                            ? static_cast<uint32_t>(at) % static_cast<uint32_t>(channels)
                            : at % channels;
      state.params[k] = op.param(c);
    }
  }
  template <class T, class Op>
  __device__ void move(const Op& op, State<Op>& state, int64_t tile, int lane) const {
    if (!fixed) start<T>(op, state, tile, lane);
  }
  template <class T, class Op, class Body>
  __device__ void each(const Op& /*op*/, const State<Op>& state, int64_t /*tile*/, int /*lane*/,
                       const Body& body) const {
#pragma unroll
    for (int k = 0; k < kShare; ++k) body(k, state.params[k]);
  }
};

// Rows of `inner` elements, each cut into runs of `group` elements, the last of a row maybe
// shorter; run r has parameters r % channels.
struct Runs {
  Divider inner, group, channels;
  int64_t runs_in_row;
  bool whole_words;  // no word lies in two runs

  template <class Op>
  struct State {};
  template <class T, class Op>
  __device__ void start(const Op& /*op*/, State<Op>& /*state*/, int64_t /*tile*/,
                        int /*lane*/) const {}
  template <class T, class Op>
  __device__ void move(const Op& /*op*/, State<Op>& /*state*/, int64_t /*tile*/,
                       int /*lane*/) const {}
  template <class T, class Op, class Body>
  __device__ void each(const Op& op, const State<Op>& /*state*/, int64_t tile, int lane,
                       const Body& body) const {
    constexpr int kSize = Word<T>::kSize;
#pragma unroll
    for (int w = 0; w < Share<T>::kWords; ++w) {
      const int64_t at = tile * kTile + place<T>(lane, w * kSize);
      const int64_t row = inner.divide(at);
      const int64_t in_row = at - row * inner.divisor();
      int64_t run_in_row = runs_in_row == 1 ? 0 : group.divide(in_row);
      const int64_t run = row * runs_in_row + run_in_row;
      int64_t c = run - channels.divide(run) * channels.divisor();
      typename Op::Param param = op.param(c);
      if (whole_words) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) body(w * kSize + k, param);
        continue;
      }
      int64_t left = run_size(run_in_row) - (in_row - run_in_row * group.divisor());
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (left == 0) {
          c = c + 1 == channels.divisor() ? 0 : c + 1;
          run_in_row = run_in_row + 1 == runs_in_row ? 0 : run_in_row + 1;
          left = run_size(run_in_row);
          param = op.param(c);
        }
        body(w * kSize + k, param);
        --left;
      }
    }
  }

 private:
  __device__ int64_t run_size(int64_t run_in_row) const {
    const int64_t rest = inner.divisor() - run_in_row * group.divisor();
    return rest < group.divisor() ? rest : group.divisor();
  }
};

// --- the kernel ----------------------------------------------------------------------------------

template <class T, class Op, class View>
__device__ uint32_t map_share(const Op& op, const View& view,
                              const typename View::template State<Op>& state, int64_t tile,
                              int lane, uint32_t bits_in, const Share<T>& x, const Share<T>& other,
                              float (&y)[kShare]) {
  float others[kShare] = {};
  unpack(x, y);
  if constexpr (Op::kTwo) unpack(other, others);
  uint32_t bits = 0;
  view.template each<T>(op, state, tile, lane, [&](int k, const typename Op::Param& param) {
    bool bit = (bits_in >> k & 1) != 0;
    y[k] = op(y[k], others[k], param, bit);
    bits |= static_cast<uint32_t>(bit) << k;
  });
  return bits;
}

template <class Op, class T, class View>
__global__ void __launch_bounds__(kThreads) map_kernel(Op op, View view, MapArgs<T> args) {
  constexpr int kTiles = (Op::kTwo ? 2 : 4) / Share<T>::kWords;  // in flight
  const int lane = threadIdx.x % kWarp;
  const int64_t step = gridDim.x * static_cast<int64_t>(kWarps);
  const int64_t first = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp;
  typename View::template State<Op> state;
  op.start();
  view.template start<T>(op, state, first, lane);

  for (int64_t tile = first; tile < args.whole; tile += kTiles * step) {
    Share<T> x[kTiles], other[kTiles];
    uint32_t bytes[kTiles];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int64_t at = tile + t * step;
      if (at < args.whole) {
        x[t] = load_share(args.x + at * kTile, lane);
        other[t] = {};
        if (Op::kTwo && args.other != nullptr) other[t] = load_share(args.other + at * kTile, lane);
        bytes[t] = args.mask_in == nullptr ? 0xffu : args.mask_in[at * kWarp + mask_place<T>(lane)];
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int64_t at = tile + t * step;
      if (at < args.whole) {  // the same for the whole warp
        view.template move<T>(op, state, at, lane);
        float y[kShare];
        const uint32_t bits = map_share(op, view, state, at, lane, byte_to_bits<T>(bytes[t], lane),
                                        x[t], other[t], y);
        store_share(args.y + at * kTile, lane, y);
        const uint32_t byte = bits_to_byte<T>(bits, lane);
        if (args.mask_out != nullptr) {
          args.mask_out[at * kWarp + mask_place<T>(lane)] = static_cast<uint8_t>(byte);
        }
      }
    }
  }

  for (int64_t tile = args.whole + first; tile * kTile < args.count; tile += step) {
    const int64_t left = args.count - tile * kTile;
    const int64_t mask_at = tile * kWarp + mask_place<T>(lane);
    const bool in_mask = mask_at * 8 < args.count;
    const Share<T> x = load_share(args.x + tile * kTile, lane, left);
    Share<T> other = {};
    if (Op::kTwo && args.other != nullptr) {
      other = load_share(args.other + tile * kTile, lane, left);
    }
    const uint32_t byte_in = args.mask_in == nullptr || !in_mask ? 0xffu : args.mask_in[mask_at];
    view.template start<T>(op, state, tile, lane);
    float y[kShare];
    uint32_t bits =
        map_share(op, view, state, tile, lane, byte_to_bits<T>(byte_in, lane), x, other, y);
    store_share(args.y + tile * kTile, lane, y, left);
#pragma unroll
    for (int k = 0; k < kShare; ++k) {
      if (place<T>(lane, k) >= left) bits &= ~(1u << k);
    }
    const uint32_t byte = bits_to_byte<T>(bits, lane);
    if (args.mask_out != nullptr && in_mask) args.mask_out[mask_at] = static_cast<uint8_t>(byte);
  }
}

// --- launching -----------------------------------------------------------------------------------

// Which parameters an element has: as in Runs; channels = 1 for all the same.
struct ParamView {
  int64_t inner = 1, group = 1, channels = 1;

  static ParamView of(const ChannelView& view) { return {view.inner, view.inner, view.channels}; }
};

template <class Op, class View, class T>
void launch_map(const Op& op, const View& view, const MapArgs<T>& args, int64_t blocks) {
  map_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      op, view, args);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// y and the inputs are dense in the same order, on the current device.
template <class Op, class T>
void map(const Op& op, ParamView view, MapArgs<T> args) {
  constexpr int64_t kMostBlocks = 65536;      // the warps of more go round again
  constexpr int64_t kBlocksOfColumns = 4096;  // few, as each warp loads its parameters once
  if (args.count == 0) return;
  view.group = std::min(view.group, view.inner);
  const int64_t tiles = divide_up(args.count, kTile);
  const bool words = is_aligned({args.x, args.other, args.y});
  args.whole = words ? args.count / kTile : 0;
  if (view.channels == 1) {
    constexpr int kTiles = (Op::kTwo ? 2 : 4) / Share<T>::kWords;
    launch_map(op, Whole{}, args, std::min(divide_up(tiles, kWarps * kTiles), kMostBlocks));
    return;
  }
  if (view.inner == 1) {
    // Tiles begin at the same channel again after `period` tiles.
    const int64_t period = view.channels / std::gcd(view.channels, int64_t{kTile});
    const int64_t blocks_of_period = period / std::gcd(period, int64_t{kWarps});
    const int64_t needed = divide_up(tiles, kWarps);
    bool fixed = true;
    int64_t blocks = needed;
    if (needed > kBlocksOfColumns) {
      fixed = blocks_of_period <= kBlocksOfColumns;
      blocks = fixed ? divide_up(kBlocksOfColumns, blocks_of_period) * blocks_of_period
                     : kBlocksOfColumns;
    }
    launch_map(op, Across{view.channels, fixed}, args, blocks);
    return;
  }
  const int64_t most = tiles * kTile;
  const bool whole_words = view.group % Word<T>::kSize == 0 && view.inner % Word<T>::kSize == 0;
  const Runs runs{Divider(view.inner, most), Divider(view.group, most),
                  Divider(view.channels, most), divide_up(view.inner, view.group), whole_words};
  constexpr int kTiles = (Op::kTwo ? 2 : 4) / Share<T>::kWords;
  launch_map(op, runs, args, std::min(divide_up(tiles, kWarps * kTiles), kMostBlocks));
}

}  // namespace qtoolkit::ops
