// What each sanitizer must report, so that a run under one shows that it looks. Compiled with TOKCOMP_SANITIZE alone.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace {

void write_outside(at::Tensor x) { x.mutable_data_ptr<int64_t>()[x.numel()] = 1; }

int64_t read_outside(at::Tensor x) { return x.const_data_ptr<int64_t>()[x.numel()]; }

int64_t overflow(int64_t x) { return x * x; }

// Threads that add to the same number.
void race(at::Tensor x) {
  int64_t* number = x.mutable_data_ptr<int64_t>();
  at::parallel_for(0, 64, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) *number += i;
  });
}

}  // namespace

TORCH_LIBRARY(tokcomp_probe, m) {
  m.def("write_outside(Tensor x) -> ()", &write_outside);
  m.def("read_outside(Tensor x) -> int", &read_outside);
  m.def("overflow(int x) -> int", &overflow);
  m.def("race(Tensor x) -> ()", &race);
}
