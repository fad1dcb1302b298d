// Sums, extremes and the like for each channel, deterministic: data is cut into parts by its shape
// alone, and what the parts give is merged in a fixed order, whatever the GPU and its load.
//
// An Op has
//   Sums                              of one channel: none() and merge(const Sums&)
//   Param, param(c), void start()     as in map.cuh
//   kTwo, kOut                        whether there is a second input, and a result per element
//   void take(float x, float other, bool bit, const Param& param, Sums& sums, float& out) const
// and a Finish has void operator()(int64_t channel, const Sums& sums) const, called once for each.
#pragma once

#include "ops/cuda/common.cuh"
#include "ops/layout.h"

namespace qtoolkit::ops {

template <class T>
struct ReduceArgs {
  const T* x = nullptr;
  const T* other = nullptr;       // or none: 0
  T* out = nullptr;               // or none; may be x or other
  const uint8_t* mask = nullptr;  // or none
  int64_t outer = 1, channels = 1, inner = 1;
  bool vectors = false;  // words can be moved at once
};

template <class Op>
constexpr int kWordsInFlight = Op::kTwo ? 2 : 4;  // of each input

// One word of the inputs.
template <class Op, class T>
struct Loaded {
  Word<T> x, other;
  uint32_t bits;

  __device__ void load(const ReduceArgs<T>& args, int64_t at, int count) {
    x = load_word(args.x + at, count, args.vectors);
    other = {};
    if (Op::kTwo && args.other != nullptr) {
      other = load_word(args.other + at, count, args.vectors);
    }
    bits = 0xffu;
    if (args.mask == nullptr) return;
    if (args.vectors && count >= Word<T>::kSize) {  // at is a multiple of kSize
      bits = args.mask[at >> 3] >> (at & 7);
      return;
    }
    bits = 0;
#pragma unroll
    for (int k = 0; k < Word<T>::kSize; ++k) {
      if (k < count) bits |= (args.mask[(at + k) >> 3] >> ((at + k) & 7) & 1u) << k;
    }
  }

  // body(k, x, other, bit, out) for the first `count` elements.
  template <class Body>
  __device__ void each(const ReduceArgs<T>& args, int64_t at, int count, const Body& body) const {
    float values[Word<T>::kSize], others[Word<T>::kSize] = {}, outs[Word<T>::kSize] = {};
    unpack(x, values);
    if constexpr (Op::kTwo) unpack(other, others);
#pragma unroll
    for (int k = 0; k < Word<T>::kSize; ++k) {
      if (k < count) body(k, values[k], others[k], (bits >> k & 1u) != 0, outs[k]);
    }
    if constexpr (Op::kOut) {
      if (args.out != nullptr) store_word(args.out + at, pack<T>(outs), count, args.vectors);
    }
  }
};

// Merges sums[0, size) of the threads into sums[0], for each of `columns` that lie side by side.
template <class Sums>
__device__ void merge_in_block(Sums* shared, int index, int size, int columns) {
  int half = 1;
  while (half < size) half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    __syncthreads();
    if (index < half && index + half < size) {
      shared[threadIdx.x].merge(shared[threadIdx.x + half * columns]);
    }
  }
  __syncthreads();
}

// Block (c, part) reduces its part of channel c: words [part * words_in_part, ...) of the runs of
// `inner` elements. partial is [parts, channels].
template <class Op, class T>
__global__ void __launch_bounds__(kThreads)
    reduce_runs(Op op, ReduceArgs<T> args, Divider words_in_run, int64_t words_in_part,
                typename Op::Sums* partial) {
  constexpr int kSize = Word<T>::kSize, kInFlight = kWordsInFlight<Op>;
  using Sums = typename Op::Sums;
  const int64_t channel = blockIdx.x;
  const int64_t begin = blockIdx.y * words_in_part;
  const int64_t all = args.outer * words_in_run.divisor();
  const int64_t end = begin + words_in_part < all ? begin + words_in_part : all;
  op.start();
  const typename Op::Param param = op.param(channel);
  Sums sums = Sums::none();
  for (int64_t word = begin + threadIdx.x; word < end; word += kThreads * kInFlight) {
    Loaded<Op, T> loaded[kInFlight];
    int64_t at[kInFlight];
    int count[kInFlight];
#pragma unroll
    for (int w = 0; w < kInFlight; ++w) {
      const int64_t current = word + w * kThreads;
      count[w] = 0;
      if (current < end) {
        const int64_t run = words_in_run.divide(current);
        const int64_t in_run = (current - run * words_in_run.divisor()) * kSize;
        const int64_t left = args.inner - in_run;
        count[w] = left < kSize ? static_cast<int>(left) : kSize;
        at[w] = (run * args.channels + channel) * args.inner + in_run;
        loaded[w].load(args, at[w], count[w]);
      }
    }
#pragma unroll
    for (int w = 0; w < kInFlight; ++w) {
      if (count[w] > 0) {
        loaded[w].each(args, at[w], count[w], [&](int, float x, float other, bool bit, float& out) {
          op.take(x, other, bit, param, sums, out);
        });
      }
    }
  }
  __shared__ alignas(16) unsigned char memory[kThreads * sizeof(Sums)];
  auto* shared = reinterpret_cast<Sums*>(memory);
  shared[threadIdx.x] = sums;
  merge_in_block(shared, threadIdx.x, kThreads, 1);
  if (threadIdx.x == 0) partial[blockIdx.y * args.channels + channel] = shared[0];
}

// The same where runs are short, of memory seen as [outer, columns], columns = channels * inner:
// block (strip, part) has `width` words of each of its rows [part * rows_in_part, ...). partial is
// [parts, columns].
template <class Op, class T>
__global__ void __launch_bounds__(kThreads)
    reduce_columns(Op op, ReduceArgs<T> args, int width, int64_t rows_in_part,
                   typename Op::Sums* partial) {
  constexpr int kSize = Word<T>::kSize, kInFlight = kWordsInFlight<Op>;
  using Sums = typename Op::Sums;
  const int64_t columns = args.channels * args.inner;
  const int height = kThreads / width;  // rows at a time
  const int row_in_block = threadIdx.x / width;
  const int64_t column = (blockIdx.x * static_cast<int64_t>(width) + threadIdx.x % width) * kSize;
  const int64_t left = row_in_block < height ? columns - column : 0;
  const int count = left < kSize ? (left < 0 ? 0 : static_cast<int>(left)) : kSize;
  op.start();
  typename Op::Param params[kSize];
  Sums sums[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    sums[k] = Sums::none();
    if (k < count) params[k] = op.param((column + k) / args.inner);
  }
  const int64_t begin = blockIdx.y * rows_in_part;
  const int64_t end = begin + rows_in_part < args.outer ? begin + rows_in_part : args.outer;
  if (count > 0) {
    for (int64_t row = begin + row_in_block; row < end; row += height * kInFlight) {
      Loaded<Op, T> loaded[kInFlight];
#pragma unroll
      for (int w = 0; w < kInFlight; ++w) {
        const int64_t current = row + w * height;
        if (current < end) loaded[w].load(args, current * columns + column, count);
      }
#pragma unroll
      for (int w = 0; w < kInFlight; ++w) {
        const int64_t current = row + w * height;
        if (current < end) {
          loaded[w].each(args, current * columns + column, count,
                         [&](int k, float x, float other, bool bit, float& out) {
                           op.take(x, other, bit, params[k], sums[k], out);
                         });
        }
      }
    }
  }
  __shared__ alignas(16) unsigned char memory[kThreads * sizeof(Sums)];
  auto* shared = reinterpret_cast<Sums*>(memory);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    shared[threadIdx.x] = sums[k];
    merge_in_block(shared, row_in_block, height, width);
    if (row_in_block == 0 && k < count) {
      partial[blockIdx.y * columns + column + k] = shared[threadIdx.x];
    }
    __syncthreads();
  }
}

// Block c merges partial [parts, channels, inner] of channel c and calls finish.
template <class Sums, class Finish>
__global__ void __launch_bounds__(kThreads)
    finish_reduction(const Sums* partial, int64_t parts, int64_t channels, int64_t inner,
                     Finish finish) {
  const int64_t channel = blockIdx.x;
  Sums sums = Sums::none();
  for (int64_t i = threadIdx.x; i < parts * inner; i += kThreads) {
    sums.merge(partial[(i / inner * channels + channel) * inner + i % inner]);
  }
  __shared__ alignas(16) unsigned char memory[kThreads * sizeof(Sums)];
  auto* shared = reinterpret_cast<Sums*>(memory);
  shared[threadIdx.x] = sums;
  merge_in_block(shared, threadIdx.x, kThreads, 1);
  if (threadIdx.x == 0) finish(channel, shared[0]);
}

// x, other and out are dense in the same order, on the current device. Without elements, finish
// gets sums of nothing.
template <class Op, class T, class Finish>
void reduce(const Op& op, const ChannelView& view, ReduceArgs<T> args, const Finish& finish,
            const at::Tensor& x) {
  using Sums = typename Op::Sums;
  constexpr int kSize = Word<T>::kSize;
  constexpr int64_t kShortRun = 32;        // in elements
  constexpr int64_t kWantedBlocks = 2048;  // fill every GPU evenly, and leave few parts
  constexpr int64_t kLeastPerThread = 4;   // words that make a part worth its launch
  constexpr int64_t kMostParts = 65535;    // of a grid's second dimension
  constexpr int64_t kMostWidth = 64;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto channels = static_cast<unsigned>(view.channels);
  if (channels == 0) return;
  args.outer = view.outer;
  args.channels = view.channels;
  args.inner = view.inner;
  const auto parts_of = [&](int64_t blocks, int64_t words_of_thread) {
    const int64_t most = std::min(divide_up(kWantedBlocks, blocks), kMostParts);
    return std::clamp<int64_t>(words_of_thread / kLeastPerThread, 1, most);
  };
  const auto make_partial = [&](int64_t count) {
    return at::empty({count * static_cast<int64_t>(sizeof(Sums))}, x.options().dtype(at::kByte));
  };
  const bool words = is_aligned({args.x, args.other, args.out});
  at::Tensor partial;
  int64_t parts = 0, inner = 1;
  if (view.outer * view.inner == 0) {
    partial = make_partial(1);
  } else if (view.inner >= kShortRun || view.channels == 1) {
    ChannelView runs = view;
    if (view.channels == 1) runs = {1, 1, view.outer * view.inner};
    args.outer = runs.outer;
    args.inner = runs.inner;
    args.vectors = words && (runs.inner % kSize == 0 || view.channels == 1);
    const int64_t words_in_run = divide_up(runs.inner, kSize);
    const int64_t words_of_channel = runs.outer * words_in_run;
    parts = parts_of(view.channels, words_of_channel / kThreads);
    const int64_t words_in_part = divide_up(words_of_channel, parts);
    partial = make_partial(parts * view.channels);
    reduce_runs<<<dim3(channels, static_cast<unsigned>(parts)), kThreads, 0, stream>>>(
        op, args, Divider(words_in_run, words_of_channel), words_in_part,
        mutable_data<Sums>(partial));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  } else {
    inner = view.inner;
    const int64_t columns = view.channels * view.inner;
    args.vectors = words && columns % kSize == 0;
    const int64_t words_in_row = divide_up(columns, kSize);
    const int64_t strips = divide_up(words_in_row, kMostWidth);
    const int64_t width = divide_up(words_in_row, strips);
    parts = parts_of(strips, view.outer * width / kThreads);
    partial = make_partial(parts * columns);
    reduce_columns<<<dim3(static_cast<unsigned>(strips), static_cast<unsigned>(parts)), kThreads, 0,
                     stream>>>(op, args, static_cast<int>(width), divide_up(view.outer, parts),
                               mutable_data<Sums>(partial));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  finish_reduction<<<channels, kThreads, 0, stream>>>(const_data<Sums>(partial), parts,
                                                      view.channels, inner, finish);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace qtoolkit::ops
