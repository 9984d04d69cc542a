// Bytes: per element the gradient once and the parameter and both moments twice (28 in fp32, 14 in bf16, 22 in bf16
// with fp32 moments), and the indices once; moves as much.
//
// A captured graph replays the step sizes and bias corrections that it was captured with.
#include "common.cuh"

namespace safekern {
namespace {

constexpr int kChunk = 1 << 14;  // elements of a block, whose protection takes 2 KB of shared memory

template <class Param, class Grad, class Moment, class Index>
struct Entry {
  Param* param;
  const Grad* grad;
  Moment *exp_avg, *exp_avg_sq;
  const Index* index;
  int64_t spared;  // the number of indices
  Real<Param> step_size, bias_correction2_sqrt;
  Groups groups;
};

// The first j whose index is not below value. All threads of the block call it and share the search: three rounds find
// one of 16 million.
template <class Index>
__device__ int64_t lower_bound(const Index* index, int64_t count, int64_t value) {
  int64_t low = 0, high = count;  // the answer is in [low, high]
  while (low < high) {
    const int64_t run = (high - low + kThreads - 1) / kThreads;
    const int64_t last = low + (threadIdx.x + 1) * run - 1;
    const int runs_below = __syncthreads_count(last < high && index[last] < value);
    low += runs_below * run;
    // The last element of the run at low is known not to be below, unless the run is cut short by high.
    high = min(low + run - 1, high);
  }
  return low;
}

template <class Param, class Grad, class Moment, class Index>
__global__ void __launch_bounds__(kThreads, 3)
    spa_adamw(const __grid_constant__ Table<Entry<Param, Grad, Moment, Index>> table, const AdamW<Real<Param>> common) {
  using Value = Real<Param>;
  constexpr int V = kVector<Param, Grad, Moment>;
  __shared__ uint32_t spared[kChunk / 32];

  const int t = table.find(blockIdx.x);
  const Entry<Param, Grad, Moment, Index>& entry = table.entries[t];
  const int64_t chunk = blockIdx.x - table.first_block[t];
  const int64_t begin = chunk * kChunk - entry.groups.shift;
  for (int w = threadIdx.x; w < kChunk / 32; w += kThreads) spared[w] = 0;
  const int64_t first = lower_bound(entry.index, entry.spared, begin);
  __syncthreads();
  for (int64_t j = first + threadIdx.x; j < entry.spared; j += kThreads) {
    const int64_t bit = entry.index[j] - begin;
    if (!inside(bit, kChunk)) break;
    atomicOr(&spared[bit / 32], 1u << (bit % 32));
  }
  __syncthreads();

  const AdamW<Value> adamw = common.at(entry.step_size, entry.bias_correction2_sqrt);
  for (int g = threadIdx.x; g < kChunk / V; g += kThreads) {
    const Group<V> group(entry.groups, chunk * (kChunk / V) + g);
    if (group.begin >= group.numel) break;
    Param param[V];
    Grad grad[V];
    Moment exp_avg[V], exp_avg_sq[V];
    group.load(param, entry.param);
    group.load(grad, entry.grad);
    group.load(exp_avg, entry.exp_avg);
    group.load(exp_avg_sq, entry.exp_avg_sq);
    const uint32_t bits = spared[g * V / 32] >> (g * V % 32);
#pragma unroll
    for (int v = 0; v < V; v++) {
      Value m = static_cast<Value>(exp_avg[v]), s = static_cast<Value>(exp_avg_sq[v]);
      const Value value = adamw.update(static_cast<Value>(param[v]), static_cast<Value>(grad[v]), m, s);
      exp_avg[v] = static_cast<Moment>(m);
      exp_avg_sq[v] = static_cast<Moment>(s);
      if (!(bits >> v & 1)) param[v] = static_cast<Param>(value);
    }
    group.store(entry.exp_avg, exp_avg);
    group.store(entry.exp_avg_sq, exp_avg_sq);
    group.store(entry.param, param);
  }
}

// The tensors of an op on one device.
struct Lists {
  const Tensors &params, &grads, &indices, &exp_avgs, &exp_avg_sqs;
  const std::vector<double>&step_sizes, &bias_correction2_sqrts;
  double beta1, beta2, eps, decay;

  template <class Param, class Grad, class Moment, class Index>
  void launch(const std::vector<size_t>& tensors, const Device& device) const {
    constexpr int V = kVector<Param, Grad, Moment>;
    std::vector<Entry<Param, Grad, Moment, Index>> entries;
    for (const size_t t : tensors) {
      Param* param = params[t].mutable_data_ptr<Param>();
      const Grad* grad = grads[t].const_data_ptr<Grad>();
      Moment* exp_avg = exp_avgs[t].mutable_data_ptr<Moment>();
      Moment* exp_avg_sq = exp_avg_sqs[t].mutable_data_ptr<Moment>();
      entries.push_back({param, grad, exp_avg, exp_avg_sq, indices[t].const_data_ptr<Index>(), indices[t].numel(),
                         static_cast<Real<Param>>(step_sizes[t]), static_cast<Real<Param>>(bias_correction2_sqrts[t]),
                         align<V>(params[t].numel(), param, grad, exp_avg, exp_avg_sq)});
    }
    const AdamW<Real<Param>> common(beta1, beta2, eps, decay, 0, 1);
    for_each_table(
        entries, [](const auto& entry) { return ceil_div(entry.groups.template count<V>(), kChunk / V); },
        [&](const auto& table) { spa_adamw<<<table.blocks(), kThreads, 0, device.stream()>>>(table, common); });
  }
};

void spa_adamw_(Tensors params, Tensors grads, Tensors indices, Tensors exp_avgs, Tensors exp_avg_sqs,
                std::vector<double> step_sizes, std::vector<double> bias_correction2_sqrts, double beta1, double beta2,
                double eps, double decay) {
  check_spa_adamw(params, grads, indices, exp_avgs, exp_avg_sqs, step_sizes, bias_correction2_sqrts);
  if (params.empty()) return;
  const Device device(params[0]);
  device.check({&params, &grads, &indices, &exp_avgs, &exp_avg_sqs});
  const Lists lists{params, grads, indices, exp_avgs, exp_avg_sqs, step_sizes, bias_correction2_sqrts,
                    beta1,  beta2, eps,     decay};
  const auto kind = [&](size_t t) {
    return std::tuple(params[t].scalar_type(), grads[t].scalar_type(), exp_avgs[t].scalar_type(),
                      indices[t].scalar_type());
  };
  for (const auto& [types, tensors] : group_by(params.size(), kind)) {
    const size_t t = tensors[0];
    with_index_type(indices[t].scalar_type(), [&, &tensors = tensors](auto* index_type) {
      with_float_type(params[t].scalar_type(), [&](auto* param_type) {
        using Param = std::remove_pointer_t<decltype(param_type)>;
        with_param_type_or_float<Param>(grads[t].scalar_type(), [&](auto* grad_type) {
          with_param_type_or_float<Param>(exp_avgs[t].scalar_type(), [&](auto* moment_type) {
            using Index = std::remove_pointer_t<decltype(index_type)>;
            using Grad = std::remove_pointer_t<decltype(grad_type)>;
            using Moment = std::remove_pointer_t<decltype(moment_type)>;
            lists.launch<Param, Grad, Moment, Index>(tensors, device);
          });
        });
      });
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA, m) { m.impl("spa_adamw_", TORCH_BOX(&spa_adamw_)); }

}  // namespace safekern
