// The engine behind include/cuda_runtime.h, where the execution model is described.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace cuda_emulation {

namespace {

constexpr size_t kStackBytes = 256 * 1024;  // of a fiber; only touched pages cost memory
constexpr int kWarpSize = 32;

struct Device {
  int major = 9;
  int shared = 232448;
  uint64_t seed = 0;
} device;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  int block = 0, warp = 0, lane = 0;
  unsigned block_index = 0;  // in the grid
  size_t priority = 0;       // the lowest that is ready runs
  bool entered = false, ended = false;
  Meeting place = Meeting::kBlockBarrier;  // where it waits
  bool waiting = false;
  bool arrived = false;  // at the cluster barrier, without having waited for it
  uint64_t arrival = 0;  // the phase of the cluster barrier in which it did
  uint32_t value = 0;    // of a shuffle: given, then received
  int source = 0;
  std::deque<std::vector<Copy>> groups;  // closed groups of copies, oldest first
  std::vector<Copy> open_group;
  ucontext_t context{};
  jmp_buf point;
};

struct Warp {
  int arrived = 0;
  Meeting place = Meeting::kShuffle;
};

struct Block {
  std::vector<uint4> memory;
  std::vector<Warp> warps;
  bool started = false;
  int alive = 0, arrived = 0;
};

// The blocks of one cluster, alive together.
struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;  // by block, warp, lane
  std::vector<Fiber*> by_priority;
  std::vector<uint64_t> ready;  // a bit for each priority
  int alive = 0, arrived = 0;   // at the cluster barrier
  uint64_t phase = 0;           // of it
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  Fiber* running = nullptr;
  ucontext_t scheduler{};
  jmp_buf scheduler_point;
};

thread_local Cluster* cluster = nullptr;

// Changes stacks. The jump saves the system call that swapcontext makes; AddressSanitizer knows
// only the latter.
#if defined(__SANITIZE_ADDRESS__)
void enter(Fiber& fiber) { swapcontext(&cluster->scheduler, &fiber.context); }
void leave(Fiber& fiber) { swapcontext(&fiber.context, &cluster->scheduler); }
#else
void enter(Fiber& fiber) {
  if (_setjmp(cluster->scheduler_point) != 0) return;
  if (fiber.entered) _longjmp(fiber.point, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}
void leave(Fiber& fiber) {
  if (_setjmp(fiber.point) == 0) _longjmp(cluster->scheduler_point, 1);
}
#endif

void make_ready(Fiber& fiber) {
  fiber.waiting = false;
  cluster->ready[fiber.priority / 64] |= uint64_t{1} << fiber.priority % 64;
}

void wait_at(Fiber& fiber, Meeting place) {
  fiber.waiting = true;
  fiber.place = place;
}

void pass_block_barrier(int index) {
  Block& block = cluster->blocks[index];
  if (block.arrived == 0 || block.arrived < block.alive) return;
  block.arrived = 0;
  for (Fiber& f : cluster->fibers) {
    if (f.block == index && f.waiting && f.place == Meeting::kBlockBarrier) make_ready(f);
  }
}

void pass_cluster_barrier() {
  if (cluster->arrived == 0 || cluster->arrived < cluster->alive) return;
  cluster->arrived = 0;
  ++cluster->phase;
  for (Fiber& f : cluster->fibers) {
    if (f.waiting && f.place == Meeting::kClusterWait) make_ready(f);
  }
}

void meet_warp(Fiber& fiber, Meeting kind, unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("a warp operation on some lanes only");
  Warp& warp = cluster->blocks[fiber.block].warps[fiber.warp];
  if (warp.arrived > 0 && warp.place != kind) {
    throw std::runtime_error("lanes of one warp meet at different operations");
  }
  warp.place = kind;
  wait_at(fiber, kind);
  if (++warp.arrived < kWarpSize) return;
  warp.arrived = 0;
  Fiber* lanes = &fiber - fiber.lane;
  uint32_t values[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) values[i] = lanes[i].value;
  for (int i = 0; i < kWarpSize; ++i) {
    lanes[i].value = values[lanes[i].source];
    make_ready(lanes[i]);
  }
}

void end_fiber(Fiber& fiber) {
  fiber.ended = true;
  --cluster->blocks[fiber.block].alive;
  --cluster->alive;
  if (fiber.arrived && fiber.arrival == cluster->phase) --cluster->arrived;
  pass_block_barrier(fiber.block);
  pass_cluster_barrier();
}

void fiber_main() {
  Fiber& fiber = *cluster->running;
  try {
    (*cluster->body)();
    // The GPU would let such copies run on into memory that is another block's by then.
    if (!fiber.open_group.empty() || !fiber.groups.empty()) {
      throw std::runtime_error("a thread ended without waiting for its asynchronous copies");
    }
  } catch (...) {
    cluster->error = std::current_exception();
  }
  end_fiber(fiber);
  leave(fiber);
}

char* stack(size_t index) {  // kept between launches
  static thread_local std::vector<char*> stacks;
  while (stacks.size() <= index) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[index];
}

[[noreturn]] void report_deadlock() {
  constexpr const char* kNames[] = {"__syncthreads", "", "the cluster barrier", "a shuffle",
                                    "__syncwarp"};
  int counts[std::size(kNames)] = {};
  for (const Fiber& f : cluster->fibers) {
    if (!f.ended) ++counts[static_cast<int>(f.place)];
  }
  std::string message = "deadlock:";
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (counts[i] > 0) message += " " + std::to_string(counts[i]) + " threads wait at " + kNames[i];
  }
  throw std::runtime_error(message);
}

// Ranks the fibers as the seed says: in order of their numbers (0), at random (1), at random but
// one block as far as it gets before the next (2), or one warp before the next (3).
void set_priorities(std::mt19937_64& random, int policy) {
  const size_t count = cluster->fibers.size();
  std::vector<std::tuple<uint64_t, uint64_t, uint64_t, size_t>> keys(count);
  std::vector<uint64_t> of_block(cluster->blocks.size());
  for (uint64_t& key : of_block) key = policy >= 2 ? random() : 0;
  uint64_t of_warp = 0;
  for (size_t i = 0; i < count; ++i) {
    const Fiber& f = cluster->fibers[i];
    if (f.lane == 0) of_warp = policy >= 3 ? random() : 0;
    keys[i] = {of_block[f.block], of_warp, policy >= 1 ? random() : 0, i};
  }
  std::sort(keys.begin(), keys.end());
  cluster->by_priority.resize(count);
  cluster->ready.assign(count / 64 + 1, 0);
  for (size_t i = 0; i < count; ++i) {
    Fiber& f = cluster->fibers[std::get<3>(keys[i])];
    f.priority = i;
    cluster->by_priority[i] = &f;
    make_ready(f);
  }
}

void run_fibers() {
  while (cluster->alive > 0) {
    size_t word = 0;
    while (word < cluster->ready.size() && cluster->ready[word] == 0) ++word;
    if (word == cluster->ready.size()) report_deadlock();
    const uint64_t bits = cluster->ready[word];
    cluster->ready[word] = bits & (bits - 1);
    Fiber& fiber = *cluster->by_priority[word * 64 + std::countr_zero(bits)];
    cluster->running = &fiber;
    cluster->blocks[fiber.block].started = true;
    threadIdx = dim3(static_cast<unsigned>(fiber.warp * kWarpSize + fiber.lane));
    blockIdx = dim3(fiber.block_index);
    enter(fiber);
    if (cluster->error) std::rethrow_exception(cluster->error);
  }
}

}  // namespace

uint32_t meet(Meeting kind, unsigned mask, uint32_t value, int source) {
  Fiber& fiber = *cluster->running;
  fiber.value = value;
  fiber.source = source;
  switch (kind) {
    case Meeting::kShuffle:
    case Meeting::kWarpBarrier:
      meet_warp(fiber, kind, mask);
      break;
    case Meeting::kBlockBarrier:
      wait_at(fiber, kind);
      ++cluster->blocks[fiber.block].arrived;
      pass_block_barrier(fiber.block);
      break;
    case Meeting::kClusterArrive:
      if (fiber.arrived) throw std::runtime_error("cluster_arrive without cluster_wait before it");
      fiber.arrived = true;
      fiber.arrival = cluster->phase;
      ++cluster->arrived;
      pass_cluster_barrier();
      return 0;
    case Meeting::kClusterWait:
      if (!fiber.arrived) throw std::runtime_error("cluster_wait without cluster_arrive before it");
      fiber.arrived = false;
      wait_at(fiber, kind);
      if (fiber.arrival < cluster->phase) make_ready(fiber);
      break;
  }
  leave(fiber);
  return fiber.value;
}

char* shared() {
  return reinterpret_cast<char*>(cluster->blocks[cluster->running->block].memory.data());
}

char* shared_of(unsigned rank) {
  if (rank >= cluster->blocks.size()) throw std::runtime_error("no such block in the cluster");
  Block& block = cluster->blocks[rank];
  if (!block.started) throw std::runtime_error("a store to a block that has not started");
  if (block.alive == 0) throw std::runtime_error("a store to a block that has ended");
  return reinterpret_cast<char*>(block.memory.data());
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    throw std::runtime_error("an access of " + std::to_string(bytes) + " bytes is not aligned");
  }
}

void copy_later(void* to, const void* from, size_t bytes) {
  check_aligned(to, bytes);
  check_aligned(from, bytes);
  cluster->running->open_group.push_back({to, from, bytes});
}

void close_copies() {
  Fiber& fiber = *cluster->running;
  fiber.groups.push_back(std::exchange(fiber.open_group, {}));
}

void finish_copies(int pending) {
  auto& groups = cluster->running->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.pop_front();
  }
}

void run(dim3 grid, dim3 block, unsigned cluster_size, size_t shared,
         const std::function<void()>& body) {
  blockDim = block;
  gridDim = grid;
  std::mt19937_64 random(device.seed);
  std::vector<unsigned> order(grid.x / cluster_size);
  std::iota(order.begin(), order.end(), 0u);
  const int policy = static_cast<int>(device.seed % 4);
  if (policy > 0) std::shuffle(order.begin(), order.end(), random);
  for (const unsigned which : order) {
    Cluster now;
    cluster = &now;
    now.body = &body;
    now.blocks.resize(cluster_size);
    now.fibers.resize(cluster_size * block.x);
    now.alive = static_cast<int>(now.fibers.size());
    for (size_t i = 0; i < now.fibers.size(); ++i) {
      Fiber& f = now.fibers[i];
      f.block = static_cast<int>(i / block.x);
      const int thread = static_cast<int>(i % block.x);
      f.warp = thread / kWarpSize;
      f.lane = thread % kWarpSize;
      Block& b = now.blocks[f.block];
      if (thread == 0) {
        b.memory.assign(shared / sizeof(uint4) + 1, {~0u, ~0u, ~0u, ~0u});
        b.warps.resize(block.x / kWarpSize);
        b.alive = static_cast<int>(block.x);
      }
      f.block_index = which * cluster_size + f.block;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = stack(i);
      f.context.uc_stack.ss_size = kStackBytes;
      f.context.uc_link = nullptr;
      makecontext(&f.context, fiber_main, 0);
    }
    set_priorities(random, policy);
    run_fibers();
  }
}

}  // namespace cuda_emulation

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  using cuda_emulation::device;
  *value = which == cudaDevAttrComputeCapabilityMajor         ? device.major
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device.shared
                                                              : 2;  // multiprocessors
  return cudaSuccess;
}

// For tests: what the emulated GPU is, and the order of its threads.
extern "C" __attribute__((visibility("default"))) void emulated_device(int major, int shared,
                                                                       uint64_t seed) {
  cuda_emulation::device = {major, shared, seed};
}
