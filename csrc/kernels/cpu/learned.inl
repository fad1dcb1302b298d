// The backward of learned quantizers in plain C++ with vector types, compiled once for every
// baseline: the including file opens the path's namespace and defines QT_VECTOR_BYTES. No include
// guard and no includes, on purpose.

namespace {

using Floats = float __attribute__((vector_size(QT_VECTOR_BYTES)));
using HalfFloats = float __attribute__((vector_size(QT_VECTOR_BYTES / 2)));
using Doubles = double __attribute__((vector_size(QT_VECTOR_BYTES)));
using Masks = int32_t __attribute__((vector_size(QT_VECTOR_BYTES)));

constexpr int64_t kLanes = QT_VECTOR_BYTES / 4;
constexpr int64_t kSums = 16;  // partial sums of one channel
constexpr int64_t kVectors = kSums / kLanes;
constexpr int64_t kGroup = 4 * kSums;  // elements whose terms are added in float first

inline Floats load(const float* from) {
  Floats vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

inline void store(Floats vector, float* to) { __builtin_memcpy(to, &vector, sizeof vector); }

inline void add_to(double* sums, Floats terms) {
  Doubles vectors[2];
  HalfFloats halves[2];
  __builtin_memcpy(vectors, sums, sizeof vectors);
  __builtin_memcpy(halves, &terms, sizeof halves);
  vectors[0] += __builtin_convertvector(halves[0], Doubles);
  vectors[1] += __builtin_convertvector(halves[1], Doubles);
  __builtin_memcpy(sums, vectors, sizeof vectors);
}

double total(const double (&sums)[kSums]) {
  double lanes[kSums];
  __builtin_memcpy(lanes, sums, sizeof lanes);
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

// What an element gives: its gradient, and terms of two sums.
struct Terms {
  Floats grad_x, first, second;
};

struct TwoSums {
  double first[kSums] = {}, second[kSums] = {};
};

template <class Rule>
inline void take_group(const float* x, const float* grad, float* grad_x, const Rule& rule,
                       TwoSums& sums) {
#pragma GCC unroll 16
  for (int64_t k = 0; k < kSums; k += kLanes) {
    Terms terms[4];
#pragma GCC unroll 4
    for (int64_t q = 0; q < 4; ++q) {
      const int64_t i = q * kSums + k;
      terms[q] = rule(load(x + i), load(grad + i));
      store(terms[q].grad_x, grad_x + i);
    }
    add_to(sums.first + k, (terms[0].first + terms[1].first) + (terms[2].first + terms[3].first));
    add_to(sums.second + k,
           (terms[0].second + terms[1].second) + (terms[2].second + terms[3].second));
  }
}

// rule(x, grad) of all elements, which share a channel.
template <class Rule>
inline TwoSums take_all(const SumArgs& args, int64_t begin, int64_t end, const Rule& rule) {
  TwoSums sums;
  for (; end - begin >= kGroup; begin += kGroup) {
    take_group(args.x + begin, args.grad + begin, args.grad_x + begin, rule, sums);
  }
  if (begin == end) return sums;
  // A gradient of 0 for the elements that are missing adds 0 to their sums.
  const int64_t bytes = (end - begin) * static_cast<int64_t>(sizeof(float));
  float x[kGroup] = {}, grad[kGroup] = {};
  __builtin_memcpy(x, args.x + begin, bytes);
  __builtin_memcpy(grad, args.grad + begin, bytes);
  take_group(x, grad, x, rule, sums);
  __builtin_memcpy(args.grad_x + begin, x, bytes);
  return sums;
}

struct LsqRule {
  Floats inverse, low, high;

  Terms operator()(Floats x, Floats grad) const {
    const Floats zero = {};
    const Floats value = x * inverse;
    // See round_small in rounding.h. Far outside the result is not the nearest integer, but large.
    const Floats rounded = (value + 12582912.0f) - 12582912.0f;
    const Masks below = rounded<low, above = rounded> high, number = value == value;
    const Masks outside = below | above;
    Floats factor = below ? low : rounded - value;
    factor = above ? high : factor;
    return {(number & ~outside) ? grad : zero, number ? grad * factor : zero,
            outside ? grad : zero};
  }
};

struct PactRule {
  Floats alpha;

  Terms operator()(Floats x, Floats grad) const {
    const Floats zero = {};
    const Masks above = x >= alpha, inside = (x >= zero) & (x < alpha);
    return {inside ? grad : zero, above ? grad : zero, zero};
  }
};

// kLanes channels side by side.
inline void take_channels(const LsqBackwardArgs& args, int64_t row, int64_t c) {
  const int64_t i = row * args.sum.channels + c;
  const LsqRule rule{load(args.inverse_scale + c), load(args.low + c), load(args.high + c)};
  const Terms terms = rule(load(args.sum.x + i), load(args.sum.grad + i));
  store(terms.grad_x, args.sum.grad_x + i);
  add_to(args.scale_sums + c, terms.first);
  add_to(args.outside_sums + c, terms.second);
}

}  // namespace

void fake_quantize_lsq_backward(const LsqBackwardArgs& args, int64_t begin, int64_t end) {
  const SumArgs& sum = args.sum;
  const int64_t channels = sum.channels;
  if (channels == 1) {
    const LsqRule rule{Floats{} + args.inverse_scale[0], Floats{} + args.low[0],
                       Floats{} + args.high[0]};
    const TwoSums sums = take_all(sum, begin, end, rule);
    args.scale_sums[0] += total(sums.first);
    args.outside_sums[0] += total(sums.second);
    return;
  }
  const int64_t whole = channels / kLanes * kLanes, rest = channels - whole;
  const int64_t bytes = rest * static_cast<int64_t>(sizeof(float));
  // The channels that fill no vector, as if they did.
  float inverse[kLanes] = {}, low[kLanes] = {}, high[kLanes] = {};
  double first[kLanes] = {}, second[kLanes] = {};
  __builtin_memcpy(inverse, args.inverse_scale + whole, bytes);
  __builtin_memcpy(low, args.low + whole, bytes);
  __builtin_memcpy(high, args.high + whole, bytes);
  __builtin_memcpy(first, args.scale_sums + whole, 2 * bytes);
  __builtin_memcpy(second, args.outside_sums + whole, 2 * bytes);
  const LsqRule rule{load(inverse), load(low), load(high)};
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t c = 0; c < whole; c += kLanes) take_channels(args, row, c);
    if (rest == 0) continue;
    const int64_t i = row * channels + whole;
    float x[kLanes] = {}, grad[kLanes] = {};
    __builtin_memcpy(x, sum.x + i, bytes);
    __builtin_memcpy(grad, sum.grad + i, bytes);
    const Terms terms = rule(load(x), load(grad));
    store(terms.grad_x, x);
    __builtin_memcpy(sum.grad_x + i, x, bytes);
    add_to(first, terms.first);
    add_to(second, terms.second);
  }
  __builtin_memcpy(args.scale_sums + whole, first, 2 * bytes);
  __builtin_memcpy(args.outside_sums + whole, second, 2 * bytes);
}

void fake_quantize_pact_backward(const PactBackwardArgs& args, int64_t begin, int64_t end) {
  const TwoSums sums = take_all(args.sum, begin, end, PactRule{Floats{} + args.alpha});
  args.alpha_sum[0] += total(sums.first);
}
