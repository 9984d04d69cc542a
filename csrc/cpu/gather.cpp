#include "../arithmetic.h"
#include "common.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 13;

template <class Out, class Src, class Index>
bool gather(Out* __restrict out, const Src* __restrict src, const Index* __restrict index, int64_t begin, int64_t end,
            int64_t count) {
  using Value = std::conditional_t<std::is_same_v<Out, double>, double, float>;
  Src values[kTile];
  uint32_t nonfinite = 0;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t size = std::min(kTile, end - tile);
    prefetch_tile(src, index, tile, count);
    for (int64_t j = 0; j < size; j++) values[j] = src[index[tile + j]];
    for (int64_t j = 0; j < size; j++) {
      out[tile + j] = static_cast<Out>(values[j]);
      nonfinite |= !std::isfinite(static_cast<Value>(out[tile + j]));
    }
  }
  return nonfinite;
}

template <class Out, class Src>
bool gather_chunk(const Tensor& out, const Tensor& src, const Tensor& indices, const Chunk& chunk) {
  bool found = false;
  with_index_type(indices.scalar_type(), [&](auto* type) {
    using Index = std::remove_pointer_t<decltype(type)>;
    found = gather(out.mutable_data_ptr<Out>(), src.const_data_ptr<Src>(), indices.const_data_ptr<Index>(), chunk.begin,
                   chunk.end, out.numel());
  });
  return found;
}

void gather_(Tensors outs, Tensors srcs, Tensors indices, Tensor nonfinite) {
  check_count(srcs, outs.size(), "source tensors");
  check_count(indices, outs.size(), "index tensors");
  check_flags(nonfinite, outs.size());
  for (size_t t = 0; t < outs.size(); t++) {
    check_contiguous(outs[t], "an output");
    check_contiguous(srcs[t], "a source tensor");
    check_numel(indices[t], outs[t].numel(), "an index tensor");
    with_float_type(srcs[t].scalar_type(), [](auto*) {});
    STD_TORCH_CHECK(outs[t].scalar_type() == ScalarType::Float || outs[t].scalar_type() == srcs[t].scalar_type(),
                    "safekern: an output of gather_ must be float32 or of its source's dtype");
  }
  check_indices(indices, srcs);
  parallel_flagged(cut(outs, kChunk), nonfinite, [&](const Chunk& chunk) {
    const Tensor &out = outs[chunk.tensor], &src = srcs[chunk.tensor], &index = indices[chunk.tensor];
    bool found = false;
    with_float_type(src.scalar_type(), [&](auto* type) {
      using Src = std::remove_pointer_t<decltype(type)>;
      found = out.scalar_type() == ScalarType::Float ? gather_chunk<float, Src>(out, src, index, chunk)
                                                     : gather_chunk<Src, Src>(out, src, index, chunk);
    });
    return found;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) { m.impl("gather_", TORCH_BOX(&gather_)); }

}  // namespace safekern
