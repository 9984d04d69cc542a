// What the CUDA kernels share: the device and stream of a call, one launch for a whole list of tensors, and 16-byte
// accesses to tensors that may start anywhere.
//
// To add a kernel, write a .cu file that fills one Entry per tensor and launches over them with for_each_table.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "../arithmetic.h"
#include "../checks.h"

// The device-generic stream of the stable ABI yields its native handle only from torch 2.13 on; this older function
// serves 2.11 too. It lives in libtorch_cuda: weak, so that this library loads beside a CPU-only torch as well.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace safekern {

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xffffffff;  // all lanes of a warp

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  const bool built_for_others = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInsufficientDriver ||
                                error == cudaErrorUnsupportedPtxVersion;
  STD_TORCH_CHECK(false, "safekern: CUDA error: ", cudaGetErrorString(error),
                  built_for_others
                      ? ". The kernels were compiled for other GPUs, or with a CUDA toolkit newer than the driver: "
                        "compile safekern again on this machine, with a toolkit that its driver knows (CUDA_HOME), or "
                        "set SAFEKERN_BACKEND=triton"
                      : "");
}

// Makes a device current for as long as an op launches kernels there, on torch's current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(index_of(tensor)), guard_(index_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "safekern: this PyTorch is built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    // The guard speaks to torch's copy of the CUDA runtime; this library is linked to one of its own.
    check_cuda(cudaSetDevice(index_));
  }

  cudaStream_t stream() const { return stream_; }

  int multiprocessors() const {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }

  // Empty tensors hold no data, so where they are does not matter.
  void check(std::initializer_list<const Tensors*> lists) const {
    for (const Tensors* list : lists) {
      for (const Tensor& tensor : *list) {
        STD_TORCH_CHECK(tensor.numel() == 0 || (tensor.is_cuda() && tensor.get_device_index() == index_),
                        "safekern: all tensors of one call must be on one device, here cuda:", index_);
      }
    }
  }

 private:
  static int32_t index_of(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda(), "safekern: all tensors of one call must be on one device, got one on another");
    return tensor.get_device_index();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// The positions of a list, grouped by kind: one launch serves tensors of the same types.
template <class Kind>
auto group_by(size_t count, const Kind& kind) {
  std::map<decltype(kind(size_t{0})), std::vector<size_t>> groups;
  for (size_t t = 0; t < count; t++) groups[kind(t)].push_back(t);
  return groups;
}

// Calls f(tensors, Param*, Index*) for every pair of dtypes of a parameter and its indices, with the positions of its
// tensors; the pointers are null and carry the types.
template <class F>
void for_each_kind(const Tensors& params, const Tensors& indices, const F& f) {
  const auto kind = [&](size_t t) { return std::pair(params[t].scalar_type(), indices[t].scalar_type()); };
  for (const auto& [dtypes, tensors] : group_by(params.size(), kind)) {
    with_types(dtypes.first, dtypes.second,
               [&, &tensors = tensors](auto* param_type, auto* index_type) { f(tensors, param_type, index_type); });
  }
}

// Kernel parameters may take 32,764 bytes since CUDA 12.1 and sm_70. The table of tensors travels there, not through a
// copy to the device: nothing has to outlive the launch, and a captured graph keeps its own table. Longer lists take
// several launches.
#if CUDART_VERSION < 12010
#error "safekern's CUDA kernels need CUDA 12.1 or newer"
#endif
constexpr size_t kTableBytes = 32764 - 188;  // the rest is for a kernel's other parameters

template <class Entry>
struct Table {
  static constexpr int kCapacity = (kTableBytes - 16) / (sizeof(Entry) + sizeof(int32_t));

  int32_t count = 0;
  int32_t first_block[kCapacity + 1];  // int32: the number of blocks in a grid is limited to 2^31 - 1
  Entry entries[kCapacity];

  __host__ __device__ int32_t blocks() const { return first_block[count]; }

  // The entry that a block belongs to.
  __device__ int find(int32_t block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_block[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};

// Calls launch(table) with tables that hold the entries in order, except those that need no block.
template <class Entry, class Blocks, class Launch>
void for_each_table(const std::vector<Entry>& entries, const Blocks& blocks_of, const Launch& launch) {
  static_assert(sizeof(Table<Entry>) <= kTableBytes);
  Table<Entry> table;
  table.first_block[0] = 0;
  const auto flush = [&] {
    if (table.count == 0) return;
    launch(table);
    check_cuda(cudaGetLastError());
    table.count = 0;
  };
  for (const Entry& entry : entries) {
    const int64_t blocks = blocks_of(entry);
    if (blocks == 0) continue;
    if (table.count == Table<Entry>::kCapacity || table.blocks() + blocks > INT32_MAX) flush();
    STD_TORCH_CHECK(blocks <= INT32_MAX, "safekern: a tensor is too large");
    table.entries[table.count] = entry;
    table.first_block[table.count + 1] = table.first_block[table.count] + static_cast<int32_t>(blocks);
    table.count++;
  }
  flush();
}

// How many elements a thread takes at a time where tensors of these types are streamed: 16 bytes of the narrowest.
template <class... T>
constexpr int kVector = 16 / std::min({sizeof(T)...});

// The same where elements are gathered and only indices and what goes with them is streamed: 16 bytes of fp32 or int32.
// Every thread takes one such group.
constexpr int kGatherVector = 4;

// Where they are written, one per thread: neighbouring lanes then write to neighbouring sectors at the same time. With
// four per thread an H100 took 1.5 times as long (benchmarks/results/gpu).
constexpr int kScatterVector = 1;

template <int V, class T>
constexpr size_t kAccessBytes = std::min<size_t>(16, V * sizeof(T));

// How the elements of tensors that are walked together fall into groups of V: group g holds the elements
// [g * V - shift, (g + 1) * V - shift), some of which may lie outside at either end.
struct Groups {
  int64_t numel;
  int32_t shift;
  bool aligned;  // the groups of all the tensors start at multiples of the access size

  template <int V>
  __host__ __device__ int64_t count() const {
    return numel ? (numel + shift + V - 1) / V : 0;
  }
};

// Views may start anywhere, and their tensors at different places: then no shift aligns them all, and every element is
// accessed alone.
template <int V, class... T>
Groups align(int64_t numel, const T*... data) {
  for (int32_t shift = 0; shift < V; shift++) {
    const auto fits = [&](const auto* from) {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
      return (reinterpret_cast<uintptr_t>(from) - shift * sizeof(Element)) % kAccessBytes<V, Element> == 0;
    };
    if ((fits(data) && ...)) return {numel, shift, true};
  }
  return {numel, 0, false};
}

template <size_t Bytes>
using Access =
    std::conditional_t<Bytes == 16, uint4,
                       std::conditional_t<Bytes == 8, uint2, std::conditional_t<Bytes == 4, uint32_t, uint16_t>>>;

// V elements from an address that is a multiple of their access size, and back. By intrinsics: of an ordinary store the
// compiler makes single ones where it keeps the elements apart. What is streamed is touched once, so it may leave the
// cache first.
template <int V, class T>
__device__ void load_aligned(T (&values)[V], const T* from) {
  using Word = Access<kAccessBytes<V, T>>;
  Word words[sizeof(values) / sizeof(Word)];
#pragma unroll
  for (int w = 0; w < sizeof(values) / sizeof(Word); w++) words[w] = __ldcs(reinterpret_cast<const Word*>(from) + w);
  std::memcpy(values, words, sizeof values);
}

template <int V, class T>
__device__ void store_aligned(T* to, const T (&values)[V]) {
  using Word = Access<kAccessBytes<V, T>>;
  Word words[sizeof(values) / sizeof(Word)];
  std::memcpy(words, values, sizeof values);
#pragma unroll
  for (int w = 0; w < sizeof(values) / sizeof(Word); w++) __stcs(reinterpret_cast<Word*>(to) + w, words[w]);
}

// One group, as one thread sees it.
template <int V>
struct Group {
  int64_t begin, numel;
  bool whole;

  __device__ Group(const Groups& groups, int64_t g)
      : begin(g * V - groups.shift),
        numel(groups.numel),
        whole(groups.aligned && begin >= 0 && begin + V <= groups.numel) {}

  __device__ bool has(int v) const { return begin + v >= 0 && begin + v < numel; }

  // Elements outside are read as zeros.
  template <class T>
  __device__ void load(T (&values)[V], const T* from) const {
    if (whole) {
      load_aligned(values, from + begin);
    } else {
#pragma unroll
      for (int v = 0; v < V; v++) values[v] = has(v) ? from[begin + v] : static_cast<T>(0.0f);
    }
  }

  // ... and are not written.
  template <class T>
  __device__ void store(T* to, const T (&values)[V]) const {
    if (whole) {
      store_aligned(to + begin, values);
    } else {
#pragma unroll
      for (int v = 0; v < V; v++) {
        if (has(v)) to[begin + v] = values[v];
      }
    }
  }
};

template <int V, class Entry>
int64_t sparse_blocks(const Entry& entry) {
  return ceil_div(entry.groups.template count<V>(), kThreads);
}

// The group of a thread of a kernel on selected elements. Past the end, it has no element.
template <int V, class Entry>
__device__ Group<V> sparse_group(const Table<Entry>& table, int t) {
  return {table.entries[t].groups, static_cast<int64_t>(blockIdx.x - table.first_block[t]) * kThreads + threadIdx.x};
}

// A mask's indices are checked when it is made, and cannot be checked again here without waiting for the device. A
// wrong one is skipped: it never reaches memory outside its tensor.
__device__ inline bool inside(int64_t index, int64_t numel) { return index >= 0 && index < numel; }

}  // namespace safekern
