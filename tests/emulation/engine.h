// What emulation.cpp (threads) and memory.cpp (memory) of the emulation share.
#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <deque>
#include <exception>
#include <random>
#include <string>
#include <vector>

namespace cuda_emulation {

constexpr size_t kStackBytes = 256 * 1024;  // of a fiber; only touched pages cost memory
constexpr int kWarpSize = 32;

struct Device {
  int major = 9;
  int shared = 232448;
  uint64_t seed = 0;
};
extern Device device;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool done = false;
};

// One thread of the GPU.
struct Fiber {
  int block = 0;  // in the cluster
  int warp = 0, lane = 0;
  dim3 thread_index, block_index;
  size_t priority = 0;  // the lowest that is ready runs
  const char* stack = nullptr;
  bool entered = false, ended = false;
  bool waiting = false;
  Meeting place = Meeting::kBlockBarrier;  // where it waits
  Place line;                              // in the source
  unsigned mask = 0;                       // of the lanes it waits for
  bool arrived = false;                    // at the cluster barrier, without having waited for it
  uint64_t arrival = 0;                    // the phase of the cluster barrier in which it did
  uint32_t value = 0;                      // of a shuffle, vote or barrier: given, then received
  int source = 0;                          // the lane whose value it wants
  std::deque<std::vector<Copy>> groups;    // closed groups of copies, oldest first
  std::vector<Copy> open_group;
  ucontext_t context{};
  jmp_buf point;
};

struct Block {
  char* memory = nullptr;  // dynamic shared memory
  size_t bytes = 0;
  std::vector<uint8_t> written;     // for each byte of it
  std::vector<char> static_memory;  // contents while another block runs
  bool started = false;
  int threads = 0, alive = 0, arrived = 0;
  uint32_t count = 0;  // of the threads at the barrier whose value is not 0
  Place line;          // of the barrier that the first of them reached
};

// The blocks of one cluster, alive together.
struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;  // by block, warp, lane
  std::vector<Fiber*> by_priority;
  std::vector<uint64_t> ready;  // a bit for each priority
  int alive = 0, arrived = 0;   // at the cluster barrier
  uint64_t phase = 0;           // of it
  const void* kernel = nullptr;
  void (*call)(const void*) = nullptr;
  const void* parameters = nullptr;
  std::exception_ptr error;
  Fiber* running = nullptr;  // null while the scheduler runs
  int static_block = -1;     // whose static shared memory is the current one
  ucontext_t scheduler{};
  jmp_buf scheduler_point;
};

extern thread_local Cluster* cluster;  // null outside of a launch

// Ends the launch with an error that names kernel, block and thread; only from a fiber.
[[noreturn]] void fail(const std::string& what);
// The same where no exception may pass: the fiber never goes on.
[[noreturn]] void fail_silently(const std::string& what);
std::string place_of(const Fiber& fiber);

// ---- memory.cpp ---------------------------------------------------------------------------------

// Gives the block `bytes` of shared memory that counts as never written.
void open_shared(int index, size_t bytes);
// Makes the static shared memory of the block the current one.
void enter_static_shared(int index);
// Lets some asynchronous copies happen before the program waits for them.
void advance_copies(std::mt19937_64& random);

}  // namespace cuda_emulation
