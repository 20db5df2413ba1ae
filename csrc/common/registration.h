// Who a compiled kernel is registered for. A kernel's file ends in one line of these per operator.
//
// Every kernel answers under its backend's own namespace (tokcomp_cpu, tokcomp_cuda), so tests and benchmarks reach it
// whoever owns the operator. On CPU it owns tokcomp::<op> as well. On CUDA the Python side decides which backend owns
// the key; a library without Python (TOKCOMP_OWN_CUDA_KEY) has only the compiled kernels, which then own it.
#pragma once

#include <torch/library.h>

#define TOKCOMP_REGISTER_CPU(op, function)                       \
  TORCH_LIBRARY_IMPL(tokcomp, CPU, m) { m.impl(#op, function); } \
  TORCH_LIBRARY_IMPL(tokcomp_cpu, CPU, m) { m.impl(#op, function); }

// A kernel that does not take all that its operator takes never owns it without Python, which knows who takes the rest.
#define TOKCOMP_OFFER_CUDA(op, function) \
  TORCH_LIBRARY_IMPL(tokcomp_cuda, CUDA, m) { m.impl(#op, function); }

#ifdef TOKCOMP_OWN_CUDA_KEY
#define TOKCOMP_REGISTER_CUDA(op, function)                       \
  TORCH_LIBRARY_IMPL(tokcomp, CUDA, m) { m.impl(#op, function); } \
  TORCH_LIBRARY_IMPL(tokcomp_cuda, CUDA, m) { m.impl(#op, function); }
#else
#define TOKCOMP_REGISTER_CUDA(op, function) \
  TORCH_LIBRARY_IMPL(tokcomp_cuda, CUDA, m) { m.impl(#op, function); }
#endif
