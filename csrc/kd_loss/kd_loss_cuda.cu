// kd_loss on the GPU. One block, or one cluster of blocks, takes a row: kd_loss_plan.h decides
// which, kd_loss_logits.cuh holds how the row's logits are walked, kd_loss_device.cuh the
// arithmetic of what is met there.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/launch.h"
#include "kd_loss/kd_loss_device.cuh"
#include "kd_loss/kd_loss_logits.cuh"

namespace kd {

namespace {

constexpr const char* kOp = "kd_loss";
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

// What the sum over rows is multiplied by; a divisor of 0 counts as 1.
__device__ float loss_scale(float divisor) { return 1.0f / (divisor == 0.0f ? 1.0f : divisor); }

template <typename scalar_t, Divergence kD, bool kOnChip>
__global__ void __launch_bounds__(kKdLossMaxThreads, 2)
    kd_loss_rows(const RowsCall<scalar_t> call) {
  using Math = RowMath<kD>;
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
  const auto logits = open_row<scalar_t, kD, kOnChip>(
      call, student, row, walk, begin, reinterpret_cast<char*>(sums_space.ranks + ranks));
  if constexpr (kOnChip) logits.stage_all();

  // Read before the gradient may overwrite it: there is a barrier in between.
  float label_logit[1] = {0.0f};
  if (writer && call.needs_labels) {
    label_logit[0] = static_cast<float>(student.data[label]);
    to_z(n.student, label_logit);
  }
  const auto open = [&](uint4 raw_student, uint4 raw_teacher, float (&s)[kSize],
                        float (&t)[kSize]) {
    unpack<scalar_t>(raw_student, s);
    to_z(n.student, s);
    if constexpr (Math::kTeacher) {
      unpack<scalar_t>(raw_teacher, t);
      to_z(n.teacher, t);
    }
  };

  RowStats stats;
  logits.each_at_first([&](int, uint4 raw_student, uint4 raw_teacher) {
    float s[kSize], t[kSize];
    open(raw_student, raw_teacher, s, t);
    Math::add(n, stats, s, t);
  });
  if (ranks > 1) cluster_wait();
  Math math(n, reduce_row(stats, RowStats{}, stats_space, rank, ranks,
                          [&](const RowStats& x) { return Math::across_warp(n, x); }));

  RowSums middle;
  if constexpr (Math::kMiddle) {
    logits.each(true, [&](int, uint4 raw_student, uint4 raw_teacher) {
      float s[kSize], t[kSize];
      open(raw_student, raw_teacher, s, t);
      math.add_middle(n, middle, s, t);
    });
    middle = reduce_row(middle, RowSums{}, sums_space, rank, ranks,
                        [](const RowSums& x) { return Math::sums_across_warp(x); });
    math.expectation = middle.mean;
  }

  const float weight = call.row_weights != nullptr ? call.row_weights[row] : 1.0f;
  if (writer) {
    const float ce = n.want_ce ? math.cross_entropy(n, label_logit[0]) : 0.0f;
    const float divergence = math.divergence(n, label_logit[0], middle);
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
  const typename Math::Slope slopes = math.slopes(n, weight * scale);
  const int labelled = call.needs_labels ? static_cast<int>(label) : -kSize;
  logits.each(!Math::kMiddle, [&](int first, uint4 raw_student, uint4 raw_teacher) {
    float s[kSize], t[kSize], g[kSize];
    open(raw_student, raw_teacher, s, t);
    math.gradient(n, slopes, s, t, g);
    if (first <= labelled && labelled < first + kSize) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (first + i == labelled) g[i] -= slopes.label;
      }
    }
    if (!n.student.plain) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) g[i] *= slope(n.student, s[i]);
    }
    store_vector(grad, first, call.classes, g);
  });
}

// ---- over all rows: one block, so that the order of the sums is fixed ---------------------------

struct alignas(16) Totals {
  float loss = 0.0f, ce = 0.0f, divergence = 0.0f, lse2 = 0.0f, count = 0.0f;
  float unused[3] = {};
};

__device__ Totals sum_over_block(const Totals& mine) {
  return reduce_row(mine, Totals{}, ReduceSpace<Totals>(dynamic_shared()), 0, 1, [](Totals x) {
    return Totals{warp_sum(x.loss), warp_sum(x.ce), warp_sum(x.divergence), warp_sum(x.lse2),
                  warp_sum(x.count)};
  });
}

__global__ void __launch_bounds__(kTotalThreads) kd_loss_count(const int64_t* labels,  // [rows]
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

__global__ void __launch_bounds__(kTotalThreads) kd_loss_totals(const TotalsCall call) {
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

// ---- host ---------------------------------------------------------------------------------------

template <typename Body>
void dispatch_divergence(Divergence divergence, const Body& body) {
  switch (divergence) {
    case Divergence::kNone:
      return body.template operator()<Divergence::kNone>();
    case Divergence::kForwardKl:
      return body.template operator()<Divergence::kForwardKl>();
    case Divergence::kSoftCe:
      return body.template operator()<Divergence::kSoftCe>();
    case Divergence::kReverseKl:
      return body.template operator()<Divergence::kReverseKl>();
    case Divergence::kJsd:
      return body.template operator()<Divergence::kJsd>();
    case Divergence::kTvd:
      return body.template operator()<Divergence::kTvd>();
    case Divergence::kSpike:
      return body.template operator()<Divergence::kSpike>();
    case Divergence::kNegEntropy:
      return body.template operator()<Divergence::kNegEntropy>();
  }
  STD_TORCH_CHECK(false, kOp, ": divergence must be one of 0 to 7, got ",
                  static_cast<int>(divergence));
}

RowNumbers row_numbers(const KdLossSpec& spec) {
  // Without a divergence there is one softmax, that of CE.
  const double temperature = spec.divergence == Divergence::kNone ? 1.0 : spec.temperature;
  const bool want_z = spec.z_loss != 0.0;
  RowNumbers n{};
  n.student = logit_rule(spec.student_scale, spec.student_softcap, temperature);
  n.teacher = logit_rule(spec.teacher_scale, spec.teacher_softcap, temperature);
  n.heat = temperature == 1.0 || !(spec.needs_ce() || want_z) ? Heat::kSame
           : temperature == 2.0                               ? Heat::kSquared
                                                              : Heat::kOther;
  n.want_ce = spec.needs_ce();
  n.want_z = want_z;
  n.temperature = static_cast<float>(temperature);
  n.beta = static_cast<float>(spec.beta);
  n.one_minus_beta = 1.0f - n.beta;
  n.ce_weight = static_cast<float>(spec.ce_weight);
  n.kd_weight = static_cast<float>(spec.kd_weight);
  n.z_loss = static_cast<float>(spec.z_loss);
  n.smoothing = spec.needs_ce() ? static_cast<float>(spec.label_smoothing) : 0.0f;
  n.want_sums = n.smoothing != 0.0f || spec.divergence == Divergence::kSpike;
  return n;
}

using MaybeTensor = std::optional<Tensor>;

struct Inputs {
  Tensor student;           // [rows, columns]
  MaybeTensor teacher;      // [rows, >= classes]
  MaybeTensor labels;       // [rows] int64
  MaybeTensor row_weights;  // [rows] float32
  MaybeTensor denominator;  // [] float32
  KdLossSpec spec;
};

template <typename T>
const T* data_or_null(const MaybeTensor& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

void check_inputs(const Inputs& in) {
  constexpr int64_t kMostColumns = int64_t{1} << 30;  // columns are counted in 32 bits
  const int64_t rows = in.student.size(0), columns = in.student.size(1);
  STD_TORCH_CHECK(1 <= in.spec.classes && in.spec.classes <= columns && columns < kMostColumns, kOp,
                  ": student must have at least ", in.spec.classes, " and below ", kMostColumns,
                  " classes, got ", columns);
  check_per_row(in.labels, rows, ScalarType::Long, kOp, "labels");
  check_per_row(in.row_weights, rows, ScalarType::Float, kOp, "row_weights");
  STD_TORCH_CHECK(in.labels.has_value() || !in.spec.needs_labels(), kOp,
                  ": labels must be given for a loss on labels, got None");
  if (in.denominator.has_value()) {
    STD_TORCH_CHECK(
        in.denominator->numel() == 1 && in.denominator->scalar_type() == ScalarType::Float, kOp,
        ": denominator must be one float32, got ", in.denominator->numel(), " of dtype ",
        static_cast<int>(in.denominator->scalar_type()));
  }
  if (!needs_teacher(in.spec.divergence)) return;
  STD_TORCH_CHECK(in.teacher.has_value(), kOp,
                  ": teacher must be given for this divergence, got None");
  check_rows(*in.teacher, kOp, "teacher");
  STD_TORCH_CHECK(in.teacher->size(0) == rows && in.teacher->size(1) >= in.spec.classes, kOp,
                  ": teacher must be [", rows, ", at least ", in.spec.classes, "], got [",
                  in.teacher->size(0), ", ", in.teacher->size(1), "]");
  STD_TORCH_CHECK(in.teacher->scalar_type() == in.student.scalar_type(), kOp,
                  ": teacher must have the dtype of student, got dtype ",
                  static_cast<int>(in.teacher->scalar_type()));
}

// Fills rows and row_parts, and grad where there is one.
template <typename scalar_t>
void launch_rows(const LaunchScope& scope, const Inputs& in, Tensor* grad,
                 RowsCall<scalar_t> call) {
  const auto matrix = [](const Tensor& x) {
    return Matrix<const scalar_t>{static_cast<const scalar_t*>(x.const_data_ptr()), x.stride(0)};
  };
  call.student = matrix(in.student);
  if (needs_teacher(in.spec.divergence)) call.teacher = matrix(*in.teacher);
  if (grad != nullptr) {
    call.grad = {static_cast<scalar_t*>(grad->mutable_data_ptr()), grad->stride(0)};
  }
  const int size = sizeof(scalar_t);
  const bool aligned = misalignment(call.student.data) == 0 &&
                       (call.row_count <= 1 || call.student.stride * size % kVectorBytes == 0);
  const KdLossPlan plan =
      plan_kd_loss({in.spec.classes, size, aligned, grad != nullptr, in.spec.divergence},
                   {scope.attribute(cudaDevAttrComputeCapabilityMajor, kOp),
                    scope.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kOp)});
  call.ranks = plan.cluster;
  call.vectors = plan.vectors;
  call.vectors_a_rank = plan.vectors_a_rank;
  const int64_t blocks = call.row_count * plan.cluster;
  STD_TORCH_CHECK(blocks <= INT32_MAX, kOp, ": student must have at most ",
                  INT32_MAX / plan.cluster, " rows, got ", call.row_count);
  const LaunchShape shape{blocks, plan.threads, plan.cluster,
                          static_cast<size_t>(plan.shared_bytes)};
  dispatch_divergence(in.spec.divergence, [&]<Divergence kD>() {
    launch_kernel(
        kOp, scope, shape,
        plan.on_chip ? &kd_loss_rows<scalar_t, kD, true> : &kd_loss_rows<scalar_t, kD, false>,
        call);
  });
}

std::tuple<Tensor, Tensor, Tensor> run(const Inputs& in, Tensor* grad) {
  check_inputs(in);
  const LaunchScope scope(in.student);
  const int64_t rows = in.student.size(0);
  const auto floats = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(in.student, size, ScalarType::Float);
  };
  const auto data = [](const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  const Tensor loss = floats({}), parts = floats({4}), row_losses = floats({rows});
  const Tensor work = floats({3 * rows + 1});  // the rows' parts, the number of valid rows
  float* row_parts = data(work);
  float* count = row_parts + 3 * rows;
  const int64_t* labels = data_or_null<int64_t>(in.labels);
  const float* denominator = data_or_null<float>(in.denominator);
  const bool by_count = in.spec.mean && denominator == nullptr;
  const LaunchShape one_block{1, kTotalThreads, 1, sizeof(Totals) * (kTotalThreads / kWarpSize)};

  // Only a gradient has to know the number of valid rows beforehand.
  const bool count_first = grad != nullptr && by_count && labels != nullptr && rows > 0;
  if (count_first) {
    launch_kernel(kOp, scope, one_block, &kd_loss_count, labels, rows, in.spec.ignore_index, count);
  }
  if (rows > 0) {
    dispatch_float(in.student.scalar_type(), kOp, "student", [&]<typename scalar_t>() {
      RowsCall<scalar_t> call{};
      call.labels = labels;
      call.row_weights = data_or_null<float>(in.row_weights);
      call.denominator = denominator;
      call.count = count_first ? count : nullptr;
      call.rows = data(row_losses);
      call.row_parts = row_parts;
      call.row_count = rows;
      call.ignore_index = in.spec.ignore_index;
      call.columns = static_cast<int>(in.student.size(1));
      call.classes = static_cast<int>(in.spec.classes);
      call.scale = by_count ? 1.0f / static_cast<float>(rows) : 1.0f;
      call.needs_labels = in.spec.needs_labels();
      call.numbers = row_numbers(in.spec);
      launch_rows(scope, in, grad, call);
    });
  }
  launch_kernel(kOp, scope, one_block, &kd_loss_totals,
                TotalsCall{data(row_losses), row_parts, labels, denominator, data(loss),
                           data(parts), rows, in.spec.ignore_index, in.spec.mean});
  return {loss, parts, row_losses};
}

enum class Gradient { kNone, kNew, kInPlace };

// The three operators, by where the gradient goes.
template <Gradient kGradient>
auto kd_loss(Tensor student, MaybeTensor teacher, MaybeTensor labels, MaybeTensor row_weights,
             MaybeTensor denominator, std::vector<double> spec) {
  check_rows(student, kOp, "student");
  STD_TORCH_CHECK(spec.size() == kSpecNumbers, kOp, ": spec must have ", kSpecNumbers,
                  " numbers, got ", spec.size());
  const Inputs in{student,     teacher,     labels,
                  row_weights, denominator, make_spec(spec, student.size(1))};
  if constexpr (kGradient == Gradient::kNew) {
    Tensor grad = torch::stable::new_empty(student, {student.size(0), student.size(1)});
    auto [loss, parts, rows] = run(in, &grad);
    return std::make_tuple(loss, parts, grad);
  } else if constexpr (kGradient == Gradient::kInPlace) {
    auto [loss, parts, rows] = run(in, &student);
    return std::make_tuple(loss, parts);
  } else {
    return run(in, nullptr);
  }
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("kd_loss", TORCH_BOX(&kd::kd_loss<kd::Gradient::kNone>));
  m.impl("kd_loss_grad", TORCH_BOX(&kd::kd_loss<kd::Gradient::kNew>));
  m.impl("kd_loss_grad_", TORCH_BOX(&kd::kd_loss<kd::Gradient::kInPlace>));
}
