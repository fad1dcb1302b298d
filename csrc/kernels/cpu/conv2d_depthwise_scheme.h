// How a depthwise convolution of two output rows is cut into dot products of four taps.
#pragma once

namespace qtoolkit::kernels::avx512vnni {
namespace {

// The four taps of a dot product, a quad: of one input column, of two rows and two columns (column
// by column), or of one row. A strip holds the quads at every kStride-th column of some rows, and
// serves both output rows: with a stride of 1 a column of four rows has three taps for each.
enum class Quad { column, square, row };
struct Strip {
  Quad quad;
  int row;  // the first
};
constexpr int columns_of(Quad quad) {
  return quad == Quad::column ? 1 : quad == Quad::square ? 2 : 4;
}

template <int kKernel, int kStride>
struct Strips;
template <>
struct Strips<3, 1> {
  static constexpr Strip kList[] = {{Quad::column, 0}};
};
template <>
struct Strips<3, 2> {
  static constexpr Strip kList[] = {{Quad::square, 0}, {Quad::row, 2}, {Quad::square, 3}};
};
template <>
struct Strips<5, 1> {
  static constexpr Strip kList[] = {{Quad::column, 0}, {Quad::square, 4}};
};
template <>
struct Strips<5, 2> {
  static constexpr Strip kList[] = {
      {Quad::square, 0}, {Quad::row, 2}, {Quad::square, 3}, {Quad::square, 5}};
};
template <>
struct Strips<7, 1> {
  static constexpr Strip kList[] = {{Quad::column, 0}, {Quad::column, 4}};
};

template <int kKernelSize, int kStrideSize>
struct Scheme {
  static constexpr int kKernel = kKernelSize, kStride = kStrideSize;
  static constexpr const auto& kList = Strips<kKernel, kStride>::kList;
  static constexpr int kStrips = sizeof(kList) / sizeof(Strip);
  static constexpr int kInputRows = kKernel + kStride;  // of two output rows

  // Dot products of an output with a strip, and the distance from one's quad to the next one's:
  // quads begin at every kStride-th column.
  static constexpr int dots(int strip) {
    return (kKernel + columns_of(kList[strip].quad) - 1) / columns_of(kList[strip].quad);
  }
  static constexpr int step(int strip) {
    return kList[strip].quad == Quad::row ? 1 : columns_of(kList[strip].quad) / kStride;
  }
  // Quads that an output needs beyond the one at its first column.
  static constexpr int lookahead(int strip) { return (dots(strip) - 1) * step(strip); }
  // Whether one of `pixels` outputs side by side needs the quad `index` beyond the first one's.
  static constexpr bool needs(int strip, int index, int pixels) {
    for (int n = 0; n < dots(strip); ++n) {
      const int pixel = index - n * step(strip);
      if (pixel >= 0 && pixel < pixels) return true;
    }
    return false;
  }
  // Whether a quad's second half is the next one's first half.
  static constexpr bool chained(int strip) {
    return kList[strip].quad == (kStride == 1 ? Quad::square : Quad::row);
  }
  static constexpr int kReach = kKernel - 1;  // the most lookahead
  static constexpr bool uses(int out_row, int strip) {
    const int first = kList[strip].row - out_row * kStride;
    return first < kKernel && first + 4 / columns_of(kList[strip].quad) > 0;
  }
  static constexpr int first_dot(int strip) {
    return strip == 0 ? 0 : first_dot(strip - 1) + dots(strip - 1);
  }
  static constexpr int kDots = first_dot(kStrips);
  static constexpr int kMost = kStrips <= 2 ? 28 : 14;  // outputs of a run
  static constexpr int kLength = kMost + kKernel - 1;
};

}  // namespace
}  // namespace qtoolkit::kernels::avx512vnni
