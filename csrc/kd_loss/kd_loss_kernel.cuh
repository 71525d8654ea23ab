// The kernels of kd_loss and topk_kd_loss. One block, or one cluster of blocks, takes a row:
// kd_loss_plan.h decides which, kd_loss_logits.cuh holds how the row's logits are walked,
// kd_loss_device.cuh the arithmetic of what is met there, kd_loss_listed.cuh that of a list.
#pragma once

#include "kd_loss/kd_loss_device.cuh"
#include "kd_loss/kd_loss_listed.cuh"
#include "kd_loss/kd_loss_logits.cuh"

namespace kd {

constexpr int kTotalThreads = 1024;  // of the blocks that run over all rows

// What the row kernels receive.
template <typename scalar_t>
struct RowsCall {
  Matrix<const scalar_t> student, teacher;  // [rows, >= classes]
  Matrix<scalar_t> grad;                    // [rows, columns]
  const int64_t* labels;                    // [rows] or null
  const float* row_weights;                 // [rows] or null
  const float* denominator;                 // [] or null
  const float* count;                       // [] valid rows, or null: do not divide by them
  float* rows;                              // [rows]
  float* row_parts;                         // [3, rows]: weighted CE, D, squared lse
  int64_t row_count, ignore_index;
  int columns, classes;
  int ranks, vectors, vectors_a_rank;
  float scale;  // of the loss, where neither denominator nor count is given
  bool needs_labels;
  ListCall list;
  RowNumbers numbers;
};

template <typename scalar_t, Divergence kD, bool kOnChip>
__device__ __forceinline__ auto open_row(const RowsCall<scalar_t>& call,
                                         const RowView<const scalar_t>& student, int64_t row,
                                         const Walk& walk, int begin, char* logits) {
  constexpr bool kTeacher = RowMath<kD>::kTeacher;
  const RowView<const scalar_t> teacher =
      kTeacher ? RowView<const scalar_t>(call.teacher, row, walk.shift) : student;
  if constexpr (kOnChip) {
    uint4* kept = reinterpret_cast<uint4*>(logits);
    return OnChipLogits<scalar_t, kTeacher>{
        student, teacher, walk, kept, kept + call.vectors_a_rank, begin};
  } else {
    return LoopedLogits<scalar_t, kTeacher>{student, teacher, walk};
  }
}

// What the sum over rows is multiplied by; a divisor of 0 counts as 1.
__device__ inline float loss_scale(float divisor) {
  return 1.0f / (divisor == 0.0f ? 1.0f : divisor);
}

template <typename scalar_t, Divergence kD, bool kOnChip>
__global__ void __launch_bounds__(kKdLossMaxThreads, 2)
    kd_loss_rows(const RowsCall<scalar_t> call) {
  using Math = RowMath<kD>;
  constexpr bool kListed = is_listed(kD);
  constexpr int kSize = kVectorSize<scalar_t>;
  const RowNumbers& n = call.numbers;
  const int ranks = kOnChip ? call.ranks : 1;
  const int rank = static_cast<int>(blockIdx.x) % ranks;
  const int64_t row = blockIdx.x / ranks;
  const bool writer = rank == 0 && threadIdx.x == 0;

  const int shift = misalignment(call.student.data + row * call.student.stride);
  const RowView<const scalar_t> student(call.student, row, shift);
  const RowView<scalar_t> grad(call.grad, row, shift);
  const bool want_grad = call.grad.data != nullptr;
  const int begin = rank * call.vectors_a_rank;
  const Walk walk{begin + static_cast<int>(threadIdx.x),
                  min(begin + call.vectors_a_rank, call.vectors), shift, call.classes};
  if (want_grad) {
    const int step = ranks * blockDim.x;
    for (int k = call.classes + rank * blockDim.x + threadIdx.x; k < call.columns; k += step) {
      grad.data[k] = static_cast<scalar_t>(0.0f);
    }
  }

  const int64_t label = call.labels != nullptr ? call.labels[row] : 0;
  const bool ignored = call.labels != nullptr && label == call.ignore_index;
  const bool wrong = call.needs_labels && (label < 0 || label >= call.classes);
  if (ignored || wrong) {
    const float value = ignored ? 0.0f : kNan;
    if (want_grad) fill_gradient(grad, walk, value);
    if (writer) {
      call.rows[row] = value;
      for (int part = 0; part < 3; ++part) call.row_parts[part * call.row_count + row] = value;
    }
    return;
  }

  // Completed before the first reduction sends anything: then every block has started.
  if (ranks > 1) cluster_arrive_relaxed();
  const ReduceSpace<RowStats> stats_space(dynamic_shared());
  const ReduceSpace<RowSums> sums_space(reinterpret_cast<char*>(stats_space.ranks + ranks));
  char* free_space = reinterpret_cast<char*>(sums_space.ranks + ranks);
  const ReduceSpace<ListSums> list_sums_space(free_space);
  if constexpr (kListed) free_space = reinterpret_cast<char*>(list_sums_space.ranks + ranks);
  // The classes of this block, from the one that its first vector would begin with.
  ListSpace<scalar_t> list(free_space, call.list, row, (walk.end - begin) * kSize,
                           begin * kSize - shift);
  if constexpr (kListed) {
    free_space += list_space_bytes(call.list.size, call.vectors_a_rank * kSize);
  }
  const auto logits = open_row<scalar_t, kD, kOnChip>(call, student, row, walk, begin, free_space);
  if constexpr (kOnChip) logits.stage_all();
  ListSums list_sums;
  if constexpr (kListed) {
    list.open(call.list.ids + row * call.list.size, student.data, n.student, call.classes,
              list_sums, rank == 0);
  }

  // Read before the gradient may overwrite it: there is a barrier in between.
  float label_logit[1] = {0.0f};
  if (writer && call.needs_labels) {
    label_logit[0] = static_cast<float>(student.data[label]);
    to_z(n.student, label_logit);
  }
  const auto open = [&](int first, uint4 raw_student, uint4 raw_teacher, float (&s)[kSize],
                        float (&t)[kSize]) {
    open_vector<scalar_t>(n.student, raw_student, s);
    if constexpr (kListed) list.hide(first, s);
    if constexpr (Math::kTeacher) open_vector<scalar_t>(n.teacher, raw_teacher, t);
  };

  RowStats stats;
  logits.each_at_first([&](int first, uint4 raw_student, uint4 raw_teacher) {
    float s[kSize], t[kSize];
    open(first, raw_student, raw_teacher, s, t);
    Math::add(n, stats, s, t);
  });
  if constexpr (kListed) {
    list.each([&](int, float z, float) { Math::raise(n, stats, z); });
  }
  if (ranks > 1) cluster_wait();
  stats = reduce_row(stats, RowStats{}, stats_space, rank, ranks,
                     [&](const RowStats& x) { return Math::across_warp(n, x); });
  const RowStats outside = stats;  // of a list
  if constexpr (kListed) {
    list.each(
        [&](int, float z, float log_p) { add_entry(n, list_sums, stats.student_max, z, log_p); });
    list_sums = reduce_row(list_sums, ListSums{}, list_sums_space, rank, ranks,
                           [](const ListSums& x) { return list_across_warp(x); });
    stats.student_sum += list_sums.student_sum;
    stats.hard_sum += list_sums.hard_sum;
    stats.live += list_sums.live;
    stats.exponent_sum += list_sums.exponent_sum;
  }
  Math math(n, stats);

  RowSums middle;
  if constexpr (Math::kMiddle) {
    logits.each(true, [&](int first, uint4 raw_student, uint4 raw_teacher) {
      float s[kSize], t[kSize];
      open(first, raw_student, raw_teacher, s, t);
      math.add_middle(n, middle, s, t);
    });
    middle = reduce_row(middle, RowSums{}, sums_space, rank, ranks,
                        [](const RowSums& x) { return Math::sums_across_warp(x); });
    math.expectation = middle.mean;
  }

  const ListMath listed(n, outside, list_sums, stats.student_sum, call.classes);
  float weight = call.row_weights != nullptr ? call.row_weights[row] : 1.0f;
  if constexpr (kListed) {
    math.expectation = listed.expectation;
    if (list_sums.wrong > 0.0f) weight = kNan;
  }
  if (writer) {
    const float ce = n.want_ce ? math.cross_entropy(n, label_logit[0]) : 0.0f;
    const float divergence =
        kListed ? listed.divergence : math.divergence(n, label_logit[0], middle);
    const float lse2 = n.want_z ? math.lse * math.lse : 0.0f;
    // A term without weight is left out: it may be infinite.
    float loss = n.ce_weight != 0.0f ? n.ce_weight * ce : 0.0f;
    if (n.kd_weight != 0.0f) loss = fmaf(n.kd_weight, divergence, loss);
    loss = fmaf(n.z_loss, lse2, loss);
    call.rows[row] = weight * loss;
    call.row_parts[row] = weight * ce;
    call.row_parts[call.row_count + row] = weight * divergence;
    call.row_parts[2 * call.row_count + row] = weight * lse2;
  }
  if (!want_grad) return;

  float scale = call.scale;
  if (call.denominator != nullptr) {
    scale = loss_scale(*call.denominator);
  } else if (call.count != nullptr) {
    scale = loss_scale(*call.count);
  }
  typename Math::Slope slopes = math.slopes(n, weight * scale);
  if constexpr (kListed) {
    slopes.student *= listed.slope;
    slopes.spread = fmaf(slopes.list, listed.uniform, slopes.spread);
  }
  const int labelled = call.needs_labels ? static_cast<int>(label) : -kSize;
  logits.each(!Math::kMiddle, [&](int first, uint4 raw_student, uint4 raw_teacher) {
    float s[kSize], t[kSize], g[kSize];
    open(first, raw_student, raw_teacher, s, t);
    math.gradient(n, slopes, s, t, g);
    finish_gradient(n, first, labelled, slopes.label, s, g);
    store_vector(grad, first, call.classes, g);
  });
  if constexpr (kListed) {
    __syncthreads();  // other threads have written there
    list.each([&](int id, float z, float log_p) {
      float g = slopes.list * listed.entry(n, stats.student_max, z, log_p);
      if (slopes.hard != 0.0f) {
        float e = exp2_approx(exponent(n.student, z, stats.student_max));
        if (n.heat == Heat::kSquared) e *= e;
        if (n.heat == Heat::kOther) {
          e = exp2_approx(n.temperature * exponent(n.student, z, stats.student_max));
        }
        g = fmaf(slopes.hard, e, g);
      }
      if (z > kMinusInf) g -= slopes.smoothing;
      if (id == labelled) g -= slopes.label;
      if (!n.student.plain) g *= slope(n.student, z);
      grad.data[id] = static_cast<scalar_t>(g);
    });
  }
}

// ---- over all rows: one block, so that the order of the sums is fixed ---------------------------

struct alignas(16) Totals {
  float loss = 0.0f, ce = 0.0f, divergence = 0.0f, lse2 = 0.0f, count = 0.0f;
  float unused[3] = {};
};

__device__ inline Totals sum_over_block(const Totals& mine) {
  return reduce_row(mine, Totals{}, ReduceSpace<Totals>(dynamic_shared()), 0, 1, [](Totals x) {
    return Totals{warp_sum(x.loss), warp_sum(x.ce), warp_sum(x.divergence), warp_sum(x.lse2),
                  warp_sum(x.count)};
  });
}

static __global__ void __launch_bounds__(kTotalThreads)
    kd_loss_count(const int64_t* labels,  // [rows]
                  int64_t rows, int64_t ignore_index,
                  float* count) {  // []
  Totals mine;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    if (labels[row] != ignore_index) mine.count += 1.0f;
  }
  const Totals all = sum_over_block(mine);
  if (threadIdx.x == 0) *count = all.count;
}

struct TotalsCall {
  const float* rows;         // [rows]
  const float* row_parts;    // [3, rows]
  const int64_t* labels;     // [rows] or null
  const float* denominator;  // [] or null
  float* loss;               // []
  float* parts;              // [4]
  int64_t row_count, ignore_index;
  bool mean;
};

static __global__ void __launch_bounds__(kTotalThreads) kd_loss_totals(const TotalsCall call) {
  Totals mine;
  for (int64_t row = threadIdx.x; row < call.row_count; row += blockDim.x) {
    mine.loss += call.rows[row];
    mine.ce += call.row_parts[row];
    mine.divergence += call.row_parts[call.row_count + row];
    mine.lse2 += call.row_parts[2 * call.row_count + row];
    if (call.labels == nullptr || call.labels[row] != call.ignore_index) mine.count += 1.0f;
  }
  const Totals all = sum_over_block(mine);
  if (threadIdx.x != 0) return;
  float scale = 1.0f;
  if (call.denominator != nullptr) {
    scale = loss_scale(*call.denominator);
  } else if (call.mean) {
    scale = loss_scale(all.count);
  }
  *call.loss = all.loss * scale;
  call.parts[0] = all.ce * scale;
  call.parts[1] = all.divergence * scale;
  call.parts[2] = all.lse2 * scale;
  call.parts[3] = all.count;
}

}  // namespace kd
