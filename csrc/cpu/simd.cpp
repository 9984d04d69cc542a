#include "simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#if SAFEKERN_X86
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace safekern {
namespace {

using torch::headeronly::Half;

constexpr const char* kVariable = "SAFEKERN_CPU_CAPABILITY";
constexpr const char* kNames[] = {"portable", "sse2", "avx2", "avx512"};

Capability widest_capability() {
#if SAFEKERN_X86
  __builtin_cpu_init();
  unsigned eax, ebx, ecx, edx;
  // Not every compiler's __builtin_cpu_supports knows f16c.
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (!f16c || !__builtin_cpu_supports("avx2")) return Capability::kSse2;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Capability::kAvx512 : Capability::kAvx2;
#else
  return Capability::kPortable;
#endif
}

Capability choose_capability() {
  const int narrowest = static_cast<int>(SAFEKERN_X86 ? Capability::kSse2 : Capability::kPortable);
  const int widest = static_cast<int>(widest_capability());
  const char* wanted = std::getenv(kVariable);
  if (!wanted || !*wanted) return static_cast<Capability>(widest);
  std::string supported;
  for (int c = narrowest; c <= widest; c++) {
    if (std::strcmp(wanted, kNames[c]) == 0) return static_cast<Capability>(c);
    supported += (supported.empty() ? "" : ", ") + std::string(kNames[c]);
  }
  STD_TORCH_CHECK(false, "safekern: ", kVariable, "='", wanted, "' is not supported: this processor and build have ",
                  supported);
}

uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// Subnormal values come from a subtraction, since arithmetic on subnormal floats may be slow or flushed to zero.
float half_to_float(uint16_t half) {
  constexpr uint32_t kSmallestNormal = 0x38800000;
  const uint32_t magnitude = (half & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const uint32_t subnormal =
      bit_copy<uint32_t>(bit_copy<float>(magnitude + kSmallestNormal) - bit_copy<float>(kSmallestNormal));
  const uint32_t finite = choose(exponent == 0, subnormal, magnitude + 0x38000000u);
  return bit_copy<float>(choose(exponent == 0x0f800000u, magnitude + 0x70000000u, finite) | (half & 0x8000u) << 16);
}

uint16_t float_to_half(float value) {
  const uint32_t bits = bit_copy<uint32_t>(value);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  const uint32_t huge = 0x7c00u | static_cast<uint32_t>(magnitude > 0x7f800000) << 9;
  const uint32_t subnormal = bit_copy<uint32_t>(bit_copy<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (static_cast<uint32_t>(magnitude) + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13;
  const uint32_t finite = choose(magnitude < 0x38800000, subnormal, normal);
  return static_cast<uint16_t>(choose(magnitude >= 0x47800000, huge, finite) | (bits >> 16 & 0x8000u));
}

#if SAFEKERN_X86

// Both return how many they converted: all but the last few.
SAFEKERN_AVX2 int64_t widen_avx2(const Half* from, float* to, int64_t numel) {
  int64_t i = 0;
  for (; i + 8 <= numel; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  return i;
}

SAFEKERN_AVX2 int64_t narrow_avx2(const float* from, Half* to, int64_t numel) {
  int64_t i = 0;
  for (; i + 8 <= numel; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}

#endif

std::string capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

}  // namespace

Capability cpu_capability() {
  static const Capability capability = choose_capability();
  return capability;
}

void convert(const Half* from, float* to, int64_t numel) {
  int64_t i = 0;
#if SAFEKERN_X86
  if (cpu_capability() >= Capability::kAvx2) i = widen_avx2(from, to, numel);
#endif
  for (; i < numel; i++) to[i] = half_to_float(from[i].x);
}

void convert(const float* from, Half* to, int64_t numel) {
  int64_t i = 0;
#if SAFEKERN_X86
  if (cpu_capability() >= Capability::kAvx2) i = narrow_avx2(from, to, numel);
#endif
  for (; i < numel; i++) to[i] = Half(float_to_half(from[i]), Half::from_bits());
}

}  // namespace safekern

// Not an op on tensors, so it needs neither a reference nor other backends.
STABLE_TORCH_LIBRARY_FRAGMENT(safekern, m) {
  m.def("cpu_capability() -> str");
  m.impl("cpu_capability", TORCH_BOX(&safekern::capability_name));
}
