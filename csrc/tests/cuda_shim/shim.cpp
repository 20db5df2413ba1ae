#include "shim.h"

#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace shim {

bool descending = false;  // the order in which a block's fibers, and a grid's blocks, run

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int64_t kSharedLimit = 48 * 1024;

enum class State { kReady, kBarrier, kWarpOp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  WarpOp op;
  int turn;  // which of the warp's two sets of values the next operation uses: mates may still read the other
};

struct Warp {
  uint64_t values[2][kWarp];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  ucontext_t scheduler;
  unsigned current;
  Body body;
  const void* kernel;
  const void* params;
} block;

void yield(State state, WarpOp op) {
  Fiber& fiber = block.fibers[block.current];
  fiber.state = state;
  fiber.op = op;
  swapcontext(&fiber.context, &block.scheduler);
}

void fiber_main() {
  block.body(block.kernel, block.params);
  yield(State::kDone, WarpOp::kNone);
}

bool all_in(size_t first, size_t last, State state, WarpOp op) {
  return std::all_of(block.fibers.begin() + first, block.fibers.begin() + last,
                     [&](const Fiber& fiber) { return fiber.state == state && fiber.op == op; });
}

// Fibers that have all arrived go on; returns whether any did.
bool release() {
  const size_t threads = block.fibers.size();
  bool released = false;
  const auto go_on = [&](size_t first, size_t last) {
    for (size_t t = first; t < last; ++t) block.fibers[t].state = State::kReady;
    released = true;
  };
  if (all_in(0, threads, State::kBarrier, WarpOp::kNone)) go_on(0, threads);
  for (size_t first = 0; first < threads; first += kWarp) {
    const WarpOp op = block.fibers[first].op;
    if (op != WarpOp::kNone && all_in(first, first + kWarp, State::kWarpOp, op)) go_on(first, first + kWarp);
  }
  return released;
}

void run_block() {
  const unsigned threads = static_cast<unsigned>(block.fibers.size());
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.state = State::kReady;
    fiber.op = WarpOp::kNone;
    fiber.turn = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  do {
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = descending ? threads - 1 - i : i;
      if (block.fibers[t].state != State::kReady) continue;
      block.current = t;
      threadIdx.x = t;
      swapcontext(&block.scheduler, &block.fibers[t].context);
    }
  } while (release());
  if (all_in(0, threads, State::kDone, WarpOp::kNone)) return;
  std::string where = "shim: the threads of block " + std::to_string(blockIdx.x) + " diverge; by warp:";
  for (const Fiber& fiber : block.fibers) {
    if (&fiber != &block.fibers[0] && (&fiber - &block.fibers[0]) % kWarp == 0) where += ' ';
    where += fiber.state == State::kBarrier ? 'b' : fiber.state == State::kDone ? 'd' : 'w';
  }
  throw std::runtime_error(where);
}

}  // namespace

void* shared_memory() { return block.shared.get(); }

void sync_threads() { yield(State::kBarrier, WarpOp::kNone); }

const uint64_t* exchange(WarpOp op, unsigned lanes, uint64_t value) {
  if (lanes != 0xffffffffu) throw std::runtime_error("shim: warp operations take all lanes");
  Warp& warp = block.warps[block.current / kWarp];
  uint64_t* values = warp.values[block.fibers[block.current].turn ^= 1];
  values[block.current % kWarp] = value;
  yield(State::kWarpOp, op);
  return values;
}

void run(int64_t blocks, int threads, int64_t shared_bytes, Body body, const void* kernel, const void* params) {
  if (shared_bytes > kSharedLimit) throw std::runtime_error("shim: a launch asks for more than 48 KB of shared memory");
  if (threads % kWarp) throw std::runtime_error("shim: a block must be whole warps");
  block.fibers.resize(threads);
  block.warps.resize(threads / kWarp);
  block.body = body;
  block.kernel = kernel;
  block.params = params;
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(descending ? blocks - 1 - i : i);
    block.shared.reset(new unsigned char[shared_bytes]);
    memset(block.shared.get(), 0xff, shared_bytes);  // NaN
    run_block();
  }
}

}  // namespace shim
