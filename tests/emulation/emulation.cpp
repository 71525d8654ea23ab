// The threads of the emulated GPU; the execution model is described in include/cuda_runtime.h.
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <tuple>

#include "engine.h"

namespace cuda_emulation {

Device device;
thread_local Cluster* cluster = nullptr;

namespace {

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

std::string text_of(dim3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string text_of(Place line) {
  const char* name = std::strrchr(line.file, '/');
  return std::string(name == nullptr ? line.file : name + 1) + ":" + std::to_string(line.line);
}

// The kernel's name from the symbols of this library; its offset where binutils are missing.
std::string name_of(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0) return "a kernel";
  const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase);
  char command[4096];
  std::snprintf(command, sizeof command, "addr2line -f -e '%s' %#tx 2>/dev/null", info.dli_fname,
                offset);
  char line[4096] = "??";
  if (FILE* out = popen(command, "r")) {
    if (std::fgets(line, sizeof line, out) == nullptr) std::strcpy(line, "??");
    pclose(out);
  }
  line[std::strcspn(line, "\n")] = 0;
  if (line[0] == '?') return "the kernel at offset " + std::to_string(offset);
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(line, nullptr, nullptr, &status), &std::free);
  std::string text = status == 0 ? name.get() : line;
  for (const char* noise : {"(anonymous namespace)::", "void ", "kd::"}) {
    for (size_t at; (at = text.find(noise)) != std::string::npos;) {
      text.erase(at, std::strlen(noise));
    }
  }
  // Parameters, but not a parenthesis in a template argument.
  int depth = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    depth += (text[i] == '<') - (text[i] == '>');
    if (text[i] == '(' && depth == 0) return text.substr(0, i);
  }
  return text;
}

void make_ready(Fiber& fiber) {
  fiber.waiting = false;
  cluster->ready[fiber.priority / 64] |= uint64_t{1} << fiber.priority % 64;
}

// All threads of a block have to come, also those that have ended: a barrier that only some reach
// is undefined on the GPU.
void meet_block(Fiber& fiber) {
  Block& block = cluster->blocks[fiber.block];
  if (block.arrived == 0) {
    block.line = fiber.line;
    block.count = 0;
  } else if (block.line != fiber.line) {
    fail("a divergent barrier: this thread is at " + text_of(fiber.line) + ", others at " +
         text_of(block.line));
  }
  block.count += fiber.value != 0;
  if (++block.arrived < block.threads) return;
  block.arrived = 0;
  for (Fiber& f : cluster->fibers) {
    if (f.block != fiber.block) continue;
    f.value = block.count;
    make_ready(f);
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

bool at_warp_operation(const Fiber& fiber) {
  return fiber.waiting && (fiber.place == Meeting::kShuffle || fiber.place == Meeting::kVote ||
                           fiber.place == Meeting::kWarpBarrier);
}

// Lets the lanes of a warp operation go on once all that it names are there or have ended.
void pass_warp(Fiber& fiber) {
  Fiber* lanes = &fiber - fiber.lane;
  const Fiber* end = cluster->fibers.data() + cluster->fibers.size();
  unsigned there = 0, votes = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    Fiber* lane = lanes + i;
    if ((fiber.mask >> i & 1) == 0 || lane >= end || lane->warp != fiber.warp || lane->ended) {
      continue;
    }
    if (!at_warp_operation(*lane)) return;
    if (lane->place != fiber.place || lane->mask != fiber.mask) {
      if ((lane->mask >> fiber.lane & 1) == 0) return;  // it can go on without this one, and come
      fail("lanes of one warp meet at different operations: lane " + std::to_string(i) + " at " +
           text_of(lane->line) + ", this one at " + text_of(fiber.line));
    }
    there |= 1u << i;
    votes |= static_cast<unsigned>(lane->value != 0) << i;
  }
  uint32_t values[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) {
    if ((there >> i & 1) == 0) continue;
    values[i] = votes;
    if (fiber.place != Meeting::kShuffle) continue;
    const int source = lanes[i].source;
    if ((there >> source & 1) == 0) {
      fail("a shuffle at " + text_of(fiber.line) + " reads from lane " + std::to_string(source) +
           ", which takes no part in it");
    }
    values[i] = lanes[source].value;
  }
  for (int i = 0; i < kWarpSize; ++i) {
    if ((there >> i & 1) == 0) continue;
    lanes[i].value = values[i];
    make_ready(lanes[i]);
  }
}

void meet_warp(Fiber& fiber) {
  if ((fiber.mask >> fiber.lane & 1) == 0) {
    fail("a warp operation at " + text_of(fiber.line) + " whose mask leaves out the caller");
  }
  pass_warp(fiber);
}

void end_fiber(Fiber& fiber) {
  fiber.ended = true;
  --cluster->blocks[fiber.block].alive;
  --cluster->alive;
  if (fiber.arrived && fiber.arrival == cluster->phase) --cluster->arrived;
  pass_cluster_barrier();
  for (Fiber& f : cluster->fibers) {
    const bool waits_for_it = f.block == fiber.block && f.warp == fiber.warp &&
                              at_warp_operation(f) && (f.mask >> fiber.lane & 1) != 0;
    if (waits_for_it) pass_warp(f);
  }
}

void fiber_main() {
  Fiber& fiber = *cluster->running;
  try {
    cluster->call(cluster->parameters);
    // The GPU would let such copies run on into memory that is another block's by then.
    if (!fiber.open_group.empty() || !fiber.groups.empty()) {
      fail("a thread ended without waiting for its asynchronous copies");
    }
    end_fiber(fiber);
  } catch (...) {
    cluster->error = std::current_exception();
  }
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
  constexpr const char* kNames[] = {"__syncthreads", "",       "the cluster barrier",
                                    "a shuffle",     "a vote", "__syncwarp"};
  int counts[std::size(kNames)] = {}, ended = 0;
  const Fiber* first = nullptr;
  for (const Fiber& f : cluster->fibers) {
    ended += f.ended;
    if (f.ended) continue;
    ++counts[static_cast<int>(f.place)];
    if (first == nullptr) first = &f;
  }
  std::string message = place_of(*first) + ": deadlock at " + text_of(first->line) + ": ";
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (counts[i] > 0)
      message += std::to_string(counts[i]) + " threads wait at " + kNames[i] + ", ";
  }
  throw std::runtime_error(message + std::to_string(ended) + " have ended");
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

void run_fibers(std::mt19937_64& random) {
  while (cluster->alive > 0) {
    size_t word = 0;
    while (word < cluster->ready.size() && cluster->ready[word] == 0) ++word;
    if (word == cluster->ready.size()) report_deadlock();
    const uint64_t bits = cluster->ready[word];
    cluster->ready[word] = bits & (bits - 1);
    Fiber& fiber = *cluster->by_priority[word * 64 + std::countr_zero(bits)];
    advance_copies(random);
    enter_static_shared(fiber.block);
    cluster->blocks[fiber.block].started = true;
    threadIdx = fiber.thread_index;
    blockIdx = fiber.block_index;
    cluster->running = &fiber;
    enter(fiber);
    cluster->running = nullptr;
    if (cluster->error) std::rethrow_exception(cluster->error);
  }
}

// The block with number `index` in a cluster that begins at block `first` of the grid.
void open_block(int index, unsigned first, size_t shared) {
  Block& block = cluster->blocks[index];
  block.threads = block.alive = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  open_shared(index, shared);
  const unsigned number = first + index;
  for (int thread = 0; thread < block.threads; ++thread) {
    const size_t i = static_cast<size_t>(index) * block.threads + thread;
    Fiber& f = cluster->fibers[i];
    f.block = index;
    f.warp = thread / kWarpSize;
    f.lane = thread % kWarpSize;
    f.thread_index = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
                      thread / blockDim.x / blockDim.y};
    f.block_index = {number % gridDim.x, number / gridDim.x % gridDim.y,
                     number / gridDim.x / gridDim.y};
    getcontext(&f.context);
    f.stack = stack(i);
    f.context.uc_stack.ss_sp = stack(i);
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
}

}  // namespace

std::string place_of(const Fiber& fiber) {
  return name_of(cluster->kernel) + ", block " + text_of(fiber.block_index) + ", thread " +
         text_of(fiber.thread_index);
}

void fail(const std::string& what) {
  throw std::runtime_error(place_of(*cluster->running) + ": " + what);
}

void fail_silently(const std::string& what) {
  Fiber& fiber = *cluster->running;
  cluster->error = std::make_exception_ptr(std::runtime_error(place_of(fiber) + ": " + what));
  for (;;) leave(fiber);
}

uint32_t meet(Meeting kind, Place line, unsigned mask, uint32_t value, int source) {
  Fiber& fiber = *cluster->running;
  fiber.line = line;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source;
  fiber.place = kind;
  fiber.waiting = kind != Meeting::kClusterArrive;
  switch (kind) {
    case Meeting::kShuffle:
    case Meeting::kVote:
    case Meeting::kWarpBarrier:
      meet_warp(fiber);
      break;
    case Meeting::kBlockBarrier:
      meet_block(fiber);
      break;
    case Meeting::kClusterArrive:
      if (fiber.arrived) fail("cluster_arrive without cluster_wait before it");
      fiber.arrived = true;
      fiber.arrival = cluster->phase;
      ++cluster->arrived;
      pass_cluster_barrier();
      return 0;
    case Meeting::kClusterWait:
      if (!fiber.arrived) fail("cluster_wait without cluster_arrive before it");
      fiber.arrived = false;
      if (fiber.arrival < cluster->phase) make_ready(fiber);
      break;
  }
  leave(fiber);
  return fiber.value;
}

void run(const void* kernel, dim3 grid, dim3 block, unsigned cluster_size, size_t shared,
         void (*call)(const void*), const void* parameters) {
  blockDim = block;
  gridDim = grid;
  std::mt19937_64 random(device.seed);
  std::vector<unsigned> order(grid.x * grid.y * grid.z / cluster_size);
  std::iota(order.begin(), order.end(), 0u);
  const int policy = static_cast<int>(device.seed % 4);
  if (policy > 0) std::shuffle(order.begin(), order.end(), random);
  struct Current {  // none, whichever way the launch ends
    explicit Current(Cluster* now) { cluster = now; }
    ~Current() { cluster = nullptr; }
  };
  for (const unsigned which : order) {
    Cluster now;
    const Current current(&now);
    now.kernel = kernel;
    now.call = call;
    now.parameters = parameters;
    now.blocks.resize(cluster_size);
    now.fibers.resize(cluster_size * block.x * block.y * block.z);
    now.alive = static_cast<int>(now.fibers.size());
    for (unsigned i = 0; i < cluster_size; ++i) {
      open_block(static_cast<int>(i), which * cluster_size, shared);
    }
    set_priorities(random, policy);
    run_fibers(random);
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
