// Bytes: the 32-byte sectors that hold a selected element, twice, and the indices; moves as much.
#include "common.cuh"

namespace safekern {
namespace {

constexpr int V = kScatterVector;

template <class Param, class Index>
struct Entry {
  Param* param;
  const Index* index;
  int64_t param_numel;
  uint64_t stream;
  float scale;
  Groups groups;
};

template <class Param, class Index>
__global__ void __launch_bounds__(kThreads)
    perturb(const __grid_constant__ Table<Entry<Param, Index>> table, uint64_t seed) {
  using Value = Real<Param>;
  const int t = table.find(blockIdx.x);
  const Entry<Param, Index>& entry = table.entries[t];
  const Group<V> group = sparse_group<V>(table, t);
  Index index[V];
  group.load(index, entry.index);
  bool valid[V];
  Param param[V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    valid[v] = group.has(v) && inside(index[v], entry.param_numel);
    param[v] = valid[v] ? entry.param[index[v]] : static_cast<Param>(0.0f);
  }
#pragma unroll
  for (int v = 0; v < V; v++) {
    const float noise = normal(seed, entry.stream, static_cast<uint64_t>(index[v])) * entry.scale;
    const Value value = static_cast<Value>(param[v]) + static_cast<Value>(noise);
    if (valid[v]) entry.param[index[v]] = static_cast<Param>(value);
  }
}

void perturb_(Tensors params, Tensors indices, std::vector<double> scales, std::vector<int64_t> streams, int64_t seed) {
  check_perturb(params, indices, scales, streams);
  if (params.empty()) return;
  const Device device(params[0]);
  device.check({&params, &indices});
  for_each_kind(params, indices, [&](const std::vector<size_t>& tensors, auto* param_type, auto* index_type) {
    using Param = std::remove_pointer_t<decltype(param_type)>;
    using Index = std::remove_pointer_t<decltype(index_type)>;
    std::vector<Entry<Param, Index>> entries;
    for (const size_t t : tensors) {
      const Index* index = indices[t].const_data_ptr<Index>();
      entries.push_back({params[t].mutable_data_ptr<Param>(), index, params[t].numel(),
                         static_cast<uint64_t>(streams[t]), static_cast<float>(scales[t]),
                         align<V>(indices[t].numel(), index)});
    }
    for_each_table(entries, sparse_blocks<V, Entry<Param, Index>>, [&](const auto& table) {
      perturb<<<table.blocks(), kThreads, 0, device.stream()>>>(table, static_cast<uint64_t>(seed));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA, m) { m.impl("perturb_", TORCH_BOX(&perturb_)); }

}  // namespace safekern
