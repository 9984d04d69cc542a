// Bytes: the 32-byte sectors that hold a selected element, the indices and the values; moves as much.
#include "common.cuh"

namespace safekern {
namespace {

constexpr int V = kGatherVector;

template <class Word, class Index>
struct Entry {
  const Word* param;
  const Index* index;
  const Word* value;
  int64_t param_numel;
  unsigned long long* changed;
  Groups groups;
};

template <class Word, class Index>
__global__ void __launch_bounds__(kThreads) count(const __grid_constant__ Table<Entry<Word, Index>> table) {
  const int t = table.find(blockIdx.x);
  const Entry<Word, Index>& entry = table.entries[t];
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
  const auto kind = [&](size_t t) { return std::pair(params[t].scalar_type(), indices[t].scalar_type()); };
  for (const auto& [types, tensors] : group_by(params.size(), kind)) {
    const auto [param_dtype, index_dtype] = types;
    with_index_type(index_dtype, [&, &tensors = tensors, param_dtype = param_dtype](auto* index_type) {
      with_word_type(param_dtype, [&](auto* word_type) {
        using Index = std::remove_pointer_t<decltype(index_type)>;
        using Word = std::remove_pointer_t<decltype(word_type)>;
        std::vector<Entry<Word, Index>> entries;
        for (const size_t t : tensors) {
          const Index* index = indices[t].const_data_ptr<Index>();
          const Word* value = static_cast<const Word*>(values[t].const_data_ptr());
          entries.push_back({static_cast<const Word*>(params[t].const_data_ptr()), index, value, params[t].numel(),
                             changed + t, align<V>(indices[t].numel(), index, value)});
        }
        for_each_table(entries, sparse_blocks<V, Entry<Word, Index>>,
                       [&](const auto& table) { count<<<table.blocks(), kThreads, 0, device.stream()>>>(table); });
      });
    });
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA, m) { m.impl("count_changed", TORCH_BOX(&count_changed)); }

}  // namespace safekern
