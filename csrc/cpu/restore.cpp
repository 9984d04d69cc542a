#include "common.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 13;

// A store waits for its line without holding up what follows it, but not for where its page lies. Asking for one of
// every few lines is enough to have that at hand (a line of the page table holds the addresses of eight pages), and an
// eighth faster; asking for every line is no faster than for none.
constexpr int64_t kStored = 8, kStoredAhead = 80;

template <class Word, class Index>
void store(Word* param, const Index* index, const Word* value, int64_t begin, int64_t end) {
  int64_t j = begin;
  for (; j < end - kStoredAhead; j += kStored) {
    prefetch(param + index[j + kStoredAhead]);
    for (int64_t i = j; i < j + kStored; i++) param[index[i]] = value[i];
  }
  for (; j < end; j++) param[index[j]] = value[j];
}

void restore_(Tensors params, Tensors indices, Tensors values) {
  check_saved(params, indices, values);
  check_indices(indices, params);
  const std::vector<Chunk> chunks = cut(indices, kChunk);
  each_chunk(chunks, [&](int64_t c) {
    const Chunk chunk = chunks[c];
    const int64_t t = chunk.tensor;
    with_types(params[t].scalar_type(), indices[t].scalar_type(), [&](auto* param_type, auto* index_type) {
      using Word = Bits<std::remove_pointer_t<decltype(param_type)>>;
      using Index = std::remove_pointer_t<decltype(index_type)>;
      Word* param = static_cast<Word*>(params[t].mutable_data_ptr());
      const Index* index = indices[t].const_data_ptr<Index>();
      const Word* value = static_cast<const Word*>(values[t].const_data_ptr());
      store(param, index, value, chunk.begin, chunk.end);
    });
  });
}

Tensor count_changed(Tensors params, Tensors indices, Tensors values) {
  check_saved(params, indices, values);
  check_indices(indices, params);
  const std::vector<Chunk> chunks = cut(indices, kChunk);
  std::vector<int64_t> counts(chunks.size());
  each_chunk(chunks, [&](int64_t c) {
    const Chunk chunk = chunks[c];
    const int64_t t = chunk.tensor;
    with_types(params[t].scalar_type(), indices[t].scalar_type(), [&](auto* param_type, auto* index_type) {
      using Word = Bits<std::remove_pointer_t<decltype(param_type)>>;
      using Index = std::remove_pointer_t<decltype(index_type)>;
      const Word* param = static_cast<const Word*>(params[t].const_data_ptr());
      const Index* index = indices[t].const_data_ptr<Index>();
      const Word* value = static_cast<const Word*>(values[t].const_data_ptr());
      int64_t changed = 0;
      each_tile(param, index, chunk.begin, chunk.end, indices[t].numel(), [&](int64_t tile, int64_t stop) {
        for (int64_t j = tile; j < stop; j++) changed += param[index[j]] != value[j];
      });
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
