#include "../arithmetic.h"
#include "common.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 13;

template <class Param>
bool same_bits(Param a, Param b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// The state of one parameter, as raw pointers; master is null when the parameter itself holds the full value.
template <class Param, class Index>
struct Selected {
  Param* param;
  const Index* index;
  const float* grad;
  float *exp_avg, *exp_avg_sq, *master;
  int64_t count;

  void step(int64_t begin, int64_t end, const AdamW& adamw) const {
    using Value = std::conditional_t<std::is_same_v<Param, double>, double, float>;
    Value values[kTile];
    for (int64_t tile = begin; tile < end; tile += kTile) {
      const int64_t size = std::min(kTile, end - tile);
      prefetch_tile(param, index, tile, count);
      for (int64_t j = 0; j < size; j++) {
        const Param current = param[index[tile + j]];
        // A master that no longer rounds to its weight is stale: the weight was loaded or edited from outside, and
        // what is in the model wins.
        const bool fresh = master && same_bits(static_cast<Param>(master[tile + j]), current);
        values[j] = fresh ? static_cast<Value>(master[tile + j]) : static_cast<Value>(current);
      }
      for (int64_t j = 0; j < size; j++) {
        values[j] = adamw.update(values[j], grad[tile + j], exp_avg[tile + j], exp_avg_sq[tile + j]);
      }
      for (int64_t j = 0; j < size; j++) {
        if (master) master[tile + j] = static_cast<float>(values[j]);
        param[index[tile + j]] = static_cast<Param>(values[j]);
      }
    }
  }
};

void set_adamw_(Tensors params, Tensors grads, Tensors indices, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters,
                std::vector<double> step_sizes, std::vector<double> bias_correction2_sqrts, double beta1, double beta2,
                double eps, double decay) {
  const size_t count = params.size();
  check_count(grads, count, "gradients");
  check_count(indices, count, "index tensors");
  check_count(exp_avgs, count, "first moments");
  check_count(exp_avg_sqs, count, "second moments");
  check_count(masters, count, "master tensors");
  STD_TORCH_CHECK(step_sizes.size() == count && bias_correction2_sqrts.size() == count, "safekern: expected ", count,
                  " step sizes and bias corrections");
  for (size_t t = 0; t < count; t++) {
    check_contiguous(params[t], "a parameter");
    with_float_type(params[t].scalar_type(), [](auto*) {});
    const int64_t selected = indices[t].numel();
    for (const Tensor* state : {&grads[t], &exp_avgs[t], &exp_avg_sqs[t], &masters[t]}) {
      if (state == &masters[t] && state->numel() == 0) continue;
      check_contiguous(*state, "a selected gradient or state tensor");
      check_dtype(*state, ScalarType::Float, "a selected gradient or state tensor");
      check_numel(*state, selected, "a selected gradient or state tensor");
    }
  }
  check_indices(indices, params);
  const std::vector<Chunk> chunks = cut(indices, kChunk);
  parallel_each(static_cast<int64_t>(chunks.size()), [&](int64_t c) {
    const int64_t t = chunks[c].tensor;
    const AdamW adamw{decay,
                      static_cast<float>(1.0 - beta1),
                      static_cast<float>(beta2),
                      static_cast<float>(1.0 - beta2),
                      static_cast<float>(eps),
                      static_cast<float>(step_sizes[t]),
                      static_cast<float>(bias_correction2_sqrts[t])};
    with_float_type(params[t].scalar_type(), [&](auto* param_type) {
      with_index_type(indices[t].scalar_type(), [&](auto* index_type) {
        using Param = std::remove_pointer_t<decltype(param_type)>;
        using Index = std::remove_pointer_t<decltype(index_type)>;
        const Selected<Param, Index> selected{params[t].mutable_data_ptr<Param>(),
                                              indices[t].const_data_ptr<Index>(),
                                              grads[t].const_data_ptr<float>(),
                                              exp_avgs[t].mutable_data_ptr<float>(),
                                              exp_avg_sqs[t].mutable_data_ptr<float>(),
                                              masters[t].numel() ? masters[t].mutable_data_ptr<float>() : nullptr,
                                              indices[t].numel()};
        selected.step(chunks[c].begin, chunks[c].end, adamw);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) { m.impl("set_adamw_", TORCH_BOX(&set_adamw_)); }

}  // namespace safekern
