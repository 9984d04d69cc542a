// The exact k largest (or smallest) ESI keys over a list of tensors, ties to the earlier element.
//
// As on the CPU (csrc/cpu/select.cpp): a sample gives a low guess of the k-th key, one streaming pass keeps what
// reaches it, and histograms over those candidates find the exact key. When the sample guessed badly, and for short
// lists or a large k, the same histograms run over all the elements instead. Neither changes the result: counts are
// integers, and positions are sorted by bitmaps.
//
// Bytes: 4 per element and 4 (or 8) per selected one; moves 4.1 per element and about 35 per selected one, or 20 per
// element without candidates. Extra memory: 28 bytes per 8192 elements and 6 per candidate, of which there may be as
// many as one in 80 elements (together 2% of the scores) or 1.25 per selected one. It waits for the device once, for
// the sizes of the outputs, and a second time if the candidates did not hold the answer.
#include <cub/block/block_scan.cuh>

#include "common.cuh"

namespace safekern {
namespace {

constexpr int kSlab = 1 << 13;  // elements that are filtered together; a position inside a slab fits 16 bits
constexpr int V = 4;
constexpr int kRows = kSlab / (kThreads * V);
constexpr int kWarps = kThreads / 32;

// A 31-bit key in three digits: the histogram of one fits in shared memory on every GPU.
constexpr int kBins = 1 << 11;
constexpr int kDigits = 3;
constexpr int kDigitBits[kDigits] = {11, 10, 10};
constexpr int kDigitShift[kDigits] = {20, 10, 0};
constexpr int kGuessDigits = 2;  // a guess need not be exact: without the last digit it is a little lower
constexpr int kGuessShift = 10;

constexpr int64_t kSampleFrom = 1 << 24;  // shorter lists fit in the cache, where a sample saves nothing
constexpr int kSampleLine = 16;

struct Entry {
  const float* grad;
  int64_t numel;
  int64_t first_slab;  // in the list of all slabs
  void* out;           // int64 where positions do not fit int32, otherwise int32
  int32_t tensor;
  bool aligned;
};

int64_t slabs_of(const Entry& entry) { return ceil_div(entry.numel, kSlab); }

// A key found digit by digit: after the last one `key` is the rank-th largest key (from 1), and `rank` is which of its
// equals that is.
struct Search {
  int64_t rank;
  uint32_t key;
};

struct State {
  Search guess, cutoff;
  unsigned long long candidates;  // how many elements reached the guess, kept or not
  unsigned long long nan;         // whether a key is NaN
};

// What is known per slab; arrays on the device.
struct Slabs {
  int64_t* offset;            // of its candidates
  int32_t* count;             // of its candidates
  int32_t* above;             // elements above the cutoff
  int32_t* ties;              // elements equal to it; afterwards how many of them are selected
  int64_t* selected;          // in all slabs before; one entry more than slabs
  unsigned long long* tiles;  // the sums of `above` (high word) and `ties` over kTile slabs each
};

struct Candidates {
  uint32_t* keys;
  uint16_t* positions;
  int64_t capacity;
};

// One slab of a tensor.
struct Slab {
  const float* grad;
  float sigma;
  uint32_t flip;
  int64_t begin;  // in the tensor
  int size;
  bool aligned;

  __device__ Slab(const Entry& entry, int64_t slab, const float* sigmas, uint32_t flip)
      : grad(entry.grad + slab * kSlab),
        sigma(sigmas[entry.tensor]),
        flip(flip),
        begin(slab * kSlab),
        size(static_cast<int>(min(int64_t{kSlab}, entry.numel - slab * kSlab))),
        aligned(entry.aligned) {}

  // The values at [position, position + V), zeros outside.
  __device__ void load(float (&values)[V], int position) const {
    if (aligned && position + V <= size) {
      load_aligned(values, grad + position);
    } else {
#pragma unroll
      for (int v = 0; v < V; v++) values[v] = position + v < size ? grad[position + v] : 0.0f;
    }
  }

  // The rows of a slab that the threads of a block take: the keys of V elements from position(row) each.
  static __device__ int position(int row) { return (row * kThreads + static_cast<int>(threadIdx.x)) * V; }

  __device__ void load_rows(float (&values)[kRows][V]) const {
    if (aligned && size == kSlab) {
#pragma unroll
      for (int row = 0; row < kRows; row++) load_aligned(values[row], grad + position(row));
    } else {
#pragma unroll
      for (int i = 0; i < kRows * V; i++) {
        const int at = position(i / V) + i % V;
        values[i / V][i % V] = at < size ? grad[at] : 0.0f;
      }
    }
  }

  __device__ bool is_nan(float value) const { return esi_key(value, sigma) > kInfinityKey; }
  __device__ uint32_t key(float value) const { return esi_key(value, sigma) ^ flip; }
};

// The N elements of a slab that one lane holds.
template <int N>
struct Held {
  static constexpr int kItems = N;
  uint32_t keys[N];
  int positions[N];
  bool exists[N];
};

// Calls f(held) until the lanes of a warp have been through the elements of a slab, or through its candidates, in
// ascending order: of one call, those of the first lane first. All lanes call f together.
struct EveryElement {
  const float* sigmas;
  uint32_t flip;

  template <class F>
  __device__ void visit(const Entry& entry, int64_t local, int lane, const F& f) const {
    const Slab slab(entry, local, sigmas, flip);
    for (int first = 0; first < slab.size; first += 32 * V) {
      const int position = first + lane * V;
      float values[V];
      slab.load(values, position);
      Held<V> held;
#pragma unroll
      for (int v = 0; v < V; v++) {
        held.keys[v] = slab.key(values[v]);
        held.positions[v] = position + v;
        held.exists[v] = position + v < slab.size;
      }
      f(held);
    }
  }
};

struct KeptElements {
  Candidates candidates;
  const int64_t* offset;
  const int32_t* count;

  template <class F>
  __device__ void visit(const Entry& entry, int64_t local, int lane, const F& f) const {
    const int64_t slab = entry.first_slab + local, begin = offset[slab], end = begin + count[slab];
    for (int64_t first = begin; first < end; first += 32) {
      const int64_t c = first + lane;
      Held<1> held{{0}, {0}, {c < end}};
      if (c < end) {
        held.keys[0] = __ldcs(candidates.keys + c);
        held.positions[0] = __ldcs(candidates.positions + c);
      }
      f(held);
    }
  }
};

// The keys of `lines` runs of kSampleLine elements.
__global__ void __launch_bounds__(kThreads)
    sample(const __grid_constant__ Table<Entry> table, const float* sigmas, uint32_t flip, int64_t slabs, int64_t lines,
           uint32_t* __restrict__ keys) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t line = thread / kSampleLine;
  if (line >= lines) return;
  const int64_t place = sample_place(line, static_cast<double>(slabs) * kSlab / static_cast<double>(lines));
  const int64_t block = min(place / kSlab, slabs - 1) - table.entries[0].first_slab;
  if (block < 0 || block >= table.blocks()) return;
  const int t = table.find(static_cast<int32_t>(block));
  const Slab slab(table.entries[t], block - table.first_block[t], sigmas, flip);
  // A slab at the end of a tensor may have fewer lines.
  const int full = (slab.size + kSampleLine - 1) / kSampleLine;
  const int position =
      static_cast<int>(place % kSlab) / kSampleLine % full * kSampleLine + static_cast<int>(thread % kSampleLine);
  keys[thread] = position < slab.size ? slab.key(slab.grad[position]) : 0;
}

__device__ void clear(uint32_t (&bins)[kBins]) {
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
  __syncthreads();
}

// Fewer than 2^32 elements meet in one block's histogram, so only the totals need 64 bits.
__device__ void flush(const uint32_t (&bins)[kBins], unsigned long long* totals) {
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    if (bins[bin]) atomicAdd(&totals[bin], static_cast<unsigned long long>(bins[bin]));
  }
}

// One digit of the keys that agree with `prefix` in the digits before.
struct Digit {
  int shift, bits;

  __device__ void count(uint32_t (&bins)[kBins], uint32_t key, uint32_t prefix) const {
    if (key >> (shift + bits) == prefix) atomicAdd(&bins[key >> shift & ((1u << bits) - 1)], 1u);
  }
};

__global__ void __launch_bounds__(kThreads)
    histogram_keys(const uint32_t* __restrict__ keys, int64_t size, const unsigned long long* used, Digit digit,
                   const Search* search, unsigned long long* totals) {
  __shared__ uint32_t bins[kBins];
  clear(bins);
  if (used) size = min(size, static_cast<int64_t>(*used));
  const uint32_t prefix = search->key;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < size; i += threads) {
    digit.count(bins, keys[i], prefix);
  }
  flush(bins, totals);
}

__global__ void __launch_bounds__(kThreads)
    histogram_elements(const __grid_constant__ Table<Entry> table, const float* sigmas, uint32_t flip, Digit digit,
                       const Search* search, unsigned long long* totals, State* state) {
  __shared__ uint32_t bins[kBins];
  clear(bins);
  const uint32_t prefix = search->key;
  bool nan = false;
  for (int64_t block = blockIdx.x; block < table.blocks(); block += gridDim.x) {
    const int t = table.find(static_cast<int32_t>(block));
    const Slab slab(table.entries[t], block - table.first_block[t], sigmas, flip);
    float values[kRows][V];
    slab.load_rows(values);
#pragma unroll
    for (int row = 0; row < kRows; row++) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        if (slab.position(row) + v >= slab.size) continue;
        nan |= slab.is_nan(values[row][v]);
        digit.count(bins, slab.key(values[row][v]), prefix);
      }
    }
  }
  flush(bins, totals);
  if (nan) state->nan = 1;
}

constexpr int kSearchThreads = 1024;

// Finds the bin that holds the wanted rank, appends its digit to the key, and clears the totals for the next digit.
// When there are fewer keys than that, nothing is found; the caller compares the numbers.
__global__ void __launch_bounds__(kSearchThreads) find_bin(unsigned long long* totals, Digit digit, Search* search) {
  static_assert(kBins == 2 * kSearchThreads);
  using Scan = cub::BlockScan<unsigned long long, kSearchThreads, cub::BLOCK_SCAN_WARP_SCANS>;
  __shared__ typename Scan::TempStorage storage;
  const int64_t rank = search->rank;
  const uint32_t prefix = search->key;
  // From the largest bin down, two per thread.
  const int bin = kBins - 1 - 2 * static_cast<int>(threadIdx.x);
  const unsigned long long counts[2] = {totals[bin], totals[bin - 1]};
  totals[bin] = totals[bin - 1] = 0;
  unsigned long long before;
  Scan(storage).ExclusiveSum(counts[0] + counts[1], before);
  // No thread writes the search before all have read it.
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int64_t left = rank - static_cast<int64_t>(before);
    if (left > 0 && left <= static_cast<int64_t>(counts[i])) {
      *search = {left, prefix << digit.bits | static_cast<uint32_t>(bin - i)};
    }
    before += counts[i];
  }
}

__global__ void start_search(Search* search, int64_t rank) { *search = {rank, 0}; }

template <class T>
__device__ T warp_exclusive_sum(T value, int lane) {
  T sum = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(kWarp, sum, distance);
    if (lane >= distance) sum += other;
  }
  return sum - value;
}

// Keeps the elements that reach the guess, in order within a slab: each slab gets a place among the candidates as it
// comes. Every element is read even when there is no more room, because a NaN may be among them.
__global__ void __launch_bounds__(kThreads, 4) filter(const __grid_constant__ Table<Entry> table, const float* sigmas,
                                                      uint32_t flip, Candidates candidates, Slabs slabs, State* state) {
  __shared__ int counts[kRows * kWarps];  // of the part of a row that a warp holds; afterwards of all parts before
  __shared__ int64_t place;
  __shared__ bool fits;
  const int t = table.find(blockIdx.x);
  const Entry& entry = table.entries[t];
  const int64_t local = blockIdx.x - table.first_block[t];
  const Slab slab(entry, local, sigmas, flip);
  const uint32_t guess = state->guess.key << kGuessShift;
  float values[kRows][V];
  slab.load_rows(values);

  static_assert(kRows * V == 32 && V == 4);
  uint32_t reached = 0;  // one bit per element of this thread
  bool nan = false;
  const auto look = [&](auto whole) {
#pragma unroll
    for (int i = 0; i < kRows * V; i++) {
      const float value = values[i / V][i % V];
      const bool exists = decltype(whole)::value || slab.position(i / V) + i % V < slab.size;
      nan |= exists && slab.is_nan(value);
      if (exists && slab.key(value) >= guess) reached |= 1u << i;
    }
  };
  if (slab.size == kSlab) {
    look(std::true_type());
  } else {
    look(std::false_type());
  }
  if (nan) state->nan = 1;

  // The bits of each row are counted in a byte of their own, of which a warp needs 129 values.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t pairs = reached - (reached >> 1 & 0x55555555u);
  const uint32_t fours = (pairs & 0x33333333u) + (pairs >> 2 & 0x33333333u);
  const uint32_t own[2] = {fours & 0x0f0f0f0fu, fours >> 4 & 0x0f0f0f0fu};  // the even rows, the odd ones
  const uint32_t before[2] = {warp_exclusive_sum(own[0], lane), warp_exclusive_sum(own[1], lane)};
  const auto of_row = [](const uint32_t (&rows)[2], int row) {
    return static_cast<int>(rows[row % 2] >> row / 2 * 8 & 0xff);
  };
  if (lane == 31) {
#pragma unroll
    for (int row = 0; row < kRows; row++) counts[row * kWarps + warp] = of_row(before, row) + of_row(own, row);
  }
  __syncthreads();
  if (warp == 0) {
    static_assert(kRows * kWarps == 64);
    const int first = counts[2 * lane], second = counts[2 * lane + 1];
    const int start = warp_exclusive_sum(first + second, lane);
    counts[2 * lane] = start;
    counts[2 * lane + 1] = start + first;
    if (lane == 31) {
      const int total = start + first + second;
      place = static_cast<int64_t>(total ? atomicAdd(&state->candidates, total) : 0);
      fits = place + total <= candidates.capacity;
      slabs.offset[entry.first_slab + local] = place;
      slabs.count[entry.first_slab + local] = fits ? total : 0;
    }
  }
  __syncthreads();
  if (!fits) return;
#pragma unroll
  for (int row = 0; row < kRows; row++) {
    int64_t next = place + counts[row * kWarps + warp] + of_row(before, row);
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (reached >> (row * V + v) & 1) {
        candidates.keys[next] = slab.key(values[row][v]);
        candidates.positions[next] = static_cast<uint16_t>(slab.position(row) + v);
        next++;
      }
    }
  }
}

// From here on, one warp per slab.
__device__ int64_t warp_index() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; }

template <class Source>
__global__ void __launch_bounds__(kThreads)
    count_selected(const __grid_constant__ Table<Entry> table, Source source, Slabs slabs, const State* state) {
  const int64_t block = warp_index();
  if (block >= table.blocks()) return;
  const int t = table.find(static_cast<int32_t>(block));
  const Entry& entry = table.entries[t];
  const int64_t local = block - table.first_block[t];
  const int lane = threadIdx.x % 32;
  const uint32_t cutoff = state->cutoff.key;
  int above = 0, ties = 0;
  source.visit(entry, local, lane, [&](const auto& held) {
    constexpr int N = std::decay_t<decltype(held)>::kItems;
#pragma unroll
    for (int i = 0; i < N; i++) {
      above += held.exists[i] && held.keys[i] > cutoff;
      ties += held.exists[i] && held.keys[i] == cutoff;
    }
  });
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    above += __shfl_xor_sync(kWarp, above, distance);
    ties += __shfl_xor_sync(kWarp, ties, distance);
  }
  if (lane == 0) {
    slabs.above[entry.first_slab + local] = above;
    slabs.ties[entry.first_slab + local] = ties;
  }
}

// The counts of slabs are added up in tiles of one slab per thread: first each tile, then the tiles before a tile.
constexpr int kTile = kSearchThreads;

struct TileScan {
  using Scan = cub::BlockScan<unsigned long long, kTile, cub::BLOCK_SCAN_WARP_SCANS>;
  typename Scan::TempStorage storage;

  // The sum over the threads before.
  __device__ unsigned long long before(unsigned long long value, unsigned long long& total) {
    unsigned long long sum;
    Scan(storage).ExclusiveSum(value, sum, total);
    __syncthreads();
    return sum;
  }
};

// Both counts of a slab in one number: a tile has fewer than 2^32 elements.
__device__ unsigned long long counts_of(const Slabs& slabs, int64_t slab, int64_t count) {
  static_assert(int64_t{kTile} * kSlab < int64_t{1} << 32);
  if (slab >= count) return 0;
  return static_cast<unsigned long long>(slabs.above[slab]) << 32 | static_cast<unsigned long long>(slabs.ties[slab]);
}

__global__ void __launch_bounds__(kTile) sum_tiles(Slabs slabs, int64_t count) {
  __shared__ TileScan scan;
  unsigned long long total;
  scan.before(counts_of(slabs, static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x, count), total);
  if (threadIdx.x == 0) slabs.tiles[blockIdx.x] = total;
}

// Gives the ties to the earliest slabs and adds up what is selected before each.
__global__ void __launch_bounds__(kTile) scan_slabs(Slabs slabs, int64_t count, const State* state) {
  __shared__ TileScan scan;
  const int64_t quota = state->cutoff.rank;
  unsigned long long above = 0, ties = 0;
  for (int64_t tile = threadIdx.x; tile < blockIdx.x; tile += kTile) {
    above += slabs.tiles[tile] >> 32;
    ties += slabs.tiles[tile] & 0xffffffff;
  }
  unsigned long long all_above, all_ties, total;  // the first two of the tiles before
  scan.before(above, all_above);
  scan.before(ties, all_ties);
  const int64_t slab = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  const unsigned long long own = counts_of(slabs, slab, count), before = scan.before(own, total);
  if (slab >= count) return;
  const auto ties_before = static_cast<int64_t>(all_ties + (before & 0xffffffff));
  const int64_t left = max(int64_t{0}, quota - ties_before), tied = min(left, static_cast<int64_t>(own & 0xffffffff));
  const int64_t selected = static_cast<int64_t>(all_above + (before >> 32)) + min(ties_before, quota);
  slabs.selected[slab] = selected;
  slabs.ties[slab] = static_cast<int32_t>(tied);
  if (slab == count - 1) slabs.selected[count] = selected + static_cast<int64_t>(own >> 32) + tied;
}

// Where the selected elements of each tensor begin, in the order of all tensors.
__global__ void __launch_bounds__(kThreads)
    collect(const __grid_constant__ Table<Entry> table, const int64_t* selected, int64_t* starts) {
  for (int t = threadIdx.x; t < table.count; t += kThreads) {
    starts[table.entries[t].tensor] = selected[table.entries[t].first_slab];
  }
}

// Writes the positions of the selected elements in ascending order.
template <class Source>
__global__ void __launch_bounds__(kThreads)
    emit(const __grid_constant__ Table<Entry> table, Source source, Slabs slabs, const State* state) {
  const int64_t block = warp_index();
  if (block >= table.blocks()) return;
  const int t = table.find(static_cast<int32_t>(block));
  const Entry& entry = table.entries[t];
  const int64_t local = block - table.first_block[t], slab = entry.first_slab + local;
  int64_t next = slabs.selected[slab];
  if (next == slabs.selected[slab + 1]) return;
  next -= slabs.selected[entry.first_slab];
  const int lane = threadIdx.x % 32;
  const uint32_t cutoff = state->cutoff.key, lanes_before = (1u << lane) - 1;
  const bool wide = entry.numel > INT32_MAX;
  const int64_t begin = local * kSlab;
  int left = slabs.ties[slab];  // of the ties, the first ones

  source.visit(entry, local, lane, [&](const auto& held) {
    constexpr int N = std::decay_t<decltype(held)>::kItems;
    // Elements of other lanes that come before, and of all lanes.
    const auto rank = [&](const bool (&marked)[N], int& before, int& total) {
      before = total = 0;
#pragma unroll
      for (int i = 0; i < N; i++) {
        const uint32_t lanes = __ballot_sync(kWarp, marked[i]);
        before += __popc(lanes & lanes_before);
        total += __popc(lanes);
      }
    };
    int before, total;
    bool chosen[N];
#pragma unroll
    for (int i = 0; i < N; i++) chosen[i] = held.exists[i] && held.keys[i] > cutoff;
    if (left > 0) {
      bool tied[N];
#pragma unroll
      for (int i = 0; i < N; i++) tied[i] = held.exists[i] && held.keys[i] == cutoff;
      rank(tied, before, total);
#pragma unroll
      for (int i = 0; i < N; i++) {
        chosen[i] |= tied[i] && before < left;
        before += tied[i];
      }
      left -= total;
    }
    rank(chosen, before, total);
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (!chosen[i]) continue;
      const int64_t position = begin + held.positions[i], at = next + before;
      if (wide) {
        static_cast<int64_t*>(entry.out)[at] = position;
      } else {
        static_cast<int32_t*>(entry.out)[at] = static_cast<int32_t>(position);
      }
      before++;
    }
    next += total;
  });
}

// torch's new_empty at a third of its time on the host, where a call makes one output per tensor.
Tensor empty(const Tensor& like, int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  AtenTensorHandle handle;
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &stride, dtype_code, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// A call of the op, with what it keeps on the device.
class Selection {
 public:
  Selection(const Tensors& grads, const Tensor& sigma, int64_t k, bool largest)
      : device_(sigma), sigmas_(sigma.const_data_ptr<float>()), k_(k), flip_(largest ? 0 : kFlipKey) {
    device_.check({&grads});
    for (size_t t = 0; t < grads.size(); t++) {
      const float* grad = grads[t].const_data_ptr<float>();
      const bool aligned = reinterpret_cast<uintptr_t>(grad) % kAccessBytes<V, float> == 0;
      entries_.push_back({grad, grads[t].numel(), slab_count_, nullptr, static_cast<int32_t>(t), aligned});
      numel_ += grads[t].numel();
      slab_count_ += slabs_of(entries_.back());
    }
    blocks_ = 8 * device_.multiprocessors();
    // The state, the starts of the tensors and the totals of a histogram share one buffer, the first two to be read
    // back together.
    const auto head = static_cast<int64_t>(sizeof(State) / sizeof(int64_t) + grads.size());
    small_ = torch::stable::new_zeros(sigma, {head + kBins}, ScalarType::Long);
    auto* words = small_.mutable_data_ptr<int64_t>();
    state_ = reinterpret_cast<State*>(words);
    starts_ = words + sizeof(State) / sizeof(int64_t);
    totals_ = reinterpret_cast<unsigned long long*>(words + head);
    tiles_ = ceil_div(slab_count_, kTile);
    wide_ = empty(sigma, 2 * slab_count_ + 1 + tiles_, ScalarType::Long);
    narrow_ = empty(sigma, 3 * slab_count_, ScalarType::Int);
    int64_t* wide = wide_.mutable_data_ptr<int64_t>();
    int32_t* narrow = narrow_.mutable_data_ptr<int32_t>();
    slabs_ = {wide,
              narrow,
              narrow + slab_count_,
              narrow + 2 * slab_count_,
              wide + slab_count_,
              reinterpret_cast<unsigned long long*>(wide + 2 * slab_count_ + 1)};
  }

  Tensors run() {
    const double sampled = static_cast<double>(sample_lines()) * kSampleLine;
    const double expected = static_cast<double>(k_) / static_cast<double>(numel_) * sampled;
    // The lines of a sample are correlated: six standard deviations of an independent sample leave room for that.
    const auto rank = static_cast<int64_t>(1.05 * expected + 6 * std::sqrt(expected) + 16);
    if (numel_ >= kSampleFrom && k_ <= numel_ / 16) {
      guess(rank);
      const Candidates candidates = keep();
      const KeptElements kept{candidates, slabs_.offset, slabs_.count};
      find(&state_->cutoff, k_, kDigits, [&](Digit digit) {
        histogram_keys<<<blocks_, kThreads, 0, device_.stream()>>>(
            candidates.keys, candidates.capacity, &state_->candidates, digit, &state_->cutoff, totals_);
        check_cuda(cudaGetLastError());
      });
      const State state = count(kept);
      const auto reached = static_cast<int64_t>(state.candidates);
      if (reached >= k_ && reached <= candidates.capacity) return write(kept);
      keys_ = positions_ = Tensor();
    }
    const EveryElement every{sigmas_, flip_};
    find(&state_->cutoff, k_, kDigits, [&](Digit digit) {
      for_each_table(entries_, slabs_of, [&](const auto& table) {
        histogram_elements<<<std::min(blocks_, table.blocks()), kThreads, 0, device_.stream()>>>(
            table, sigmas_, flip_, digit, &state_->cutoff, totals_, state_);
      });
    });
    count(every);
    return write(every);
  }

 private:
  int64_t sample_lines() const { return std::clamp<int64_t>(numel_ / 4096, 1 << 14, 1 << 16); }

  // Runs one histogram per digit and leaves these digits of the rank-th largest key in search.
  template <class Histogram>
  void find(Search* search, int64_t rank, int digits, const Histogram& histogram) {
    start_search<<<1, 1, 0, device_.stream()>>>(search, rank);
    check_cuda(cudaGetLastError());
    for (int d = 0; d < digits; d++) {
      const Digit digit{kDigitShift[d], kDigitBits[d]};
      histogram(digit);
      find_bin<<<1, kSearchThreads, 0, device_.stream()>>>(totals_, digit, search);
      check_cuda(cudaGetLastError());
    }
  }

  void guess(int64_t rank) {
    const int64_t lines = sample_lines(), size = lines * kSampleLine;
    const Tensor sampled = empty(small_, size, ScalarType::Int);
    auto* keys = reinterpret_cast<uint32_t*>(sampled.mutable_data_ptr<int32_t>());
    for_each_table(entries_, slabs_of, [&](const auto& table) {
      sample<<<static_cast<int>(ceil_div(size, kThreads)), kThreads, 0, device_.stream()>>>(table, sigmas_, flip_,
                                                                                            slab_count_, lines, keys);
    });
    find(&state_->guess, rank, kGuessDigits, [&](Digit digit) {
      histogram_keys<<<blocks_, kThreads, 0, device_.stream()>>>(keys, size, nullptr, digit, &state_->guess, totals_);
      check_cuda(cudaGetLastError());
    });
  }

  Candidates keep() {
    const int64_t capacity = std::max(numel_ / 80, k_ + k_ / 4);
    keys_ = empty(small_, capacity, ScalarType::Int);
    positions_ = empty(small_, capacity, ScalarType::Short);
    const Candidates candidates{reinterpret_cast<uint32_t*>(keys_.mutable_data_ptr<int32_t>()),
                                reinterpret_cast<uint16_t*>(positions_.mutable_data_ptr<int16_t>()), capacity};
    for_each_table(entries_, slabs_of, [&](const auto& table) {
      filter<<<table.blocks(), kThreads, 0, device_.stream()>>>(table, sigmas_, flip_, candidates, slabs_, state_);
    });
    return candidates;
  }

  // Counts what is selected in every slab and reads back the state and the sizes of the outputs.
  template <class Source>
  State count(const Source& source) {
    for_each_table(entries_, slabs_of, [&](const auto& table) {
      count_selected<<<static_cast<int>(ceil_div(table.blocks(), kWarps)), kThreads, 0, device_.stream()>>>(
          table, source, slabs_, state_);
    });
    sum_tiles<<<static_cast<int>(tiles_), kTile, 0, device_.stream()>>>(slabs_, slab_count_);
    check_cuda(cudaGetLastError());
    scan_slabs<<<static_cast<int>(tiles_), kTile, 0, device_.stream()>>>(slabs_, slab_count_, state_);
    check_cuda(cudaGetLastError());
    for_each_table(entries_, slabs_of, [&](const auto& table) {
      collect<<<1, kThreads, 0, device_.stream()>>>(table, slabs_.selected, starts_);
    });
    std::vector<int64_t> words(sizeof(State) / sizeof(int64_t) + entries_.size());
    check_cuda(cudaMemcpyAsync(words.data(), state_, words.size() * sizeof(int64_t), cudaMemcpyDeviceToHost,
                               device_.stream()));
    check_cuda(cudaStreamSynchronize(device_.stream()));
    State state;
    std::memcpy(&state, words.data(), sizeof state);
    STD_TORCH_CHECK(!state.nan, "safekern: a score is NaN");
    sizes_.assign(entries_.size(), 0);
    int64_t end = k_;
    for (size_t t = entries_.size(); t-- > 0;) {
      if (entries_[t].numel == 0) continue;
      const int64_t start = words[sizeof(State) / sizeof(int64_t) + t];
      sizes_[t] = end - start;
      end = start;
    }
    return state;
  }

  template <class Source>
  Tensors write(const Source& source) {
    Tensors outputs;
    for (size_t t = 0; t < entries_.size(); t++) {
      outputs.push_back(empty(small_, sizes_[t], index_dtype(entries_[t].numel)));
      entries_[t].out = outputs.back().mutable_data_ptr();
    }
    for_each_table(entries_, slabs_of, [&](const auto& table) {
      emit<<<static_cast<int>(ceil_div(table.blocks(), kWarps)), kThreads, 0, device_.stream()>>>(table, source, slabs_,
                                                                                                  state_);
    });
    return outputs;
  }

  Device device_;
  const float* sigmas_;
  int64_t k_, numel_ = 0, slab_count_ = 0, tiles_;
  uint32_t flip_;
  int blocks_;
  std::vector<Entry> entries_;
  std::vector<int64_t> sizes_;
  Tensor small_, wide_, narrow_, keys_, positions_;
  State* state_;
  int64_t* starts_;
  unsigned long long* totals_;
  Slabs slabs_;
};

Tensors select(Tensors grads, Tensor sigma, int64_t k, bool largest) {
  check_select(grads, sigma, k);
  return Selection(grads, sigma, k, largest).run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA, m) { m.impl("select", TORCH_BOX(&select)); }

}  // namespace safekern
