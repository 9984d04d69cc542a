#include "common.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 13;

// Calls f(j) for j in [begin, end) of the tensor's count indices, with the weights fetched ahead.
template <class Word, class Index, class F>
void each_selected(const Word* param, const Index* index, int64_t begin, int64_t end, int64_t count, const F& f) {
  for (int64_t tile = begin; tile < end; tile += kTile) {
    prefetch_tile(param, index, tile, count);
    for (int64_t j = tile, stop = std::min(tile + kTile, end); j < stop; j++) f(j);
  }
}

// Calls f with null pointers of an unsigned integer of the parameter's size, because only bits count, and of the index.
template <class F>
void with_types(const Tensor& param, const Tensor& index, F&& f) {
  with_index_type(index.scalar_type(), [&](auto* index_type) {
    switch (param.element_size()) {
      case 2:
        return f(static_cast<uint16_t*>(nullptr), index_type);
      case 4:
        return f(static_cast<uint32_t*>(nullptr), index_type);
      default:
        return f(static_cast<uint64_t*>(nullptr), index_type);
    }
  });
}

void check(const Tensors& params, const Tensors& indices, const Tensors& values) {
  check_count(indices, params.size(), "index tensors");
  check_count(values, params.size(), "value tensors");
  for (size_t t = 0; t < params.size(); t++) {
    check_contiguous(params[t], "a parameter");
    check_contiguous(values[t], "a value tensor");
    with_float_type(params[t].scalar_type(), [](auto*) {});
    check_dtype(values[t], params[t].scalar_type(), "a value tensor");
    check_numel(values[t], indices[t].numel(), "a value tensor");
  }
  check_indices(indices, params);
}

void restore_(Tensors params, Tensors indices, Tensors values) {
  check(params, indices, values);
  const std::vector<Chunk> chunks = cut(indices, kChunk);
  parallel_each(static_cast<int64_t>(chunks.size()), [&](int64_t c) {
    const auto [t, begin, end] = chunks[c];
    with_types(params[t], indices[t], [&, t = t, begin = begin, end = end](auto* word_type, auto* index_type) {
      using Word = std::remove_pointer_t<decltype(word_type)>;
      using Index = std::remove_pointer_t<decltype(index_type)>;
      Word* param = static_cast<Word*>(params[t].mutable_data_ptr());
      const Index* index = indices[t].const_data_ptr<Index>();
      const Word* value = static_cast<const Word*>(values[t].const_data_ptr());
      each_selected(param, index, begin, end, indices[t].numel(), [=](int64_t j) { param[index[j]] = value[j]; });
    });
  });
}

Tensor count_changed(Tensors params, Tensors indices, Tensors values) {
  check(params, indices, values);
  const std::vector<Chunk> chunks = cut(indices, kChunk);
  std::vector<int64_t> counts(chunks.size());
  parallel_each(static_cast<int64_t>(chunks.size()), [&](int64_t c) {
    const auto [t, begin, end] = chunks[c];
    with_types(params[t], indices[t], [&, t = t, begin = begin, end = end](auto* word_type, auto* index_type) {
      using Word = std::remove_pointer_t<decltype(word_type)>;
      using Index = std::remove_pointer_t<decltype(index_type)>;
      const Word* param = static_cast<const Word*>(params[t].const_data_ptr());
      const Index* index = indices[t].const_data_ptr<Index>();
      const Word* value = static_cast<const Word*>(values[t].const_data_ptr());
      int64_t changed = 0;
      each_selected(param, index, begin, end, indices[t].numel(),
                    [=, &changed](int64_t j) { changed += param[index[j]] != value[j]; });
      counts[c] = changed;
    });
  });
  Tensor result = torch::stable::empty({static_cast<int64_t>(params.size())}, ScalarType::Long);
  int64_t* total = result.mutable_data_ptr<int64_t>();
  std::fill_n(total, params.size(), 0);
  for (size_t c = 0; c < chunks.size(); c++) total[chunks[c].tensor] += counts[c];
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) {
  m.impl("restore_", TORCH_BOX(&restore_));
  m.impl("count_changed", TORCH_BOX(&count_changed));
}

}  // namespace safekern
