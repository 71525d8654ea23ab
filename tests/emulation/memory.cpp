// Memory of the emulated GPU: what is shared, what a kernel may touch, asynchronous copies.
//
// The kernels are compiled with -fsanitize=kernel-address, which only turns every load and store
// into a call of the functions at the foot of this file: they check it and name the culprit.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "engine.h"

// The section of the variables declared __shared__; absent where there are none.
extern "C" char __start_kd_static_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_kd_static_shared[] __attribute__((weak, visibility("hidden")));
// This library, from its header to the end of its data: constants of kernels are in between.
extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace cuda_emulation {

namespace {

// Every block of a cluster has a slot of address space; between the end of its shared memory and
// the next slot nothing may be touched.
constexpr size_t kSlotBytes = 1 << 20;
constexpr size_t kMostBlocks = 16;

char* arena() {
  static thread_local char* memory = [] {
    void* got = mmap(nullptr, kSlotBytes * kMostBlocks, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(got);
  }();
  return memory;
}

// Global memory the kernels may touch: the tensors whose address the call has asked for.
struct Range {
  const char* begin;
  const char* end;
  bool writable;
};
thread_local std::vector<Range> ranges;
// Beside them what the call reaches by addresses in a tensor.
thread_local std::vector<Range> reachable;

size_t static_bytes() { return __stop_kd_static_shared - __start_kd_static_shared; }

struct Access {
  const char* at;
  size_t bytes;
  bool is_write, vector;  // a vector has to be aligned to its size

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(at); }
  bool aligned() const { return !vector || address() % bytes == 0; }
  bool within(const char* begin, const char* end) const { return begin <= at && at + bytes <= end; }
};

// The block whose shared memory a place in the arena belongs to, and the byte in there.
struct SharedPlace {
  size_t block, first;
};
bool in_arena(const Access& access, SharedPlace* place) {
  const uintptr_t offset = access.address() - reinterpret_cast<uintptr_t>(arena());
  *place = {offset / kSlotBytes, offset % kSlotBytes};
  return offset < kSlotBytes * kMostBlocks;
}

bool unwritten(const Access& access, const SharedPlace& place) {
  return std::memchr(&cluster->blocks[place.block].written[place.first], 0, access.bytes) !=
         nullptr;
}

// Whether the running thread may do this; called for every load and store of a kernel.
bool allowed(const Access& access) {
  if (access.address() - reinterpret_cast<uintptr_t>(cluster->running->stack) < kStackBytes) {
    return true;
  }
  if (!access.aligned()) return false;
  for (const Range& range : ranges) {
    if (access.within(range.begin, range.end) && (range.writable || !access.is_write)) return true;
  }
  SharedPlace place;
  if (in_arena(access, &place)) {
    return place.block < cluster->blocks.size() &&
           place.first + access.bytes <= cluster->blocks[place.block].bytes &&
           (access.is_write || !unwritten(access, place));
  }
  return access.within(__start_kd_static_shared, __stop_kd_static_shared) ||
         (!access.is_write && access.within(__ehdr_start, _end));
}

// Why not.
std::string complaint(const Access& access) {
  const std::string text =
      (access.is_write ? "a write of " : "a read of ") + std::to_string(access.bytes) + " bytes ";
  if (!access.aligned()) return text + "at an address that is not aligned to them";
  SharedPlace place;
  if (in_arena(access, &place)) {
    const size_t bytes = cluster->blocks[cluster->running->block].bytes;
    const bool outside =
        place.block >= cluster->blocks.size() || place.first + access.bytes > bytes;
    const std::string from = "from byte " + std::to_string(place.first);
    return outside ? text + "outside of shared memory: " + from + ", the block has " +
                         std::to_string(bytes)
                   : text + "of shared memory that was never written: " + from;
  }
  // The tensor that the access has left, most likely.
  int64_t nearest = 4096;
  std::string behind_what;
  for (const Range& range : ranges) {
    if (access.within(range.begin, range.end)) return text + "to an input";
    const bool behind = access.at + access.bytes > range.end;
    const int64_t distance = behind ? access.at - range.end : range.begin - access.at;
    if (std::abs(distance) >= nearest) continue;
    nearest = std::abs(distance);
    behind_what =
        ": " + std::to_string(distance) + " bytes " + (behind ? "behind" : "before") + " one";
  }
  return text + "outside of every tensor of the call" + behind_what;
}

void mark_written(const Access& access) {
  SharedPlace place;
  if (!in_arena(access, &place)) return;
  std::memset(&cluster->blocks[place.block].written[place.first], 1, access.bytes);
}

// From a kernel's own load or store: no exception may pass there.
void check(const Access& access) {
  if (cluster == nullptr || cluster->running == nullptr) return;  // code of the host
  if (!allowed(access)) fail_silently(complaint(access));
  if (access.is_write) mark_written(access);
}

void check_or_throw(const Access& access) {
  if (!allowed(access)) fail(complaint(access));
}

void do_copies(std::vector<Copy>& copies, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (std::exchange(copies[i].done, true)) continue;
    std::memcpy(copies[i].to, copies[i].from, copies[i].bytes);
    mark_written({static_cast<const char*>(copies[i].to), copies[i].bytes, true, true});
  }
}

// When copies happen, as the seed says.
enum class Copies { kAtTheWait, kAtOnce, kInBetween };
Copies when() { return static_cast<Copies>(device.seed % 3); }

}  // namespace

void open_shared(int index, size_t bytes) {
  Block& block = cluster->blocks[index];
  block.memory = arena() + index * kSlotBytes;
  block.bytes = bytes;
  block.written.assign(bytes, 0);
  std::memset(block.memory, 0xff, bytes);  // NaN
  block.static_memory.assign(static_bytes(), '\xff');
}

void enter_static_shared(int index) {
  if (static_bytes() == 0 || cluster->static_block == index) return;
  if (cluster->static_block >= 0) {
    std::memcpy(cluster->blocks[cluster->static_block].static_memory.data(),
                __start_kd_static_shared, static_bytes());
  }
  std::memcpy(__start_kd_static_shared, cluster->blocks[index].static_memory.data(),
              static_bytes());
  cluster->static_block = index;
}

char* shared() { return cluster->blocks[cluster->running->block].memory; }

char* shared_of(unsigned rank) {
  if (rank >= cluster->blocks.size()) fail("no block " + std::to_string(rank) + " in the cluster");
  Block& block = cluster->blocks[rank];
  if (!block.started) fail("a store to a block that has not started");
  if (block.alive == 0) fail("a store to a block that has ended");
  return block.memory;
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("an access of " + std::to_string(bytes) + " bytes is not aligned to them");
  }
}

void copy_later(void* to, const void* from, size_t bytes) {
  check_or_throw({static_cast<const char*>(to), bytes, true, true});
  check_or_throw({static_cast<const char*>(from), bytes, false, true});
  auto& group = cluster->running->open_group;
  group.push_back({to, from, bytes});
  if (when() == Copies::kAtOnce) do_copies(group, group.size());
}

void close_copies() {
  Fiber& fiber = *cluster->running;
  fiber.groups.push_back(std::exchange(fiber.open_group, {}));
}

void finish_copies(int pending) {
  auto& groups = cluster->running->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    do_copies(groups.front(), groups.front().size());
    groups.pop_front();
  }
}

void advance_copies(std::mt19937_64& random) {
  if (when() != Copies::kInBetween) return;
  Fiber& fiber = cluster->fibers[random() % cluster->fibers.size()];
  if (!fiber.groups.empty()) {
    do_copies(fiber.groups.front(), random() % (fiber.groups.front().size() + 1));
  } else {
    do_copies(fiber.open_group, random() % (fiber.open_group.size() + 1));
  }
}

void allow(const void* begin, size_t bytes, bool writable) {
  const char* first = static_cast<const char*>(begin);
  ranges.push_back({first, first + bytes, writable});
}

void forget_memory() { ranges = reachable; }

}  // namespace cuda_emulation

// For tests: memory that kernels reach by addresses in a tensor; null: none any more.
extern "C" __attribute__((visibility("default"))) void emulated_reach(const char* begin,
                                                                      size_t bytes, int writable) {
  using namespace cuda_emulation;
  if (begin == nullptr) {
    reachable.clear();
  } else {
    reachable.push_back({begin, begin + bytes, writable != 0});
  }
  forget_memory();
}

// What the compiler calls before every load and store of a kernel.
#define KD_CHECKED(bytes)                              \
  void __asan_load##bytes##_noabort(const char* at) {  \
    cuda_emulation::check({at, bytes, false, true});   \
  }                                                    \
  void __asan_store##bytes##_noabort(const char* at) { \
    cuda_emulation::check({at, bytes, true, true});    \
  }
extern "C" {
KD_CHECKED(1)
KD_CHECKED(2)
KD_CHECKED(4)
KD_CHECKED(8)
KD_CHECKED(16)
// Whole structures: of an alignment the call does not tell.
void __asan_loadN_noabort(const char* at, size_t bytes) {
  cuda_emulation::check({at, bytes, false, false});
}
void __asan_storeN_noabort(const char* at, size_t bytes) {
  cuda_emulation::check({at, bytes, true, false});
}
void __asan_handle_no_return() {}
void __asan_before_dynamic_init(const char*) {}
void __asan_after_dynamic_init() {}
}
