#include "common.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 13;

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
      // Nothing is fetched ahead: a store waits for its line without holding up what follows it, and in a loop by
      // itself asking for the line before took a fifth longer.
      for (int64_t j = chunk.begin; j < chunk.end; j++) param[index[j]] = value[j];
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
