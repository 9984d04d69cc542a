#include "../arithmetic.h"
#include "common.h"
#include "simd.h"

namespace safekern {
namespace {

// Sums are in fp64, and per chunk in this many lanes whatever the width of the vectors: a mask is the same on every
// machine only if sigma is, and the CUDA and Triton kernels add in this order too.
constexpr int64_t kChunk = 4096;
constexpr int64_t kLanes = 8;

struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: the sum of squared deviations from the mean

  // Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
  void add(const Moments& other) {
    const double total = count + other.count, delta = other.mean - mean;
    squares += other.squares + delta * delta * (count * other.count / total);
    mean += delta * (other.count / total);
    count = total;
  }
};

// One pass over the chunk. Deviations are taken from the mean of its first elements: were one of those a large
// outlier, it would dominate the chunk's variance as well, so nothing is lost to cancellation.
template <class Param>
SAFEKERN_INLINE Moments moments(const Param* param, int64_t numel) {
  const int64_t head = std::min<int64_t>(numel, 64);
  double pivot = 0;
  for (int64_t i = 0; i < head; i++) pivot += static_cast<double>(param[i]);
  pivot /= static_cast<double>(head);

  double sums[kLanes] = {0}, squares[kLanes] = {0};
  int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; lane++) {
      const double deviation = static_cast<double>(param[i + lane]) - pivot;
      sums[lane] += deviation;
      squares[lane] += deviation * deviation;
    }
  }
  for (int64_t lane = 0; i < numel; i++, lane++) {
    const double deviation = static_cast<double>(param[i]) - pivot;
    sums[lane] += deviation;
    squares[lane] += deviation * deviation;
  }
  double sum = 0, square = 0;
  for (int64_t lane = 0; lane < kLanes; lane++) {
    sum += sums[lane];
    square += squares[lane];
  }
  const double count = static_cast<double>(numel);
  return {count, pivot + sum / count, std::max(0.0, square - sum * sum / count)};
}

template <class Param>
Moments chunk_moments(const Param* param, int64_t numel) {
  Moments result;
  if constexpr (sizeof(Param) == 2) {
    // Compilers vectorise the way from bf16 to fp64 for AVX-512 only, where it saves an eighth; that of fp16 never.
    const bool at_once = std::is_same_v<Param, BFloat16> && cpu_capability() == Capability::kAvx512;
    if (!at_once) {
      float values[kChunk];
      vectorised([&]() SAFEKERN_INLINE_LAMBDA {
        convert(param, values, numel);
        result = moments(values, numel);
      });
      return result;
    }
  }
  vectorised([&]() SAFEKERN_INLINE_LAMBDA { result = moments(param, numel); });
  return result;
}

Tensor sigma(Tensors params) {
  check_sigma(params);
  const std::vector<Chunk> chunks = cut(params, kChunk);
  std::vector<Moments> partial(chunks.size());
  each_chunk(chunks, [&](int64_t c) {
    const Chunk& chunk = chunks[c];
    with_float_type(params[chunk.tensor].scalar_type(), [&](auto* type) {
      using Param = std::remove_pointer_t<decltype(type)>;
      partial[c] = chunk_moments(params[chunk.tensor].const_data_ptr<Param>() + chunk.begin, chunk.end - chunk.begin);
    });
  });
  std::vector<Moments> total(params.size());
  for (size_t c = 0; c < chunks.size(); c++) total[chunks[c].tensor].add(partial[c]);

  Tensor result = torch::stable::empty({static_cast<int64_t>(params.size())}, ScalarType::Float);
  float* out = result.mutable_data_ptr<float>();
  for (size_t t = 0; t < params.size(); t++) {
    const double freedom = total[t].count - 1;
    out[t] = freedom > 0 ? static_cast<float>(std::sqrt(total[t].squares / freedom)) : 0.0f;
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) { m.impl("sigma", TORCH_BOX(&sigma)); }

}  // namespace safekern
