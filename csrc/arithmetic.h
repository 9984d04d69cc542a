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

// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
struct Philox {
  uint32_t word[4];  // the counter, lowest word first, and afterwards the random bits

  void run(uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
      const uint64_t product0 = uint64_t{0xd2511f53u} * word[0], product1 = uint64_t{0xcd9e8d57u} * word[2];
      const uint32_t high0 = static_cast<uint32_t>(product0 >> 32), high1 = static_cast<uint32_t>(product1 >> 32);
      word[0] = high1 ^ word[1] ^ key0;
      word[1] = static_cast<uint32_t>(product1);
      word[2] = high0 ^ word[3] ^ key1;
      word[3] = static_cast<uint32_t>(product0);
      key0 += 0x9e3779b9u;
      key1 += 0xbb67ae85u;
    }
  }
};

// The natural logarithm of a positive normal number, by the polynomial of Moshier's Cephes library.
inline float log_by_polynomial(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // relative to sqrt(1/2)
  bits -= exponent * (1 << 23);
  float f;
  std::memcpy(&f, &bits, sizeof f);
  f -= 1.0f;
  const float e = static_cast<float>(exponent), square = f * f;
  float p = f * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float tail = p * f * square + e * -2.12194440e-4f - square * 0.5f;
  return f + tail + e * 0.693359375f;
}

// The standard normal number of one weight, in the order of operations of the plain-torch reference: the inverse of
// the distribution function by PPND7 (Wichura, algorithm AS 241, Applied Statistics 37(3), 1988).
inline float normal(uint64_t seed, uint64_t stream, uint64_t index) {
  Philox philox{{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), static_cast<uint32_t>(stream),
                 static_cast<uint32_t>(stream >> 32)}};
  philox.run(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const float p = (static_cast<float>(philox.word[0]) + 0.5f) * 0x1p-33f;
  const float q = 0.5f - p;
  float r = 0.180625f - q * q;
  const float centre_top =
      ((r * 5.9109374720e+01f + 1.5929113202e+02f) * r + 5.0434271938e+01f) * r + 3.3871327179e+00f;
  const float centre_bottom = ((r * 6.7187563600e+01f + 7.8757757664e+01f) * r + 1.7895169469e+01f) * r + 1.0f;
  r = std::sqrt(-log_by_polynomial(p)) - 1.6f;
  const float tail_top = ((r * 1.7023821103e-01f + 1.3067284816e+00f) * r + 2.7568153900e+00f) * r + 1.4234372777e+00f;
  const float tail_bottom = (r * 1.2021132975e-01f + 7.3700164250e-01f) * r + 1.0f;
  const bool centre = q <= 0.425f;
  const float z = (centre ? q * centre_top : tail_top) / (centre ? centre_bottom : tail_bottom);
  return philox.word[1] >> 31 ? -z : z;
}

}  // namespace safekern
