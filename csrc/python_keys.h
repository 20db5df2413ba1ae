// Dispatch keys of tokcomp::<op> that need no Python in the common case, registered on request by tokcomp_kernels/ops.
// Where it takes Python all the same, they hand over to tokcomp_python::<op>: under its Autograd key to the gradient's
// autograd.Function and the refusals, under its backends' to what takes what a compiled kernel does not.
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

// A backend's key ("CPU" or "CUDA"): the compiled kernel of `kernels`::<op>; what Python has registered for float64, or
// where the first argument is None. With `half_width` above 0 the kernel takes float16 and bfloat16 alone, of at most
// so many numbers in the last dimension, and Python's all else.
void own_backend(const std::string& name, const std::string& key, const std::string& kernels, int64_t half_width);

}  // namespace tokcomp
