// Blocks of a row of kd_loss: what is done to 1024 logits at a time. Part of kd_loss_row.h, hence
// compiled once per instruction set and without an include guard.

#include "common/logit_blocks.h"

namespace kd::KD_ISA {

constexpr float kTiny = 1.17549435e-38f;

// How the softmax of CE (temperature 1) follows from the one of the divergence (temperature T).
enum class Softmax { kShared, kSquare, kSeparate };

struct Blocks {
  float* a;            // exp of the student at T; JSD: its probability
  float* b;            // exp of the teacher; reverse KL: difference of logits; JSD: log ratio
  float* c;            // exp of the student at temperature 1, where a does not give it
  float* student_ref;  // per block: the maximum its exponentials are relative to
  float* teacher_ref;
};

struct Sums {
  float student_ref = -3.4028235e38f;  // finite: -inf - ref must stay -inf
  float teacher_ref = -3.4028235e38f;
  double student = 0, student_ce = 0, teacher = 0;
  double cross = 0;   // sum of exp * difference of logits, each less its reference
  double logits = 0;  // of classes that are not -inf, each less the reference
  int64_t live = 0;
};

// Where memory that will be needed soon lies; past the last row it is only asked for, never read.
struct Ahead {
  const char* student;
  const char* teacher;
  int64_t student_step, teacher_step;  // bytes an element
};

template <Divergence D>
constexpr bool kHasTeacher = Divergence::kForwardKl <= D && D <= Divergence::kTvd;
template <Divergence D>
constexpr bool kOwnEntropy = D == Divergence::kNegEntropy || D == Divergence::kListedEntropy;
template <Divergence D>
constexpr bool kStudentExpectation = D == Divergence::kReverseKl || kOwnEntropy<D>;
template <Divergence D>
constexpr bool kTwoStage = D == Divergence::kJsd || D == Divergence::kTvd;

// Pass 1 over one block; s and t are padded with -inf to whole vectors.
template <Divergence D, Softmax M, bool kKeep>
static void add_block(const float* s, const float* t, int n, Split at_t, Split at_1, Sums& sums,
                      float* a, float* b, float* c, Ahead ahead) {
  const Vec student_ref = splat(sums.student_ref);
  const Vec teacher_ref = splat(sums.teacher_ref);
  Vec student{}, student_ce{}, teacher{}, cross{};
  for (int i = 0; i < n; i += kLanes) {
    __builtin_prefetch(ahead.student + i * ahead.student_step);
    if constexpr (kHasTeacher<D>) __builtin_prefetch(ahead.teacher + i * ahead.teacher_step);
    const Vec ds = load(s + i) - student_ref;
    Mask student_live, teacher_live, live_at_1;
    const Vec es = exp2_scaled(ds, at_t, &student_live);
    student += es;
    if constexpr (kKeep) store(a + i, es);
    if constexpr (M == Softmax::kSquare) student_ce = fma(es, es, student_ce);
    if constexpr (M == Softmax::kSeparate) {
      const Vec e1 = exp2_scaled(ds, at_1, &live_at_1);
      student_ce += e1;
      if constexpr (kKeep) store(c + i, e1);
    }
    if constexpr (kOwnEntropy<D>) {
      cross = select(student_live, fma(es, ds, cross), cross);
      if constexpr (kKeep) store(b + i, ds);
    }
    if constexpr (kHasTeacher<D>) {
      const Vec dt = load(t + i) - teacher_ref;
      const Vec et = exp2_scaled(dt, at_t, &teacher_live);
      teacher += et;
      if constexpr (D == Divergence::kReverseKl) {
        const Vec difference = ds - dt;
        cross = select(student_live, fma(es, difference, cross), cross);
        if constexpr (kKeep) store(b + i, difference);
      } else {
        // A class without teacher mass adds nothing, also where a logit is -inf.
        if constexpr (D == Divergence::kForwardKl) {
          cross = select(teacher_live, fma(et, dt - ds, cross), cross);
        }
        if constexpr (D == Divergence::kSoftCe) {
          cross = select(teacher_live, fma(et, -ds, cross), cross);
        }
        if constexpr (kKeep) store(b + i, et);
      }
    }
  }
  sums.student += sum(student);
  if constexpr (M != Softmax::kShared) sums.student_ce += sum(student_ce);
  if constexpr (kHasTeacher<D>) sums.teacher += sum(teacher);
  if constexpr (kHasTeacher<D> || kOwnEntropy<D>) sums.cross += sum(cross);
}

// Sum and number of the logits that are not -inf: for smoothing and the virtual teacher.
static void add_logits(const float* s, int n, Sums& sums) {
  const Vec ref = splat(sums.student_ref);
  Vec total{};
  IntVec live{};
  for (int i = 0; i < n; i += kLanes) {
    const Vec z = load(s + i);
    const IntVec is_live = z > -__builtin_inff();
    total += select(is_live, z - ref, Vec{});
    live -= is_live;
  }
  sums.logits += sum(total);
  sums.live += static_cast<int64_t>(sum(__builtin_convertvector(live, Vec)));
}

// Rounds `n` floats to the dtype of the gradient.
template <typename Out>
static void store_block(char* row, int64_t column, const float* x, int n, bool past_cache) {
  Out* p = reinterpret_cast<Out*>(row) + column;
  using Word = std::conditional_t<std::is_same_v<Out, float>, float, uint16_t>;
  int i = 0;
  if (past_cache) {
    // A streaming store needs an aligned address.
    constexpr int64_t kBytes = kLanes * sizeof(Out);
    const int64_t off = reinterpret_cast<uintptr_t>(p) % kBytes;
    if (off != 0) {
      const int head = std::min<int64_t>(n, (kBytes - off) / sizeof(Out));
      store_first(p, load(x), head);
      i = head;
    }
    for (; i + kLanes <= n; i += kLanes) {
      stream(reinterpret_cast<Word*>(p + i), convert<Out>(load(x + i)));
    }
  } else {
    for (; i + kLanes <= n; i += kLanes) store_first(p + i, load(x + i), kLanes);
  }
  if (i < n) store_first(p + i, load(x + i), n - i);
}

// By dtype, as LoadBlock.
using StoreBlock = void (*)(char*, int64_t, const float*, int, bool);

static StoreBlock storer(Dtype dtype) {
  if (dtype == Dtype::kBf16) return &store_block<Bf16>;
  if (dtype == Dtype::kHalf) return &store_block<Half>;
  return &store_block<float>;
}

// What pass 2 needs of pass 1, with all factors of the row folded in.
struct Slope {
  float divergence;                                // factor of the divergence's part
  float ce;                                        // factor of the softmax at temperature 1
  float uniform;                                   // constant subtracted from every live class
  float student_inv, student_ce_inv, teacher_inv;  // 1 / sum of exponentials
  float mean;  // expectation to subtract inside the divergence's part
};

// exp((ref of the block - final ref) / T): 1 for blocks that saw the row's maximum.
static inline float rescale(float block_ref, float final_ref, double inv_temperature) {
  if (block_ref == final_ref) return 1.0f;
  return static_cast<float>(
      std::exp((static_cast<double>(block_ref) - final_ref) * inv_temperature));
}

// Pass 2 over one block: the gradient for the (scaled, capped) student logits, as floats.
template <Divergence D, Softmax M>
static void slope_of_block(const float* a, const float* b, const float* c, int n, const Slope& k,
                           float to_student, float to_ce, float to_teacher, float* out) {
  // Where the difference of probabilities is the gradient, its factor goes into both normalisers:
  // equal terms still cancel exactly.
  constexpr bool kDifference = D == Divergence::kForwardKl || D == Divergence::kSoftCe;
  const float outer = kDifference ? k.divergence : 1.0f;
  const Vec student = splat(k.student_inv * to_student * outer);
  const Vec teacher = splat(k.teacher_inv * to_teacher * outer);
  const Vec ce = splat(k.student_ce_inv * to_ce * k.ce);
  const Vec uniform = splat(k.uniform), mean = splat(k.mean);
  for (int i = 0; i < n; i += kLanes) {
    const Vec es = load(a + i);
    Vec g = -uniform;
    if constexpr (D != Divergence::kNone) {
      const Vec ps = D == Divergence::kJsd ? es : es * student;
      Vec part = ps;
      if constexpr (kDifference) part = ps - load(b + i) * teacher;
      if constexpr (kStudentExpectation<D>) {
        part = select(es > 0.0f, ps * (load(b + i) - mean), Vec{});
      }
      if constexpr (D == Divergence::kJsd) part = ps * (load(b + i) - mean);
      if constexpr (D == Divergence::kTvd) {
        const Vec difference = ps - load(b + i) * teacher;
        const Vec sign =
            select(difference > 0.0f, splat(1.0f), select(difference < 0.0f, splat(-1.0f), Vec{}));
        part = ps * (sign - mean);
      }
      g += kDifference ? part : part * k.divergence;
    }
    if constexpr (M == Softmax::kShared) g = fma(es, ce, g);
    if constexpr (M == Softmax::kSquare) g = fma(es * es, ce, g);
    if constexpr (M == Softmax::kSeparate) g = fma(load(c + i), ce, g);
    store(out + i, g);
  }
}

// The pass between for JSD and TVD. JSD leaves probability and log ratio in scratch.
template <Divergence D>
static void middle_block(float* a, float* b, int n, float to_student, float to_teacher, float beta,
                         double* student_part, double* teacher_part) {
  const Vec student = splat(to_student), teacher = splat(to_teacher);
  Vec first{}, second{};
  for (int i = 0; i < n; i += kLanes) {
    const Vec ps = load(a + i) * student;
    const Vec pt = load(b + i) * teacher;
    const Vec difference = ps - pt;
    if constexpr (D == Divergence::kTvd) {
      first += select(difference < 0.0f, -difference, difference);
      const Vec sign =
          select(difference > 0.0f, splat(1.0f), select(difference < 0.0f, splat(-1.0f), Vec{}));
      second = fma(ps, sign, second);
    } else {
      const Vec tiny = splat(kTiny);
      const Vec mixture = max(ps - beta * difference, tiny);
      // True divisions: p / p is exactly 1, p * (1 / p) is not.
      const Vec log_student = log(max(ps, tiny) / mixture);
      const Vec log_teacher = log(max(pt, tiny) / mixture);
      first = fma(ps, log_student, first);
      second = fma(pt, log_teacher, second);
      store(a + i, ps);
      store(b + i, log_student);
    }
  }
  *student_part += sum(first);
  *teacher_part += sum(second);
}

}  // namespace kd::KD_ISA
