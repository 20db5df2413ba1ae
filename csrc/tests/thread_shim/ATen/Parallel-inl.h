// Found in place of PyTorch's own header where the kernels are compiled for ThreadSanitizer: at::parallel_for on
// threads that it sees begin and end. It does not see the barriers of an OpenMP library that was compiled without it.
#pragma once

#include <c10/util/ParallelGuard.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace at {

// Four threads whatever torch's own number, which is 1 so that torch starts none.
template <class F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  if (begin >= end) return;
  const int64_t tasks = c10::ParallelGuard::is_enabled() ? 1 : divup(end - begin, std::max<int64_t>(grain_size, 1));
  const int64_t threads = std::min<int64_t>(4, tasks), chunk = divup(end - begin, threads);
  std::vector<std::exception_ptr> errors(threads);
  const auto run = [&](int64_t thread) {
    try {
      const int64_t first = begin + thread * chunk;
      const internal::ThreadIdGuard id(static_cast<int>(thread));
      const c10::ParallelGuard guard(true);
      if (first < end) f(first, std::min(end, first + chunk));
    } catch (...) {
      errors[thread] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

template <class scalar_t, class F, class SF>
inline scalar_t parallel_reduce(int64_t begin, int64_t end, int64_t, scalar_t ident, const F& f, const SF&) {
  return begin >= end ? ident : f(begin, end, ident);
}

}  // namespace at
