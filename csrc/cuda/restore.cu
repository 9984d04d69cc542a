// Two ops on selected weights and the bits that were saved of them: restore_ and count_changed.
//
// Bytes: the 32-byte sectors that hold a selected element (restore_: twice, since a sector written in part is first
// read), the indices and the values; both move as much.
#include "common.cuh"

namespace safekern {
namespace {

// One tensor's; Word is const where the weights are only read.
template <class Word, class Index>
struct Saved {
  Word* param;
  const Index* index;
  const std::remove_const_t<Word>* value;
  int64_t param_numel;
  Groups groups;
};

template <int V, class Word, class Index>
Saved<Word, Index> saved(Word* param, const Index* index, const Tensor& value, int64_t param_numel) {
  const auto* data = static_cast<const std::remove_const_t<Word>*>(value.const_data_ptr());
  return {param, index, data, param_numel, align<V>(value.numel(), index, data)};
}

template <class Word, class Index>
__global__ void __launch_bounds__(kThreads) restore(const __grid_constant__ Table<Saved<Word, Index>> table) {
  constexpr int V = kScatterVector;
  const int t = table.find(blockIdx.x);
  const Saved<Word, Index>& entry = table.entries[t];
  const Group<V> group = sparse_group<V>(table, t);
  Index index[V];
  Word value[V];
  group.load(index, entry.index);
  group.load(value, entry.value);
#pragma unroll
  for (int v = 0; v < V; v++) {
    if (group.has(v) && inside(index[v], entry.param_numel)) entry.param[index[v]] = value[v];
  }
}

void restore_(Tensors params, Tensors indices, Tensors values) {
  check_saved(params, indices, values);
  if (params.empty()) return;
  const Device device(params[0]);
  device.check({&params, &indices, &values});
  for_each_kind(params, indices, [&](const std::vector<size_t>& tensors, auto* param_type, auto* index_type) {
    using Word = Bits<std::remove_pointer_t<decltype(param_type)>>;
    using Index = std::remove_pointer_t<decltype(index_type)>;
    std::vector<Saved<Word, Index>> entries;
    for (const size_t t : tensors) {
      entries.push_back(saved<kScatterVector>(static_cast<Word*>(params[t].mutable_data_ptr()),
                                              indices[t].const_data_ptr<Index>(), values[t], params[t].numel()));
    }
    for_each_table(entries, sparse_blocks<kScatterVector, Saved<Word, Index>>,
                   [&](const auto& table) { restore<<<table.blocks(), kThreads, 0, device.stream()>>>(table); });
  });
}

template <class Word, class Index>
struct Counted : Saved<const Word, Index> {
  unsigned long long* changed;
};

template <class Word, class Index>
__global__ void __launch_bounds__(kThreads) count(const __grid_constant__ Table<Counted<Word, Index>> table) {
  constexpr int V = kGatherVector;
  const int t = table.find(blockIdx.x);
  const Counted<Word, Index>& entry = table.entries[t];
  const Group<V> group = sparse_group<V>(table, t);
  Index index[V];
  Word value[V];
  group.load(index, entry.index);
  group.load(value, entry.value);
  bool changed[V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    // A weight that does not exist is not what was saved.
    changed[v] = group.has(v) && !(inside(index[v], entry.param_numel) && entry.param[index[v]] == value[v]);
  }
  int total = 0;
#pragma unroll
  for (int v = 0; v < V; v++) total += __syncthreads_count(changed[v]);
  if (total && threadIdx.x == 0) atomicAdd(entry.changed, static_cast<unsigned long long>(total));
}

Tensor count_changed(Tensors params, Tensors indices, Tensors values) {
  check_saved(params, indices, values);
  if (params.empty()) return torch::stable::empty({0}, ScalarType::Long);
  const Device device(params[0]);
  device.check({&params, &indices, &values});
  Tensor result = torch::stable::new_zeros(params[0], {static_cast<int64_t>(params.size())}, ScalarType::Long);
  auto* changed = reinterpret_cast<unsigned long long*>(result.mutable_data_ptr<int64_t>());
  for_each_kind(params, indices, [&](const std::vector<size_t>& tensors, auto* param_type, auto* index_type) {
    using Word = Bits<std::remove_pointer_t<decltype(param_type)>>;
    using Index = std::remove_pointer_t<decltype(index_type)>;
    std::vector<Counted<Word, Index>> entries;
    for (const size_t t : tensors) {
      entries.push_back({saved<kGatherVector>(static_cast<const Word*>(params[t].const_data_ptr()),
                                              indices[t].const_data_ptr<Index>(), values[t], params[t].numel()),
                         changed + t});
    }
    for_each_table(entries, sparse_blocks<kGatherVector, Counted<Word, Index>>,
                   [&](const auto& table) { count<<<table.blocks(), kThreads, 0, device.stream()>>>(table); });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA, m) {
  m.impl("restore_", TORCH_BOX(&restore_));
  m.impl("count_changed", TORCH_BOX(&count_changed));
}

}  // namespace safekern
