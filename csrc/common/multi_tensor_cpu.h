// Chunks of lists of tensors on the CPU; see multi_tensor.h.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/multi_tensor.h"

namespace kd {

// Calls body(row of the table, first element, count) for the chunks of all tensors, in parallel.
// `worth` elements are worth a thread.
template <typename Row, typename Body>
void each_chunk(const Tensor& table, int64_t chunks, int64_t worth, const Body& body) {
  const Row* rows = static_cast<const Row*>(table.const_data_ptr());
  const Row* rows_end = rows + table.size(0);
  int64_t elements = 0;
  for (const Row* row = rows; row != rows_end; ++row) elements += row->size;
  const int64_t grain = elements == 0 ? 1 : std::max<int64_t>(1, chunks * worth / elements);
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    const auto ends_later = [](int64_t chunk, const Row& r) { return chunk < r.chunks_end; };
    const Row* row = std::upper_bound(rows, rows_end, begin, ends_later);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (row->chunks_end <= chunk) ++row;
      const int64_t all = (row->size + kTableChunk - 1) / kTableChunk;
      const int64_t first = (chunk - (row->chunks_end - all)) * kTableChunk;
      body(*row, first, std::min(kTableChunk, row->size - first));
    }
  });
}

// An element of a tensor in the table; null where there is no tensor.
inline char* element_at(int64_t address, int64_t element, TableDtype dtype) {
  return address == 0 ? nullptr : reinterpret_cast<char*>(address) + element * bytes_of(dtype);
}

}  // namespace kd
