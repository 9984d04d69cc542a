// What the CPU kernels share: prefetching, and the cutting of tensor lists into chunks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "simd.h"

namespace safekern {

// Scattered elements are loaded and stored a tile at a time around plain arrays, so that what lies between vectorises.
constexpr int64_t kTile = 64;

// Into the second-level cache: requests to the first one would wait for its few miss buffers, at a quarter of the
// speed.
inline void prefetch(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address, 0, 2);
#endif
}

// How far ahead elements are asked for; in a loop of its own, a tile at a time.
constexpr int64_t kAhead = 4 * kTile;

template <class T, class Index>
void prefetch_elements(const T* base, const Index* index, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; j++) prefetch(base + index[j]);
}

// Calls f(tile, end of the tile) for the tiles of [begin, end), with the elements at the tensor's `count` indices asked
// for ahead.
template <class T, class Index, class F>
void each_tile(const T* base, const Index* index, int64_t begin, int64_t end, int64_t count, const F& f) {
  prefetch_elements(base, index, begin, std::min(begin + kAhead, count));
  for (int64_t tile = begin; tile < end; tile += kTile) {
    prefetch_elements(base, index, std::min(tile + kAhead, count), std::min(tile + kAhead + kTile, count));
    f(tile, std::min(tile + kTile, end));
  }
}

// A run of consecutive elements of one tensor of a list. Chunks have a fixed size, so that what is computed per chunk
// does not depend on the number of threads.
struct Chunk {
  int64_t tensor, begin, end;
};

inline std::vector<Chunk> cut(const Tensors& tensors, int64_t chunk_size) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tensors.size(); t++) {
    const int64_t numel = tensors[t].numel();
    for (int64_t begin = 0; begin < numel; begin += chunk_size) {
      chunks.push_back({static_cast<int64_t>(t), begin, std::min(begin + chunk_size, numel)});
    }
  }
  return chunks;
}

// Runs f(begin, end) for ranges that make up [0, count) on torch's own threads; on this one alone if there are no more
// than `grain`. What f throws arrives here: torch's stable interface would say only that something was thrown.
template <class F>
void parallel_ranges(int64_t count, int64_t grain, const F& f) {
  std::exception_ptr thrown;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const KeptDenormals kept;
    try {
      f(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!thrown) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

// Runs f(i) for i in [0, count).
template <class F>
void parallel_each(int64_t count, const F& f, int64_t grain = 1) {
  parallel_ranges(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

// Runs f(c) for every chunk c: on this thread alone if there are fewer elements in all than `alone`, which are done
// before another thread has woken up.
template <class F>
void each_chunk(const std::vector<Chunk>& chunks, const F& f, int64_t alone = 1 << 13) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  int64_t numel = 0;
  for (const Chunk& chunk : chunks) numel += chunk.end - chunk.begin;
  parallel_each(count, f, numel < alone ? count : 1);
}

// The same for chunks, where f says whether it met a value that is not finite: flags[tensor] is set if so. The flags
// are gathered per chunk because several threads may work on one tensor.
template <class F>
void parallel_flagged(const std::vector<Chunk>& chunks, const Tensor& nonfinite, const F& f) {
  std::vector<uint8_t> found(chunks.size());
  each_chunk(chunks, [&](int64_t c) { found[c] = f(chunks[c]); });
  bool* flags = nonfinite.mutable_data_ptr<bool>();
  for (size_t c = 0; c < chunks.size(); c++) flags[chunks[c].tensor] |= found[c] != 0;
}

// Indices come from masks, which are checked when they are made; a wrong one here would write outside its tensor.
inline void check_indices(const Tensors& indices, const Tensors& tensors) {
  const std::vector<Chunk> chunks = cut(indices, 1 << 16);
  std::vector<uint8_t> inside(chunks.size());
  const auto check = [&](int64_t c) {
    const auto [t, begin, end] = chunks[c];
    with_index_type(indices[t].scalar_type(), [&, t = t, begin = begin, end = end](auto* type) {
      using Index = std::remove_pointer_t<decltype(type)>;
      const Index* index = indices[t].const_data_ptr<Index>();
      const Index last =
          static_cast<Index>(std::min<int64_t>(tensors[t].numel() - 1, std::numeric_limits<Index>::max()));
      // The sign bit of either term is set where an index is outside: three instructions of any vector unit, where
      // minima and maxima of 32-bit integers need SSE4.1. Without a sign the difference may wrap.
      using Unsigned = std::make_unsigned_t<Index>;
      Unsigned outside = 0;
      for (int64_t j = begin; j < end; j++) {
        outside |= static_cast<Unsigned>(index[j]) | (static_cast<Unsigned>(last) - static_cast<Unsigned>(index[j]));
      }
      inside[c] = static_cast<Index>(outside) >= 0;
    });
  };
  each_chunk(chunks, check, 1 << 17);
  for (size_t c = 0; c < chunks.size(); c++) {
    STD_TORCH_CHECK(inside[c], "safekern: an index is outside the tensor's ", tensors[chunks[c].tensor].numel(),
                    " elements");
  }
}

}  // namespace safekern
