// What the CPU kernels share: dtype dispatch, argument checks, and the cutting of tensor lists into chunks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <vector>

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

template <class F>
void with_index_type(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Int) return f(static_cast<int32_t*>(nullptr));
  STD_TORCH_CHECK(dtype == ScalarType::Long, "safekern: indices must be int32 or int64, got ",
                  torch::headeronly::toString(dtype));
  f(static_cast<int64_t*>(nullptr));
}

inline void check_contiguous(const Tensor& tensor, const char* what) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "safekern: ", what, " must be contiguous");
}

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "safekern: ", what, " must be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_count(const Tensors& tensors, size_t count, const char* what) {
  STD_TORCH_CHECK(tensors.size() == count, "safekern: expected ", count, " ", what, ", got ", tensors.size());
}

inline void check_numel(const Tensor& tensor, int64_t numel, const char* what) {
  STD_TORCH_CHECK(tensor.numel() == numel, "safekern: ", what, " must have ", numel, " elements, got ", tensor.numel());
}

// Scattered elements are loaded and stored a tile at a time around plain arrays, so that what lies between vectorises.
constexpr int64_t kTile = 64;

// Asks for the elements some tiles after the one at `begin`. In a loop of its own, and into the second-level cache:
// requests to the first one would wait for its few miss buffers, at a quarter of the speed.
template <class T, class Index>
void prefetch_tile(const T* base, const Index* index, int64_t begin, int64_t count) {
#if defined(__GNUC__) || defined(__clang__)
  const Index* ahead = index + begin + 4 * kTile;
  if (begin + 5 * kTile > count) return;
  for (int64_t j = 0; j < kTile; j++) __builtin_prefetch(base + ahead[j], 0, 2);
#endif
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

// Runs f(i) for i in [0, count) on torch's own threads.
template <class F>
void parallel_each(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(i);
  });
}

// The same for chunks, where f says whether it met a value that is not finite: flags[tensor] is set if so. The flags
// are gathered per chunk because several threads may work on one tensor.
template <class F>
void parallel_flagged(const std::vector<Chunk>& chunks, const Tensor& nonfinite, const F& f) {
  std::vector<uint8_t> found(chunks.size());
  parallel_each(static_cast<int64_t>(chunks.size()), [&](int64_t c) { found[c] = f(chunks[c]); });
  bool* flags = nonfinite.mutable_data_ptr<bool>();
  for (size_t c = 0; c < chunks.size(); c++) flags[chunks[c].tensor] |= found[c] != 0;
}

inline void check_flags(const Tensor& nonfinite, size_t count) {
  check_contiguous(nonfinite, "nonfinite");
  check_dtype(nonfinite, ScalarType::Bool, "nonfinite");
  check_numel(nonfinite, static_cast<int64_t>(count), "nonfinite");
}

// Indices come from masks, which are checked when they are made; a wrong one here would write outside its tensor.
inline void check_indices(const Tensors& indices, const Tensors& tensors) {
  for (size_t t = 0; t < tensors.size(); t++) {
    check_contiguous(indices[t], "indices");
    with_index_type(indices[t].scalar_type(), [](auto*) {});
  }
  const std::vector<Chunk> chunks = cut(indices, 1 << 16);
  std::vector<uint8_t> inside(chunks.size());
  parallel_each(static_cast<int64_t>(chunks.size()), [&](int64_t c) {
    const auto [t, begin, end] = chunks[c];
    with_index_type(indices[t].scalar_type(), [&, t = t, begin = begin, end = end](auto* type) {
      using Index = std::remove_pointer_t<decltype(type)>;
      const Index* index = indices[t].const_data_ptr<Index>();
      Index low = 0, high = -1;
      for (int64_t j = begin; j < end; j++) {
        low = std::min(low, index[j]);
        high = std::max(high, index[j]);
      }
      inside[c] = low >= 0 && high < tensors[t].numel();
    });
  });
  for (size_t c = 0; c < chunks.size(); c++) {
    STD_TORCH_CHECK(inside[c], "safekern: an index is outside the tensor's ", tensors[chunks[c].tensor].numel(),
                    " elements");
  }
}

}  // namespace safekern
