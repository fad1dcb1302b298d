#include "ops/binary.h"

#include <ATen/ExpandUtils.h>

#include <utility>
#include <vector>

#include "ops/layout.h"

namespace qtoolkit::ops {
namespace {

c10::SymDimVector broadcast_sizes(const char* op, const Tensor& a, const Tensor& b) {
  const auto one_or_equal = [](const c10::SymInt& m, const c10::SymInt& n) {
    return m == n || m == 1 || n == 1;
  };
  for (int64_t d = 1; d <= std::min(a.dim(), b.dim()); ++d) {
    TORCH_CHECK_VALUE(one_or_equal(a.sym_size(-d), b.sym_size(-d)), "qtoolkit::", op,
                      ": the shapes of a ", describe(a), " and b ", describe(b),
                      " do not broadcast to one");
  }
  return at::infer_size_symdimvector(a.sym_sizes(), b.sym_sizes());
}

// The layout of an operand that already has the output's shape.
at::MemoryFormat output_format(const Tensor& a, const Tensor& b, c10::SymIntArrayRef sizes) {
  if (a.sym_sizes() == sizes) return a.suggest_memory_format();
  if (b.sym_sizes() == sizes) return b.suggest_memory_format();
  return at::MemoryFormat::Contiguous;
}

// A dimension of the output, or several that are one in all three tensors.
struct Loop {
  int64_t size, a, b, y;  // strides
};

// The output's dimensions, outermost in memory first.
std::vector<Loop> loops_of(const Tensor& a, const Tensor& b, const Tensor& y) {
  std::vector<Loop> loops;
  for (int64_t d = 0; d < y.dim(); ++d) {
    if (y.size(d) != 1) loops.push_back({y.size(d), a.stride(d), b.stride(d), y.stride(d)});
  }
  std::stable_sort(loops.begin(), loops.end(),
                   [](const Loop& m, const Loop& n) { return m.y > n.y; });
  std::vector<Loop> merged;
  for (const Loop& inner : loops) {
    Loop* outer = merged.empty() ? nullptr : &merged.back();
    if (outer != nullptr && outer->a == inner.a * inner.size && outer->b == inner.b * inner.size &&
        outer->y == inner.y * inner.size) {
      *outer = {outer->size * inner.size, inner.a, inner.b, inner.y};
    } else {
      merged.push_back(inner);
    }
  }
  if (merged.empty()) merged.push_back({1, 1, 1, 1});
  return merged;
}

// More groups than one for each of these codes would take longer to tell apart than to copy.
constexpr int64_t kLeastGroup = 256;

int64_t group_size(const std::vector<Loop>& loops) {
  if (loops.size() < 3) return kLeastGroup;  // there is one group
  return loops[loops.size() - 1].size * loops[loops.size() - 2].size;
}

bool walkable(int64_t a_stride, int64_t b_stride) {
  return (a_stride == 1 && (b_stride == 0 || b_stride == 1)) || (a_stride == 0 && b_stride == 1);
}

// The places of all groups in one tensor.
std::vector<int64_t> offsets_of(const std::vector<Loop>& outer, int64_t Loop::*stride) {
  std::vector<int64_t> offsets{0};
  for (const Loop& loop : outer) {
    std::vector<int64_t> next;
    next.reserve(offsets.size() * static_cast<size_t>(loop.size));
    for (const int64_t offset : offsets) {
      for (int64_t i = 0; i < loop.size; ++i) next.push_back(offset + i * (loop.*stride));
    }
    offsets = std::move(next);
  }
  return offsets;
}

}  // namespace

Tensor binary_meta(const char* op, const BinaryArguments& given) {
  const Tensor& a = given.a;
  check_codes(op, "a", a);
  check_codes(op, "b", given.b);
  check_device(op, "b", given.b, a);
  check_qparams(op, "a_", given.a_scale, given.a_zero_point, a);
  check_qparams(op, "b_", given.b_scale, given.b_zero_point, a);
  check_qparams(op, "y_", given.y_scale, given.y_zero_point, a);
  const CodeRange range = check_quant_range(op, given.quant_min, given.quant_max);
  const c10::SymDimVector sizes = broadcast_sizes(op, a, given.b);
  return empty_beside(a, sizes, range.dtype(), output_format(a, given.b, sizes));
}

BinaryQParams read_binary_qparams(const char* op, const BinaryArguments& given) {
  BinaryQParams result;
  result.a_range = check_codes(op, "a", given.a);
  result.b_range = check_codes(op, "b", given.b);
  result.range = check_quant_range(op, given.quant_min, given.quant_max);
  result.a = read_qparams(op, "a_", given.a_scale, given.a_zero_point, result.a_range);
  result.b = read_qparams(op, "b_", given.b_scale, given.b_zero_point, result.b_range);
  result.y = read_qparams(op, "y_", given.y_scale, given.y_zero_point, result.range);
  return result;
}

BroadcastRows broadcast_rows(const Tensor& a, const Tensor& b, const Tensor& y) {
  const at::MemoryFormat format = y.suggest_memory_format();
  // What is broadcast stays as small as it is, if its codes lie as a kernel reads them.
  const auto spread = [&](const Tensor& operand) {
    return operand.sizes() == y.sizes() ? operand.contiguous(format) : operand.expand(y.sizes());
  };
  BroadcastRows result;
  result.a = spread(a);
  result.b = spread(b);
  std::vector<Loop> loops = loops_of(result.a, result.b, y);
  if (!walkable(loops.back().a, loops.back().b) || group_size(loops) < kLeastGroup) {
    result.a = result.a.contiguous(format);
    result.b = result.b.contiguous(format);
    loops = loops_of(result.a, result.b, y);
  }
  if (loops.back().a == 0) {
    result.swapped = true;
    std::swap(result.a, result.b);
    for (Loop& loop : loops) std::swap(loop.a, loop.b);
  }
  result.b_single = loops.back().b == 0;
  result.channels = loops.back().size;
  loops.pop_back();
  if (!loops.empty()) {
    result.rows = loops.back().size;
    result.a_row_stride = loops.back().a;
    result.b_row_stride = loops.back().b;
    result.y_row_stride = loops.back().y;
    loops.pop_back();
  }
  result.a_offsets = offsets_of(loops, &Loop::a);
  result.b_offsets = offsets_of(loops, &Loop::b);
  result.y_offsets = offsets_of(loops, &Loop::y);
  result.outer = static_cast<int64_t>(result.y_offsets.size());
  return result;
}

}  // namespace qtoolkit::ops
