// core/rounding.h's rule in a form that compilers vectorise on every instruction set.
//
// Everything is static and uses nothing of the standard library: see core/rounding.h on linkage.
#pragma once

#include <cstdint>

// Before a loop: its iterations do not depend on each other, also where output and input are the
// same memory.
#if defined(__clang__)
#define QT_INDEPENDENT_ITERATIONS _Pragma("clang loop vectorize(assume_safety)")
#else
#define QT_INDEPENDENT_ITERATIONS _Pragma("GCC ivdep")
#endif

namespace qtoolkit::kernels {

// Equals round_half_even for |x| <= 2^22, without -0: the sum lies in [2^23, 2^24], where the
// spacing of floats is 1, so the addition rounds to an integer, ties to the even one (the added
// number is even), and the subtraction is exact. SSE2 has no instruction for it.
static inline float round_small(float x) { return (x + 12582912.0f) - 12582912.0f; }

// round_to_code without the zero point: low and high are lo and hi less the zero point.
static inline float round_between(float x, float low, float high) {
  x = x == x ? x : 0.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  return round_small(x);
}

}  // namespace qtoolkit::kernels
