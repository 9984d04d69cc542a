// torch's parallel_for as the sanitizers see it: threads of the C++ library in place of libgomp's, which is not
// instrumented, so that ThreadSanitizer would know none of its barriers and report every result that it hands over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace on_threads {

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  constexpr int64_t kThreads = 4;
  const int64_t size = std::max(grain, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors(kThreads);
  for (int64_t first = begin; first < end; first += size) {
    threads.emplace_back([&f, first, last = std::min(first + size, end), &error = errors[threads.size()]] {
      try {
        f(first, last);
      } catch (...) {
        error = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace on_threads
