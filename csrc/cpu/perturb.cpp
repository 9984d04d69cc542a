#include "../arithmetic.h"
#include "common.h"
#include "simd.h"

namespace safekern {
namespace {

constexpr int64_t kChunk = 1 << 13;

struct Noise {
  float scale;
  uint64_t stream, seed;
};

template <class Param, class Index>
void perturb(Param* param, const Index* index, int64_t begin, int64_t end, int64_t count, const Noise& noise) {
  using Value = Real<Param>;
  float added[kTile];
  each_tile(param, index, begin, end, count, [&](int64_t tile, int64_t stop) {
    const int64_t size = stop - tile;
    vectorised([&]() SAFEKERN_INLINE_LAMBDA {
      for (int64_t j = 0; j < size; j++) {
        added[j] = normal(noise.seed, noise.stream, static_cast<uint64_t>(index[tile + j])) * noise.scale;
      }
    });
    for (int64_t j = 0; j < size; j++) {
      Param& weight = param[index[tile + j]];
      weight = static_cast<Param>(static_cast<Value>(weight) + static_cast<Value>(added[j]));
    }
  });
}

void perturb_(Tensors params, Tensors indices, std::vector<double> scales, std::vector<int64_t> streams, int64_t seed) {
  check_perturb(params, indices, scales, streams);
  check_indices(indices, params);
  const std::vector<Chunk> chunks = cut(indices, kChunk);
  each_chunk(chunks, [&](int64_t c) {
    const int64_t t = chunks[c].tensor;
    const Noise noise{static_cast<float>(scales[t]), static_cast<uint64_t>(streams[t]), static_cast<uint64_t>(seed)};
    with_types(params[t].scalar_type(), indices[t].scalar_type(), [&](auto* param_type, auto* index_type) {
      using Param = std::remove_pointer_t<decltype(param_type)>;
      using Index = std::remove_pointer_t<decltype(index_type)>;
      perturb(params[t].mutable_data_ptr<Param>(), indices[t].const_data_ptr<Index>(), chunks[c].begin, chunks[c].end,
              indices[t].numel(), noise);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(safekern, CPU, m) { m.impl("perturb_", TORCH_BOX(&perturb_)); }

}  // namespace safekern
