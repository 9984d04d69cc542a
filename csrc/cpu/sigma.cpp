#include <limits>

#include "../arithmetic.h"
#include "common.h"
#include "simd.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 8192;
// Sums of a chunk are kept in this many lanes whatever the width of the vectors, so that results do not depend on it.
constexpr int64_t kLanes = 64;

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

template <class Real>
SAFEKERN_INLINE double sum_of(const Real (&lanes)[kLanes]) {
  double partial[8] = {0}, sum = 0;
  for (int64_t lane = 0; lane < kLanes; lane++) partial[lane % 8] += static_cast<double>(lanes[lane]);
  for (double value : partial) sum += value;
  return sum;
}

// Sums of a chunk's deviations from a pivot, and of their squares.
struct Deviations {
  double count, pivot, sum, squares;

  Moments moments() const { return {count, pivot + sum / count, std::max(0.0, squares - sum * sum / count)}; }

  // Whether sums in fp32 tell the variance: no square overflowed, those that underflowed do not matter, and the pivot
  // lies near the mean, as it does not when an outlier is among the first elements.
  bool fit_float() const {
    return squares > 1e-30 * count && squares <= std::numeric_limits<float>::max() &&
           sum * sum / count < 0.25 * squares;
  }
};

// One pass over the chunk, every weight read once. Deviations are taken from the mean of its first elements: were one
// of those a large outlier, it would dominate the chunk's variance as well, so nothing is lost to cancellation.
template <class Real, class Param>
SAFEKERN_INLINE Deviations deviations(const Param* param, int64_t numel) {
  const int64_t head = std::min(numel, kLanes);
  Real first[kLanes] = {0};
  for (int64_t i = 0; i < head; i++) first[i] = static_cast<Real>(param[i]);
  const Real pivot = static_cast<Real>(sum_of(first) / static_cast<double>(head));

  Real sums[kLanes] = {0}, squares[kLanes] = {0};
  int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; lane++) {
      const Real deviation = static_cast<Real>(param[i + lane]) - pivot;
      sums[lane] += deviation;
      squares[lane] += deviation * deviation;
    }
  }
  for (int64_t lane = 0; i < numel; i++, lane++) {
    const Real deviation = static_cast<Real>(param[i]) - pivot;
    sums[lane] += deviation;
    squares[lane] += deviation * deviation;
  }
  return {static_cast<double>(numel), static_cast<double>(pivot), sum_of(sums), sum_of(squares)};
}

template <class Param>
Moments chunk_moments(const Param* param, int64_t numel) {
  Deviations result;
  if constexpr (!std::is_same_v<Param, double>) {
    vectorised([&]() SAFEKERN_INLINE_LAMBDA { result = deviations<float>(param, numel); });
    if (result.fit_float()) return result.moments();
  }
  vectorised([&]() SAFEKERN_INLINE_LAMBDA { result = deviations<double>(param, numel); });
  return result.moments();
}

Moments chunk_moments(const Half* param, int64_t numel) {
  float values[kChunk];
  convert(param, values, numel);
  return chunk_moments<float>(values, numel);
}

Tensor sigma(Tensors params) {
  check_sigma(params);
  const std::vector<Chunk> chunks = cut(params, kChunk);
  std::vector<Moments> partial(chunks.size());
  parallel_each(static_cast<int64_t>(chunks.size()), [&](int64_t c) {
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
