// TOKCOMP_CPU_MODULES, where the build is for dispatch, is what the file names of the levels' modules begin with: they
// lie beside the library that this is part of. Else TOKCOMP_CPU_LEVEL is the level that it was built for.
#include "cpu_level.h"

#include <cstdlib>
#include <stdexcept>
#include <vector>

#ifdef TOKCOMP_CPU_MODULES
#include <cpuid.h>
#include <dlfcn.h>
#endif

namespace tokcomp {
namespace {

struct Level {
  std::string name;
  bool supported;  // by this CPU and its system
};

std::string names(const std::vector<Level>& levels) {
  std::string text;
  for (const Level& level : levels) {
    if (level.supported) text += (text.empty() ? "" : ", ") + level.name;
  }
  return text;
}

#ifdef TOKCOMP_CPU_MODULES

bool has_f16c() {  // which __builtin_cpu_supports does not know in every compiler
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

// From the least to the best; the flags are those of cmake/CpuArch.cmake.
std::vector<Level> known_levels() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bfloat16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return {{"default", true}, {"avx2", avx2}, {"avx512", avx512}, {"avx512_bf16", bfloat16}};
}

// Never closed: the dispatcher holds its functions. RTLD_LOCAL keeps its symbols from everything loaded later.
void load_module(const std::string& level) {
  Dl_info self;
  if (!dladdr(reinterpret_cast<const void*>(&load_module), &self) || !self.dli_fname) {
    throw std::runtime_error("tokcomp: the folder of this library is unknown");
  }
  const std::string path(self.dli_fname);
  const std::string folder = path.find('/') == std::string::npos ? "" : path.substr(0, path.rfind('/') + 1);
  if (!dlopen((folder + TOKCOMP_CPU_MODULES + level + ".so").c_str(), RTLD_NOW | RTLD_LOCAL)) {
    throw std::runtime_error(std::string("tokcomp: ") + dlerror());
  }
}

#else

std::vector<Level> known_levels() { return {{TOKCOMP_CPU_LEVEL, true}}; }

void load_module(const std::string&) {}

#endif

std::string choose(const std::vector<Level>& levels) {
  const char* variable = std::getenv("TOKCOMP_CPU_CAPABILITY");
  const std::string wanted = variable ? variable : "";
  std::string best;
  for (const Level& level : levels) {
    if (level.supported && (wanted.empty() || level.name == wanted)) best = level.name;
  }
  if (!best.empty()) return best;
  const std::string got = "TOKCOMP_CPU_CAPABILITY=" + wanted;
  for (const Level& level : levels) {
    if (level.name == wanted) {
      throw std::invalid_argument(got + " needs instructions that this CPU lacks: unset it, or choose of " +
                                  names(levels));
    }
  }
  if (levels.size() == 1) {
    throw std::invalid_argument(got + ", but the kernels were built for " + levels[0].name +
                                " alone: unset it, or build with TOKCOMP_CPU_ARCH=dispatch");
  }
  throw std::invalid_argument("TOKCOMP_CPU_CAPABILITY must be one of " + names(levels) + " on this CPU, got '" +
                              wanted + "'");
}

}  // namespace

std::string load_cpu_kernels() {
  const std::string level = choose(known_levels());
  load_module(level);
  return level;
}

}  // namespace tokcomp
