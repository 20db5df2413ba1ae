// A program without Python gets its CPU kernels as libtokcomp is loaded. A level that is not to be had ends the
// program, with the reason: nothing could catch it.
#include "../cpu_level.h"

namespace {

const std::string level = tokcomp::load_cpu_kernels();

}  // namespace
