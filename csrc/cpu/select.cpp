// The exact k largest (or smallest) ESI keys over a list of tensors, ties to the earlier element.
//
// A sample gives a low guess of the k-th key, one streaming pass keeps what reaches it, and histograms over those
// candidates find the exact key. The sample decides only how much is kept: when it guessed badly, the same histograms
// run over all the data instead, in bounded memory. Blocks have a fixed size and counters are integers, so the result
// does not depend on the number of threads.
#include <atomic>
#include <mutex>

#include "../arithmetic.h"
#include "common.h"

namespace safekern {
namespace {

constexpr int64_t kBlock = 1 << 16;  // a position inside a block fits 16 bits
constexpr int64_t kGroup = 16;       // elements tested together before any is looked at alone; also a cache line
constexpr int64_t kSampleLines = 1 << 14;
constexpr int kHighBins = 1 << 15, kLowBins = 1 << 16;  // a 31-bit key in two digits

struct Problem {
  Tensors grads;
  const float* sigma;
  int64_t k, numel;
  uint32_t flip;  // kFlipKey to rank the smallest first
  std::vector<Chunk> blocks;

  const float* data(int64_t tensor) const { return grads[tensor].const_data_ptr<float>(); }
  uint32_t key(float grad, int64_t tensor) const { return esi_key(grad, sigma[tensor]) ^ flip; }
};

// Both sources below visit the (key, position in block) pairs of a block in ascending order of position.
struct EveryElement {
  const Problem& problem;

  template <class F>
  void visit(int64_t b, const F& f) const {
    const Chunk& block = problem.blocks[b];
    const float* grad = problem.data(block.tensor) + block.begin;
    for (int64_t i = 0; i < block.end - block.begin; i++) f(problem.key(grad[i], block.tensor), i);
  }
};

struct Candidates {
  std::vector<std::vector<uint32_t>> keys;
  std::vector<std::vector<uint16_t>> positions;

  template <class F>
  void visit(int64_t b, const F& f) const {
    for (size_t c = 0; c < keys[b].size(); c++) f(keys[b][c], static_cast<int64_t>(positions[b][c]));
  }
};

template <class Digit>
std::vector<int64_t> histogram(int64_t blocks, int bins, const Digit& digit_counts) {
  std::vector<int64_t> total(bins);
  std::mutex mutex;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> local(bins);
    for (int64_t b = begin; b < end; b++) digit_counts(b, local);
    const std::lock_guard<std::mutex> lock(mutex);
    for (int bin = 0; bin < bins; bin++) total[bin] += local[bin];
  });
  return total;
}

// The bin that holds the rank-th largest entry (from 1); rank becomes the rank inside that bin.
uint32_t find_bin(const std::vector<int64_t>& counts, int64_t& rank) {
  auto bin = counts.size() - 1;
  while (counts[bin] < rank) rank -= counts[bin--];
  return static_cast<uint32_t>(bin);
}

struct Cutoff {
  uint32_t key;
  int64_t ties;  // how many elements equal to the key are selected
};

template <class Source>
Cutoff find_cutoff(const Problem& problem, const Source& source) {
  const int64_t blocks = static_cast<int64_t>(problem.blocks.size());
  int64_t rank = problem.k;
  const uint32_t high = find_bin(histogram(blocks, kHighBins,
                                           [&](int64_t b, std::vector<int64_t>& counts) {
                                             source.visit(b, [&](uint32_t key, int64_t) { counts[key >> 16]++; });
                                           }),
                                 rank);
  const uint32_t low = find_bin(histogram(blocks, kLowBins,
                                          [&](int64_t b, std::vector<int64_t>& counts) {
                                            source.visit(b, [&](uint32_t key, int64_t) {
                                              if (key >> 16 == high) counts[key & 0xffff]++;
                                            });
                                          }),
                                rank);
  return {high << 16 | low, rank};
}

template <class Source>
Tensors emit(const Problem& problem, const Source& source, Cutoff cutoff) {
  const int64_t blocks = static_cast<int64_t>(problem.blocks.size());
  std::vector<int64_t> above(blocks), ties(blocks), offsets(blocks);
  parallel_each(blocks, [&](int64_t b) {
    source.visit(b, [&](uint32_t key, int64_t) {
      above[b] += key > cutoff.key;
      ties[b] += key == cutoff.key;
    });
  });

  std::vector<int64_t> counts(problem.grads.size());
  for (int64_t b = 0; b < blocks; b++) {
    ties[b] = std::min(ties[b], cutoff.ties);
    cutoff.ties -= ties[b];
    int64_t& count = counts[problem.blocks[b].tensor];
    offsets[b] = count;
    count += above[b] + ties[b];
  }

  Tensors outputs;
  for (size_t t = 0; t < counts.size(); t++) {
    const bool fits = problem.grads[t].numel() <= INT32_MAX;
    outputs.push_back(torch::stable::empty({counts[t]}, fits ? ScalarType::Int : ScalarType::Long));
  }
  parallel_each(blocks, [&](int64_t b) {
    const Chunk& block = problem.blocks[b];
    with_index_type(outputs[block.tensor].scalar_type(), [&](auto* type) {
      using Index = std::remove_pointer_t<decltype(type)>;
      Index* out = outputs[block.tensor].mutable_data_ptr<Index>() + offsets[b];
      int64_t quota = ties[b];
      source.visit(b, [&](uint32_t key, int64_t position) {
        if (key > cutoff.key || (key == cutoff.key && quota-- > 0)) *out++ = static_cast<Index>(block.begin + position);
      });
    });
  });
  return outputs;
}

// A key that, going by a sample of cache lines, somewhat more than k elements reach; 0 when a sample cannot tell.
uint32_t guess_cutoff(const Problem& problem) {
  const int64_t lines = kSampleLines;
  if (problem.numel < 4 * lines * kGroup) return 0;
  std::vector<uint32_t> sample;
  sample.reserve(lines * kGroup);
  const double stride = static_cast<double>(problem.numel) / static_cast<double>(lines);
  int64_t tensor = 0, first = 0;  // first: the number of elements before this tensor
  for (int64_t line = 0; line < lines; line++) {
    // Jittered within its stride, since weights repeat with the period of a matrix row.
    uint32_t hash = static_cast<uint32_t>(line) * 0x9e3779b1u;
    hash = (hash ^ hash >> 15) * 0x85ebca77u;
    const double jitter = static_cast<double>(hash >> 8) / (1 << 24);
    const auto position = static_cast<int64_t>(stride * (static_cast<double>(line) + jitter));
    while (position >= first + problem.grads[tensor].numel()) first += problem.grads[tensor++].numel();
    const int64_t begin = (position - first) / kGroup * kGroup;
    const int64_t end = std::min(begin + kGroup, problem.grads[tensor].numel());
    const float* grad = problem.data(tensor);
    for (int64_t i = begin; i < end; i++) sample.push_back(problem.key(grad[i], tensor));
  }
  const double expected = static_cast<double>(problem.k) / static_cast<double>(problem.numel) * sample.size();
  // The lines of a sample are correlated: eight standard deviations of an independent sample leave room for that.
  const auto rank = static_cast<size_t>(1.1 * expected + 8 * std::sqrt(expected) + 16);
  if (rank >= sample.size()) return 0;
  std::nth_element(sample.begin(), sample.begin() + static_cast<int64_t>(rank), sample.end(), std::greater<>());
  return sample[rank];
}

// Keeps what reaches the guess, block by block; false when that is more than `capacity` or fewer than k elements.
bool filter(const Problem& problem, uint32_t guess, int64_t capacity, Candidates& candidates) {
  const int64_t blocks = static_cast<int64_t>(problem.blocks.size());
  candidates.keys.resize(blocks);
  candidates.positions.resize(blocks);
  std::atomic<int64_t> total{0};
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(kBlock);
    std::vector<uint16_t> positions(kBlock);
    for (int64_t b = begin; b < end && total.load(std::memory_order_relaxed) <= capacity; b++) {
      const Chunk& block = problem.blocks[b];
      const float* grad = problem.data(block.tensor) + block.begin;
      const int64_t size = block.end - block.begin;
      int64_t count = 0;
      for (int64_t group = 0; group < size; group += kGroup) {
        const int64_t width = std::min(kGroup, size - group);
        const float* values = grad + group;
        float padded[kGroup] = {0};
        if (width < kGroup) values = std::copy(values, values + width, padded) - width;
        uint32_t tile[kGroup];
        int32_t reached = 0;
        // Signed comparison of 31-bit keys: baseline x86-64 has no unsigned one.
        for (int64_t i = 0; i < kGroup; i++) {
          tile[i] = problem.key(values[i], block.tensor);
          reached |= static_cast<int32_t>(tile[i]) >= static_cast<int32_t>(guess);
        }
        if (!reached) continue;
        for (int64_t i = 0; i < width; i++) {
          keys[count] = tile[i];
          positions[count] = static_cast<uint16_t>(group + i);
          count += tile[i] >= guess;
        }
      }
      candidates.keys[b].assign(keys.begin(), keys.begin() + count);
      candidates.positions[b].assign(positions.begin(), positions.begin() + count);
      total.fetch_add(count, std::memory_order_relaxed);
    }
  });
  return total.load() >= problem.k && total.load() <= capacity;
}

bool has_nan(const Problem& problem) {
  std::vector<uint8_t> found(problem.blocks.size());
  parallel_each(static_cast<int64_t>(problem.blocks.size()), [&](int64_t b) {
    const Chunk& block = problem.blocks[b];
    const float* grad = problem.data(block.tensor);
    const float sigma = problem.sigma[block.tensor];
    int32_t nan = 0;
    for (int64_t i = block.begin; i < block.end; i++) {
      nan |= static_cast<int32_t>(esi_key(grad[i], sigma)) > static_cast<int32_t>(kInfinityKey);
    }
    found[b] = nan != 0;
  });
  return std::find(found.begin(), found.end(), 1) != found.end();
}

Tensors select(Tensors grads, Tensor sigma, int64_t k, bool largest) {
  check_select(grads, sigma, k);
  Problem problem{grads, sigma.const_data_ptr<float>(), k, 0, largest ? 0 : kFlipKey, cut(grads, kBlock)};
  for (const Tensor& grad : grads) problem.numel += grad.numel();
  STD_TORCH_CHECK(!has_nan(problem), "safekern: a score is NaN");

  const uint32_t guess = guess_cutoff(problem);
  const int64_t capacity = k + k / 3 + kBlock;
  Candidates candidates;
  if (guess > 0 && filter(problem, guess, capacity, candidates)) {
    return emit(problem, candidates, find_cutoff(problem, candidates));
  }
  candidates = {};
  const EveryElement everything{problem};
  return emit(problem, everything, find_cutoff(problem, everything));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) { m.impl("select", TORCH_BOX(&select)); }

}  // namespace safekern
