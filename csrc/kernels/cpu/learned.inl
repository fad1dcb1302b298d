// The backward of learned quantizers in plain C++ with vector types, compiled once for every
// baseline: the including file opens the path's namespace and defines QT_VECTOR_BYTES. No include
// guard and no includes, on purpose.

namespace {

constexpr int64_t kSums = 16;                    // partial sums of one channel
constexpr int64_t kLanes = QT_VECTOR_BYTES / 4;  // floats of a vector
constexpr int64_t kVectors = kSums / kLanes;

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using HalfFloats = float __attribute__((vector_size(QT_VECTOR_BYTES / 2)));
using Doubles = double __attribute__((vector_size(QT_VECTOR_BYTES)));

inline Floats load(const float* from) {
  Floats vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

inline void store(Floats vector, float* to) { __builtin_memcpy(to, &vector, sizeof vector); }

struct Sums {
  Doubles vectors[2 * kVectors] = {};

  void add(int64_t v, Floats terms) {
    HalfFloats halves[2];
    __builtin_memcpy(halves, &terms, sizeof halves);
    vectors[2 * v] += __builtin_convertvector(halves[0], Doubles);
    vectors[2 * v + 1] += __builtin_convertvector(halves[1], Doubles);
  }

  double total() const {
    double lanes[kSums];
    __builtin_memcpy(lanes, vectors, sizeof lanes);
    for (int64_t half = kSums / 2; half > 0; half /= 2) {
      for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    }
    return lanes[0];
  }
};

inline void add_to(double* sums, Floats terms) {
  Doubles vectors[2];
  HalfFloats halves[2];
  __builtin_memcpy(vectors, sums, sizeof vectors);
  __builtin_memcpy(halves, &terms, sizeof halves);
  vectors[0] += __builtin_convertvector(halves[0], Doubles);
  vectors[1] += __builtin_convertvector(halves[1], Doubles);
  __builtin_memcpy(sums, vectors, sizeof vectors);
}

// terms(x, grad, v) gives grad_x of kLanes elements and adds to sums number v.
template <class Terms>
inline void take_sixteen(const float* x, const float* grad, float* grad_x, Terms& terms) {
#pragma GCC unroll 16
  for (int64_t v = 0; v < kVectors; ++v) {
    store(terms(load(x + v * kLanes), load(grad + v * kLanes), v), grad_x + v * kLanes);
  }
}

template <class Terms>
inline void take_all(const SumArgs& args, int64_t begin, int64_t end, Terms& terms) {
  for (; end - begin >= kSums; begin += kSums) {
    take_sixteen(args.x + begin, args.grad + begin, args.grad_x + begin, terms);
  }
  if (begin == end) return;
  // A gradient of 0 for the elements that are missing adds 0 to their sums.
  const int64_t bytes = (end - begin) * static_cast<int64_t>(sizeof(float));
  float x[kSums] = {}, grad[kSums] = {};
  __builtin_memcpy(x, args.x + begin, bytes);
  __builtin_memcpy(grad, args.grad + begin, bytes);
  take_sixteen(x, grad, x, terms);
  __builtin_memcpy(args.grad_x + begin, x, bytes);
}

// See LsqBackwardArgs. T is a float or a vector of them.
template <class T>
struct LsqTerms {
  T grad_x, scale, outside;
};

template <class T>
inline LsqTerms<T> lsq_terms(T x, T grad, T inverse, T low, T high) {
  const T zero = {};
  const T value = x * inverse;
  // One step beyond the range is enough to know that a value is outside. NaN stays NaN.
  T rounded = value < low - 1.0f ? low - 1.0f : value;
  rounded = rounded > high + 1.0f ? high + 1.0f : rounded;
  rounded = (rounded + 12582912.0f) - 12582912.0f;  // see round_small in rounding.h
  T outside = rounded < low ? grad : zero;
  outside = rounded > high ? grad : outside;
  T inside = rounded >= low ? grad : zero;
  inside = rounded <= high ? inside : zero;
  T factor = rounded - value;
  factor = rounded < low ? low : factor;
  factor = rounded > high ? high : factor;
  const T scale = grad * factor;
  return {inside, value == value ? scale : zero, outside};
}

struct LsqOfOneChannel {
  Floats inverse, low, high;
  Sums scale_sums = {}, outside_sums = {};

  Floats operator()(Floats x, Floats grad, int64_t v) {
    const LsqTerms<Floats> terms = lsq_terms(x, grad, inverse, low, high);
    scale_sums.add(v, terms.scale);
    outside_sums.add(v, terms.outside);
    return terms.grad_x;
  }
};

struct PactTerms {
  Floats alpha;
  Sums sums = {};

  Floats operator()(Floats x, Floats grad, int64_t v) {
    const Floats zero = {};
    sums.add(v, x >= alpha ? grad : zero);
    const Floats passed = x >= zero ? grad : zero;
    return x < alpha ? passed : zero;
  }
};

}  // namespace

void fake_quantize_lsq_backward(const LsqBackwardArgs& args, int64_t begin, int64_t end) {
  if (args.sum.channels == 1) {
    LsqOfOneChannel terms{Floats{} + args.inverse_scale[0], Floats{} + args.low[0],
                          Floats{} + args.high[0]};
    take_all(args.sum, begin, end, terms);
    args.scale_sums[0] += terms.scale_sums.total();
    args.outside_sums[0] += terms.outside_sums.total();
    return;
  }
  const int64_t channels = args.sum.channels;
  for (int64_t row = begin; row < end; ++row) {
    const float* x = args.sum.x + row * channels;
    const float* grad = args.sum.grad + row * channels;
    float* grad_x = args.sum.grad_x + row * channels;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      const LsqTerms<Floats> terms =
          lsq_terms(load(x + c), load(grad + c), load(args.inverse_scale + c), load(args.low + c),
                    load(args.high + c));
      store(terms.grad_x, grad_x + c);
      add_to(args.scale_sums + c, terms.scale);
      add_to(args.outside_sums + c, terms.outside);
    }
    for (; c < channels; ++c) {
      const LsqTerms<float> terms =
          lsq_terms(x[c], grad[c], args.inverse_scale[c], args.low[c], args.high[c]);
      grad_x[c] = terms.grad_x;
      args.scale_sums[c] += static_cast<double>(terms.scale);
      args.outside_sums[c] += static_cast<double>(terms.outside);
    }
  }
}

void fake_quantize_pact_backward(const PactBackwardArgs& args, int64_t begin, int64_t end) {
  PactTerms terms{Floats{} + args.alpha};
  take_all(args.sum, begin, end, terms);
  args.alpha_sum[0] += terms.sums.total();
}
