// One row of kd_loss on vectors; compiled once per instruction set by common/for_each_isa.h, for
// kd_loss, with a list in the place of the teacher's logits for topk_kd_loss, and in steps for
// kd_shard, where a process has some of the classes.
//
// Pass 1 reads both rows once, in blocks that stay in the first-level cache: the running maximum is
// raised to the block's, then exponentials relative to it are summed and kept in scratch, which
// stays in the second-level cache. Pass 2 turns scratch into the gradient: no exponential is
// computed twice. JSD and TVD need both normalisers first and take a pass over scratch in between.

#include "kd_loss/kd_loss_blocks.h"
#include "kd_loss/kd_loss_listed.h"

namespace kd::KD_ISA {

template <Divergence D, Softmax M>
class Row {
 public:
  Row(const KdLossCall& call, float* scratch)
      : call_(call),
        spec_(call.spec),
        inv_t_(D == Divergence::kNone ? 1.0 : 1.0 / call.spec.temperature),
        load_student_(loader(call.student_dtype)),
        load_teacher_(loader(call.teacher_dtype)),
        store_grad_(storer(call.student_dtype)),
        list_(call) {
    const int64_t blocks = blocks_of(spec_.classes);
    keep_ = {scratch, scratch + blocks * kBlock, scratch + 2 * blocks * kBlock,
             scratch + 3 * blocks * kBlock, scratch + 3 * blocks * kBlock + blocks};
    smooth_ = (spec_.needs_ce() && spec_.label_smoothing != 0.0) || D == Divergence::kSpike ||
              (is_listed(D) && spec_.tail == Tail::kUniform);
  }

  RowTerms run(int64_t row) {
    open(row);
    if (call_.grad != nullptr || kTwoStage<D>) {
      read<true>();
    } else {
      read<false>();
    }
    const RowTerms terms = finish();
    if (call_.grad != nullptr) {
      const double weight = call_.row_weights == nullptr ? 1.0 : call_.row_weights[row];
      write(row, weight * call_.scale);
    }
    return terms;
  }

 protected:
  void open(int64_t row) {
    student_ = call_.student + row * call_.student_stride * bytes_of(call_.student_dtype);
    if (kHasTeacher<D>) {
      teacher_ = call_.teacher + row * call_.teacher_stride * bytes_of(call_.teacher_dtype);
    }
    label_ = spec_.needs_labels() ? call_.labels[row] : -1;
    sums_ = Sums{};
    if constexpr (is_listed(D)) list_.open(row);
  }

  int length(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kBlock, spec_.classes - block * kBlock));
  }
  static int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

  const float* student_block(int64_t block, float* buffer) const {
    return load_student_(student_, block * kBlock, length(block), spec_.student_scale,
                         spec_.student_softcap, buffer);
  }

  template <bool kKeep>
  void read() {
    const Split at_t = split(kLog2E * inv_t_), at_1 = split(kLog2E);
    for (int64_t block = 0; block < blocks_of(spec_.classes); ++block) {
      alignas(64) float student_buffer[kBlock], teacher_buffer[kBlock];
      const int n = padded(length(block));
      const float* s = student_block(block, student_buffer);
      const float* t = nullptr;
      if constexpr (is_listed(D)) s = list_.take(block, s, n, student_buffer);
      raise_student(max_of_block(s, n));
      if constexpr (kHasTeacher<D>) {
        t = load_teacher_(teacher_, block * kBlock, length(block), spec_.teacher_scale,
                          spec_.teacher_softcap, teacher_buffer);
        raise(max_of_block(t, n), &sums_.teacher_ref, [&](double by) {
          const double factor = std::exp(-by * inv_t_);
          if (kStudentExpectation<D>) {
            sums_.cross += by * sums_.student;
          } else if (D == Divergence::kForwardKl) {
            sums_.cross = (sums_.cross - by * sums_.teacher) * factor;
          } else {
            sums_.cross *= factor;
          }
          sums_.teacher *= factor;
        });
      }
      keep_.student_ref[block] = sums_.student_ref;
      keep_.teacher_ref[block] = sums_.teacher_ref;
      const int64_t at = block * kBlock;
      const int64_t student_step = bytes_of(call_.student_dtype);
      const int64_t teacher_step = bytes_of(call_.teacher_dtype);
      add_block<D, M, kKeep>(s, t, n, at_t, at_1, sums_, keep_.a + at, keep_.b + at, keep_.c + at,
                             {student_ + at * student_step + kAhead,
                              teacher_ + at * teacher_step + kAhead, student_step, teacher_step});
      if (smooth_) add_logits(s, n, sums_);
    }
    if constexpr (is_listed(D)) {
      raise_student(list_.max_logit());
      list_.template meet<M>(sums_, inv_t_);
    }
    if (M == Softmax::kShared) sums_.student_ce = sums_.student;
    some_masked_ = smooth_ && sums_.live != spec_.classes;
  }

  void raise_student(float block_max) {
    raise(block_max, &sums_.student_ref, [&](double by) {
      const double factor = std::exp(-by * inv_t_);
      sums_.student *= factor;
      sums_.student_ce *= std::exp(-by);
      // In this form equal models leave an exact 0.
      if (kStudentExpectation<D>) {
        sums_.cross = sums_.cross * factor - by * sums_.student;
      } else {
        sums_.cross += by * sums_.teacher;
      }
      sums_.logits -= by * sums_.live;
    });
  }

  // Raises a reference to the maximum of a block; `rescale` brings the sums so far along.
  template <typename Rescale>
  static void raise(float block_max, float* ref, const Rescale& rescale) {
    if (!(block_max > *ref)) return;
    if (*ref != Sums{}.student_ref) rescale(static_cast<double>(block_max) - *ref);
    *ref = block_max;
  }

  // Losses of the row from its sums; runs the middle pass where there is one.
  RowTerms finish() {
    RowTerms terms{0, 0, 0};
    const double log_ce = std::log(sums_.student_ce);
    lse_ = sums_.student_ref + log_ce;
    if (spec_.z_loss != 0.0) terms.lse_squared = lse_ * lse_;
    if (spec_.needs_ce()) {
      terms.ce = log_ce - label_logit();
      if (spec_.label_smoothing != 0.0) {
        const double uniform = log_ce - sums_.logits / sums_.live;
        terms.ce += spec_.label_smoothing * (uniform - terms.ce);
      }
    }
    if constexpr (D != Divergence::kNone) {
      terms.divergence = divergence(std::log(sums_.student), std::log(sums_.teacher));
    }
    return terms;
  }

  // D from the log-sums; the references cancel in the differences kept.
  double divergence(double log_student, double log_teacher) {
    if constexpr (D == Divergence::kForwardKl) {
      return sums_.cross / sums_.teacher * inv_t_ + (log_student - log_teacher);
    }
    if constexpr (D == Divergence::kSoftCe) {
      return sums_.cross / sums_.teacher * inv_t_ + log_student;
    }
    if constexpr (D == Divergence::kReverseKl) {
      return sums_.cross / sums_.student * inv_t_ - (log_student - log_teacher);
    }
    if constexpr (D == Divergence::kNegEntropy) {
      return sums_.cross / sums_.student * inv_t_ - log_student;
    }
    if constexpr (D == Divergence::kSpike) return spike(log_student);
    if constexpr (kTwoStage<D>) return middle();
    if constexpr (is_listed(D)) return list_.divergence();
    return 0.0;
  }

  double spike(double log_student) {
    const int64_t others = sums_.live - 1;
    const double at_label = others > 0 ? spec_.beta : 1.0;
    share_ = others > 0 ? (1.0 - spec_.beta) / others : 0.0;
    const double entropy = xlogx(at_label) + others * xlogx(share_);
    const double log_label = label_logit() * inv_t_ - log_student;
    const double log_sum = sums_.logits * inv_t_ - sums_.live * log_student;
    spike_ = at_label - share_;
    return entropy - spike_ * log_label - share_ * log_sum;
  }

  static double xlogx(double x) { return x > 0.0 ? x * std::log(x) : 0.0; }

  double middle() {
    double student_part = 0, teacher_part = 0;
    for (int64_t block = 0; block < blocks_of(spec_.classes); ++block) {
      const int64_t at = block * kBlock;
      middle_block<D>(keep_.a + at, keep_.b + at, padded(length(block)),
                      student_factor(block) / sums_.student, teacher_factor(block) / sums_.teacher,
                      spec_.beta, &student_part, &teacher_part);
    }
    if (D == Divergence::kTvd) {
      mean_ = teacher_part;
      return 0.5 * student_part;
    }
    mean_ = student_part;
    return spec_.beta * teacher_part + (1.0 - spec_.beta) * student_part;
  }

  float student_factor(int64_t block) const {
    return rescale(keep_.student_ref[block], sums_.student_ref, inv_t_);
  }
  float ce_factor(int64_t block) const {
    // The middle pass of JSD has normalised the exponentials that are used here.
    if (D == Divergence::kJsd && M == Softmax::kShared) return sums_.student;
    if (D == Divergence::kJsd && M == Softmax::kSquare) return sums_.student * sums_.student;
    return rescale(keep_.student_ref[block], sums_.student_ref, 1.0);
  }
  float teacher_factor(int64_t block) const {
    return rescale(keep_.teacher_ref[block], sums_.teacher_ref, inv_t_);
  }

  // The label's logit, less the row's maximum.
  double label_logit() const {
    float buffer[kLanes];
    const double logit =
        *load_student_(student_, label_, 1, spec_.student_scale, spec_.student_softcap, buffer);
    return logit - sums_.student_ref;
  }

  // Pass 2: the gradient of the row times `weight`, chained through scale and soft-cap.
  void write(int64_t row, double weight) {
    char* grad = call_.grad + row * call_.grad_stride * bytes_of(call_.student_dtype);
    const double outer = weight * spec_.student_scale;
    double divergence = outer * spec_.kd_weight * inv_t_;
    double at_label = 0.0, uniform = 0.0;
    if constexpr (D == Divergence::kSpike) {
      at_label += divergence * spike_;
      uniform += divergence * share_;
    }
    if constexpr (is_listed(D)) {
      list_factor_ = divergence;
      uniform += divergence * list_.tail_uniform();
      divergence *= list_.tail_slope();
      mean_ = list_.tail_mean();
    }
    if constexpr (kStudentExpectation<D>) {
      if constexpr (!is_listed(D)) mean_ = sums_.cross / sums_.student;
      divergence *= inv_t_;  // the differences kept are not yet divided by T
    }
    if constexpr (D == Divergence::kJsd) divergence *= 1.0 - spec_.beta;
    if constexpr (D == Divergence::kTvd) divergence *= 0.5;
    if (spec_.ce_weight != 0.0) {
      at_label += outer * spec_.ce_weight * (1.0 - spec_.label_smoothing);
      if (spec_.label_smoothing != 0.0) {
        spread_ = outer * spec_.ce_weight * spec_.label_smoothing / sums_.live;
        uniform += spread_;
      }
    }
    const double ce = outer * (spec_.ce_weight + 2.0 * spec_.z_loss * lse_);
    const Slope k{static_cast<float>(divergence),
                  static_cast<float>(ce),
                  static_cast<float>(uniform),
                  static_cast<float>(1.0 / sums_.student),
                  static_cast<float>(1.0 / sums_.student_ce),
                  static_cast<float>(1.0 / sums_.teacher),
                  static_cast<float>(mean_)};
    for (int64_t block = 0; block < blocks_of(spec_.classes); ++block) {
      alignas(64) float out[kBlock + kLanes];
      write_block(block, k, static_cast<float>(at_label), out);
      store_grad_(grad, block * kBlock, out, length(block), call_.stream);
    }
    const int64_t bytes = bytes_of(call_.student_dtype);
    if (spec_.classes < call_.columns) {
      std::memset(grad + spec_.classes * bytes, 0, (call_.columns - spec_.classes) * bytes);
    }
  }

  void write_block(int64_t block, const Slope& k, float at_label, float* out) const {
    const int64_t at = block * kBlock;
    const int n = padded(length(block));
    Slope slope = k;
    if (kStudentExpectation<D>) {
      // The differences of the block are relative to its own references.
      slope.mean = mean_ + (static_cast<double>(sums_.student_ref) - keep_.student_ref[block]) -
                   (static_cast<double>(sums_.teacher_ref) - keep_.teacher_ref[block]);
    }
    slope_of_block<D, M>(keep_.a + at, keep_.b + at, keep_.c + at, n, slope, student_factor(block),
                         ce_factor(block), kHasTeacher<D> ? teacher_factor(block) : 0.0f, out);
    alignas(64) float buffer[kBlock];
    if (some_masked_) {
      // Masked classes take no share of the smoothing.
      const float* s = student_block(block, buffer);
      for (int i = 0; i < n; i += kLanes) {
        const IntVec live = load(s + i) > -__builtin_inff();
        store(out + i, select(live, load(out + i), Vec{}));
      }
    }
    if constexpr (is_listed(D)) {
      list_.template put<M>(block, list_factor_, k.ce * k.student_ce_inv, spread_, out);
    }
    if (at <= label_ && label_ < at + length(block)) out[label_ - at] -= at_label;
    if (spec_.student_softcap != 0.0) {
      const float* s = student_block(block, buffer);
      const float inv_cap = 1.0 / spec_.student_softcap;
      for (int i = 0; i < n; i += kLanes) {
        const Vec z = load(s + i);
        const Vec ratio = z * inv_cap;
        const Vec chain = fma(-ratio, ratio, splat(1.0f));
        store(out + i, select(z > -__builtin_inff(), load(out + i) * chain, Vec{}));
      }
    }
  }

  const KdLossCall& call_;
  const KdLossSpec& spec_;
  const double inv_t_;
  const LoadBlock load_student_, load_teacher_;
  const StoreBlock store_grad_;
  Blocks keep_;
  bool smooth_, some_masked_ = false;
  const char* student_ = nullptr;
  const char* teacher_ = nullptr;
  int64_t label_;
  Sums sums_;
  double lse_ = 0, mean_ = 0, share_ = 0, spike_ = 0, spread_ = 0, list_factor_ = 0;
  std::conditional_t<is_listed(D), List, NoList> list_;
};

template <Divergence D, Softmax M>
static void run_rows(const KdLossCall& call, int64_t begin, int64_t end, float* scratch,
                     RowTerms* terms) {
  Row<D, M> job(call, scratch);
  const int64_t bytes = bytes_of(call.student_dtype);
  for (int64_t row = begin; row < end; ++row) {
    if (call.labels != nullptr && call.labels[row] == call.spec.ignore_index) {
      terms[row] = {0, 0, 0};
      if (call.grad != nullptr) {
        std::memset(call.grad + row * call.grad_stride * bytes, 0, call.columns * bytes);
      }
      continue;
    }
    terms[row] = job.run(row);
  }
  if (call.stream) stream_fence();
}

// How a call's rows get the softmax of CE.
template <Divergence D>
static Softmax softmax_of(const KdLossSpec& spec) {
  const bool needs_ce = spec.needs_ce() || spec.z_loss != 0.0;
  if (D == Divergence::kNone || !needs_ce || spec.temperature == 1.0) return Softmax::kShared;
  return spec.temperature == 2.0 ? Softmax::kSquare : Softmax::kSeparate;
}

template <Divergence D>
static void with_softmax(const KdLossCall& call, int64_t begin, int64_t end, float* scratch,
                         RowTerms* terms) {
  switch (softmax_of<D>(call.spec)) {
    case Softmax::kShared:
      return run_rows<D, Softmax::kShared>(call, begin, end, scratch, terms);
    case Softmax::kSquare:
      return run_rows<D, Softmax::kSquare>(call, begin, end, scratch, terms);
    case Softmax::kSeparate:
      return run_rows<D, Softmax::kSeparate>(call, begin, end, scratch, terms);
  }
}

}  // namespace kd::KD_ISA
