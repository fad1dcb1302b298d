// The activation functions at the end of float results, once for every path: Float is float with
// Int int32_t, or a vector of floats with the vector of int32 of its size. All is additions,
// multiplications, divisions and comparisons in float32, rounded one by one, so every instruction
// set gives the same bits.
//
// GELU and SiLU are max(x, 0) - t * tail(t) with t = |x|: the tail is an exponential times
// something smooth, so small results keep the relative precision that x * (1 + erf(x / sqrt(2))) /
// 2 loses. Against exact arithmetic they are off by at most 3 units in the last place, for x < 0 by
// 8 (gelu) and, growing with |x| as the exponential's argument is rounded, 200 (gelu_tanh); see
// tests/cpp/activation_test.cpp. Magnitudes below 3e-36 become 0.
//
// Static, like core/rounding.h, and without the standard library.
#pragma once

#include <cstdint>

namespace qtoolkit {

// gelu is x times the normal distribution function (Hendrycks & Gimpel 2016), gelu_tanh their
// approximation 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), silu x / (1 + exp(-x)).
enum class Activation : uint8_t { none, relu, gelu, gelu_tanh, silu };

namespace activation_parts {

// exp(-(a + rest)), rest being what a float cannot hold of the argument; 0 if a > 86.5. a < 2^20.
template <class Float, class Int>
static inline Float exp_minus(Float a, Float rest) {
  constexpr float kMagic = 12582912.0f;  // see round_small in kernels/cpu/rounding.h
  // exp(-x) = 2^-n exp(-r) with |r| <= ln(2) / 2. ln(2) is in two parts, n times the first is
  // exact.
  const Float shifted = (a + rest) * 1.44269502f + kMagic;
  const Float n = shifted - kMagic;
  const Float r = ((a - n * 0x1.62e4p-1f) + rest) - n * 1.42860677e-06f;
  // Minimax, relative error 2e-9.
  Float p = r * 1.38434011e-03f - 8.37437157e-03f;
  p = p * r + 4.16680165e-02f;
  p = p * r - 1.66664287e-01f;
  p = p * r + 4.99999940e-01f;
  p = (p * (r * r) - r) + 1.0f;
  // The lowest bits of `shifted` are n, which is subtracted from the exponent.
  const Int bits = __builtin_bit_cast(Int, p) - (__builtin_bit_cast(Int, shifted) << 23);
  return a > 86.5f ? Float{} : __builtin_bit_cast(Float, bits);
}

// |x|, at most `most`; NaN stays.
template <class Float>
static inline Float magnitude(Float x, float most) {
  const Float positive = x < 0.0f ? -x : x;
  return positive > most ? Float{} + most : positive;
}

template <class Float>
static inline Float positive_part(Float x) {
  return x > 0.0f ? x : Float{};
}

}  // namespace activation_parts

template <class Float, class Int>
static inline Float gelu(Float x) {
  const Float t = activation_parts::magnitude(x, 14.0f);
  // t^2 / 2 in two parts: the square of the upper 12 bits is exact.
  const Float upper = __builtin_bit_cast(Float, __builtin_bit_cast(Int, t) & ~0xfff);
  const Float power = activation_parts::exp_minus<Float, Int>(upper * upper * 0.5f,
                                                              (t - upper) * (t + upper) * 0.5f);
  // tail(t) = erfc(t / sqrt(2)) / 2 = exp(-t^2 / 2) * a / b; minimax, relative error 6e-9.
  Float a = t * 4.07760032e-03f + 4.03726026e-02f;
  a = a * t + 1.82462126e-01f;
  a = a * t + 4.37251508e-01f;
  a = a * t + 0.5f;
  Float b = t * 1.02208995e-02f + 1.01205923e-01f;
  b = b * t + 4.67429817e-01f;
  b = b * t + 1.19929230e+00f;
  b = b * t + 1.67238796e+00f;
  b = b * t + 1.0f;
  return activation_parts::positive_part(x) - t * power * a / b;
}

template <class Float, class Int>
static inline Float gelu_tanh(Float x) {
  const Float t = activation_parts::magnitude(x, 14.0f);
  // tail(t) = 1 / (1 + exp(v)), v = 2 sqrt(2 / pi) (t + 0.044715 t^3)
  const Float v = t * (t * t * 7.13548163e-02f + 1.59576912e+00f);
  const Float power = activation_parts::exp_minus<Float, Int>(v, Float{});
  return activation_parts::positive_part(x) - t * power / (power + 1.0f);
}

template <class Float, class Int>
static inline Float silu(Float x) {
  const Float t = activation_parts::magnitude(x, 88.0f);
  const Float power = activation_parts::exp_minus<Float, Int>(t, Float{});
  return activation_parts::positive_part(x) - t * power / (power + 1.0f);
}

template <Activation kActivation, class Float, class Int>
static inline Float activate(Float x) {
  if constexpr (kActivation == Activation::relu) return x < 0.0f ? Float{} : x;
  if constexpr (kActivation == Activation::gelu) return gelu<Float, Int>(x);
  if constexpr (kActivation == Activation::gelu_tanh) return gelu_tanh<Float, Int>(x);
  if constexpr (kActivation == Activation::silu) return silu<Float, Int>(x);
  return x;
}

}  // namespace qtoolkit
