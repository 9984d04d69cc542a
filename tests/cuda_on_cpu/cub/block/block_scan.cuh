#pragma once

#include <cuda_runtime.h>

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_WARP_SCANS };

template <class T, int kThreads, BlockScanAlgorithm kAlgorithm = BLOCK_SCAN_WARP_SCANS>
struct BlockScan {
  struct TempStorage {
    T sums[kThreads];
  };
  TempStorage& storage;

  explicit BlockScan(TempStorage& storage) : storage(storage) {}

  void ExclusiveSum(T value, T& before, T& total) {
    storage.sums[threadIdx.x] = value;
    __syncthreads();
    before = total = 0;
    for (unsigned t = 0; t < kThreads; t++) {
      if (t == threadIdx.x) before = total;
      total += storage.sums[t];
    }
    __syncthreads();
  }

  void ExclusiveSum(T value, T& before) {
    T total;
    ExclusiveSum(value, before, total);
  }

  template <int kItems>
  void ExclusiveSum(const T (&values)[kItems], T (&before)[kItems], T& total) {
    T sum = 0, start;
    for (T value : values) sum += value;
    ExclusiveSum(sum, start, total);
    for (int i = 0; i < kItems; i++) {
      before[i] = start;
      start += values[i];
    }
  }
};

}  // namespace cub
