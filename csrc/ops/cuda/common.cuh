// What the CUDA operators share: how elements are moved, masks of one bit an element, launching.
//
// Elements are float, __half or __nv_bfloat16; arithmetic is float32. Memory is moved 16 bytes at
// a time where pointers and sizes allow it, else element by element. Values on the device, such as
// scales, are never read by the host, so nothing waits for the GPU and graphs can be captured.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace qtoolkit::ops {

constexpr int kThreads = 256;  // of a block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// --- elements ------------------------------------------------------------------------------------

// 16 bytes of elements.
template <class T>
struct alignas(16) Word {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <class T>
__device__ void unpack(const Word<T>& word, float* values) {
  const auto* bits = reinterpret_cast<const uint32_t*>(&word);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      values[i] = __uint_as_float(bits[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      values[2 * i] = __uint_as_float(bits[i] << 16);
      values[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(reinterpret_cast<const __half2*>(&word)[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

template <class T>
__device__ Word<T> pack(const float* values) {
  Word<T> word;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      word.values[i] = values[i];
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      reinterpret_cast<__nv_bfloat162*>(&word)[i] =
          __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    } else {
      reinterpret_cast<__half2*>(&word)[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
    }
  }
  return word;
}

// Read once: first to leave the caches.
template <class T>
__device__ Word<T> load_word(const T* from) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
  return reinterpret_cast<const Word<T>&>(bits);
}

// One instruction: the compiler cuts a plain assignment of 2-byte elements into four.
template <class T>
__device__ void store_word(T* to, const Word<T>& word) {
  __stwb(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(word));
}

// The first `count` elements of a word, in 16 bytes where `vectors` says that `from` is aligned;
// the others are 0.
template <class T>
__device__ Word<T> load_word(const T* from, int count, bool vectors) {
  if (vectors && count >= Word<T>::kSize) return load_word(from);
  Word<T> word;
#pragma unroll
  for (int k = 0; k < Word<T>::kSize; ++k) word.values[k] = k < count ? from[k] : T(0.0f);
  return word;
}

template <class T>
__device__ void store_word(T* to, const Word<T>& word, int count, bool vectors) {
  if (vectors && count >= Word<T>::kSize) {
    store_word(to, word);
    return;
  }
#pragma unroll
  for (int k = 0; k < Word<T>::kSize; ++k) {
    if (k < count) to[k] = word.values[k];
  }
}

// --- tiles: what a warp moves at once ------------------------------------------------------------

// A tile is kTile consecutive elements, of which each lane has a share: whole words, so that the
// lanes of an instruction lie side by side. Its mask is 32 bytes, one of which each lane moves.
constexpr int kShare = 8;
constexpr int kTile = kWarp * kShare;

template <class T>
struct Share {
  static constexpr int kWords = kShare / Word<T>::kSize;
  Word<T> words[kWords];
};

// Where element k of a lane's share lies in the tile.
template <class T>
__device__ int place(int lane, int k) {
  return (k / Word<T>::kSize * kWarp + lane) * Word<T>::kSize + k % Word<T>::kSize;
}

template <class T>
__device__ Share<T> load_share(const T* tile, int lane) {
  Share<T> share;
#pragma unroll
  for (int w = 0; w < Share<T>::kWords; ++w) {
    share.words[w] = load_word(tile + place<T>(lane, w * Word<T>::kSize));
  }
  return share;
}

// Of a tile with `left` elements, element by element.
template <class T>
__device__ Share<T> load_share(const T* tile, int lane, int64_t left) {
  Share<T> share;
#pragma unroll
  for (int k = 0; k < kShare; ++k) {
    const int at = place<T>(lane, k);
    share.words[k / Word<T>::kSize].values[k % Word<T>::kSize] = at < left ? tile[at] : T(0.0f);
  }
  return share;
}

template <class T>
__device__ void unpack(const Share<T>& share, float (&values)[kShare]) {
#pragma unroll
  for (int w = 0; w < Share<T>::kWords; ++w) unpack(share.words[w], values + w * Word<T>::kSize);
}

template <class T>
__device__ void store_share(T* tile, int lane, const float (&values)[kShare]) {
#pragma unroll
  for (int w = 0; w < Share<T>::kWords; ++w) {
    const int k = w * Word<T>::kSize;
    store_word(tile + place<T>(lane, k), pack<T>(values + k));
  }
}

template <class T>
__device__ void store_share(T* tile, int lane, const float (&values)[kShare], int64_t left) {
#pragma unroll
  for (int w = 0; w < Share<T>::kWords; ++w) {
    const Word<T> word = pack<T>(values + w * Word<T>::kSize);
#pragma unroll
    for (int k = 0; k < Word<T>::kSize; ++k) {
      const int at = place<T>(lane, w * Word<T>::kSize + k);
      if (at < left) tile[at] = word.values[k];
    }
  }
}

// The byte of the tile's mask that a lane moves. Of 2-byte elements a lane has 8 consecutive ones;
// of 4-byte elements it has 4 of each half of the tile, and two neighbours exchange 4 bits.
template <class T>
__device__ int mask_place(int lane) {
  return sizeof(T) == 2 ? lane : lane % 2 * (kWarp / 2) + lane / 2;
}

// From the bits of a lane's share, bit k for element k, to the byte that it moves. All lanes call.
template <class T>
__device__ uint32_t bits_to_byte(uint32_t bits, int lane) {
  if constexpr (sizeof(T) == 2) return bits;
  const bool odd = lane % 2 != 0;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? bits & 0xfu : bits >> 4, 1);
  return odd ? other | (bits & 0xf0u) : (bits & 0xfu) | other << 4;
}

template <class T>
__device__ uint32_t byte_to_bits(uint32_t byte, int lane) {
  if constexpr (sizeof(T) == 2) return byte;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, byte, 1);
  return lane % 2 != 0 ? other >> 4 | (byte & 0xf0u) : (byte & 0xfu) | (other & 0xfu) << 4;
}

// --- arithmetic ----------------------------------------------------------------------------------

constexpr float kInf = __builtin_huge_valf();

// Half to even, for |x| <= 2^22; never -0.
__device__ inline float round_small(float x) {
  constexpr float kMagic = 0x1.8p23f;  // numbers about it are whole
  return __fsub_rn(__fadd_rn(x, kMagic), kMagic);
}

// What core/rounding.h does with x: value = x * inverse in steps, rounded and clamped.
struct Rounded {
  float value;    // not rounded
  float code;     // in [low, high], relative to the zero point
  bool in_range;  // before clamping; not where value is NaN
};

// low and high are whole and below 2^22 in size.
__device__ inline Rounded round_to_code(float x, float inverse, float low, float high) {
  constexpr float kFar = 0x1p22f;
  const float value = __fmul_rn(x, inverse);
  const float rounded = round_small(fminf(fmaxf(value, -kFar), kFar));
  const float code = fminf(fmaxf(rounded, low), high);
  return {value, code, code == rounded};  // NaN became -kFar
}

// Division of a number that is not negative by one that is known at launch: multiplication where
// both are below 2^31 (Granlund & Montgomery 1994, figure 4.1).
class Divider {
 public:
  // For dividends up to `most`.
  Divider(int64_t divisor, int64_t most)
      : divisor_(divisor), small_(divisor < INT32_MAX && most < INT32_MAX) {
    if (!small_) return;
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t power = uint64_t{1} << shift_;
    magic_ = static_cast<uint32_t>(((power - divisor) << 32) / divisor + 1);
  }
  __host__ __device__ int64_t divisor() const { return divisor_; }
  __device__ int64_t divide(int64_t n) const {
    if (!small_) return n / divisor_;
    const auto low = static_cast<uint32_t>(n);
    return (__umulhi(low, magic_) + low) >> shift_;
  }

 private:
  int64_t divisor_;
  bool small_;
  uint32_t magic_ = 0;
  uint32_t shift_ = 0;
};

// --- the host's side -----------------------------------------------------------------------------

// An operator, for its Meta kernel: that checks the arguments and makes the results, on the device
// of the arguments.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
inline const c10::DispatchKeySet kMeta(c10::DispatchKey::Meta);

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  });
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
const T* const_data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
struct Type {
  using type = T;
};

// Calls run(Type<T>()) for the element type of a checked float tensor.
template <class Run>
void with_element_type(const at::Tensor& x, const Run& run) {
  switch (x.scalar_type()) {
    case at::kHalf:
      return run(Type<__half>());
    case at::kBFloat16:
      return run(Type<__nv_bfloat16>());
    default:
      return run(Type<float>());
  }
}

}  // namespace qtoolkit::ops
