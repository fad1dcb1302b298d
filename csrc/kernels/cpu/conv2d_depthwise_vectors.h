// What the AVX-512 depthwise convolution is made of: 64 bytes in one or several places, their
// quads, and dot products.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qtoolkit::kernels::avx512vnni {
namespace {

constexpr int kRegisters = 4;

// See conv2d_avx512vnni.cpp for the reason.
inline __attribute__((always_inline)) void dot(__m512i& acc, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

// The register at base + kOffset. Written out because GCC 12 loads again what it could keep, or
// keeps what there is no register for, and computes every address by itself. The last operand only
// tells it that memory is read.
template <int64_t kOffset>
inline __attribute__((always_inline)) __m512i load_at(const void* base) {
  __m512i result;
  asm("vmovdqa64 %c2(%1), %0"
      : "=v"(result)
      : "r"(base), "i"(kOffset), "m"(*static_cast<const char(*)[1 << 20]>(base)));
  return result;
}

// Four taps' bytes side by side.
inline void interleave(__m512i tap0, __m512i tap1, __m512i tap2, __m512i tap3, __m512i* result) {
  const __m512i low01 = _mm512_unpacklo_epi8(tap0, tap1);
  const __m512i high01 = _mm512_unpackhi_epi8(tap0, tap1);
  const __m512i low23 = _mm512_unpacklo_epi8(tap2, tap3);
  const __m512i high23 = _mm512_unpackhi_epi8(tap2, tap3);
  result[0] = _mm512_unpacklo_epi16(low01, low23);
  result[1] = _mm512_unpackhi_epi16(low01, low23);
  result[2] = _mm512_unpacklo_epi16(high01, high23);
  result[3] = _mm512_unpackhi_epi16(high01, high23);
}

template <int kParts>
inline __attribute__((always_inline)) __m512i load(const uint8_t* const (&x)[kParts], int64_t at) {
  if constexpr (kParts == 1) {
    return _mm512_loadu_si512(x[0] + at);
  } else if constexpr (kParts == 2) {
    const __m512i first =
        _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[0] + at)));
    return _mm512_inserti64x4(first,
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[1] + at)), 1);
  } else {
    const auto part = [&](int i) __attribute__((always_inline)) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x[i] + at));
    };
    __m512i all = _mm512_castsi128_si512(part(0));
    all = _mm512_inserti32x4(all, part(1), 1);
    all = _mm512_inserti32x4(all, part(2), 2);
    return _mm512_inserti32x4(all, part(3), 3);
  }
}

template <int kParts>
inline __attribute__((always_inline)) void store(uint8_t* const (&y)[kParts], int64_t at,
                                                 __m512i codes) {
  if constexpr (kParts == 1) {
    _mm512_storeu_si512(y[0] + at, codes);
  } else if constexpr (kParts == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y[0] + at), _mm512_castsi512_si256(codes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y[1] + at), _mm512_extracti64x4_epi64(codes, 1));
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y[0] + at), _mm512_castsi512_si128(codes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y[1] + at), _mm512_extracti32x4_epi32(codes, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y[2] + at), _mm512_extracti32x4_epi32(codes, 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y[3] + at), _mm512_extracti32x4_epi32(codes, 3));
  }
}

}  // namespace
}  // namespace qtoolkit::kernels::avx512vnni
