#include <immintrin.h>

#include "kernels/convert.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

constexpr int64_t kLanes = 16;

void float16_to_float(const uint16_t* x, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    _mm512_storeu_ps(y + i,
                     _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
  }
  for (; i < count; ++i) y[i] = _cvtsh_ss(x[i]);
}

void float_to_float16(const float* x, uint16_t* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < count; ++i) y[i] = _cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT);
}

}  // namespace
#include "kernels/cpu/convert.inl"
}  // namespace qtoolkit::kernels::avx512vnni
