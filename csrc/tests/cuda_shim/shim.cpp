#include "shim.h"

#include "moment.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
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

// The order in which a cluster's fibers, and a grid's clusters, run: 0 ascending, 1 descending, above 1 the seed of
// random orders, in which a cluster's blocks also take turns from barrier to barrier.
int64_t schedule = 0;
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
  int arrived, waited;                      // halves of the cluster's barriers
  int block_barriers, warp_barriers;        // passed
  int remote;                               // arrivals before its last use of another block's shared memory, or -1
  std::deque<std::vector<Copy>> copies{1};  // groups that are committed, and the one that is not
  int under_way;                            // of them
};

struct Warp {
  uint64_t values[2][kWarp];
  Fragments fragments[2][kWarp];
};

// Threads, warps and shared memory of all blocks of the cluster that runs, block after block.
struct Cluster {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<unsigned char[]>> shared;
  int64_t shared_bytes;
  size_t block_threads;
  std::vector<unsigned> turns;  // of a block's threads
  std::vector<bool> releases;   // of each arrival at the cluster's barrier
  Context scheduler;
  size_t current;
  int64_t launches = 0, clusters = 0;  // up to the one that runs
  bool running = false;                // a fiber, not the scheduler
  std::string error;                   // of a fiber, which is never taken up again
  std::mt19937 random;
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
  const Fiber& fiber = cluster.fibers[cluster.current];
  if (fiber.arrived != fiber.waited) fail("a thread ends between the halves of a cluster's barrier");
  if (fiber.under_way > 0) fail("a thread ends with copies under way");
  if (fiber.remote == fiber.arrived) fail("another block's shared memory after the cluster's last barrier");
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

// `count` numbers in the order of the schedule.
std::vector<unsigned> turns(size_t count) {
  std::vector<unsigned> all(count);
  std::iota(all.begin(), all.end(), 0u);
  if (schedule == 1) std::reverse(all.begin(), all.end());
  return all;
}

// Runs a block's threads to the next barrier or warp operation; returns whether any of them can go on from there.
bool run_block(unsigned block, unsigned first_block) {
  const size_t threads = cluster.block_threads, first = block * threads;
  blockIdx.x = first_block + block;
  if (schedule > 1) std::shuffle(cluster.turns.begin(), cluster.turns.end(), cluster.random);
  for (const unsigned t : cluster.turns) {
    if (cluster.fibers[first + t].state != State::kReady) continue;
    cluster.current = first + t;
    threadIdx.x = t;
    cluster.running = true;
    cluster.scheduler.go_to(cluster.fibers[first + t].context);
    cluster.running = false;
    if (!cluster.error.empty()) {
      cluster.fibers.clear();  // with their stacks, which are left in the middle of something
      throw std::runtime_error("shim: " + std::exchange(cluster.error, {}) + ", in block " +
                               std::to_string(blockIdx.x) + ", thread " + std::to_string(t));
    }
  }
  const bool more = release(first);
  if (all_in(first, first + threads, State::kDone, WarpOp::kNone)) cluster.shared[block].reset();
  return more;
}

void run_cluster(unsigned first_block) {
  const size_t threads = cluster.fibers.size();
  cluster.releases.clear();
  for (Fiber& fiber : cluster.fibers) {
    fiber.state = State::kReady;
    fiber.op = WarpOp::kNone;
    fiber.turn = fiber.arrived = fiber.waited = fiber.block_barriers = fiber.warp_barriers = 0;
    fiber.remote = -1;
    fiber.copies.assign(1, {});
    fiber.under_way = 0;
    fiber.context.prepare(fiber.stack.get(), kStackBytes, fiber_main);
  }
  for (bool more = true; more;) {
    // Each until all of it waits for the cluster, or is done: in order, as far ahead of the others as it can ever get.
    std::vector<unsigned> going = turns(cluster.shared.size());
    while (!going.empty()) {
      const size_t next = schedule > 1 ? cluster.random() % going.size() : 0;
      if (!run_block(going[next], first_block)) going.erase(going.begin() + next);
    }
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
  if (offset < 0 || offset > cluster.shared_bytes) fail("not this block's shared memory");
  if (!cluster.shared.at(rank)) fail("the shared memory of a block that is done");
  if (static_cast<size_t>(rank) != cluster.current_block()) {
    Fiber& fiber = cluster.fibers[cluster.current];
    if (fiber.waited == 0) fail("another block's shared memory before the cluster's first barrier");
    fiber.remote = fiber.arrived;
  }
  return cluster.shared[rank].get() + offset;
}

void sync_threads() {
  yield(State::kBarrier, WarpOp::kNone);
  ++cluster.fibers[cluster.current].block_barriers;
}

void arrive(bool releases) {
  Fiber& fiber = cluster.fibers[cluster.current];
  if (fiber.arrived != fiber.waited) fail("a second arrival at a cluster's barrier before the wait");
  if (cluster.releases.size() == static_cast<size_t>(fiber.arrived)) cluster.releases.push_back(releases);
  ++fiber.arrived;
}

// Nothing that a kernel does between the halves of a barrier waits for another block, so all of it can wait.
void wait() {
  if (cluster.fibers[cluster.current].arrived == cluster.fibers[cluster.current].waited) {
    fail("a wait at a cluster's barrier without an arrival");
  }
  yield(State::kClusterBarrier, WarpOp::kNone);
  ++cluster.fibers[cluster.current].waited;
}

const uint64_t* exchange(WarpOp op, unsigned lanes, uint64_t value) {
  if (lanes != 0xffffffffu) fail("warp operations take all lanes");
  Warp& warp = cluster.warps[cluster.current / kWarp];
  uint64_t* values = warp.values[cluster.fibers[cluster.current].turn ^= 1];
  values[cluster.current % kWarp] = value;
  yield(State::kWarpOp, op);
  if (op == WarpOp::kSync) ++cluster.fibers[cluster.current].warp_barriers;
  return values;
}

const Fragments* exchange(const Fragments& own) {
  Fragments* all = cluster.warps[cluster.current / kWarp].fragments[cluster.fibers[cluster.current].turn ^= 1];
  all[cluster.current % kWarp] = own;
  yield(State::kWarpOp, WarpOp::kMultiplyAdd);
  return all;
}

void ask_for_copy(const Copy& copy) {
  if ((reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from)) % 16) {
    fail("a copy of 16 bytes that are not aligned");
  }
  Fiber& fiber = cluster.fibers[cluster.current];
  fiber.copies.back().push_back(copy);
  ++fiber.under_way;
}

void commit_copies() { cluster.fibers[cluster.current].copies.emplace_back(); }

bool take_copy(int pending, Copy& copy) {
  Fiber& fiber = cluster.fibers[cluster.current];
  auto& groups = fiber.copies;
  while (groups.size() > static_cast<size_t>(pending) + 1 && groups.front().empty()) groups.pop_front();
  if (groups.size() <= static_cast<size_t>(pending) + 1) return false;
  copy = groups.front().back();
  groups.front().pop_back();
  --fiber.under_way;
  return true;
}

bool running() { return cluster.running; }

Moment now() {
  const Fiber& fiber = cluster.fibers[cluster.current];
  return {cluster.launches, cluster.clusters, cluster.current,      cluster.current_block(), cluster.current / kWarp,
          fiber.arrived,    fiber.waited,     fiber.block_barriers, fiber.warp_barriers};
}

bool released(int arrivals, int waits) {
  return std::find(cluster.releases.begin() + std::min(arrivals, waits), cluster.releases.begin() + waits, true) !=
         cluster.releases.begin() + waits;
}

Place place_of(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  const auto* stack = reinterpret_cast<const unsigned char*>(cluster.fibers[cluster.current].stack.get());
  if (at >= stack && at < stack + kStackBytes) return Place::kStack;
  for (const auto& shared : cluster.shared) {
    if (shared && at >= shared.get() && at < shared.get() + cluster.shared_bytes) return Place::kShared;
  }
  return Place::kGlobal;
}

void fail(const char* message) {
  cluster.error = message;
  yield(State::kDone, WarpOp::kNone);
  std::abort();  // not reached
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
  cluster.turns = turns(threads);
  cluster.random.seed(static_cast<unsigned>(schedule));
  ++cluster.launches;
  for (int64_t i = 0; i < blocks; i += cluster_blocks) {
    for (auto& shared : cluster.shared) {
      shared.reset(new unsigned char[shared_bytes]);
      memset(shared.get(), 0xff, shared_bytes);  // NaN
    }
    ++cluster.clusters;
    run_cluster(static_cast<unsigned>(schedule == 1 ? blocks - cluster_blocks - i : i));
  }
}

}  // namespace shim
