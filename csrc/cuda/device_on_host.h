// device.cuh in plain C++: a block's threads are fibers that run until a barrier stops them, so that a host runs the
// kernels line by line, under sanitizers and guard pages (tests/native/cuda_test.cpp). For tests; slow, and no model of
// speed.
//
// Stricter than a GPU where that finds errors: shared memory starts as NaN, an asynchronous copy first makes its
// destination NaN and arrives only when it is waited for, waiting for a copy that nobody started is an error, fibers
// take turns in a given order, and a barrier that not all reach is reported.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "../common/dtypes.h"

#define VCPO_KERNEL(threads, blocks) inline void
#define VCPO_DEVICE inline

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

namespace vcpo {
namespace device {

constexpr bool kHasBulk = true;
[[noreturn]] inline void fail(const char* what) {
  std::printf("FAILED on the host's device: %s\n", what);
  std::abort();
}
inline void unsupported() { fail("kernel for another architecture"); }

struct Vector {
  std::uint32_t x, y, z, w;
};
struct Barrier {  // 8 bytes, as the device's
  std::uint32_t initialised, phase;
};
constexpr std::uint32_t kInitialised = 0xBA221E2u;

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
  const Barrier* barrier;
  void arrive() const { std::memcpy(to, from, bytes); }
};

constexpr char kPoison = static_cast<char>(0xFF);  // NaN in every dtype

struct Meeting {  // of the fibers of a warp, block or cluster
  int members, arrived = 0;
  std::uint64_t generation = 0;
};

struct Block {
  std::int64_t index;
  int rank;
  std::vector<char> memory;
  char* shared;
  std::vector<Copy> bulk;
  Meeting all;
  std::vector<Meeting> warps;
  std::vector<float> exchange;  // a place for each thread
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  int thread;
  bool finished = false;
  std::vector<std::vector<Copy>> groups;  // of copy16_async, oldest first
  std::vector<Copy> open;
};

struct Machine {
  ucontext_t scheduler;
  Fiber* running = nullptr;
  std::vector<Block> blocks;  // of the cluster that is running
  Meeting cluster;
  std::uint64_t progress = 0;
};
inline Machine machine;

inline void wait_in(Meeting& meeting) {
  const std::uint64_t mine = meeting.generation;
  ++machine.progress;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  Fiber* self = machine.running;
  while (meeting.generation == mine) swapcontext(&self->context, &machine.scheduler);
}

inline int thread() { return machine.running->thread; }
inline std::int64_t block() { return machine.running->block->index; }
inline void block_sync() { wait_in(machine.running->block->all); }
inline void warp_sync() { wait_in(machine.running->block->warps[static_cast<std::size_t>(thread() / 32)]); }
inline char* shared_memory() { return machine.running->block->shared; }

inline float shuffle_xor(float x, int lanes) {
  std::vector<float>& exchange = machine.running->block->exchange;
  exchange[static_cast<std::size_t>(thread())] = x;
  warp_sync();
  const float other = exchange[static_cast<std::size_t>(thread() ^ lanes)];
  warp_sync();
  return other;
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // NaN stays NaN
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % 16 != 0) fail("16-byte access to an address that is not aligned to it");
}
inline Vector load16(const void* from) {
  check_aligned(from);
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store16(void* to, Vector v) {
  check_aligned(to);
  std::memcpy(to, &v, sizeof v);
}

template <class T>
float2 unpack2(std::uint32_t word) {
  return {to_float(T{static_cast<std::uint16_t>(word)}), to_float(T{static_cast<std::uint16_t>(word >> 16)})};
}
template <class T>
std::uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<std::uint32_t>(from_float<T>(high).bits) << 16;
}

inline Copy started(void* to, const void* from, std::size_t bytes, const Barrier* barrier) {
  check_aligned(to), check_aligned(from);
  std::memset(to, kPoison, bytes);
  return {to, from, bytes, barrier};
}
inline void copy16_async(void* shared, const void* global) {
  machine.running->open.push_back(started(shared, global, 16, nullptr));
}
inline void copy_commit() {
  machine.running->groups.push_back(std::move(machine.running->open)), machine.running->open.clear();
}
template <int kPending>
void copy_wait() {
  std::vector<std::vector<Copy>>& groups = machine.running->groups;
  while (groups.size() > static_cast<std::size_t>(kPending)) {
    for (const Copy& copy : groups.front()) copy.arrive();
    groups.erase(groups.begin());
  }
}

inline void barrier_init(Barrier* barrier) { *barrier = {kInitialised, 0}; }
inline void barrier_init_done() {}
inline void copy_bulk(void* shared, const void* global, std::uint32_t bytes, Barrier* barrier) {
  if (barrier->initialised != kInitialised) fail("copy to a barrier that was not initialised");
  machine.running->block->bulk.push_back(started(shared, global, bytes, barrier));
}
inline void barrier_wait(Barrier* barrier, std::uint32_t parity) {
  if (barrier->initialised != kInitialised) fail("wait at a barrier that was not initialised");
  if ((barrier->phase & 1) != parity) return;  // that phase is over
  std::vector<Copy>& bulk = machine.running->block->bulk;
  const auto mine = std::find_if(bulk.begin(), bulk.end(), [&](const Copy& c) { return c.barrier == barrier; });
  if (mine == bulk.end()) fail("wait for a copy that nobody started");
  mine->arrive();
  bulk.erase(mine);
  ++barrier->phase;
}

inline int cluster_rank() { return machine.running->block->rank; }
inline int cluster_size() { return static_cast<int>(machine.blocks.size()); }
inline void cluster_sync() { wait_in(machine.cluster); }
inline void cluster_meet() { wait_in(machine.cluster); }
inline float4 load_of_block(const void* own, int rank) {
  const Block& other = machine.blocks[static_cast<std::size_t>(rank)];
  float4 v;
  std::memcpy(&v, other.shared + (static_cast<const char*>(own) - machine.running->block->shared), sizeof v);
  return v;
}

// --- launching ---

struct Launch {
  std::int64_t blocks;
  int threads, cluster;
  std::size_t shared_bytes;
  enum Order { kForward, kBackward } order;
};

inline std::function<void()> work_of_fiber;

inline void fiber_main() {
  work_of_fiber();
  Fiber* self = machine.running;
  for (const std::vector<Copy>& group : self->groups)
    if (!group.empty()) fail("a thread ended before its copies had arrived");
  self->finished = true;
  ++machine.progress;
  swapcontext(&self->context, &machine.scheduler);
}

inline Block make_block(std::int64_t index, int rank, const Launch& launch) {
  Block block{index, rank, {}, nullptr, {}, {launch.threads}, {}, {}};
  constexpr std::size_t kAlignment = 128;
  block.memory.assign(launch.shared_bytes + kAlignment, kPoison);
  const std::size_t past = reinterpret_cast<std::uintptr_t>(block.memory.data()) % kAlignment;
  block.shared = block.memory.data() + (past == 0 ? 0 : kAlignment - past);
  block.warps.assign(static_cast<std::size_t>(launch.threads / 32), Meeting{32});
  block.exchange.resize(static_cast<std::size_t>(launch.threads));
  return block;
}

inline void prepare(Fiber& fiber, Block& block, int thread) {
  constexpr std::size_t kStack = 64 << 10;
  fiber.block = &block;
  fiber.thread = thread;
  fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

// Turn by turn, until all have ended: one block as far as it comes alone, then the next, so that nothing but the
// cluster's own barriers holds a block back for another.
inline void run_fibers(std::vector<std::vector<Fiber*>> blocks) {
  for (bool left = true; left;) {
    const std::uint64_t before = machine.progress;
    left = false;
    for (std::vector<Fiber*>& fibers : blocks) {
      if (fibers.empty()) continue;
      Block& block = *fibers[0]->block;
      std::uint64_t own;
      do {
        own = machine.progress;
        for (Fiber* fiber : fibers) {
          machine.running = fiber;
          swapcontext(&machine.scheduler, &fiber->context);
        }
        fibers.erase(std::remove_if(fibers.begin(), fibers.end(), [](Fiber* f) { return f->finished; }), fibers.end());
      } while (machine.progress != own);
      if (fibers.empty()) std::fill(block.memory.begin(), block.memory.end(), kPoison);  // it ends with its block
      left = left || !fibers.empty();
    }
    if (left && machine.progress == before) fail("a barrier that not all of its threads reach");
  }
}

inline void run_cluster(std::int64_t first_block, const Launch& launch) {
  machine.cluster = Meeting{launch.threads * launch.cluster};
  machine.blocks.clear();
  for (int rank = 0; rank < launch.cluster; ++rank)
    machine.blocks.push_back(make_block(first_block + rank, rank, launch));
  std::vector<Fiber> fibers(static_cast<std::size_t>(launch.threads * launch.cluster));
  std::vector<std::vector<Fiber*>> turns(machine.blocks.size());
  for (std::size_t i = 0; i < fibers.size(); ++i) {
    const std::size_t threads = static_cast<std::size_t>(launch.threads), rank = i / threads;
    prepare(fibers[i], machine.blocks[rank], static_cast<int>(i % threads));
    turns[rank].push_back(&fibers[i]);
  }
  if (launch.order == Launch::kBackward) {
    std::reverse(turns.begin(), turns.end());
    for (std::vector<Fiber*>& of_block : turns) std::reverse(of_block.begin(), of_block.end());
  }
  run_fibers(turns);
  for (const Block& block : machine.blocks)
    if (!block.bulk.empty()) fail("a block ended before its copies had arrived");
}

// Runs kernel() for every thread of every block.
inline void run(const Launch& launch, const std::function<void()>& kernel) {
  work_of_fiber = kernel;
  for (std::int64_t first = 0; first < launch.blocks; first += launch.cluster) run_cluster(first, launch);
}

}  // namespace device
}  // namespace vcpo
