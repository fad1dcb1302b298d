// What the forward and the backward of the fused training batch norm share.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "kernels/batch_norm.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {

using BatchNormGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The operator batch_norm_act_backward on the CPU. With overwrite_grad the memory of grad may
// become a result's: nobody else may see it.
BatchNormGradients batch_norm_act_backward(const Tensor& grad, const Tensor& x,
                                           const OptionalTensor& weight, const Tensor& mean,
                                           const Tensor& invstd, const Tensor& mask, bool training,
                                           std::array<bool, 4> output_mask, bool overwrite_grad);

// x [N, C] or [N, C, ...], float.
void check_batch_norm_input(const char* op, const Tensor& x);
// float32 [C] on the device of x, if it is there.
void check_batch_norm_channels(const char* op, const char* argument, const OptionalTensor& tensor,
                               const Tensor& x);

inline ChannelView batch_norm_view(const Tensor& x) {
  return channel_view(x.sizes(), 1, x.suggest_memory_format());
}

// Bytes of a mask.
inline c10::SymInt mask_size(const Tensor& x) { return (x.sym_numel() + 7) / 8; }

// A tensor's numbers as doubles, `missing` for each channel where there is no tensor.
std::vector<double> channel_values(const OptionalTensor& tensor, int64_t channels, double missing);

// Numbers per channel as the element kernels want them; see kernels::BatchNormArgs.
class ChannelNumbers {
 public:
  explicit ChannelNumbers(const ChannelView& view);
  int64_t period() const { return period_; }
  std::vector<float> spread(const std::vector<float>& values) const;

 private:
  int64_t channels_, period_;
  bool repeated_;
};

// How a tensor is cut for the kernels that sum over it: fixed by its shape alone, so that sums do
// not depend on the number of threads. Where channels lie side by side and their number is no
// multiple of a step, several rows are seen as one of more channels, so that steps are whole; the
// rows left over form a second piece. Result r belongs to channel r % (the tensor's channels).
struct SumPiece {
  ChannelView view;
  int64_t first_element = 0;
  int64_t part_rows = 1, parts = 0;
  int64_t results() const { return parts * results_of_part(); }
  int64_t results_of_part() const { return view.inner > 1 ? 1 : view.channels; }
  int64_t elements_of_part() const {
    return view.inner > 1 ? view.inner : part_rows * view.channels;
  }
};
std::vector<SumPiece> sum_pieces(const ChannelView& view);

// Passes over one tensor alternate, since what a thread has read last is still in its cache. The
// sums of the pieces go forwards.
enum class Order : uint8_t { forwards, backwards };

// Calls run(begin, end) for blocks of [0, elements) on all threads.
template <class Run>
void for_element_blocks(int64_t elements, Order order, const Run& run) {
  constexpr int64_t kBlock = int64_t{1} << 14;
  static_assert(kBlock % kernels::kBatchNormStep == 0);
  const int64_t blocks = (elements + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, grain_of(kElementGrain, kBlock), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = order == Order::forwards ? i : begin + end - 1 - i;
      run(block * kBlock, std::min((block + 1) * kBlock, elements));
    }
  });
}

}  // namespace qtoolkit::ops
