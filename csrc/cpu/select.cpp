// The exact k largest (or smallest) ESI keys over a list of tensors, ties to the earlier element.
//
// A sample gives a low guess of the k-th key, one streaming pass keeps what reaches it, and histograms over those
// candidates find the exact key. The sample decides only how much is kept: when it guessed badly, or very many are
// selected, the same histograms run over all the data instead, in bounded memory. Where it guessed well and too many
// elements have that very key, as zeros have, what is above it is kept instead, and the first of these ties are looked
// up. Blocks have a fixed size and counters are integers, so the result does not depend on the number of threads.
#include <atomic>
#include <mutex>
#include <optional>

#include "../arithmetic.h"
#include "common.h"
#include "simd.h"

#if SAFEKERN_X86
#include <immintrin.h>
#endif

namespace safekern {
namespace {

constexpr int64_t kBlock = 1 << 16;  // a position inside a block fits 16 bits
constexpr int64_t kLine = 16;        // fp32 elements in a cache line
constexpr int64_t kMostSampleLines = 1 << 14, kFewestSampleLines = 1 << 8;
constexpr int64_t kSampleShare = 16;  // at most one in so many lines
// Of more than one element in so many, the candidates would take nearly as much memory as the scores.
constexpr int64_t kCandidateShare = 4;
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
  parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) {
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

// The rank-th largest key (from 1) of the blocks of a source.
template <class Source>
Cutoff find_cutoff(const Source& source, int64_t blocks, int64_t rank) {
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
    outputs.push_back(torch::stable::empty({counts[t]}, index_dtype(problem.grads[t].numel())));
  }
  parallel_each(blocks, [&](int64_t b) {
    const Chunk& block = problem.blocks[b];
    with_index_type(outputs[block.tensor].scalar_type(), [&](auto* type) {
      using Index = std::remove_pointer_t<decltype(type)>;
      Index* out = outputs[block.tensor].mutable_data_ptr<Index>() + offsets[b];
      int64_t written = 0, quota = ties[b];
      const int64_t chosen = above[b] + ties[b];
      // Written before it is known to be chosen: one candidate in five is not, which no branch predicts.
      source.visit(b, [&](uint32_t key, int64_t position) {
        if (written == chosen) return;
        out[written] = static_cast<Index>(block.begin + position);
        const bool tied = key == cutoff.key && quota > 0;
        quota -= tied;
        written += tied || key > cutoff.key;
      });
    });
  });
  return outputs;
}

// The elements of some cache lines spread over all the tensors.
struct SampledLine {
  const float* grad;
  int64_t tensor, numel;
};

std::vector<SampledLine> sample_lines(const Problem& problem, int64_t count) {
  std::vector<SampledLine> lines;
  lines.reserve(count);
  const double stride = static_cast<double>(problem.numel) / static_cast<double>(count);
  int64_t tensor = 0, first = 0, numel = problem.grads[0].numel();  // first: the elements before this tensor
  for (int64_t line = 0; line < count; line++) {
    const int64_t position = sample_place(line, stride);
    while (position >= first + numel) {
      first += numel;
      numel = problem.grads[++tensor].numel();
    }
    const int64_t begin = (position - first) / kLine * kLine;
    lines.push_back({problem.data(tensor) + begin, tensor, std::min(kLine, numel - begin)});
  }
  return lines;
}

// A key that, going by a sample of cache lines, somewhat more than k elements reach; none when a sample would be too
// small, or the candidates too many.
std::optional<uint32_t> guess_cutoff(const Problem& problem) {
  const int64_t number = std::min(kMostSampleLines, problem.numel / (kSampleShare * kLine));
  if (number < kFewestSampleLines || problem.k > problem.numel / kCandidateShare) return std::nullopt;
  const std::vector<SampledLine> lines = sample_lines(problem, number);
  Candidates sample;
  std::vector<uint32_t>& keys = sample.keys.emplace_back(number * kLine);
  sample.positions.emplace_back(number * kLine);
  size_t count = 0;
  for (size_t l = 0; l < lines.size(); l++) {
    // Few enough at a time for the caches to hold them until they are read.
    prefetch(lines[std::min(l + 64, lines.size() - 1)].grad);
    const auto [grad, tensor, numel] = lines[l];
    for (int64_t i = 0; i < numel; i++) keys[count++] = problem.key(grad[i], tensor);
  }
  keys.resize(count);
  const double expected =
      static_cast<double>(problem.k) / static_cast<double>(problem.numel) * static_cast<double>(keys.size());
  // The lines of a sample are correlated: eight standard deviations of an independent sample leave room for that.
  const auto rank = static_cast<int64_t>(1.1 * expected + 8 * std::sqrt(expected) + 17);
  return find_cutoff(sample, 1, rank).key;
}

// What the filter keeps of one block, and the largest ESI key it met.
struct Kept {
  // Room for a vector more than a block, since whole vectors are stored.
  std::vector<uint32_t> keys = std::vector<uint32_t>(kBlock + kLine);
  std::vector<uint16_t> positions = std::vector<uint16_t>(kBlock + kLine);
  int64_t count = 0;
  uint32_t highest = 0;

  SAFEKERN_INLINE void add(uint32_t key, int64_t position) {
    keys[count] = key;
    positions[count++] = static_cast<uint16_t>(position);
  }
};

// Each of these keeps what reaches the guess among the first elements of a block, in its own steps, and returns how
// many it has looked at. Bytes moved: 4 per element, and at a ratio of 1% about 1.2% of 6.
struct Filter {
  float sigma;
  uint32_t flip, guess;

  int64_t portable(const float* grad, int64_t begin, int64_t size, Kept& kept) const {
    for (int64_t i = begin; i < size; i++) {
      const uint32_t key = esi_key(grad[i], sigma);
      kept.highest = std::max(kept.highest, key);
      if ((key ^ flip) >= guess) kept.add(key ^ flip, i);
    }
    return size;
  }

#if SAFEKERN_X86
  SAFEKERN_AVX2 int64_t avx2(const float* grad, int64_t size, Kept& kept) const {
    constexpr int64_t kVectors = 4, kStep = 8 * kVectors;
    const __m256 sigmas = _mm256_set1_ps(sigma);
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff), flips = _mm256_set1_epi32(static_cast<int32_t>(flip));
    const __m256i below = _mm256_set1_epi32(static_cast<int32_t>(guess - 1));
    __m256i highest = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + kStep <= size; i += kStep) {
      __m256i keys[kVectors];
      uint32_t reached = 0;
      for (int64_t v = 0; v < kVectors; v++) {
        const __m256 esi = _mm256_mul_ps(_mm256_loadu_ps(grad + i + 8 * v), sigmas);
        const __m256i key = _mm256_and_si256(_mm256_castps_si256(esi), magnitude);
        highest = _mm256_max_epi32(highest, key);
        keys[v] = _mm256_xor_si256(key, flips);
        const __m256 above = _mm256_castsi256_ps(_mm256_cmpgt_epi32(keys[v], below));
        reached |= static_cast<uint32_t>(_mm256_movemask_ps(above)) << (8 * v);
      }
      if (!reached) continue;
      alignas(32) uint32_t stored[kStep];
      for (int64_t v = 0; v < kVectors; v++) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(stored + 8 * v), keys[v]);
      }
      for (; reached; reached &= reached - 1) {
        const int j = __builtin_ctz(reached);
        kept.add(stored[j], i + j);
      }
    }
    uint32_t highest_keys[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(highest_keys), highest);
    for (uint32_t key : highest_keys) kept.highest = std::max(kept.highest, key);
    return i;
  }

  SAFEKERN_AVX512 int64_t avx512(const float* grad, int64_t size, Kept& kept) const {
    const __m512 sigmas = _mm512_set1_ps(sigma);
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), flips = _mm512_set1_epi32(static_cast<int32_t>(flip));
    const __m512i guesses = _mm512_set1_epi32(static_cast<int32_t>(guess)), step = _mm512_set1_epi32(kLine);
    __m512i positions = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i highest = _mm512_setzero_si512();
    uint32_t* __restrict kept_keys = kept.keys.data();
    uint16_t* __restrict kept_positions = kept.positions.data();
    int64_t i = 0, count = kept.count;
    for (; i + kLine <= size; i += kLine) {
      const __m512 esi = _mm512_mul_ps(_mm512_loadu_ps(grad + i), sigmas);
      const __m512i key = _mm512_and_si512(_mm512_castps_si512(esi), magnitude);
      highest = _mm512_max_epi32(highest, key);
      const __m512i flipped = _mm512_xor_si512(key, flips);
      const __mmask16 reached = _mm512_cmpge_epu32_mask(flipped, guesses);
      // Compressed in the register: an instruction that compresses into memory is several times slower on Zen 4.
      _mm512_storeu_si512(kept_keys + count, _mm512_maskz_compress_epi32(reached, flipped));
      const __m512i chosen = _mm512_maskz_compress_epi32(reached, positions);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept_positions + count), _mm512_cvtepi32_epi16(chosen));
      count += __builtin_popcount(reached);
      positions = _mm512_add_epi32(positions, step);
    }
    kept.count = count;
    kept.highest = std::max(kept.highest, static_cast<uint32_t>(_mm512_reduce_max_epi32(highest)));
    return i;
  }
#endif

  void operator()(const float* grad, int64_t size, Kept& kept) const {
    int64_t done = 0;
#if SAFEKERN_X86
    if (cpu_capability() == Capability::kAvx512) done = avx512(grad, size, kept);
    if (cpu_capability() == Capability::kAvx2) done = avx2(grad, size, kept);
#endif
    portable(grad, done, size, kept);
  }
};

void check_no_nan(bool nan) { STD_TORCH_CHECK(!nan, "safekern: a score is NaN"); }

// Keeps what reaches the guess, block by block, and says how many that are; more than `capacity` are not counted to the
// end, and what is kept of them is of no use.
int64_t filter(const Problem& problem, uint32_t guess, int64_t capacity, Candidates& candidates) {
  const int64_t blocks = static_cast<int64_t>(problem.blocks.size());
  candidates.keys.resize(blocks);
  candidates.positions.resize(blocks);
  std::atomic<int64_t> total{0};
  std::atomic<bool> nan{false};
  parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) {
    Kept kept;
    for (int64_t b = begin; b < end && total.load(std::memory_order_relaxed) <= capacity; b++) {
      const Chunk& block = problem.blocks[b];
      const Filter keep{problem.sigma[block.tensor], problem.flip, guess};
      kept.count = 0;
      keep(problem.data(block.tensor) + block.begin, block.end - block.begin, kept);
      candidates.keys[b].assign(kept.keys.begin(), kept.keys.begin() + kept.count);
      candidates.positions[b].assign(kept.positions.begin(), kept.positions.begin() + kept.count);
      total.fetch_add(kept.count, std::memory_order_relaxed);
    }
    if (kept.highest > kInfinityKey) nan = true;
  });
  check_no_nan(nan);
  return total;
}

SAFEKERN_INLINE int64_t count_equal(const float* grad, int64_t numel, float sigma, uint32_t key) {
  int32_t count = 0;
  for (int64_t i = 0; i < numel; i++) count += esi_key(grad[i], sigma) == key;
  return count;
}

// How many elements have the key in each of the first blocks, up to where there are `quota` of them, and none in the
// others.
std::vector<int64_t> find_ties(const Problem& problem, uint32_t key, int64_t quota) {
  const int64_t blocks = static_cast<int64_t>(problem.blocks.size());
  std::vector<int64_t> ties(blocks);
  int64_t done = 0;
  for (int64_t batch = 16; quota > 0 && done < blocks; batch *= 2) {
    const int64_t end = std::min(done + batch, blocks);
    parallel_each(end - done, [&](int64_t i) {
      const Chunk& block = problem.blocks[done + i];
      vectorised([&]() SAFEKERN_INLINE_LAMBDA {
        const float* grad = problem.data(block.tensor) + block.begin;
        const float sigma = problem.sigma[block.tensor];
        ties[done + i] = count_equal(grad, block.end - block.begin, sigma, key ^ problem.flip);
      });
    });
    for (; done < end; done++) {
      if (quota <= 0) ties[done] = 0;
      quota -= ties[done];
    }
  }
  return ties;
}

// What is above a key, and all elements of the blocks in which some of those that have it are wanted.
struct WithTies {
  const Problem& problem;
  const Candidates& candidates;
  std::vector<int64_t> ties;

  template <class F>
  void visit(int64_t b, const F& f) const {
    if (ties[b] > 0) {
      EveryElement{problem}.visit(b, f);
    } else {
      candidates.visit(b, f);
    }
  }
};

SAFEKERN_INLINE bool any_nan(const float* grad, int64_t numel, float sigma) {
  int32_t highest = 0;
  for (int64_t i = 0; i < numel; i++) highest = std::max(highest, static_cast<int32_t>(esi_key(grad[i], sigma)));
  return highest > static_cast<int32_t>(kInfinityKey);
}

bool has_nan(const Problem& problem) {
  std::atomic<bool> found{false};
  parallel_each(static_cast<int64_t>(problem.blocks.size()), [&](int64_t b) {
    const Chunk& block = problem.blocks[b];
    vectorised([&]() SAFEKERN_INLINE_LAMBDA {
      const float* grad = problem.data(block.tensor) + block.begin;
      if (any_nan(grad, block.end - block.begin, problem.sigma[block.tensor])) found = true;
    });
  });
  return found;
}

Tensors select(Tensors grads, Tensor sigma, int64_t k, bool largest) {
  check_select(grads, sigma, k);
  Problem problem{grads, sigma.const_data_ptr<float>(), k, 0, largest ? 0 : kFlipKey, cut(grads, kBlock)};
  for (const Tensor& grad : grads) problem.numel += grad.numel();
  const auto blocks = static_cast<int64_t>(problem.blocks.size());
  if (const std::optional<uint32_t> guess = guess_cutoff(problem)) {
    // Small ratios are guessed least well: at 0.1%, 1.66 k elements reach the guess.
    const int64_t capacity = std::max(problem.numel / 80, k + k / 3) + kBlock;
    Candidates candidates;
    // Everything reaches 0.
    int64_t reached = *guess > 0 ? filter(problem, *guess, capacity, candidates) : capacity + 1;
    const bool tied = reached > capacity;
    if (tied) reached = filter(problem, *guess + 1, capacity, candidates);
    if (reached >= k && reached <= capacity) return emit(problem, candidates, find_cutoff(candidates, blocks, k));
    if (tied && reached < k) {
      // More than k reach the guess, so that it is the key to be found.
      const Cutoff cutoff{*guess, k - reached};
      return emit(problem, WithTies{problem, candidates, find_ties(problem, cutoff.key, cutoff.ties)}, cutoff);
    }
  }
  check_no_nan(has_nan(problem));
  const EveryElement everything{problem};
  return emit(problem, everything, find_cutoff(everything, blocks, k));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) { m.impl("select", TORCH_BOX(&select)); }

}  // namespace safekern
