// Errors of ranges in plain C++ with vector types, compiled once for every baseline: the including
// file opens the path's namespace and defines QT_VECTOR_BYTES. No include guard and no includes, on
// purpose.

namespace {

constexpr int64_t kLanes = QT_VECTOR_BYTES / 8;
constexpr int64_t kSums = 8;
constexpr int64_t kVectors = kSums / kLanes;

using Doubles = double __attribute__((vector_size(QT_VECTOR_BYTES)));
using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES / 2)));
using Ints = int32_t __attribute__((vector_size(QT_VECTOR_BYTES / 2)));

template <class Vector, class Element>
inline Vector load(const Element* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

double total(const Doubles (&sums)[kVectors]) {
  double lanes[kSums];
  __builtin_memcpy(lanes, sums, sizeof lanes);
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

struct Cells {
  double cell, whole, most;

  Doubles integral(Doubles edge) const {
    const Doubles zero = {};
    Doubles place = edge / cell;
    place = place < zero ? zero : place;
    place = place > most ? zero + most : place;
    const Doubles k =
        __builtin_convertvector(__builtin_convertvector(place, Ints), Doubles);  // truncates
    const Doubles distance = edge - (k + 0.5) * cell;
    return k * whole + distance * distance * distance;
  }
};

// Adds the errors of kSums bins from bin i, with masses of their own.
inline void take_bins(const Cells& cells, double i, double first, const double* mass,
                      Doubles (&sums)[kVectors]) {
  Doubles lane = {};
  for (int64_t k = 0; k < kLanes; ++k) lane[k] = static_cast<double>(k);
  for (int64_t v = 0; v < kVectors; ++v) {
    const Doubles edge = lane + (i + static_cast<double>(v * kLanes));
    const Doubles area = cells.integral(edge + 1.0 - first) - cells.integral(edge - first);
    sums[v] += load<Doubles>(mass + v * kLanes) * area;
  }
}

struct Candidate {
  float scale, inverse, low, high;
};

// Adds the errors of kSums values; without kWeighed, mass is 1.
template <bool kWeighed>
inline void take_values(const Candidate& candidate, const float* x, const double* mass,
                        Doubles (&sums)[kVectors]) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const Floats value = load<Floats>(x + v * kLanes);
    Floats code = value * candidate.inverse;
    code = code < candidate.low ? Floats{} + candidate.low : code;
    code = code > candidate.high ? Floats{} + candidate.high : code;
    code = (code + 12582912.0f) - 12582912.0f;  // see round_small in rounding.h
    const Doubles error = __builtin_convertvector(value - code * candidate.scale, Doubles);
    const Doubles square = error * error;
    sums[v] += kWeighed ? load<Doubles>(mass + v * kLanes) * square : square;
  }
}

// kWeighed or not, the values that fill no kSums are followed by zeros, whose error is 0.
template <bool kWeighed>
double error_of(const ScaleErrorsArgs& args, const Candidate& candidate) {
  Doubles sums[kVectors] = {};
  int64_t i = 0;
  for (; i + kSums <= args.size; i += kSums) {
    take_values<kWeighed>(candidate, args.x + i, kWeighed ? args.mass + i : nullptr, sums);
  }
  if (i < args.size) {
    float x[kSums] = {};
    double mass[kSums] = {};
    __builtin_memcpy(x, args.x + i, (args.size - i) * sizeof(float));
    if (kWeighed) __builtin_memcpy(mass, args.mass + i, (args.size - i) * sizeof(double));
    take_values<kWeighed>(candidate, x, mass, sums);
  }
  return total(sums);
}

}  // namespace

void cell_errors(const CellErrorsArgs& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const double first = args.first[c], last = args.last[c];
    const double cell = (last - first + 1) / args.levels;
    const double half = cell / 2;
    const Cells cells = {cell, 2 * (half * half * half), args.levels - 1.0};
    Doubles sums[kVectors] = {};
    int64_t i = 0;
    for (; i + kSums <= args.bins; i += kSums) {
      take_bins(cells, static_cast<double>(i), first, args.mass + i, sums);
    }
    if (i < args.bins) {
      double mass[kSums] = {};
      __builtin_memcpy(mass, args.mass + i, (args.bins - i) * sizeof(double));
      take_bins(cells, static_cast<double>(i), first, mass, sums);
    }
    args.errors[c] = total(sums) / 3;
  }
}

void scale_errors(const ScaleErrorsArgs& args, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    const Candidate candidate = {args.scale[c], 1.0f / args.scale[c],
                                 static_cast<float>(args.quant_min - args.zero_point[c]),
                                 static_cast<float>(args.quant_max - args.zero_point[c])};
    args.errors[c] =
        args.mass == nullptr ? error_of<false>(args, candidate) : error_of<true>(args, candidate);
  }
}
