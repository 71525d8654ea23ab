// How a block of kd_loss walks over its part of a row of logits.
//
// A row is walked in vectors of 16 bytes that lie on 16-byte boundaries of the student's memory;
// `shift` elements of the first one lie before the row. What lies outside of the classes is read
// as -inf, which adds nothing, so the passes know no borders. A thread only ever touches its own
// vectors: staging and the in-place gradient need no barrier, only the reductions do. A teacher or
// a gradient whose rows lie otherwise between the boundaries is read or written by elements.
#pragma once

#include "common/logits.cuh"
#include "kd_loss/kd_loss_device.cuh"

namespace kd {

// The vectors of a row that one thread walks: first, first + threads, ... below end.
struct Walk {
  int first, end, shift, classes;

  __device__ __forceinline__ int count() const {
    const int threads = static_cast<int>(blockDim.x);
    return first < end ? (end - first + threads - 1) / threads : 0;
  }
  __device__ __forceinline__ int vector(int i) const {
    return first + i * static_cast<int>(blockDim.x);
  }
};

// A vector of stored logits as z.
template <typename scalar_t>
__device__ __forceinline__ void open_vector(const LogitRule& rule, uint4 raw,
                                            float (&z)[kVectorSize<scalar_t>]) {
  unpack<scalar_t>(raw, z);
  to_z(rule, z);
}

// Gives every class of the row the gradient `value`.
template <typename scalar_t>
__device__ void fill_gradient(const RowView<scalar_t>& grad, const Walk& walk, float value) {
  constexpr int kSize = kVectorSize<scalar_t>;
  float x[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = value;
  for (int vector = walk.first; vector < walk.end; vector += blockDim.x) {
    store_vector(grad, vector * kSize - walk.shift, walk.classes, x);
  }
}

// Walks in global memory: a block loads the vector after next while it computes.
template <typename scalar_t, bool kTeacher>
struct LoopedLogits {
  RowView<const scalar_t> student, teacher;
  Walk walk;

  // Calls body(first class, student's vector, teacher's vector). Every other pass runs backwards:
  // it meets what the pass before it has left in the caches.
  template <typename Body>
  __device__ __forceinline__ void each(bool backwards, const Body& body) const {
    constexpr int kSize = kVectorSize<scalar_t>;
    const int count = walk.count();
    if (count == 0) return;
    const auto place = [&](int i) {
      return walk.vector(backwards ? count - 1 - i : i) * kSize - walk.shift;
    };
    const auto load = [&](const RowView<const scalar_t>& row, int i) {
      return load_vector(row, place(i), walk.classes);
    };
    uint4 next_student = load(student, 0);
    uint4 next_teacher = kTeacher ? load(teacher, 0) : uint4{};
    for (int i = 0; i < count; ++i) {
      const uint4 now_student = next_student, now_teacher = next_teacher;
      if (i + 1 < count) {
        next_student = load(student, i + 1);
        if constexpr (kTeacher) next_teacher = load(teacher, i + 1);
      }
      body(place(i), now_student, now_teacher);
    }
  }
  template <typename Body>
  __device__ __forceinline__ void each_at_first(const Body& body) const {
    each(false, body);
  }
};

// Walks in shared memory, filled by asynchronous copies; the first pass starts on the first
// quarter of them while the others are under way.
template <typename scalar_t, bool kTeacher>
struct OnChipLogits {
  static constexpr int kGroups = 4;

  RowView<const scalar_t> student, teacher;
  Walk walk;
  uint4* kept_student;  // [vectors of this block]
  uint4* kept_teacher;
  int begin;  // vector of the row that is the block's first

  __device__ __forceinline__ void stage(const RowView<const scalar_t>& row, uint4* kept,
                                        int vector) const {
    constexpr int kSize = kVectorSize<scalar_t>;
    const int at = vector * kSize - walk.shift;
    uint4* to = kept + (vector - begin);
    if (row.aligned && at >= 0 && at + kSize <= walk.classes) {
      copy_async_16(to, row.data + at);
    } else {
      *to = load_vector(row, at, walk.classes);
    }
  }

  __device__ __forceinline__ int group_size() const {
    return (walk.count() + kGroups - 1) / kGroups;
  }

  __device__ __forceinline__ void stage_all() const {
    const int count = walk.count(), size = group_size();
    for (int group = 0; group < kGroups; ++group) {
      const int end = min(count, (group + 1) * size);
      for (int i = group * size; i < end; ++i) {
        stage(student, kept_student, walk.vector(i));
        if constexpr (kTeacher) stage(teacher, kept_teacher, walk.vector(i));
      }
      copy_async_commit();
    }
  }

  template <typename Body>
  __device__ __forceinline__ void some(int from, int to, const Body& body) const {
    for (int i = from; i < to; ++i) {
      const int vector = walk.vector(i);
      const uint4 now_student = kept_student[vector - begin];
      const uint4 now_teacher = kTeacher ? kept_teacher[vector - begin] : uint4{};
      body(vector * kVectorSize<scalar_t> - walk.shift, now_student, now_teacher);
    }
  }
  template <typename Body>
  __device__ __forceinline__ void each(bool, const Body& body) const {
    some(0, walk.count(), body);
  }
  template <typename Body>
  __device__ __forceinline__ void each_at_first(const Body& body) const {
    const int count = walk.count(), size = group_size();
    for (int group = 0; group < kGroups; ++group) {
      switch (kGroups - 1 - group) {
        case 3:
          copy_async_wait<3>();
          break;
        case 2:
          copy_async_wait<2>();
          break;
        case 1:
          copy_async_wait<1>();
          break;
        default:
          copy_async_wait<0>();
      }
      some(group * size, min(count, (group + 1) * size), body);
    }
  }
};

}  // namespace kd
