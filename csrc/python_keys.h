// Dispatch keys of tokcomp::<op> that need no Python in the common case, registered on request by tokcomp_kernels/ops.
// Where it takes Python all the same, they hand over to tokcomp_python::<op>: under its Autograd key to the gradient's
// autograd.Function and the refusals, under its backends' to the reference.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tokcomp {

// Autograd: straight to the kernel below, unless an argument at one of `watched` wants a gradient or has a tangent, or
// any argument is nested.
void own_autograd(const std::string& name, std::vector<int64_t> watched);

// Autocast of a device ("cpu" or "cuda"): its floating tensors at `positions`, float64 excepted, in autocast's dtype,
// or in float32.
void own_autocast(const std::string& name, const std::string& device, std::vector<int64_t> positions, bool to_float32);

// A backend's key ("CPU" or "CUDA"): the compiled kernel of `kernels`::<op>; the reference for float64, or where the
// first argument is None.
void own_backend(const std::string& name, const std::string& key, const std::string& kernels);

}  // namespace tokcomp
