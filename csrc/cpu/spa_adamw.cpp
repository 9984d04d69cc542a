#include "../arithmetic.h"
#include "common.h"
#include "simd.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 18;
// Small enough for a block's copy and its four streams to stay in the L1 cache.
constexpr int64_t kBlock = 512;

template <class Param, class Grad, class Moment>
SAFEKERN_INLINE void update(Param* __restrict param, const Grad* __restrict grad, Moment* __restrict exp_avg,
                            Moment* __restrict exp_avg_sq, int64_t numel, const AdamW adamw) {
  using Real = std::conditional_t<std::is_same_v<Param, double>, double, float>;
  for (int64_t i = 0; i < numel; i++) {
    Real first = widen<Real>(exp_avg[i]), second = widen<Real>(exp_avg_sq[i]);
    const Real value = adamw.update(widen<Real>(param[i]), widen<Real>(grad[i]), first, second);
    exp_avg[i] = narrow<Moment>(first);
    exp_avg_sq[i] = narrow<Moment>(second);
    param[i] = narrow<Param>(value);
  }
}

// The tensors of one parameter, as raw pointers.
template <class Param, class Grad, class Moment, class Index>
struct Spared {
  Param* param;
  const Grad* grad;
  Moment *exp_avg, *exp_avg_sq;
  const Index* index;
  int64_t count;

  // Updates everything and puts the spared weights back: the loop that does the work has no branch and no mask. The
  // whole block is saved, not the spared weights, since reading those ahead of the stream would wait for memory.
  void step(int64_t begin, int64_t end, const AdamW& adamw) const {
    Param before[kBlock];
    const Index *last = index + count, *spared = std::lower_bound(index, last, begin);
    for (int64_t block = begin; block < end; block += kBlock) {
      const int64_t size = std::min(kBlock, end - block);
      std::copy_n(param + block, size, before);
      vectorised([&]() SAFEKERN_INLINE_LAMBDA {
        update(param + block, grad + block, exp_avg + block, exp_avg_sq + block, size, adamw);
      });
      for (; spared != last && *spared < block + size; spared++) param[*spared] = before[*spared - block];
    }
  }
};

// Calls f with a null pointer of the parameter's C++ type, or of float where the tensor is fp32.
template <class Param, class F>
void with_param_type_or_float(ScalarType dtype, F&& f) {
  if constexpr (!std::is_same_v<Param, float>) {
    if (dtype != ScalarType::Float) return f(static_cast<Param*>(nullptr));
  }
  f(static_cast<float*>(nullptr));
}

void check_param_type_or_float(const Tensor& tensor, ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype || tensor.scalar_type() == ScalarType::Float, "safekern: ", what,
                  " must be Float or its parameter's ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

// A weight is spared because a binary search finds it, so order matters as much as range.
void check_ascending(const Tensors& indices, const Tensors& params) {
  for (size_t t = 0; t < indices.size(); t++) {
    check_contiguous(indices[t], "indices");
    with_index_type(indices[t].scalar_type(), [](auto*) {});
  }
  const std::vector<Chunk> chunks = cut(indices, kChunk);
  std::vector<uint8_t> wrong(chunks.size());
  parallel_each(static_cast<int64_t>(chunks.size()), [&](int64_t c) {
    const Chunk& chunk = chunks[c];
    with_index_type(indices[chunk.tensor].scalar_type(), [&](auto* type) {
      using Index = std::remove_pointer_t<decltype(type)>;
      const Index* index = indices[chunk.tensor].const_data_ptr<Index>();
      bool descends = false;
      for (int64_t j = std::max<int64_t>(chunk.begin, 1); j < chunk.end; j++) descends |= index[j] <= index[j - 1];
      const bool outside = index[chunk.begin] < 0 || index[chunk.end - 1] >= params[chunk.tensor].numel();
      wrong[c] = descends || outside;
    });
  });
  STD_TORCH_CHECK(std::find(wrong.begin(), wrong.end(), 1) == wrong.end(),
                  "safekern: indices must ascend without repetition and lie inside their parameter");
}

void spa_adamw_(Tensors params, Tensors grads, Tensors indices, Tensors exp_avgs, Tensors exp_avg_sqs,
                std::vector<double> step_sizes, std::vector<double> bias_correction2_sqrts, double beta1, double beta2,
                double eps, double decay) {
  const size_t count = params.size();
  check_count(grads, count, "gradients");
  check_count(indices, count, "index tensors");
  check_count(exp_avgs, count, "first moments");
  check_count(exp_avg_sqs, count, "second moments");
  STD_TORCH_CHECK(step_sizes.size() == count && bias_correction2_sqrts.size() == count, "safekern: expected ", count,
                  " step sizes and bias corrections");
  for (size_t t = 0; t < count; t++) {
    const ScalarType dtype = params[t].scalar_type();
    check_contiguous(params[t], "a parameter");
    with_float_type(dtype, [](auto*) {});
    for (const Tensor* other : {&grads[t], &exp_avgs[t], &exp_avg_sqs[t]}) {
      check_contiguous(*other, "a gradient or moment");
      check_numel(*other, params[t].numel(), "a gradient or moment");
      check_param_type_or_float(*other, dtype, "a gradient or moment");
    }
    check_dtype(exp_avg_sqs[t], exp_avgs[t].scalar_type(), "a second moment");
  }
  check_ascending(indices, params);
  const std::vector<Chunk> chunks = cut(params, kChunk);
  parallel_each(static_cast<int64_t>(chunks.size()), [&](int64_t c) {
    const int64_t t = chunks[c].tensor;
    const AdamW adamw{decay, 1.0 - beta1, beta2, 1.0 - beta2, eps, step_sizes[t], bias_correction2_sqrts[t]};
    with_float_type(params[t].scalar_type(), [&](auto* param_type) {
      using Param = std::remove_pointer_t<decltype(param_type)>;
      with_param_type_or_float<Param>(grads[t].scalar_type(), [&](auto* grad_type) {
        with_param_type_or_float<Param>(exp_avgs[t].scalar_type(), [&](auto* moment_type) {
          with_index_type(indices[t].scalar_type(), [&](auto* index_type) {
            using Grad = std::remove_pointer_t<decltype(grad_type)>;
            using Moment = std::remove_pointer_t<decltype(moment_type)>;
            using Index = std::remove_pointer_t<decltype(index_type)>;
            const Spared<Param, Grad, Moment, Index> spared{
                params[t].mutable_data_ptr<Param>(),    grads[t].const_data_ptr<Grad>(),
                exp_avgs[t].mutable_data_ptr<Moment>(), exp_avg_sqs[t].mutable_data_ptr<Moment>(),
                indices[t].const_data_ptr<Index>(),     indices[t].numel()};
            spared.step(chunks[c].begin, chunks[c].end, adamw);
          });
        });
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) { m.impl("spa_adamw_", TORCH_BOX(&spa_adamw_)); }

}  // namespace safekern
