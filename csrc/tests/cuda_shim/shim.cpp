#include "shim.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __x86_64__
// What swapcontext does, but for the two system calls that it makes for the sake of signals.
extern "C" void shim_switch(void** from, void* to);
asm(R"(
  .text
  .local shim_switch
  .type shim_switch, @function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size shim_switch, .-shim_switch
)");
#endif

namespace shim {

bool descending = false;  // the order in which a cluster's fibers, and a grid's clusters, run
int64_t shared_limit = 227 * 1024;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

enum class State { kReady, kBarrier, kClusterBarrier, kWarpOp, kDone };

#ifdef __x86_64__
struct Context {
  void* top;  // of the stack, where the registers lie

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    const uintptr_t end = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
    void** frame = reinterpret_cast<void**>(end) - 8;  // six registers, the entry, and where that would return to
    std::fill(frame, frame + 8, nullptr);
    frame[6] = reinterpret_cast<void*>(entry);
    top = frame;
  }
  void go_to(Context& other) { shim_switch(&top, other.top); }
};
#else
struct Context {
  ucontext_t state;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = bytes;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  void go_to(Context& other) { swapcontext(&state, &other.state); }
};
#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  WarpOp op;
  int turn;  // which of the warp's two sets of values the next operation uses: mates may still read the other
};

struct Warp {
  uint64_t values[2][kWarp];
};

// Threads, warps and shared memory of all blocks of the cluster that runs, block after block.
struct Cluster {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<unsigned char[]>> shared;
  int64_t shared_bytes;
  size_t block_threads;
  Context scheduler;
  size_t current;
  Body body;
  const void* kernel;
  const void* params;

  size_t current_block() const { return current / block_threads; }
} cluster;

void yield(State state, WarpOp op) {
  Fiber& fiber = cluster.fibers[cluster.current];
  fiber.state = state;
  fiber.op = op;
  fiber.context.go_to(cluster.scheduler);
}

void fiber_main() {
  cluster.body(cluster.kernel, cluster.params);
  yield(State::kDone, WarpOp::kNone);
}

bool all_in(size_t first, size_t last, State state, WarpOp op) {
  return std::all_of(cluster.fibers.begin() + first, cluster.fibers.begin() + last,
                     [&](const Fiber& fiber) { return fiber.state == state && fiber.op == op; });
}

void go_on(size_t first, size_t last) {
  for (size_t t = first; t < last; ++t) cluster.fibers[t].state = State::kReady;
}

// Fibers of the block of threads first.. that have all arrived go on; returns whether any did.
bool release(size_t first) {
  const size_t last = first + cluster.block_threads;
  bool released = false;
  if (all_in(first, last, State::kBarrier, WarpOp::kNone)) {
    go_on(first, last);
    released = true;
  }
  for (size_t warp = first; warp < last; warp += kWarp) {
    const WarpOp op = cluster.fibers[warp].op;
    if (op != WarpOp::kNone && all_in(warp, warp + kWarp, State::kWarpOp, op)) {
      go_on(warp, warp + kWarp);
      released = true;
    }
  }
  return released;
}

// Runs a block until all of it waits for the cluster, or is done: as far ahead of the others as it can ever get.
void run_block(unsigned block, unsigned first_block) {
  const size_t threads = cluster.block_threads, first = block * threads;
  blockIdx.x = first_block + block;
  do {
    for (size_t i = 0; i < threads; ++i) {
      const size_t t = descending ? threads - 1 - i : i;
      if (cluster.fibers[first + t].state != State::kReady) continue;
      cluster.current = first + t;
      threadIdx.x = static_cast<unsigned>(t);
      cluster.scheduler.go_to(cluster.fibers[first + t].context);
    }
  } while (release(first));
  if (all_in(first, first + threads, State::kDone, WarpOp::kNone)) cluster.shared[block].reset();
}

void run_cluster(unsigned first_block) {
  const size_t threads = cluster.fibers.size();
  for (Fiber& fiber : cluster.fibers) {
    fiber.state = State::kReady;
    fiber.op = WarpOp::kNone;
    fiber.turn = 0;
    fiber.context.prepare(fiber.stack.get(), kStackBytes, fiber_main);
  }
  const unsigned blocks = static_cast<unsigned>(cluster.shared.size());
  for (bool more = true; more;) {
    for (unsigned i = 0; i < blocks; ++i) run_block(descending ? blocks - 1 - i : i, first_block);
    more = all_in(0, threads, State::kClusterBarrier, WarpOp::kNone);
    if (more) go_on(0, threads);
  }
  if (all_in(0, threads, State::kDone, WarpOp::kNone)) return;
  std::string where = "shim: threads diverge from block " + std::to_string(first_block) + "; by warp:";
  for (size_t t = 0; t < threads; ++t) {
    const char* const kLetters = "rbcwd";
    if (t > 0 && t % kWarp == 0) where += ' ';
    where += kLetters[static_cast<int>(cluster.fibers[t].state)];
  }
  throw std::runtime_error(where);
}

}  // namespace

void* shared_memory() { return cluster.shared[cluster.current_block()].get(); }

void* in_block(void* local, int rank) {
  const auto* base = static_cast<unsigned char*>(shared_memory());
  const int64_t offset = static_cast<unsigned char*>(local) - base;
  if (offset < 0 || offset > cluster.shared_bytes) throw std::runtime_error("shim: not this block's shared memory");
  if (!cluster.shared.at(rank)) throw std::runtime_error("shim: the shared memory of a block that is done");
  return cluster.shared[rank].get() + offset;
}

void sync_threads() { yield(State::kBarrier, WarpOp::kNone); }

void sync_cluster() { yield(State::kClusterBarrier, WarpOp::kNone); }

const uint64_t* exchange(WarpOp op, unsigned lanes, uint64_t value) {
  if (lanes != 0xffffffffu) throw std::runtime_error("shim: warp operations take all lanes");
  Warp& warp = cluster.warps[cluster.current / kWarp];
  uint64_t* values = warp.values[cluster.fibers[cluster.current].turn ^= 1];
  values[cluster.current % kWarp] = value;
  yield(State::kWarpOp, op);
  return values;
}

void run(int64_t blocks, int threads, int64_t shared_bytes, int cluster_blocks, Body body, const void* kernel,
         const void* params) {
  if (shared_bytes > shared_limit) throw std::runtime_error("shim: a launch asks for more shared memory than there is");
  if (threads % kWarp) throw std::runtime_error("shim: a block must be whole warps");
  if (blocks % cluster_blocks) throw std::runtime_error("shim: a grid must be whole clusters");
  cluster.fibers.resize(static_cast<size_t>(cluster_blocks) * threads);
  cluster.warps.resize(cluster.fibers.size() / kWarp);
  cluster.shared.resize(cluster_blocks);
  cluster.shared_bytes = shared_bytes;
  cluster.block_threads = threads;
  cluster.body = body;
  cluster.kernel = kernel;
  cluster.params = params;
  for (int64_t i = 0; i < blocks; i += cluster_blocks) {
    for (auto& shared : cluster.shared) {
      shared.reset(new unsigned char[shared_bytes]);
      memset(shared.get(), 0xff, shared_bytes);  // NaN
    }
    run_cluster(static_cast<unsigned>(descending ? blocks - cluster_blocks - i : i));
  }
}

}  // namespace shim
