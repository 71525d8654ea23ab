#include "common/buffer_pool.h"

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "common/empty.h"

namespace kd {

namespace {

constexpr size_t kSmallest = 4 << 20;  // below, the system allocator keeps its memory itself
constexpr size_t kKeptBytes = size_t{2} << 30;  // at most this much waits for reuse,
constexpr size_t kKeptBlocks = 2;               // in at most this many blocks
constexpr size_t kHugePage = 2 << 20;

class Pool {
 public:
  void* take(size_t bytes) {
    {
      std::lock_guard lock(mutex_);
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        // Not much larger: a block must not be spent on a call that leaves most of it idle.
        if (bytes <= it->bytes && it->bytes / 4 * 3 <= bytes) {
          void* data = it->data;
          used_.push_back(*it);
          free_.erase(it);
          return data;
        }
      }
    }
    const size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = std::aligned_alloc(kHugePage, rounded);
    STD_TORCH_CHECK(data != nullptr, "kdkernels: out of memory for a result of ", bytes, " bytes");
    madvise(data, rounded, MADV_HUGEPAGE);  // advice: failing is fine
    std::lock_guard lock(mutex_);
    used_.push_back({data, rounded});
    return data;
  }

  void give_back(void* data) {
    std::vector<Block> dropped;
    {
      std::lock_guard lock(mutex_);
      const auto it = std::find_if(used_.begin(), used_.end(),
                                   [data](const Block& block) { return block.data == data; });
      free_.push_back(*it);
      used_.erase(it);
      while (free_.size() > kKeptBlocks || (!free_.empty() && kept_bytes() > kKeptBytes)) {
        dropped.push_back(free_.front());  // the one that waited longest
        free_.erase(free_.begin());
      }
    }
    for (const Block& block : dropped) std::free(block.data);
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  size_t kept_bytes() const {
    size_t bytes = 0;
    for (const Block& block : free_) bytes += block.bytes;
    return bytes;
  }

  std::mutex mutex_;
  std::vector<Block> used_, free_;
};

// Never destroyed: tensors may be freed after the static objects of this library.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

size_t element_bytes(torch::headeronly::ScalarType dtype) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Double:
      return 8;
    case torch::headeronly::ScalarType::Float:
      return 4;
    default:
      return 2;
  }
}

template <size_t N>
torch::stable::Tensor pooled(const std::array<int64_t, N>& sizes,
                             const std::array<int64_t, N>& strides,
                             const torch::stable::Tensor& like) {
  size_t bytes = element_bytes(like.scalar_type());
  for (int64_t size : sizes) bytes *= size;
  if (bytes < kSmallest) return empty_cpu(sizes, like.scalar_type());
  return torch::stable::from_blob(pool().take(bytes), sizes, strides, like.device(),
                                  like.scalar_type(), [](void* data) { pool().give_back(data); });
}

}  // namespace

torch::stable::Tensor pooled_empty(int64_t rows, int64_t columns,
                                   const torch::stable::Tensor& like) {
  return pooled<2>({rows, columns}, {columns, 1}, like);
}

torch::stable::Tensor pooled_empty(int64_t size, const torch::stable::Tensor& like) {
  return pooled<1>({size}, {1}, like);
}

}  // namespace kd
