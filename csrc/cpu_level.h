// Which instruction set the CPU kernels run with: one of default, avx2, avx512, avx512_bf16.
#pragma once

#include <string>

namespace tokcomp {

// Loads the kernels compiled for the best level that this CPU has, or for the one that TOKCOMP_CPU_CAPABILITY names,
// and returns its name. A library built for one level holds its kernels itself, and the variable can name no other.
// Throws std::invalid_argument for a level that is unknown or not to be had, std::runtime_error where a module is
// missing.
std::string load_cpu_kernels();

}  // namespace tokcomp
