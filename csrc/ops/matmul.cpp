// Products of matrices of codes, as attention has them: both sides are activations, so the right
// one is packed at every call.
#include "kernels/matmul.h"

#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "kernels/kernels.h"
#include "ops/aligned_buffer.h"
#include "ops/checks.h"
#include "ops/code_product.h"
#include "ops/conv_args.h"
#include "ops/layout.h"
#include "ops/parallel.h"

namespace qtoolkit::ops {
namespace {

constexpr const char* kOp = "matmul";

// So many products of 8-bit codes fit int32: 255 * 255 each.
constexpr int64_t kMostProducts = (int64_t{1} << 31) / (255 * 255);

c10::SymDimVector batch_sizes(const Tensor& a, const Tensor& b) {
  const auto a_batch = a.sym_sizes().slice(0, a.dim() - 2);
  const auto b_batch = b.sym_sizes().slice(0, b.dim() - 2);
  for (int64_t d = 3; d <= std::min(a.dim(), b.dim()); ++d) {
    const c10::SymInt &m = a.sym_size(-d), &n = b.sym_size(-d);
    TORCH_CHECK_VALUE(m == n || m == 1 || n == 1, "qtoolkit::matmul: the batches of a ",
                      describe(a), " and b ", describe(b), " do not broadcast to one");
  }
  return at::infer_size_symdimvector(a_batch, b_batch);
}

Tensor matmul_meta(const Tensor& a, const Tensor& a_scale, const Tensor& a_zero_point,
                   const Tensor& b, const Tensor& b_scale, const Tensor& b_zero_point,
                   const OptionalTensor& y_scale, const OptionalTensor& y_zero_point,
                   int64_t quant_min, int64_t quant_max) {
  check_codes(kOp, "a", a);
  check_codes(kOp, "b", b);
  check_device(kOp, "b", b, a);
  check_qparams(kOp, "a_", a_scale, a_zero_point, a);
  check_qparams(kOp, "b_", b_scale, b_zero_point, a);
  TORCH_CHECK_VALUE(a.dim() >= 2 && b.dim() >= 2 && a.sym_size(-1) == b.sym_size(-2),
                    "qtoolkit::matmul: a ", describe(a), " and b ", describe(b),
                    " must be [..., M, K] and [..., K, N]");
  const c10::SymInt products = a.sym_size(-1);
  TORCH_CHECK_VALUE(products > 0 && products <= kMostProducts, "qtoolkit::matmul: sums of ",
                    products, " products do not fit: K must lie in [1, ", kMostProducts,
                    "], or int32 could overflow");
  c10::SymDimVector sizes = batch_sizes(a, b);
  const at::ScalarType dtype =
      check_output_qparams(kOp, y_scale, y_zero_point, quant_min, quant_max, a);
  sizes.push_back(a.sym_size(-2));
  sizes.push_back(b.sym_size(-1));
  return empty_beside(a, sizes, dtype, at::MemoryFormat::Contiguous);
}

// One operand's matrices: those of a batch lie where the strides of its dimensions say.
struct Matrices {
  const uint8_t* codes;
  at::IntArrayRef sizes, strides;
  uint8_t flip;        // code ^ flip is unsigned (left) or signed (right)
  int32_t zero_point;  // of the code after that

  int64_t row_stride() const { return strides[strides.size() - 2]; }
  int64_t column_stride() const { return strides.back(); }
  const uint8_t* matrix(int64_t index) const {
    const uint8_t* result = codes;
    for (auto d = static_cast<int64_t>(sizes.size()) - 3; d >= 0; --d) {
      result += index % sizes[d] * strides[d];
      index /= sizes[d];
    }
    return result;
  }
};

// How the products of one call become results.
struct Output {
  float multiplier;
  int32_t zero_point;
  CodeRange range;
  void* y;
  bool codes;
};

class Matmul {
 public:
  // `a` is [..., M, K] and `b` [..., K, N] with the same batch dimensions.
  Matmul(const Matrices& a, const Matrices& b, const Output& output)
      : a_(a),
        b_(b),
        output_(output),
        rows_(a.sizes[a.sizes.size() - 2]),
        width_(a.sizes.back()),
        shape_{.out_height = 1,
               .out_width = rows_,
               .in_channels = width_,
               .out_channels = b.sizes.back()},
        copies_(a.flip != 0 || a.column_stride() != 1 || shape_.overreads()),
        row_stride_(copies_ ? spread_stride(width_) : a.row_stride()),
        factors_(static_cast<size_t>(rows_), -a.zero_point),
        ones_(static_cast<size_t>(rows_), 1.0f),
        multipliers_(static_cast<size_t>(shape_.out_channels), output.multiplier) {}

  int64_t multiplications() const { return rows_ * width_ * shape_.out_channels; }

  // Memory for one product at a time.
  struct Workspace {
    explicit Workspace(const Matmul& matmul)
        : packed(aligned_buffer<int8_t>(matmul.shape_.packed_bytes())),
          rows(aligned_buffer<uint8_t>(
              matmul.copies_ ? matmul.rows_ * matmul.row_stride_ + kernels::kOverread : 0)),
          column_sums(static_cast<size_t>(matmul.shape_.padded_channels())),
          row_terms(static_cast<size_t>(matmul.rows_)) {}

    AlignedBuffer<int8_t> packed;
    AlignedBuffer<uint8_t> rows;
    std::vector<int32_t> column_sums, row_terms;
  };

  void run(int64_t index, Workspace& workspace) const {
    pack(index, workspace);
    const uint8_t* const rows = read_rows(index, workspace);
    const CodeProduct product({.codes = rows,
                               .row_stride = row_stride_,
                               .rows = rows_,
                               .width = width_,
                               .packed = workspace.packed.get(),
                               .columns = shape_.out_channels});
    at::parallel_for(0, product.blocks(), grain_of(kMultiplyGrain, product.multiplications()),
                     [&](int64_t begin, int64_t end) {
                       const auto buffer =
                           aligned_buffer<std::byte>(product.largest().sums() * sizeof(int32_t));
                       auto* const sums = reinterpret_cast<int32_t*>(buffer.get());
                       for (; begin < end; ++begin) {
                         const CodeProduct::Block block = product.block(begin);
                         product.multiply(block, sums);
                         write(index, block, sums, workspace);
                       }
                     });
  }

 private:
  void pack(int64_t index, Workspace& workspace) const {
    const kernels::PackMatrixArgs args{.codes = b_.matrix(index),
                                       .rows = width_,
                                       .columns = shape_.out_channels,
                                       .row_stride = b_.row_stride(),
                                       .column_stride = b_.column_stride(),
                                       .flip = b_.flip,
                                       .packed = workspace.packed.get(),
                                       .sums = workspace.column_sums.data()};
    at::parallel_for(0, shape_.blocks_per_group(),
                     grain_of(kElementGrain, width_ * kernels::kChannelBlock),
                     [&](int64_t begin, int64_t end) { kernels::pack_matrix(args, begin, end); });
  }

  // The rows of the left matrix as unsigned codes, and the terms that they add to their sums:
  //   sum of (a - za) (b - zb) = sum of a b - za (sum of b) - zb (sum of a) + K za zb
  const uint8_t* read_rows(int64_t index, Workspace& workspace) const {
    const uint8_t* const from = a_.matrix(index);
    const uint8_t* const rows = copies_ ? workspace.rows.get() : from;
    const kernels::SumRowsArgs args{.codes = rows,
                                    .width = width_,
                                    .row_stride = row_stride_,
                                    .sums = workspace.row_terms.data()};
    const auto constant =
        static_cast<int32_t>(width_ * a_.zero_point * int64_t{b_.zero_point});  // fits, as K does
    at::parallel_for(0, rows_, grain_of(kElementGrain, width_), [&](int64_t begin, int64_t end) {
      if (copies_) copy_rows(from, workspace.rows.get(), begin, end);
      kernels::sum_rows(args, begin, end);
      for (int64_t row = begin; row < end; ++row) {
        int32_t& term = workspace.row_terms[static_cast<size_t>(row)];
        term = constant - b_.zero_point * term;
      }
    });
    return rows;
  }

  void copy_rows(const uint8_t* from, uint8_t* to, int64_t begin, int64_t end) const {
    const int64_t step = a_.column_stride();
    const uint8_t flip = a_.flip;
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* const x = from + row * a_.row_stride();
      uint8_t* const y = to + row * row_stride_;
      if (step == 1) {
        for (int64_t i = 0; i < width_; ++i) y[i] = x[i] ^ flip;
      } else {
        for (int64_t i = 0; i < width_; ++i) y[i] = x[i * step] ^ flip;
      }
    }
  }

  void write(int64_t index, const CodeProduct::Block& block, const int32_t* sums,
             const Workspace& workspace) const {
    const int64_t columns = shape_.out_channels;
    const int64_t to = (index * rows_ + block.row) * columns + block.column;
    kernels::scale_sums({.sums = sums,
                         .sums_row_stride = block.columns,
                         .columns = block.columns,
                         .row_factor = factors_.data() + block.row,
                         .row_term = workspace.row_terms.data() + block.row,
                         .row_scale = ones_.data() + block.row,
                         .column_term = workspace.column_sums.data() + block.column,
                         .column_scale = multipliers_.data() + block.column,
                         .y_row_stride = columns,
                         .y = output_.codes ? nullptr : static_cast<float*>(output_.y) + to,
                         .y_codes = output_.codes ? static_cast<uint8_t*>(output_.y) + to : nullptr,
                         .zero_point = output_.zero_point,
                         .lo = output_.range.min,
                         .hi = output_.range.max},
                        0, block.rows);
  }

  Matrices a_, b_;
  Output output_;
  int64_t rows_, width_;
  kernels::Conv2dShape shape_;
  bool copies_;  // the rows of the left matrix, into the workspace
  int64_t row_stride_;
  std::vector<int32_t> factors_;
  std::vector<float> ones_, multipliers_;
};

Matrices matrices_of(const Tensor& tensor, uint8_t flip, int32_t zero_point) {
  return {static_cast<const uint8_t*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
          flip, zero_point};
}

// [N, ...] without batch dimensions, or with its own dimensions expanded to those of the output.
Tensor with_batch(const Tensor& operand, at::IntArrayRef sizes) {
  std::vector<int64_t> wanted = sizes.vec();
  wanted.back() = operand.size(-1);
  wanted[wanted.size() - 2] = operand.size(-2);
  return operand.expand(wanted);
}

Tensor matmul_cpu(const Tensor& a, const Tensor& a_scale, const Tensor& a_zero_point,
                  const Tensor& b, const Tensor& b_scale, const Tensor& b_zero_point,
                  const OptionalTensor& y_scale, const OptionalTensor& y_zero_point,
                  int64_t quant_min, int64_t quant_max) {
  const Tensor y = matmul_meta(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale,
                               y_zero_point, quant_min, quant_max);
  const CodeRange a_range = check_codes(kOp, "a", a);
  const CodeRange b_range = check_codes(kOp, "b", b);
  const QParams a_qparams = read_qparams(kOp, "a_", a_scale, a_zero_point, a_range);
  const QParams b_qparams = read_qparams(kOp, "b_", b_scale, b_zero_point, b_range);
  Output output{.multiplier = 1.0f, .zero_point = 0, .range = {}, .y = nullptr, .codes = false};
  QParams y_qparams;
  if (y_scale) {
    output.range = check_quant_range(kOp, quant_min, quant_max);
    output.codes = true;
    y_qparams = read_qparams(kOp, "y_", *y_scale, *y_zero_point, output.range);
    output.zero_point = y_qparams.zero_point;
  }
  output.multiplier =
      multiplier(kOp, static_cast<double>(a_qparams.scale) * b_qparams.scale, y_qparams.scale);
  if (y.numel() == 0) return y;
  output.y = y.mutable_data_ptr();

  // Where all matrices on the left meet the same one on the right they are one.
  const bool one_right = b.numel() == b.size(-1) * b.size(-2);
  const Tensor left = one_right ? a.reshape({-1, a.size(-1)}) : with_batch(a, y.sizes());
  const Tensor right = one_right ? b.reshape({b.size(-2), b.size(-1)}) : with_batch(b, y.sizes());
  const Matmul matmul(
      matrices_of(left, a_range.is_signed() ? 0x80 : 0, a_qparams.zero_point - a_range.min),
      matrices_of(right, b_range.is_signed() ? 0 : 0x80,
                  b_qparams.zero_point - (b_range.is_signed() ? 0 : 128)),
      output);
  const int64_t batch = one_right ? 1 : y.numel() / (y.size(-1) * y.size(-2));
  const auto run = [&](int64_t begin, int64_t end) {
    Matmul::Workspace workspace(matmul);
    for (; begin < end; ++begin) matmul.run(begin, workspace);
  };
  // Few products share the threads within each.
  if (batch < at::get_num_threads()) {
    run(0, batch);
  } else {
    at::parallel_for(0, batch, grain_of(kMultiplyGrain, matmul.multiplications()), run);
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(qtoolkit, m) {
  m.def(
      "matmul(Tensor a, Tensor a_scale, Tensor a_zero_point, Tensor b, Tensor b_scale, "
      "Tensor b_zero_point, Tensor? y_scale, Tensor? y_zero_point, int quant_min, "
      "int quant_max) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(qtoolkit, Meta, m) { m.impl("matmul", matmul_meta); }
TORCH_LIBRARY_IMPL(qtoolkit, CPU, m) { m.impl("matmul", matmul_cpu); }

}  // namespace qtoolkit::ops
