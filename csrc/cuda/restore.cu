// Bytes: the 32-byte sectors that hold a selected element, twice (a sector written in part is first read), the indices
// and the values; moves as much.
#include "common.cuh"

namespace safekern {
namespace {

constexpr int V = kScatterVector;

template <class Word, class Index>
struct Entry {
  Word* param;
  const Index* index;
  const Word* value;
  int64_t param_numel;
  Groups groups;
};

template <class Word, class Index>
__global__ void __launch_bounds__(kThreads) restore(const __grid_constant__ Table<Entry<Word, Index>> table) {
  const int t = table.find(blockIdx.x);
  const Entry<Word, Index>& entry = table.entries[t];
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
          entries.push_back({static_cast<Word*>(params[t].mutable_data_ptr()), index, value, params[t].numel(),
                             align<V>(indices[t].numel(), index, value)});
        }
        for_each_table(entries, sparse_blocks<V, Entry<Word, Index>>,
                       [&](const auto& table) { restore<<<table.blocks(), kThreads, 0, device.stream()>>>(table); });
      });
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA, m) { m.impl("restore_", TORCH_BOX(&restore_)); }

}  // namespace safekern
