#include "../arithmetic.h"
#include "common.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 16;

template <bool Absolute, class Grad>
bool accumulate(float* __restrict acc, const Grad* __restrict grad, int64_t numel) {
  uint32_t nonfinite = 0;
  for (int64_t i = 0; i < numel; i++) {
    const float value = static_cast<float>(grad[i]);
    acc[i] += Absolute ? std::fabs(value) : value;
    nonfinite |= !is_finite_bits(float_bits(acc[i]));
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
