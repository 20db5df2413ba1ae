// Finds races between a kernel's threads: two accesses to the same bytes, one of them a write, that no barrier puts in
// an order. g++ -fsanitize=thread has the kernels call the functions below at every access; its own runtime, which
// knows threads of the system alone, is not linked.
//
// A barrier is passed by all threads of its cluster, block or warp, so counts of those passed say what comes before
// what: no vector clocks. Shuffles and ballots exchange registers and order nothing. Launches follow one another;
// clusters of one launch never do.
#include <dlfcn.h>

#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "moment.h"

namespace {

using shim::Moment;

constexpr size_t kGrain = 2;    // bytes of the smallest element
constexpr size_t kReaders = 8;  // kept of an element's: with what one of them meets, a race of many is found

struct Access {
  Moment moment;
  void* pc;
};

struct Element {
  bool written = false;
  Access write;
  std::vector<Access> reads;  // since then, none before another
};

std::unordered_map<uintptr_t, Element> elements;  // of the launch at hand, by address / kGrain
int64_t launch_at_hand = 0;

// Whether `a`, the earlier one in this run, comes before `b` in every run.
bool ordered(const Moment& a, const Moment& b) {
  if (a.cluster != b.cluster) return false;
  if (a.thread == b.thread || shim::released(a.arrived, b.waited)) return true;
  if (a.block == b.block && a.block_barriers < b.block_barriers) return true;
  return a.warp == b.warp && a.warp_barriers < b.warp_barriers;
}

void describe(std::ostream& out, const char* kind, const Access& access) {
  Dl_info library{};
  dladdr(access.pc, &library);
  const uintptr_t base = reinterpret_cast<uintptr_t>(library.dli_fbase);
  // A return address is after the access: what precedes it is still the access's own line.
  out << kind << " at 0x" << std::hex << reinterpret_cast<uintptr_t>(access.pc) - base - 1 << std::dec << " by thread "
      << access.moment.thread << " of the cluster";
}

[[noreturn]] void report(shim::Place place, const char* first, const Access& a, const char* second, const Access& b) {
  std::ostringstream message;  // never destroyed: this stack is given up
  message << "race in " << (place == shim::Place::kShared ? "shared" : "global") << " memory: ";
  describe(message, first, a);
  describe(message, second, b);
  static std::string text;
  text = message.str();
  shim::fail(text.c_str());
}

void touch(const volatile void* address, size_t bytes, bool writes, void* pc) {
  if (!shim::running()) return;
  const shim::Place place = shim::place_of(const_cast<const void*>(address));
  if (place == shim::Place::kStack) return;
  const Access access{shim::now(), pc};
  if (access.moment.launch != launch_at_hand) {
    elements.clear();
    launch_at_hand = access.moment.launch;
  }
  const uintptr_t first = reinterpret_cast<uintptr_t>(address) / kGrain;
  for (uintptr_t at = first; at * kGrain < reinterpret_cast<uintptr_t>(address) + bytes; ++at) {
    Element& element = elements[at];
    // Shared memory of another cluster that lay at the same address.
    if (place == shim::Place::kShared && element.written && element.write.moment.cluster != access.moment.cluster) {
      element.written = false;
    }
    if (place == shim::Place::kShared && !element.reads.empty() &&
        element.reads.front().moment.cluster != access.moment.cluster) {
      element.reads.clear();
    }
    if (element.written && !ordered(element.write.moment, access.moment)) {
      report(place, "write", element.write, writes ? ", write" : ", read", access);
    }
    if (writes) {
      for (const Access& read : element.reads) {
        if (!ordered(read.moment, access.moment)) report(place, "read", read, ", write", access);
      }
      element.reads.clear();
      element.written = true;
      element.write = access;
    } else {
      std::erase_if(element.reads, [&](const Access& read) { return ordered(read.moment, access.moment); });
      if (element.reads.size() < kReaders) element.reads.push_back(access);
    }
  }
}

}  // namespace

#define HOOKS(bytes)                                                                                    \
  void __tsan_read##bytes(void* at) { touch(at, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* at) { touch(at, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* at) { touch(at, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { touch(at, bytes, true, __builtin_return_address(0)); } \
  void __tsan_volatile_read##bytes(void* at) { touch(at, bytes, false, __builtin_return_address(0)); }  \
  void __tsan_volatile_write##bytes(void* at) { touch(at, bytes, true, __builtin_return_address(0)); }

// Torch's reference counts, in the code around the kernels; a kernel has no atomics.
#define ATOMICS(bits, T)                                                                                            \
  T __tsan_atomic##bits##_load(const volatile T* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }         \
  void __tsan_atomic##bits##_store(volatile T* at, T value, int) { __atomic_store_n(at, value, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_exchange(volatile T* at, T value, int) {                                                  \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                                 \
  T __tsan_atomic##bits##_fetch_add(volatile T* at, T value, int) {                                                 \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                                 \
  T __tsan_atomic##bits##_fetch_sub(volatile T* at, T value, int) {                                                 \
    return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                                 \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* at, T* expected, T value, int, int) {               \
    return __atomic_compare_exchange_n(at, expected, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
  }                                                                                                                 \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* at, T* expected, T value, int, int) {                 \
    return __atomic_compare_exchange_n(at, expected, value, 1, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* at, size_t bytes) { touch(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t bytes) { touch(at, bytes, true, __builtin_return_address(0)); }
void __tsan_atomic_thread_fence(int) {}
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
ATOMICS(8, uint8_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
}
