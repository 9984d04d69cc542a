// The arithmetic that every backend must reproduce bit for bit, written once for C++ and CUDA.
// Compile with -ffp-contract=off (nvcc: -fmad=false): a fused multiply-add rounds differently from the plain-torch
// reference.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define SAFEKERN_HOST_DEVICE __host__ __device__
#else
#define SAFEKERN_HOST_DEVICE
#endif

namespace safekern {

// The type in which values of a floating type are computed with.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The unsigned integer of the size of a floating type, where only bits count.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

SAFEKERN_HOST_DEVICE inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

SAFEKERN_HOST_DEVICE inline bool is_finite_bits(uint32_t bits) { return (bits & 0x7f800000u) != 0x7f800000u; }

template <class T>
SAFEKERN_HOST_DEVICE bool same_bits(T a, T b) {
  Bits<T> a_bits, b_bits;
  std::memcpy(&a_bits, &a, sizeof a);
  std::memcpy(&b_bits, &b, sizeof b);
  return a_bits == b_bits;
}

// The ranking key of one weight: the bits of ESI = |grad| * sigma. Non-negative floats order as their bits do.
// A NaN gives a key above kInfinityKey.
SAFEKERN_HOST_DEVICE inline uint32_t esi_key(float grad, float sigma) {
  return float_bits(std::fabs(grad) * sigma) & 0x7fffffffu;
}

constexpr uint32_t kInfinityKey = 0x7f800000u;

// Where a line of a sample that has one per stride is taken: at a hashed place of its stride, since weights repeat with
// the period of a matrix row.
SAFEKERN_HOST_DEVICE inline int64_t sample_place(int64_t line, double stride) {
  uint32_t hash = static_cast<uint32_t>(line) * 0x9e3779b1u;
  hash = (hash ^ hash >> 15) * 0x85ebca77u;
  return static_cast<int64_t>(stride * (static_cast<double>(line) + (hash >> 8) * 0x1p-24));
}

// Reverses the order of the 31-bit keys, so that "smallest first" is "largest first" of the flipped keys.
constexpr uint32_t kFlipKey = 0x7fffffffu;

// One AdamW step (decoupled weight decay, https://arxiv.org/abs/1711.05101), in the order of operations of
// torch.optim.AdamW's single-tensor path. Value is the type of the weight, Moment that of the gradient and the moments;
// the hyperparameters come in fp64 and are rounded to these types once.
template <class Value, class Moment = Value>
struct AdamW {
  Value decay;  // 1 - lr * weight_decay
  Moment one_minus_beta1, beta2, one_minus_beta2, eps;
  Moment step_size;              // lr / (1 - beta1^step)
  Moment bias_correction2_sqrt;  // sqrt(1 - beta2^step)

  AdamW(double beta1, double beta2, double eps, double decay, double step_size, double bias_correction2_sqrt)
      : decay(static_cast<Value>(decay)),
        one_minus_beta1(static_cast<Moment>(1.0 - beta1)),
        beta2(static_cast<Moment>(beta2)),
        one_minus_beta2(static_cast<Moment>(1.0 - beta2)),
        eps(static_cast<Moment>(eps)),
        step_size(static_cast<Moment>(step_size)),
        bias_correction2_sqrt(static_cast<Moment>(bias_correction2_sqrt)) {}

  // The same with what differs between parameters: how many steps they have had.
  SAFEKERN_HOST_DEVICE AdamW at(Moment step_size, Moment bias_correction2_sqrt) const {
    AdamW result = *this;
    result.step_size = step_size;
    result.bias_correction2_sqrt = bias_correction2_sqrt;
    return result;
  }

  SAFEKERN_HOST_DEVICE Value update(Value value, Moment grad, Moment& exp_avg, Moment& exp_avg_sq) const {
    exp_avg += (grad - exp_avg) * one_minus_beta1;
    exp_avg_sq = exp_avg_sq * beta2 + (grad * one_minus_beta2) * grad;
    const Moment denom = std::sqrt(exp_avg_sq) / bias_correction2_sqrt + eps;
    return value * decay - (exp_avg * step_size) / denom;
  }
};

// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
struct Philox {
  uint32_t word[4];  // the counter, lowest word first, and afterwards the random bits

  SAFEKERN_HOST_DEVICE void run(uint32_t key0, uint32_t key1) {
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
SAFEKERN_HOST_DEVICE inline float log_by_polynomial(float x) {
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
SAFEKERN_HOST_DEVICE inline float normal(uint64_t seed, uint64_t stream, uint64_t index) {
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
