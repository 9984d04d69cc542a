// What the ops require of their arguments, for every compiled backend: dtype dispatch and, per op, the checks that need
// no look at the data.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "arithmetic.h"

namespace safekern {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Calls f with a null pointer of the C++ type of a floating dtype, which carries the type and nothing else.
template <class F>
void with_float_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "safekern: expected a bfloat16, float16, float32 or float64 tensor, got ",
                      torch::headeronly::toString(dtype));
  }
}

// The same where a tensor is fp32 or of the type Param of its parameter.
template <class Param, class F>
void with_param_type_or_float(ScalarType dtype, F&& f) {
  if constexpr (!std::is_same_v<Param, float>) {
    if (dtype != ScalarType::Float) return f(static_cast<Param*>(nullptr));
  }
  f(static_cast<float*>(nullptr));
}

template <class F>
void with_index_type(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Int) return f(static_cast<int32_t*>(nullptr));
  STD_TORCH_CHECK(dtype == ScalarType::Long, "safekern: indices must be int32 or int64, got ",
                  torch::headeronly::toString(dtype));
  f(static_cast<int64_t*>(nullptr));
}

// The dtype of positions in a tensor of so many elements.
inline ScalarType index_dtype(int64_t numel) { return numel <= INT32_MAX ? ScalarType::Int : ScalarType::Long; }

// Calls f with null pointers of the C++ types of a parameter and of positions in it.
template <class F>
void with_types(ScalarType param, ScalarType index, F&& f) {
  with_float_type(
      param, [&](auto* param_type) { with_index_type(index, [&](auto* index_type) { f(param_type, index_type); }); });
}

// Contiguous, and with memory: kernels get nothing but addresses. What sharding frees keeps its shape.
inline void check_tensor(const Tensor& tensor, const char* what) {
  // The address would not do: of a view into freed memory it is the view's offset.
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  STD_TORCH_CHECK(bytes > 0 || tensor.numel() == 0, "safekern: the memory of ", what, " was freed");
  STD_TORCH_CHECK(tensor.is_contiguous(), "safekern: ", what, " must be contiguous");
}

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "safekern: ", what, " must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_count(size_t actual, size_t count, const char* what) {
  STD_TORCH_CHECK(actual == count, "safekern: expected ", count, " ", what, ", got ", actual);
}

inline void check_numel(const Tensor& tensor, int64_t numel, const char* what) {
  STD_TORCH_CHECK(tensor.numel() == numel, "safekern: ", what, " must have ", numel, " elements, got ", tensor.numel());
}

inline void check_float(const Tensor& tensor, const char* what) {
  check_tensor(tensor, what);
  with_float_type(tensor.scalar_type(), [](auto*) {});
}

inline void check_index(const Tensor& tensor) {
  check_tensor(tensor, "an index tensor");
  with_index_type(tensor.scalar_type(), [](auto*) {});
}

inline void check_flags(const Tensor& nonfinite, size_t count) {
  check_tensor(nonfinite, "nonfinite");
  check_dtype(nonfinite, ScalarType::Bool, "nonfinite");
  check_numel(nonfinite, static_cast<int64_t>(count), "nonfinite");
}

inline void check_accumulate(const Tensors& accs, const Tensors& grads, const Tensor& nonfinite) {
  check_count(grads.size(), accs.size(), "gradients");
  check_flags(nonfinite, accs.size());
  for (size_t t = 0; t < accs.size(); t++) {
    check_dtype(accs[t], ScalarType::Float, "an accumulator");
    check_tensor(accs[t], "an accumulator");
    check_float(grads[t], "a gradient");
    check_numel(grads[t], accs[t].numel(), "a gradient");
  }
}

inline void check_sigma(const Tensors& params) {
  for (const Tensor& param : params) check_float(param, "a parameter");
}

inline void check_select(const Tensors& grads, const Tensor& sigma, int64_t k) {
  check_dtype(sigma, ScalarType::Float, "sigma");
  check_tensor(sigma, "sigma");
  check_numel(sigma, static_cast<int64_t>(grads.size()), "sigma");
  int64_t numel = 0;
  for (const Tensor& grad : grads) {
    check_dtype(grad, ScalarType::Float, "an accumulator");
    check_tensor(grad, "an accumulator");
    numel += grad.numel();
  }
  STD_TORCH_CHECK(k >= 1 && k <= numel, "safekern: cannot select ", k, " of ", numel, " elements");
}

inline void check_gather(const Tensors& outs, const Tensors& srcs, const Tensors& indices, const Tensor& nonfinite) {
  check_count(srcs.size(), outs.size(), "source tensors");
  check_count(indices.size(), outs.size(), "index tensors");
  check_flags(nonfinite, outs.size());
  for (size_t t = 0; t < outs.size(); t++) {
    check_tensor(outs[t], "an output");
    check_float(srcs[t], "a source tensor");
    check_index(indices[t]);
    check_numel(indices[t], outs[t].numel(), "an index tensor");
    STD_TORCH_CHECK(outs[t].scalar_type() == ScalarType::Float || outs[t].scalar_type() == srcs[t].scalar_type(),
                    "safekern: an output of gather_ must be float32 or of its source's dtype");
  }
}

// Parameters and positions in each of them, which most ops begin with.
inline void check_selected(const Tensors& params, const Tensors& indices) {
  check_count(indices.size(), params.size(), "index tensors");
  for (size_t t = 0; t < params.size(); t++) {
    check_float(params[t], "a parameter");
    check_index(indices[t]);
  }
}

// Of restore_ and count_changed.
inline void check_saved(const Tensors& params, const Tensors& indices, const Tensors& values) {
  check_selected(params, indices);
  check_count(values.size(), params.size(), "value tensors");
  for (size_t t = 0; t < params.size(); t++) {
    check_tensor(values[t], "a value tensor");
    check_dtype(values[t], params[t].scalar_type(), "a value tensor");
    check_numel(values[t], indices[t].numel(), "a value tensor");
  }
}

// What set_adamw_ and spa_adamw_ have in common.
inline void check_adamw(const Tensors& params, const Tensors& grads, const Tensors& indices, const Tensors& exp_avgs,
                        const Tensors& exp_avg_sqs, const std::vector<double>& step_sizes,
                        const std::vector<double>& bias_correction2_sqrts) {
  const size_t count = params.size();
  check_selected(params, indices);
  check_count(grads.size(), count, "gradients");
  check_count(exp_avgs.size(), count, "first moments");
  check_count(exp_avg_sqs.size(), count, "second moments");
  STD_TORCH_CHECK(step_sizes.size() == count && bias_correction2_sqrts.size() == count, "safekern: expected ", count,
                  " step sizes and bias corrections");
}

inline void check_set_adamw(const Tensors& params, const Tensors& grads, const Tensors& indices,
                            const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& masters,
                            const std::vector<double>& step_sizes, const std::vector<double>& bias_correction2_sqrts,
                            const std::optional<Tensor>& nonfinite) {
  check_adamw(params, grads, indices, exp_avgs, exp_avg_sqs, step_sizes, bias_correction2_sqrts);
  check_count(masters.size(), params.size(), "master tensors");
  if (nonfinite) check_flags(*nonfinite, 1);
  for (size_t t = 0; t < params.size(); t++) {
    for (const Tensor* state : {&grads[t], &exp_avgs[t], &exp_avg_sqs[t], &masters[t]}) {
      if (state == &masters[t] && state->numel() == 0) continue;
      check_tensor(*state, "a selected gradient or state tensor");
      check_dtype(*state, ScalarType::Float, "a selected gradient or state tensor");
      check_numel(*state, indices[t].numel(), "a selected gradient or state tensor");
    }
  }
}

inline void check_spa_adamw(const Tensors& params, const Tensors& grads, const Tensors& indices,
                            const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const std::vector<double>& step_sizes,
                            const std::vector<double>& bias_correction2_sqrts) {
  check_adamw(params, grads, indices, exp_avgs, exp_avg_sqs, step_sizes, bias_correction2_sqrts);
  for (size_t t = 0; t < params.size(); t++) {
    const ScalarType dtype = params[t].scalar_type();
    for (const Tensor* other : {&grads[t], &exp_avgs[t], &exp_avg_sqs[t]}) {
      check_tensor(*other, "a gradient or moment");
      check_numel(*other, params[t].numel(), "a gradient or moment");
      STD_TORCH_CHECK(other->scalar_type() == dtype || other->scalar_type() == ScalarType::Float,
                      "safekern: a gradient or moment must be Float or its parameter's ",
                      torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(other->scalar_type()));
    }
    check_dtype(exp_avg_sqs[t], exp_avgs[t].scalar_type(), "a second moment");
  }
}

inline void check_perturb(const Tensors& params, const Tensors& indices, const std::vector<double>& scales,
                          const std::vector<int64_t>& streams) {
  check_selected(params, indices);
  STD_TORCH_CHECK(scales.size() == params.size() && streams.size() == params.size(), "safekern: expected ",
                  params.size(), " scales and streams");
}

}  // namespace safekern
