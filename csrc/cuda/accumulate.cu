// Bytes: per element the gradient once and the accumulator twice, 10 for a bf16 gradient; moves as much.
#include "common.cuh"

namespace safekern {
namespace {

constexpr int kSteps = 4;

template <class Grad>
struct Entry {
  float* acc;
  const Grad* grad;
  bool* nonfinite;
  Groups groups;
};

template <bool kAbsolute, class Grad>
__global__ void __launch_bounds__(kThreads) accumulate(const __grid_constant__ Table<Entry<Grad>> table) {
  constexpr int V = kVector<float, Grad>;
  const int t = table.find(blockIdx.x);
  const Entry<Grad>& entry = table.entries[t];
  const int64_t first = static_cast<int64_t>(blockIdx.x - table.first_block[t]) * (kSteps * kThreads);
  bool found = false;
  for (int step = 0; step < kSteps; step++) {
    const Group<V> group(entry.groups, first + step * kThreads + threadIdx.x);
    if (group.begin >= group.numel) break;
    float acc[V];
    Grad grad[V];
    group.load(acc, entry.acc);
    group.load(grad, entry.grad);
#pragma unroll
    for (int v = 0; v < V; v++) {
      const float value = static_cast<float>(grad[v]);
      acc[v] += kAbsolute ? std::fabs(value) : value;
      found |= !is_finite_bits(float_bits(acc[v]));
    }
    group.store(entry.acc, acc);
  }
  if (__syncthreads_or(found) && threadIdx.x == 0) *entry.nonfinite = true;
}

void accumulate_(Tensors accs, Tensors grads, Tensor nonfinite, bool absolute) {
  check_accumulate(accs, grads, nonfinite);
  if (accs.empty()) return;
  const Device device(nonfinite);
  device.check({&accs, &grads});
  bool* flag = nonfinite.mutable_data_ptr<bool>();
  for (const auto& [dtype, tensors] : group_by(accs.size(), [&](size_t t) { return grads[t].scalar_type(); })) {
    with_float_type(dtype, [&, &tensors = tensors](auto* type) {
      using Grad = std::remove_pointer_t<decltype(type)>;
      constexpr int V = kVector<float, Grad>;
      std::vector<Entry<Grad>> entries;
      for (const size_t t : tensors) {
        float* acc = accs[t].mutable_data_ptr<float>();
        const Grad* grad = grads[t].const_data_ptr<Grad>();
        entries.push_back({acc, grad, flag + t, align<V>(accs[t].numel(), acc, grad)});
      }
      for_each_table(
          entries, [](const auto& entry) { return ceil_div(entry.groups.template count<V>(), kSteps * kThreads); },
          [&](const auto& table) {
            const auto kernel = absolute ? accumulate<true, Grad> : accumulate<false, Grad>;
            kernel<<<table.blocks(), kThreads, 0, device.stream()>>>(table);
          });
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CUDA, m) { m.impl("accumulate_", TORCH_BOX(&accumulate_)); }

}  // namespace safekern
