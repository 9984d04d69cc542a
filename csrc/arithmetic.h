// The arithmetic that every backend must reproduce bit for bit, written once for C++ (and, later, CUDA).
// Compile with -ffp-contract=off: a fused multiply-add rounds differently from the plain-torch reference.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace safekern {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline bool is_finite_bits(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

// The ranking key of one weight: the bits of ESI = |grad| * sigma. Non-negative floats order as their bits do.
// A NaN gives a key above kInfinityKey.
inline uint32_t esi_key(float grad, float sigma) { return float_bits(std::fabs(grad) * sigma) & 0x7fffffffu; }

constexpr uint32_t kInfinityKey = 0x7f800000u;

// Reverses the order of the 31-bit keys, so that "smallest first" is "largest first" of the flipped keys.
constexpr uint32_t kFlipKey = 0x7fffffffu;

// One AdamW step (decoupled weight decay, https://arxiv.org/abs/1711.05101), in the order of operations of
// torch.optim.AdamW's single-tensor path. Real is the type of the arithmetic, to which the hyperparameters are rounded.
struct AdamW {
  double decay;  // 1 - lr * weight_decay
  double one_minus_beta1, beta2, one_minus_beta2, eps;
  double step_size;              // lr / (1 - beta1^step)
  double bias_correction2_sqrt;  // sqrt(1 - beta2^step)

  template <class Value, class Real>
  Value update(Value value, Real grad, Real& exp_avg, Real& exp_avg_sq) const {
    exp_avg += (grad - exp_avg) * static_cast<Real>(one_minus_beta1);
    exp_avg_sq = exp_avg_sq * static_cast<Real>(beta2) + (grad * static_cast<Real>(one_minus_beta2)) * grad;
    const Real denom = std::sqrt(exp_avg_sq) / static_cast<Real>(bias_correction2_sqrt) + static_cast<Real>(eps);
    return value * static_cast<Value>(decay) - (exp_avg * static_cast<Real>(step_size)) / denom;
  }
};

}  // namespace safekern
