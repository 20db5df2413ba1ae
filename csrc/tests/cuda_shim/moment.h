// What the race detector asks of the shim: who runs, after which barriers, and what kind of memory an address is in.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shim {

struct Moment {
  int64_t launch, cluster;
  size_t thread, block, warp;         // within the cluster
  int arrived, waited;                // halves of the cluster's barriers
  int block_barriers, warp_barriers;  // passed
};

enum class Place { kStack, kShared, kGlobal };

bool running();  // a kernel's thread, not what launches it
Moment now();    // of the thread that runs
// Whether one of the cluster's barriers after `arrivals` arrivals, and among the first `waits`, hands memory on.
bool released(int arrivals, int waits);
Place place_of(const void* address);
// Ends the launch with an exception.
[[noreturn]] void fail(const char* message);

}  // namespace shim
