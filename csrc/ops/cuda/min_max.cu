// Minimum and maximum of float tensors on CUDA: the CPU operators' bits.
#include <torch/library.h>

#include <tuple>

#include "ops/cuda/range.cuh"

namespace qtoolkit::ops {
namespace {

using TensorPair = std::tuple<Tensor, Tensor>;

struct WriteExtremes {
  float* minimum;
  float* maximum;
  __device__ void operator()(int64_t channel, const Extremes& extremes) const {
    minimum[channel] = extremes.minimum;
    maximum[channel] = extremes.maximum;
  }
};

template <class Finish>
void run(const Tensor& x, const ChannelView& view, const Finish& finish) {
  with_element_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    reduce(ExtremesOp{}, view, ReduceArgs<T>{.x = const_data<T>(x)}, finish, x);
  });
}

void check_input(const char* op, const Tensor& x) {
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.numel() != 0, "qtoolkit::", op, ": x is empty, ", describe(x),
                    "; it has no statistics");
}

TensorPair write(const Tensor& x, const ChannelView& view, at::IntArrayRef sizes) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto options = x.options().dtype(at::kFloat);
  const Tensor minimum = at::empty(sizes, options), maximum = at::empty(sizes, options);
  run(x.contiguous(x.suggest_memory_format()), view,
      WriteExtremes{mutable_data<float>(minimum), mutable_data<float>(maximum)});
  return {minimum, maximum};
}

TensorPair min_max_cuda(const Tensor& x) {
  check_input("min_max", x);
  return write(x, {1, 1, x.numel()}, {});
}

TensorPair min_max_per_channel_cuda(const Tensor& x, int64_t ch_axis) {
  check_input("min_max_per_channel", x);
  ch_axis = check_ch_axis("min_max_per_channel", x, ch_axis);
  return write(x, channel_view(x.sizes(), ch_axis, x.suggest_memory_format()),
               x.sizes().slice(ch_axis, 1));
}

}  // namespace

void observe_range(const Tensor& x, const RangeState& state) {
  run(x, {1, 1, x.numel()}, Observe{state});
}

TORCH_LIBRARY_IMPL(qtoolkit, CUDA, m) {
  m.impl("min_max", min_max_cuda);
  m.impl("min_max_per_channel", min_max_per_channel_cuda);
}

}  // namespace qtoolkit::ops
