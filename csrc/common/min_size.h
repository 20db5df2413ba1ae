// The least size of a token, for every kernel in C++ and CUDA: no header of torch, for CUDA's kernels compile without.
#pragma once

namespace tokcomp {

constexpr double kMinSize = 1e-6;  // as tokcomp_kernels/_numbers.py says it: a test compares them

}  // namespace tokcomp
