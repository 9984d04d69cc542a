// Loops compiled for the widest vectors of the processor they run on, in one portable binary. The results do not depend
// on the vectors: no reduction is reordered and, with -ffp-contract=off, no multiply-add is fused.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define SAFEKERN_X86 1
#define SAFEKERN_INLINE inline __attribute__((always_inline))
#define SAFEKERN_INLINE_LAMBDA __attribute__((always_inline))
#define SAFEKERN_AVX2 __attribute__((target("avx2,f16c")))
#define SAFEKERN_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")))
#else
#define SAFEKERN_X86 0
#define SAFEKERN_INLINE inline
#define SAFEKERN_INLINE_LAMBDA
#endif

namespace safekern {

// Sse2 is what every x86-64 processor has, Portable what the compiler makes of the loops elsewhere.
enum class Capability { kPortable, kSse2, kAvx2, kAvx512 };

// The widest of the processor, or the one that the environment variable SAFEKERN_CPU_CAPABILITY names; decided once.
Capability cpu_capability();

#if SAFEKERN_X86

template <class F>
SAFEKERN_AVX2 __attribute__((noinline)) void run_avx2(const F& f) {
  f();
}

template <class F>
SAFEKERN_AVX512 __attribute__((noinline)) void run_avx512(const F& f) {
  f();
}

#endif

// f: a lambda marked SAFEKERN_INLINE_LAMBDA that calls only functions which inline into it.
template <class F>
void vectorised(const F& f) {
#if SAFEKERN_X86
  const Capability capability = cpu_capability();
  if (capability == Capability::kAvx512) return run_avx512(f);
  if (capability == Capability::kAvx2) return run_avx2(f);
#endif
  f();
}

// Denormals are values as all others on this thread for as long as this lives. torch.set_flush_denormal(True) makes
// them zeros, on the thread that calls it alone, so that results would depend on which thread computes what.
class KeptDenormals {
 public:
#if defined(__SSE2__) || defined(_M_X64)
  KeptDenormals() : control_(_mm_getcsr()) { _mm_setcsr(control_ & ~0x8040u); }
  ~KeptDenormals() { _mm_setcsr(control_); }

 private:
  unsigned control_;
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
  KeptDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(control_));
    asm volatile("msr fpcr, %0" ::"r"(control_ & ~(uint64_t{1} << 24)));
  }
  ~KeptDenormals() { asm volatile("msr fpcr, %0" ::"r"(control_)); }

 private:
  uint64_t control_;
#else
  KeptDenormals() {}
#endif
 public:
  KeptDenormals(const KeptDenormals&) = delete;
  KeptDenormals& operator=(const KeptDenormals&) = delete;
};

template <class To, class From>
SAFEKERN_INLINE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Conversions of arrays between dtypes, to nearest and ties to even, to be called inside a vectorised lambda. Those of
// float16 are functions of their own, because torch's branch, which keeps a loop from being vectorised.
template <class From, class To>
SAFEKERN_INLINE void convert(const From* __restrict from, To* __restrict to, int64_t numel) {
  for (int64_t i = 0; i < numel; i++) to[i] = static_cast<To>(from[i]);
}

void convert(const torch::headeronly::Half* from, float* to, int64_t numel);
void convert(const float* from, torch::headeronly::Half* to, int64_t numel);

}  // namespace safekern
