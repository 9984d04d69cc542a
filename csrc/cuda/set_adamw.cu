// Bytes per selected element: index 4, gradient 4, moments 16, master 8, and the 32-byte sector of the parameter twice
// (a sector written in part is first read); moves as much. A master alone would do without reading the parameter, but
// could not tell that the weight was loaded or edited from outside.
//
// A captured graph replays the step sizes and bias corrections that it was captured with.
#include "common.cuh"

namespace safekern {
namespace {

constexpr int V = kScatterVector;

template <class Param, class Index>
struct Entry {
  Param* param;
  const Index* index;
  const float* grad;
  float *exp_avg, *exp_avg_sq, *master;  // master is null when the parameter itself holds the full value
  int64_t param_numel;
  float step_size, bias_correction2_sqrt;
  Groups groups;
};

template <class Param, class Index>
__global__ void __launch_bounds__(kThreads) set_adamw(const __grid_constant__ Table<Entry<Param, Index>> table,
                                                      const AdamW<Real<Param>, float> common, const bool* nonfinite) {
  using Value = Real<Param>;
  if (nonfinite && *nonfinite) return;
  const int t = table.find(blockIdx.x);
  const Entry<Param, Index>& entry = table.entries[t];
  const Group<V> group = sparse_group<V>(table, t);
  const AdamW<Value, float> adamw = common.at(entry.step_size, entry.bias_correction2_sqrt);

  Index index[V];
  float grad[V], exp_avg[V], exp_avg_sq[V], master[V];
  group.load(index, entry.index);
  group.load(grad, entry.grad);
  group.load(exp_avg, entry.exp_avg);
  group.load(exp_avg_sq, entry.exp_avg_sq);
  if (entry.master) group.load(master, entry.master);
  bool valid[V];
  Param param[V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    valid[v] = group.has(v) && inside(index[v], entry.param_numel);
    param[v] = valid[v] ? entry.param[index[v]] : static_cast<Param>(0.0f);
  }
#pragma unroll
  for (int v = 0; v < V; v++) {
    // A master that no longer rounds to its weight is stale: the weight was loaded or edited from outside, and what is
    // in the model wins.
    const bool fresh = entry.master && same_bits(static_cast<Param>(master[v]), param[v]);
    const Value current = fresh ? static_cast<Value>(master[v]) : static_cast<Value>(param[v]);
    const Value value = adamw.update(current, grad[v], exp_avg[v], exp_avg_sq[v]);
    master[v] = static_cast<float>(value);
    if (valid[v]) entry.param[index[v]] = static_cast<Param>(value);
  }
  group.store(entry.exp_avg, exp_avg);
  group.store(entry.exp_avg_sq, exp_avg_sq);
  if (entry.master) group.store(entry.master, master);
}

void set_adamw_(Tensors params, Tensors grads, Tensors indices, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters,
                std::vector<double> step_sizes, std::vector<double> bias_correction2_sqrts, double beta1, double beta2,
                double eps, double decay, std::optional<Tensor> nonfinite) {
  check_set_adamw(params, grads, indices, exp_avgs, exp_avg_sqs, masters, step_sizes, bias_correction2_sqrts,
                  nonfinite);
  if (params.empty()) return;
  const Device device(params[0]);
  const Tensors flags = nonfinite ? Tensors{*nonfinite} : Tensors{};
  device.check({&params, &grads, &indices, &exp_avgs, &exp_avg_sqs, &masters, &flags});
  const bool* flag = nonfinite ? nonfinite->const_data_ptr<bool>() : nullptr;
  for_each_kind(params, indices, [&](const std::vector<size_t>& tensors, auto* param_type, auto* index_type) {
    using Param = std::remove_pointer_t<decltype(param_type)>;
    using Index = std::remove_pointer_t<decltype(index_type)>;
    std::vector<Entry<Param, Index>> entries;
    for (const size_t t : tensors) {
      const Index* index = indices[t].const_data_ptr<Index>();
      const float* grad = grads[t].const_data_ptr<float>();
      float* exp_avg = exp_avgs[t].mutable_data_ptr<float>();
      float* exp_avg_sq = exp_avg_sqs[t].mutable_data_ptr<float>();
      float* master = masters[t].numel() ? masters[t].mutable_data_ptr<float>() : nullptr;
      // A null pointer is aligned like the others when these are; without a master any shift must do.
      const float* master_or_grad = master ? master : grad;
      entries.push_back({params[t].mutable_data_ptr<Param>(), index, grad, exp_avg, exp_avg_sq, master,
                         params[t].numel(), static_cast<float>(step_sizes[t]),
                         static_cast<float>(bias_correction2_sqrts[t]),
                         align<V>(indices[t].numel(), index, grad, exp_avg, exp_avg_sq, master_or_grad)});
    }
    const AdamW<Real<Param>, float> common(beta1, beta2, eps, decay, 0, 1);
    for_each_table(entries, sparse_blocks<V, Entry<Param, Index>>, [&](const auto& table) {
      set_adamw<<<table.blocks(), kThreads, 0, device.stream()>>>(table, common, flag);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA, m) { m.impl("set_adamw_", TORCH_BOX(&set_adamw_)); }

}  // namespace safekern
