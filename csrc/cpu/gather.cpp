#include <limits>

#include "../arithmetic.h"
#include "common.h"
#include "simd.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 13;

template <class T>
SAFEKERN_INLINE bool all_finite(const T* values, int64_t numel) {
  using Word = Bits<T>;
  const Word exponent = bit_copy<Word>(std::numeric_limits<T>::infinity());
  Word nonfinite = 0;
  for (int64_t j = 0; j < numel; j++) nonfinite |= (bit_copy<Word>(values[j]) & exponent) == exponent;
  return !nonfinite;
}

// Bytes moved: the cache lines of the selected elements (of a bf16 tensor, a random 1% touches 27% of all lines), the
// indices and the output.
template <class Out, class Src, class Index>
bool gather(Out* __restrict out, const Src* __restrict src, const Index* __restrict index, int64_t begin, int64_t end,
            int64_t count) {
  Src values[kTile];
  bool nonfinite = false;
  each_tile(src, index, begin, end, count, [&](int64_t tile, int64_t stop) {
    const int64_t size = stop - tile;
    for (int64_t j = 0; j < size; j++) values[j] = src[index[tile + j]];
    vectorised([&]() SAFEKERN_INLINE_LAMBDA {
      convert(values, out + tile, size);
      nonfinite |= !all_finite(out + tile, size);
    });
  });
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
  check_gather(outs, srcs, indices, nonfinite);
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
