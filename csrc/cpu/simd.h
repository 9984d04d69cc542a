// Loops compiled for the widest vectors of the processor they run on, in one portable binary. The results do not depend
// on the vectors: no reduction is reordered and, with -ffp-contract=off, no multiply-add is fused.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define SAFEKERN_X86 1
#define SAFEKERN_INLINE inline __attribute__((always_inline))
#define SAFEKERN_INLINE_LAMBDA __attribute__((always_inline))
#else
#define SAFEKERN_X86 0
#define SAFEKERN_INLINE inline
#define SAFEKERN_INLINE_LAMBDA
#endif

namespace safekern {

#if SAFEKERN_X86

template <class F>
__attribute__((target("avx2"), noinline)) void run_avx2(const F& f) {
  f();
}

template <class F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), noinline)) void run_avx512(const F& f) {
  f();
}

enum class Vectors { kBaseline, kAvx2, kAvx512 };

inline Vectors widest_vectors() {
  static const Vectors widest = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return Vectors::kAvx512;
    }
    return __builtin_cpu_supports("avx2") ? Vectors::kAvx2 : Vectors::kBaseline;
  }();
  return widest;
}

// f: a lambda marked SAFEKERN_INLINE_LAMBDA that calls only functions which inline into it.
template <class F>
void vectorised(const F& f) {
  switch (widest_vectors()) {
    case Vectors::kAvx512:
      return run_avx512(f);
    case Vectors::kAvx2:
      return run_avx2(f);
    case Vectors::kBaseline:
      return f();
  }
}

#else

template <class F>
void vectorised(const F& f) {
  f();
}

#endif

template <class To, class From>
SAFEKERN_INLINE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

SAFEKERN_INLINE uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// torch's own conversions of float16 branch, which keeps a loop from being vectorised below AVX-512. These do not, and
// they add where the value is subnormal, because arithmetic on subnormal floats may be slow or flushed to zero.
SAFEKERN_INLINE float half_to_float(uint16_t half) {
  constexpr uint32_t kSmallestNormal = 0x38800000;
  const uint32_t magnitude = (half & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const uint32_t subnormal =
      bit_copy<uint32_t>(bit_copy<float>(magnitude + kSmallestNormal) - bit_copy<float>(kSmallestNormal));
  const uint32_t finite = choose(exponent == 0, subnormal, magnitude + 0x38000000u);
  return bit_copy<float>(choose(exponent == 0x0f800000u, magnitude + 0x70000000u, finite) | (half & 0x8000u) << 16);
}

SAFEKERN_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bit_copy<uint32_t>(value);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  const uint32_t huge = 0x7c00u | static_cast<uint32_t>(magnitude > 0x7f800000) << 9;
  const uint32_t subnormal = bit_copy<uint32_t>(bit_copy<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (static_cast<uint32_t>(magnitude) + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13;
  const uint32_t finite = choose(magnitude < 0x38800000, subnormal, normal);
  return static_cast<uint16_t>(choose(magnitude >= 0x47800000, huge, finite) | (bits >> 16 & 0x8000u));
}

// Conversions between the dtypes of tensors and the type of the arithmetic, to nearest and ties to even.
template <class Real, class T>
SAFEKERN_INLINE Real widen(T value) {
  if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    return static_cast<Real>(half_to_float(value.x));
  } else {
    return static_cast<Real>(value);
  }
}

template <class T, class Real>
SAFEKERN_INLINE T narrow(Real value) {
  if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    return T(float_to_half(static_cast<float>(value)), T::from_bits());
  } else {
    return static_cast<T>(value);
  }
}

}  // namespace safekern
