#include "common.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 13;
constexpr int64_t kPrefetchAhead = 64;

// Word: an unsigned integer of the parameter's size, because only bits are moved.
template <class Word, class Index>
void restore(Word* __restrict param, const Index* __restrict index, const Word* __restrict values, int64_t begin,
             int64_t end, int64_t count) {
  for (int64_t j = begin; j < end; j++) {
    if (j + kPrefetchAhead < count) SAFEKERN_PREFETCH(param + index[j + kPrefetchAhead]);
    param[index[j]] = values[j];
  }
}

template <class F>
void with_word_type(size_t size, F&& f) {
  if (size == 2) return f(static_cast<uint16_t*>(nullptr));
  if (size == 4) return f(static_cast<uint32_t*>(nullptr));
  f(static_cast<uint64_t*>(nullptr));
}

void restore_(Tensors params, Tensors indices, Tensors values) {
  check_count(indices, params.size(), "index tensors");
  check_count(values, params.size(), "value tensors");
  for (size_t t = 0; t < params.size(); t++) {
    check_contiguous(params[t], "a parameter");
    check_contiguous(values[t], "a value tensor");
    with_float_type(params[t].scalar_type(), [](auto*) {});
    check_dtype(values[t], params[t].scalar_type(), "a value tensor");
    check_numel(values[t], indices[t].numel(), "a value tensor");
    check_indices(indices[t], params[t].numel());
  }
  const std::vector<Chunk> chunks = cut(indices, kChunk);
  parallel_each(static_cast<int64_t>(chunks.size()), [&](int64_t c) {
    const Tensor &param = params[chunks[c].tensor], &value = values[chunks[c].tensor];
    const Tensor& index = indices[chunks[c].tensor];
    with_word_type(param.element_size(), [&](auto* word_type) {
      with_index_type(index.scalar_type(), [&](auto* index_type) {
        using Word = std::remove_pointer_t<decltype(word_type)>;
        using Index = std::remove_pointer_t<decltype(index_type)>;
        restore(static_cast<Word*>(param.mutable_data_ptr()), index.const_data_ptr<Index>(),
                static_cast<const Word*>(value.const_data_ptr()), chunks[c].begin, chunks[c].end, index.numel());
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) { m.impl("restore_", TORCH_BOX(&restore_)); }

}  // namespace safekern
