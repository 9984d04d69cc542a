// Bytes: the 32-byte sectors that hold a selected element (at a random 1%, 15% of a bf16 tensor's), the indices and the
// output; moves as much.
#include "common.cuh"

namespace safekern {
namespace {

constexpr int V = kGatherVector;

template <class Out, class Src, class Index>
struct Entry {
  Out* out;
  const Src* src;
  const Index* index;
  bool* nonfinite;
  int64_t src_numel;
  Groups groups;
};

template <class Out, class Src, class Index>
__global__ void __launch_bounds__(kThreads) gather(const __grid_constant__ Table<Entry<Out, Src, Index>> table) {
  const int t = table.find(blockIdx.x);
  const Entry<Out, Src, Index>& entry = table.entries[t];
  const Group<V> group = sparse_group<V>(table, t);
  Index index[V];
  Out out[V];
  group.load(index, entry.index);
  bool found = false;
#pragma unroll
  for (int v = 0; v < V; v++) {
    // What a wrong index asks for does not exist: a NaN, which the flag reports.
    out[v] = inside(index[v], entry.src_numel) ? static_cast<Out>(entry.src[index[v]]) : static_cast<Out>(NAN);
    found |= group.has(v) && !isfinite(static_cast<Real<Out>>(out[v]));
  }
  group.store(entry.out, out);
  if (__syncthreads_or(found) && threadIdx.x == 0) *entry.nonfinite = true;
}

template <class Out, class Src, class Index>
void launch(const Tensors& outs, const Tensors& srcs, const Tensors& indices, bool* flags,
            const std::vector<size_t>& tensors, const Device& device) {
  std::vector<Entry<Out, Src, Index>> entries;
  for (const size_t t : tensors) {
    Out* out = outs[t].mutable_data_ptr<Out>();
    const Index* index = indices[t].const_data_ptr<Index>();
    entries.push_back(
        {out, srcs[t].const_data_ptr<Src>(), index, flags + t, srcs[t].numel(), align<V>(outs[t].numel(), out, index)});
  }
  for_each_table(entries, sparse_blocks<V, Entry<Out, Src, Index>>,
                 [&](const auto& table) { gather<<<table.blocks(), kThreads, 0, device.stream()>>>(table); });
}

void gather_(Tensors outs, Tensors srcs, Tensors indices, Tensor nonfinite) {
  check_gather(outs, srcs, indices, nonfinite);
  if (outs.empty()) return;
  const Device device(nonfinite);
  device.check({&outs, &srcs, &indices});
  bool* flag = nonfinite.mutable_data_ptr<bool>();
  const auto kind = [&](size_t t) {
    return std::tuple(outs[t].scalar_type(), srcs[t].scalar_type(), indices[t].scalar_type());
  };
  for (const auto& [types, tensors] : group_by(outs.size(), kind)) {
    const auto [out_dtype, src_dtype, index_dtype] = types;
    with_index_type(index_dtype, [&, &tensors = tensors, out_dtype = out_dtype, src_dtype = src_dtype](auto* index) {
      with_float_type(src_dtype, [&](auto* src) {
        using Index = std::remove_pointer_t<decltype(index)>;
        using Src = std::remove_pointer_t<decltype(src)>;
        with_param_type_or_float<Src>(out_dtype, [&](auto* out) {
          using Out = std::remove_pointer_t<decltype(out)>;
          launch<Out, Src, Index>(outs, srcs, indices, flag, tensors, device);
        });
      });
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA, m) { m.impl("gather_", TORCH_BOX(&gather_)); }

}  // namespace safekern
