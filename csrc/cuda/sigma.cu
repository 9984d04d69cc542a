// Bytes: every weight once; moves 16 bytes per 4096 weights more.
//
// The sums are those of the CPU kernel (csrc/cpu/sigma.cpp) in the same order: per chunk of 4096 elements, fp64
// deviations from the mean of its first 64, in eight interleaved lanes; then the chunks one after the other. So sigma
// is the same on both, bit for bit, and with it every mask.
#include "common.cuh"

namespace safekern {
namespace {

constexpr int kChunk = 4096;
constexpr int kLanes = 8;
constexpr int kPivot = 64;  // the first elements of a chunk, from whose mean deviations are taken
constexpr int kOwn = 16;    // consecutive elements that a thread fetches at a time
constexpr int kTile = kLanes * kOwn;
constexpr int kMomentThreads = 128;
constexpr int kChunksPerBlock = kMomentThreads / kLanes;

template <class Param>
struct Entry {
  const Param* param;
  int64_t first_chunk;  // in the list of all chunks
  Groups groups;
};

struct Moments {
  double mean, squares;  // squares: the sum of squared deviations from the mean
};

// Eight threads per chunk, one per lane. What a thread fetches in 16-byte accesses belongs to all lanes, so a tile
// passes through shared memory. Padded: the chunks of a warp use different banks.
template <class Param>
__global__ void __launch_bounds__(kMomentThreads)
    moments(const __grid_constant__ Table<Entry<Param>> table, Moments* __restrict__ partial) {
  __shared__ __align__(16) Param tiles[kChunksPerBlock][kTile + 8];
  const int t = table.find(blockIdx.x);
  const Entry<Param>& entry = table.entries[t];
  const int lane = threadIdx.x % kLanes;
  Param* tile = tiles[threadIdx.x / kLanes];
  const int64_t numel = entry.groups.numel;
  const int64_t chunk =
      static_cast<int64_t>(blockIdx.x - table.first_block[t]) * kChunksPerBlock + threadIdx.x / kLanes;
  const int64_t begin = chunk * kChunk;
  const int size = static_cast<int>(max(int64_t{0}, min(int64_t{kChunk}, numel - begin)));
  // A warp walks its chunks together; its first one is the longest.
  const int steps = __shfl_sync(kWarp, (size + kTile - 1) / kTile, 0);

  const auto fetch = [&](Param(&values)[kOwn], int step) {
    const Group<kOwn> group(entry.groups, (begin + step * kTile) / kOwn + lane);
    group.load(values, entry.param);
  };
  Param next[kOwn];
  fetch(next, 0);
  double pivot = 0, sum = 0, square = 0;
  for (int step = 0; step < steps; step++) {
    uint4 words[sizeof next / sizeof(uint4)];
    std::memcpy(words, next, sizeof next);
#pragma unroll
    for (int w = 0; w < sizeof next / sizeof(uint4); w++) reinterpret_cast<uint4*>(tile + lane * kOwn)[w] = words[w];
    __syncwarp();
    if (step + 1 < steps) fetch(next, step + 1);
    if (step == 0) {
      const int head = min(size, kPivot);
      for (int i = 0; i < head; i++) pivot += static_cast<double>(tile[i]);
      pivot /= static_cast<double>(head);
    }
    const auto add = [&](int row) {
      const double deviation = static_cast<double>(tile[row * kLanes + lane]) - pivot;
      sum += deviation;
      square += deviation * deviation;
    };
    if (step * kTile + kTile <= size) {
#pragma unroll
      for (int row = 0; row < kTile / kLanes; row++) add(row);
    } else {
      for (int row = 0; row < kTile / kLanes; row++) {
        if (step * kTile + row * kLanes + lane < size) add(row);
      }
    }
    __syncwarp();
  }

  double total = 0, total_square = 0;
#pragma unroll
  for (int other = 0; other < kLanes; other++) {
    total += __shfl_sync(kWarp, sum, other, kLanes);
    total_square += __shfl_sync(kWarp, square, other, kLanes);
  }
  if (lane == 0 && size > 0) {
    const double count = size, squares = total_square - total * total / count;
    partial[entry.first_chunk + chunk] = {pivot + total / count, 0.0 < squares ? squares : 0.0};
  }
}

struct Combined {
  const Moments* partial;
  int64_t numel;
  float* sigma;
};

constexpr int kRound = kThreads - 32;

// What the chain below needs of some chunks.
struct Round {
  double means[kRound], squares[kRound], shares[kRound], weights[kRound];

  __device__ void prepare(const Combined& entry, int64_t chunk, int i) {
    const double before = static_cast<double>(chunk * kChunk);
    const double count = static_cast<double>(min(int64_t{kChunk}, entry.numel - chunk * kChunk));
    const double total = before + count;
    means[i] = entry.partial[chunk].mean;
    squares[i] = entry.partial[chunk].squares;
    shares[i] = count / total;
    weights[i] = before * count / total;
  }
};

// One block per tensor. Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances" (1979): the weights of an update depend on counts alone, the rest of it is a chain. The first thread walks
// that, while the other warps prepare the next round.
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Table<Combined> table) {
  __shared__ Round rounds[2];
  const Combined& entry = table.entries[blockIdx.x];
  const int64_t chunks = (entry.numel + kChunk - 1) / kChunk, all = (chunks + kRound - 1) / kRound;
  double mean = 0, square = 0;
  for (int64_t next = 0; next <= all; next++) {
    if (threadIdx.x == 0 && next > 0) {
      const Round& round = rounds[(next - 1) % 2];
      const int size = static_cast<int>(min(int64_t{kRound}, chunks - (next - 1) * kRound));
#pragma unroll 8
      for (int i = 0; i < size; i++) {
        const double delta = round.means[i] - mean;
        square += round.squares[i] + delta * delta * round.weights[i];
        mean += delta * round.shares[i];
      }
    }
    const int i = static_cast<int>(threadIdx.x) - 32;
    const int64_t chunk = next * kRound + i;
    if (i >= 0 && chunk < chunks) rounds[next % 2].prepare(entry, chunk, i);
    __syncthreads();
  }
  if (threadIdx.x == 0 && entry.numel > 1) {
    *entry.sigma = static_cast<float>(std::sqrt(square / static_cast<double>(entry.numel - 1)));
  }
}

Tensor sigma(Tensors params) {
  check_sigma(params);
  if (params.empty()) return torch::stable::empty({0}, ScalarType::Float);
  const Device device(params[0]);
  device.check({&params});
  std::vector<int64_t> first_chunk(params.size());
  int64_t chunks = 0;
  for (size_t t = 0; t < params.size(); t++) {
    first_chunk[t] = chunks;
    chunks += ceil_div(params[t].numel(), kChunk);
  }
  const Tensor partials = torch::stable::new_empty(params[0], {2 * chunks}, ScalarType::Double);
  auto* partial = reinterpret_cast<Moments*>(partials.mutable_data_ptr<double>());
  // Tensors of one element or none keep their 0.
  Tensor result = torch::stable::new_zeros(params[0], {static_cast<int64_t>(params.size())}, ScalarType::Float);
  float* out = result.mutable_data_ptr<float>();

  for (const auto& [dtype, tensors] : group_by(params.size(), [&](size_t t) { return params[t].scalar_type(); })) {
    with_float_type(dtype, [&, &tensors = tensors](auto* type) {
      using Param = std::remove_pointer_t<decltype(type)>;
      std::vector<Entry<Param>> entries;
      for (const size_t t : tensors) {
        const Param* param = params[t].const_data_ptr<Param>();
        // Chunks start where they start on the CPU: a tensor that is not aligned there is read element by element.
        const bool aligned = reinterpret_cast<uintptr_t>(param) % kAccessBytes<kOwn, Param> == 0;
        entries.push_back({param, first_chunk[t], {params[t].numel(), 0, aligned}});
      }
      for_each_table(
          entries, [](const auto& entry) { return ceil_div(entry.groups.numel, int64_t{kChunksPerBlock} * kChunk); },
          [&](const auto& table) { moments<<<table.blocks(), kMomentThreads, 0, device.stream()>>>(table, partial); });
    });
  }
  std::vector<Combined> totals;
  for (size_t t = 0; t < params.size(); t++) totals.push_back({partial + first_chunk[t], params[t].numel(), out + t});
  for_each_table(
      totals, [](const Combined& entry) { return int64_t{entry.numel > 0}; },
      [&](const auto& table) { combine<<<table.blocks(), kThreads, 0, device.stream()>>>(table); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA, m) { m.impl("sigma", TORCH_BOX(&sigma)); }

}  // namespace safekern
