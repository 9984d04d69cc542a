#include "../arithmetic.h"
#include "common.h"
#include "simd.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 16;
constexpr int64_t kBlock = 512;

// Bytes per element: the gradient once and the accumulator twice, so 10 for a 16-bit gradient and 12 for fp32.
template <bool Absolute, class Grad>
SAFEKERN_INLINE bool add(float* __restrict acc, const Grad* __restrict grad, int64_t numel) {
  uint32_t nonfinite = 0;
  for (int64_t i = 0; i < numel; i++) {
    const float value = static_cast<float>(grad[i]);
    acc[i] += Absolute ? std::fabs(value) : value;
    nonfinite |= !is_finite_bits(float_bits(acc[i]));
  }
  return nonfinite;
}

template <bool Absolute, class Grad>
bool accumulate(float* acc, const Grad* grad, int64_t numel) {
  bool nonfinite;
  vectorised([&]() SAFEKERN_INLINE_LAMBDA { nonfinite = add<Absolute>(acc, grad, numel); });
  return nonfinite;
}

template <bool Absolute>
bool accumulate(float* acc, const Half* grad, int64_t numel) {
  float values[kBlock];
  bool nonfinite = false;
  for (int64_t begin = 0; begin < numel; begin += kBlock) {
    const int64_t size = std::min(kBlock, numel - begin);
    convert(grad + begin, values, size);
    nonfinite |= accumulate<Absolute>(acc + begin, values, size);
  }
  return nonfinite;
}

void accumulate_(Tensors accs, Tensors grads, Tensor nonfinite, bool absolute) {
  check_accumulate(accs, grads, nonfinite);
  parallel_flagged(cut(accs, kChunk), nonfinite, [&](const Chunk& chunk) {
    bool found = false;
    with_float_type(grads[chunk.tensor].scalar_type(), [&](auto* type) {
      using Grad = std::remove_pointer_t<decltype(type)>;
      float* acc = accs[chunk.tensor].mutable_data_ptr<float>() + chunk.begin;
      const Grad* grad = grads[chunk.tensor].const_data_ptr<Grad>() + chunk.begin;
      const int64_t numel = chunk.end - chunk.begin;
      found = absolute ? accumulate<true>(acc, grad, numel) : accumulate<false>(acc, grad, numel);
    });
    return found;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) { m.impl("accumulate_", TORCH_BOX(&accumulate_)); }

}  // namespace safekern
