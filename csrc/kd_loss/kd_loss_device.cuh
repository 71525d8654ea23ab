// The arithmetic of one row of kd_loss on the GPU: what a thread does with the logits it is given.
// Where they come from and go to is the kernel's matter (kd_loss_kernel.cuh).
//
// Exponents are in units of log2: a = c * (z - m) with c = log2(e) / T and m the largest z seen so
// far, so that a softmax is 2^a over its sum. (One fma(c, z, -c * m) would be cheaper, but then the
// largest exponent is not exactly 0: a row that is sure of its label would have a loss of rounding
// errors, also negative.) A class without mass (p = 0, as for a logit of -inf) adds nothing to an
// expectation: 0 * inf never happens. Student and teacher go through the same rounded operations
// (explicit mul, which the compiler does not contract), so that equal models give a divergence and
// a gradient of exactly 0.
#pragma once

#include "common/logits.cuh"
#include "common/reduce.cuh"
#include "kd_loss/kd_loss_plan.h"

namespace kd {

// How CE, which is at temperature 1, gets its softmax from the exponents at T.
enum class Heat { kSame, kSquared, kOther };

// The numbers of a call, as floats.
struct RowNumbers {
  LogitRule student, teacher;
  Heat heat;
  bool want_ce, want_z, want_sums;  // sums: over the live logits, for smoothing, SPIKE, UNIFORM
  bool reverse;                     // which KL from a list
  Tail tail;                        // of a list
  float temperature, beta, one_minus_beta;
  float ce_weight, kd_weight, z_loss, smoothing;
};

inline RowNumbers row_numbers(const KdLossSpec& spec) {
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
  n.want_sums =
      n.smoothing != 0.0f || spec.divergence == Divergence::kSpike || spec.tail == Tail::kUniform;
  n.reverse = spec.reverse();
  n.tail = spec.tail;
  return n;
}

// dz/dx where z is not x; 0 for a logit that is -inf.
__device__ __forceinline__ float slope(const LogitRule& rule, float z) {
  const float y = z * rule.per_softcap;
  return z == kMinusInf ? 0.0f : rule.scale * fmaf(-y, y, 1.0f);
}

// What the logits seen so far add up to; also the form in which warps and blocks exchange it.
struct alignas(16) RowStats {
  float student_max = kLowest, student_sum = 0.0f;
  float teacher_max = kLowest, teacher_sum = 0.0f;
  float cross = 0.0f;         // the unnormalised expectation of D, see add()
  float hard_sum = 0.0f;      // student_sum at temperature 1, where that is another
  float live = 0.0f;          // student's logits that are not -inf
  float exponent_sum = 0.0f;  // of those
};

// Two sums of the middle pass.
struct alignas(16) RowSums {
  float loss = 0.0f;  // D, up to a constant factor
  float mean = 0.0f;  // expectation under the student of what its gradient is relative to
  float unused[2] = {};
};

static_assert(sizeof(RowStats) == kKdLossStatsBytes && sizeof(RowSums) == kKdLossSumsBytes);

template <Divergence kD>
struct RowMath {
  static constexpr bool kTeacher = Divergence::kForwardKl <= kD && kD <= Divergence::kTvd;
  static constexpr bool kMiddle = has_middle_pass(kD);
  static constexpr bool kEntropy =
      kD == Divergence::kNegEntropy || kD == Divergence::kListedEntropy;

  // ---- first pass: maxima, sums, expectations -----------------------------------------------

  // Makes the sums relative to other maxima, none lower than its own.
  __device__ static __forceinline__ void rebase(const RowNumbers& n, RowStats& s, float student_max,
                                                float teacher_max) {
    const float ds = exponent(n.student, s.student_max, student_max);
    const float dt = kTeacher ? exponent(n.teacher, s.teacher_max, teacher_max) : 0.0f;
    const float fs = exp2_approx(ds);
    const float ft = kTeacher ? exp2_approx(dt) : 0.0f;
    if constexpr (kD == Divergence::kForwardKl) {
      s.cross = ft > 0.0f ? ft * fmaf(s.teacher_sum, dt - ds, s.cross) : 0.0f;
    } else if constexpr (kD == Divergence::kSoftCe) {
      s.cross = ft > 0.0f ? ft * fmaf(s.teacher_sum, ds, s.cross) : 0.0f;
    } else if constexpr (kD == Divergence::kReverseKl) {
      s.cross = fs > 0.0f ? fs * fmaf(s.student_sum, ds - dt, s.cross) : 0.0f;
    } else if constexpr (kEntropy) {
      s.cross = fs > 0.0f ? fs * fmaf(s.student_sum, ds, s.cross) : 0.0f;
    }
    s.student_sum = __fmul_rn(s.student_sum, fs);
    if constexpr (kTeacher) s.teacher_sum = __fmul_rn(s.teacher_sum, ft);
    if (n.heat != Heat::kSame) s.hard_sum *= exp2_approx(n.temperature * ds);
    if (n.want_sums) s.exponent_sum = fmaf(s.live, ds, s.exponent_sum);
    s.student_max = student_max;
    if constexpr (kTeacher) s.teacher_max = teacher_max;
  }

  // Adds a vector of classes; logits that are -inf add nothing.
  template <int kSize>
  __device__ static __forceinline__ void add(const RowNumbers& n, RowStats& s,
                                             const float (&student)[kSize],
                                             const float (&teacher)[kSize]) {
    float zs = student[0], zt = kTeacher ? teacher[0] : 0.0f;
#pragma unroll
    for (int i = 1; i < kSize; ++i) {
      zs = fmaxf(zs, student[i]);
      if constexpr (kTeacher) zt = fmaxf(zt, teacher[i]);
    }
    if (zs > s.student_max || (kTeacher && zt > s.teacher_max)) {
      rebase(n, s, fmaxf(zs, s.student_max), fmaxf(zt, s.teacher_max));
    }
    float exps[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float as = exponent(n.student, student[i], s.student_max);
      const float es = exp2_approx(as);
      exps[i] = es;
      s.student_sum = __fadd_rn(s.student_sum, es);
      if constexpr (kTeacher) {
        const float at = exponent(n.teacher, teacher[i], s.teacher_max);
        const float et = exp2_approx(at);
        s.teacher_sum = __fadd_rn(s.teacher_sum, et);
        if constexpr (kD == Divergence::kForwardKl) {
          if (et > 0.0f) s.cross = fmaf(et, at - as, s.cross);
        } else if constexpr (kD == Divergence::kSoftCe) {
          if (et > 0.0f) s.cross = fmaf(et, as, s.cross);
        } else if constexpr (kD == Divergence::kReverseKl) {
          if (es > 0.0f) s.cross = fmaf(es, as - at, s.cross);
        }
      } else if constexpr (kEntropy) {
        if (es > 0.0f) s.cross = fmaf(es, as, s.cross);
      }
    }
    if (n.heat == Heat::kSquared) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) s.hard_sum = fmaf(exps[i], exps[i], s.hard_sum);
    } else if (n.heat == Heat::kOther) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        s.hard_sum += exp2_approx(n.temperature * exponent(n.student, student[i], s.student_max));
      }
    }
    if (n.want_sums) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (student[i] > kMinusInf) {
          s.live += 1.0f;
          s.exponent_sum += exponent(n.student, student[i], s.student_max);
        }
      }
    }
  }

  // Makes room for a logit that is met by itself.
  __device__ static __forceinline__ void raise(const RowNumbers& n, RowStats& s, float z) {
    if (z > s.student_max) rebase(n, s, z, s.teacher_max);
  }

  __device__ static __forceinline__ RowStats across_warp(const RowNumbers& n, RowStats s) {
    rebase(n, s, warp_max(s.student_max), kTeacher ? warp_max(s.teacher_max) : kLowest);
    s.student_sum = warp_sum(s.student_sum);
    if constexpr (kTeacher) s.teacher_sum = warp_sum(s.teacher_sum);
    if constexpr (kTeacher ? !kMiddle : kEntropy) {
      s.cross = warp_sum(s.cross);
    }
    if (n.heat != Heat::kSame) s.hard_sum = warp_sum(s.hard_sum);
    if (n.want_sums) {
      s.live = warp_sum(s.live);
      s.exponent_sum = warp_sum(s.exponent_sum);
    }
    return s;
  }

  // ---- the row as a whole ---------------------------------------------------------------------

  RowStats s;
  float student_log, teacher_log;  // log2 of the sums
  float hard_log;                  // of the sum at temperature 1
  float lse;                       // natural, temperature 1
  float at_label, share;           // SPIKE's teacher: on the label, on each other live class
  float per_student, per_teacher;  // 1 / sum, for the middle pass
  float expectation;               // under the student, of what the gradient is relative to

  __device__ __forceinline__ RowMath(const RowNumbers& n, const RowStats& stats) : s(stats) {
    student_log = log2f(s.student_sum);
    teacher_log = kTeacher ? log2f(s.teacher_sum) : 0.0f;
    hard_log = n.heat == Heat::kSame ? student_log : log2f(s.hard_sum);
    lse = fmaf(n.student.natural, s.student_max, kLn2 * hard_log);
    if constexpr (kD == Divergence::kSpike) {
      const float others = s.live - 1.0f;
      share = others > 0.0f ? n.one_minus_beta / others : 0.0f;
      at_label = others > 0.0f ? n.beta : 1.0f;
    } else {
      share = at_label = 0.0f;
    }
    per_student = kMiddle ? 1.0f / s.student_sum : 0.0f;
    per_teacher = kMiddle ? 1.0f / s.teacher_sum : 0.0f;
    expectation = 0.0f;
    if constexpr (kD == Divergence::kReverseKl || kD == Divergence::kNegEntropy) {
      expectation = s.cross / s.student_sum;
    }
  }

  // CE of the row; z is the label's logit.
  __device__ __forceinline__ float cross_entropy(const RowNumbers& n, float z) const {
    const float hard = fmaf(n.student.natural, s.student_max - z, kLn2 * hard_log);
    if (n.smoothing == 0.0f) return hard;
    const float spread = kLn2 * (hard_log - n.temperature * s.exponent_sum / s.live);
    return fmaf(1.0f - n.smoothing, hard, n.smoothing * spread);
  }

  // D of the row; z is the label's logit, middle the sums of the middle pass.
  __device__ __forceinline__ float divergence(const RowNumbers& n, float z,
                                              const RowSums& middle) const {
    if constexpr (kD == Divergence::kForwardKl) {
      return kLn2 * (s.cross / s.teacher_sum - (teacher_log - student_log));
    } else if constexpr (kD == Divergence::kSoftCe) {
      return kLn2 * (student_log - s.cross / s.teacher_sum);
    } else if constexpr (kD == Divergence::kReverseKl) {
      return kLn2 * (expectation - (student_log - teacher_log));
    } else if constexpr (kD == Divergence::kNegEntropy) {
      return kLn2 * (expectation - student_log);
    } else if constexpr (kD == Divergence::kJsd) {
      return kLn2 * middle.loss;
    } else if constexpr (kD == Divergence::kTvd) {
      return 0.5f * middle.loss;
    } else if constexpr (kD == Divergence::kSpike) {
      const float a = exponent(n.student, z, s.student_max);
      const float log_label = kLn2 * (a - student_log);
      const float log_sum = kLn2 * fmaf(-s.live, student_log, s.exponent_sum);
      float entropy = at_label > 0.0f ? at_label * logf(at_label) : 0.0f;
      if (share > 0.0f) entropy = fmaf((s.live - 1.0f) * share, logf(share), entropy);
      // The label's own part only where it counts: its log may be -inf.
      const float excess = at_label - share;
      return entropy - (excess != 0.0f ? excess * log_label : 0.0f) - share * log_sum;
    } else {
      return 0.0f;
    }
  }

  // ---- middle pass (JSD, TVD): what needs normalised probabilities -----------------------------

  // log2(p_s / m) for m = (1 - beta) p_s + beta p_t, from d = log2(p_t / p_s), as
  // -log2(1 - beta + beta 2^d): one exponential and one logarithm, no division, exactly 0 for
  // d = 0, and finite for every d after the clamp (NaN: no mass in either, becomes finite too).
  __device__ static __forceinline__ float clamped(float d) {
    constexpr float kFar = 115.0f;
    return fminf(fmaxf(d, -kFar), kFar);
  }
  __device__ static __forceinline__ float log_share(const RowNumbers& n, float d) {
    return -log2_approx(fmaf(n.beta, exp2_approx(d), n.one_minus_beta));
  }

  template <int kSize>
  __device__ __forceinline__ void add_middle(const RowNumbers& n, RowSums& sums,
                                             const float (&student)[kSize],
                                             const float (&teacher)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float as = exponent(n.student, student[i], s.student_max);
      const float at = exponent(n.teacher, teacher[i], s.teacher_max);
      const float ps = __fmul_rn(exp2_approx(as), per_student);
      const float pt = __fmul_rn(exp2_approx(at), per_teacher);
      if constexpr (kD == Divergence::kJsd) {
        const float d = clamped((at - as) - (teacher_log - student_log));
        const float r = log_share(n, d);
        const float weighted = ps * r;
        sums.mean += weighted;
        sums.loss = fmaf(n.one_minus_beta, weighted, sums.loss);
        sums.loss = fmaf(n.beta * pt, d + r, sums.loss);
      } else {
        const float d = __fsub_rn(ps, pt);
        sums.loss += fabsf(d);
        sums.mean += d > 0.0f ? ps : d < 0.0f ? -ps : 0.0f;
      }
    }
  }

  __device__ static __forceinline__ RowSums sums_across_warp(RowSums sums) {
    sums.loss = warp_sum(sums.loss);
    sums.mean = warp_sum(sums.mean);
    return sums;
  }

  // ---- last pass: the gradient ------------------------------------------------------------------

  struct Slope {
    float student, teacher;  // of the exponentials at T, in D
    float hard;              // of the exponentials at temperature 1, in CE and z-loss
    float spread;            // off every live class
    float label;             // off the label's class
    float list, smoothing;   // of D's gradient, and off, a listed class
  };

  // The constants of the gradient of `factor * row`.
  __device__ __forceinline__ Slope slopes(const RowNumbers& n, float factor) const {
    if (n.student.plain) factor *= n.student.scale;
    const float soft = factor * n.kd_weight / n.temperature;
    const float ce = factor * n.ce_weight;
    Slope g{};
    g.student = soft / s.student_sum;
    if constexpr (kD == Divergence::kForwardKl || kD == Divergence::kSoftCe) {
      g.teacher = soft / s.teacher_sum;
    } else if constexpr (kD == Divergence::kReverseKl || kEntropy) {
      g.student *= kLn2;
    } else if constexpr (kD == Divergence::kJsd) {
      g.student *= kLn2 * n.one_minus_beta;
    } else if constexpr (kD == Divergence::kTvd) {
      g.student *= 0.5f;
    }
    const float hard_sum = n.heat == Heat::kSame ? s.student_sum : s.hard_sum;
    g.hard = (ce + (n.want_z ? 2.0f * factor * n.z_loss * lse : 0.0f)) / hard_sum;
    g.spread = soft * share + (n.smoothing != 0.0f ? ce * n.smoothing / s.live : 0.0f);
    g.label = soft * (at_label - share) + ce * (1.0f - n.smoothing);
    g.list = soft;
    g.smoothing = g.spread;
    return g;
  }

  // The gradient for a vector of x, except for what the label's class has more.
  template <int kSize>
  __device__ __forceinline__ void gradient(const RowNumbers& n, const Slope& g,
                                           const float (&student)[kSize],
                                           const float (&teacher)[kSize],
                                           float (&out)[kSize]) const {
    float exps[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float as = exponent(n.student, student[i], s.student_max);
      const float es = exps[i] = exp2_approx(as);
      float at = 0.0f;
      if constexpr (kTeacher) at = exponent(n.teacher, teacher[i], s.teacher_max);
      if constexpr (kD == Divergence::kForwardKl || kD == Divergence::kSoftCe) {
        out[i] = __fsub_rn(__fmul_rn(g.student, es), __fmul_rn(g.teacher, exp2_approx(at)));
      } else if constexpr (kD == Divergence::kReverseKl) {
        out[i] = es > 0.0f ? g.student * es * ((as - at) - expectation) : 0.0f;
      } else if constexpr (kEntropy) {
        out[i] = es > 0.0f ? g.student * es * (as - expectation) : 0.0f;
      } else if constexpr (kD == Divergence::kJsd) {
        const float d = clamped((at - as) - (teacher_log - student_log));
        out[i] = g.student * es * (log_share(n, d) - expectation);
      } else if constexpr (kD == Divergence::kTvd) {
        const float ps = __fmul_rn(es, per_student);
        const float pt = __fmul_rn(exp2_approx(at), per_teacher);
        const float sign = ps > pt ? 1.0f : ps < pt ? -1.0f : 0.0f;
        out[i] = g.student * es * (sign - expectation);
      } else if constexpr (kD == Divergence::kSpike || kD == Divergence::kListed) {
        out[i] = g.student * es;
      } else {
        out[i] = 0.0f;
      }
    }
    if (g.hard != 0.0f) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        float e = exps[i];
        if (n.heat == Heat::kSquared) {
          e *= e;
        } else if (n.heat == Heat::kOther) {
          e = exp2_approx(n.temperature * exponent(n.student, student[i], s.student_max));
        }
        out[i] = fmaf(g.hard, e, out[i]);
      }
    }
    if (g.spread != 0.0f) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (student[i] > kMinusInf) out[i] -= g.spread;
      }
    }
  }
};

// Makes what RowMath gives of a vector of z the gradient for the stored logits: takes `label` off
// the class `labelled`, where it is here, and allows for scale and soft-cap.
template <int kSize>
__device__ __forceinline__ void finish_gradient(const RowNumbers& n, int first, int labelled,
                                                float label, const float (&z)[kSize],
                                                float (&g)[kSize]) {
  if (first <= labelled && labelled < first + kSize) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (first + i == labelled) g[i] -= label;
    }
  }
  if (!n.student.plain) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) g[i] *= slope(n.student, z[i]);
  }
}

}  // namespace kd
