// A function of one code: a table of what each code becomes.
#include <torch/library.h>

#include "kernels/elementwise.h"
#include "ops/checks.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "lookup";

Tensor lookup_meta(const Tensor& x, const Tensor& table) {
  check_codes(kOp, "x", x);
  check_codes(kOp, "table", table);
  check_device(kOp, "table", table, x);
  TORCH_CHECK_VALUE(table.dim() == 1 && table.sym_size(0) == 256,
                    "qtoolkit::lookup: table must hold one element for each of 256 codes, got ",
                    describe(table));
  return empty_beside(x, x.sym_sizes(), table.scalar_type(), x.suggest_memory_format());
}

Tensor lookup_cpu(const Tensor& x, const Tensor& table) {
  Tensor y = lookup_meta(x, table);
  const Tensor dense = x.contiguous(x.suggest_memory_format());
  const Tensor entries = table.contiguous();
  const kernels::LookupArgs args{.x = static_cast<const uint8_t*>(dense.const_data_ptr()),
                                 .y = static_cast<uint8_t*>(y.mutable_data_ptr()),
                                 .table = static_cast<const uint8_t*>(entries.const_data_ptr()),
                                 .channels = 1,
                                 .x_row_stride = 1,
                                 .y_row_stride = 1};
  at::parallel_for(0, x.numel(), kElementGrain,
                   [&](int64_t begin, int64_t end) { kernels::lookup(args, begin, end); });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def("lookup(Tensor x, Tensor table) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("lookup", lookup_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("lookup", lookup_cpu); }

}  // namespace qtoolkit::ops
