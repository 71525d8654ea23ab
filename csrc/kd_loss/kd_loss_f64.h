// One row of kd_loss in float64, element by element: for gradient checks, not for speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kd_loss/kd_loss_cpu.h"

namespace kd {

class RowF64 {
 public:
  explicit RowF64(const KdLossCall& call)
      : spec_(call.spec), columns_(call.columns), z_(call.spec.classes), t_(z_), log_s_(z_) {
    if (needs_teacher(spec_.divergence)) log_t_.resize(z_.size());
  }

  // `student` and `teacher` hold the logits of one row as doubles; `grad` is null or [columns].
  RowTerms run(const double* student, const double* teacher, int64_t label, double weight,
               double* grad) {
    transform(student, spec_.student_scale, spec_.student_softcap, &z_);
    const double lse = log_softmax(z_, 1.0, &log_s_);
    const int64_t live = std::count_if(z_.begin(), z_.end(), [](double z) { return z > -kInf; });
    std::vector<double> slope(z_.size(), 0.0);
    RowTerms terms{0, 0, spec_.z_loss != 0.0 ? lse * lse : 0.0};
    for (size_t i = 0; i < z_.size(); ++i) {
      slope[i] = (spec_.ce_weight + 2.0 * spec_.z_loss * lse) * std::exp(log_s_[i]);
    }
    if (spec_.needs_ce()) {
      const double eps = spec_.label_smoothing;
      double uniform = 0.0;
      for (size_t i = 0; i < z_.size(); ++i) {
        if (z_[i] == -kInf) continue;
        uniform -= log_s_[i] / live;
        slope[i] -= spec_.ce_weight * eps / live;
      }
      terms.ce = -(1.0 - eps) * log_s_[label] + (eps != 0.0 ? eps * uniform : 0.0);
      slope[label] -= spec_.ce_weight * (1.0 - eps);
    }
    if (spec_.divergence != Divergence::kNone) {
      terms.divergence = divergence(teacher, label, live, &slope);
    }
    if (grad != nullptr) write(slope, weight, grad);
    return terms;
  }

 private:
  static constexpr double kInf = std::numeric_limits<double>::infinity();

  static void transform(const double* x, double scale, double cap, std::vector<double>* z) {
    for (size_t i = 0; i < z->size(); ++i) {
      double v = x[i] * scale;
      if (cap != 0.0 && v != -kInf) v = cap * std::tanh(v / cap);
      (*z)[i] = v;
    }
  }

  static double log_softmax(const std::vector<double>& z, double inv_t, std::vector<double>* out) {
    const double top = *std::max_element(z.begin(), z.end());
    double total = 0.0;
    for (double v : z) total += std::exp((v - top) * inv_t);
    const double lse = top * inv_t + std::log(total);
    for (size_t i = 0; i < z.size(); ++i) (*out)[i] = z[i] * inv_t - lse;
    return lse;
  }

  // Value of D; adds kd_weight * dD/dz to `slope`.
  double divergence(const double* teacher, int64_t label, int64_t live,
                    std::vector<double>* slope) {
    const double inv_t = 1.0 / spec_.temperature;
    const double factor = spec_.kd_weight * inv_t;
    log_softmax(z_, inv_t, &log_s_);
    if (needs_teacher(spec_.divergence)) {
      transform(teacher, spec_.teacher_scale, spec_.teacher_softcap, &t_);
      log_softmax(t_, inv_t, &log_t_);
    }
    // dD/dz = p * (u - sum p u) for u = dD/dp, or p - target for the cross-entropies.
    double value = 0.0, mean = 0.0;
    std::vector<double> u(z_.size(), 0.0);
    const double others = live - 1;
    const double at_label = others > 0 ? spec_.beta : 1.0;
    const double share = others > 0 ? (1.0 - spec_.beta) / others : 0.0;
    for (size_t i = 0; i < z_.size(); ++i) {
      const double ls = log_s_[i], ps = std::exp(ls);
      if (spec_.divergence == Divergence::kSpike) {
        if (z_[i] == -kInf) continue;
        const double target = static_cast<int64_t>(i) == label ? at_label : share;
        value += target > 0.0 ? target * (std::log(target) - ls) : 0.0;
        (*slope)[i] += factor * (ps - target);
      } else if (spec_.divergence == Divergence::kNegEntropy) {
        u[i] = ps > 0.0 ? ls : 0.0;
        value += ps * u[i];
      } else {
        value += teacher_term(ls, log_t_[i], &u[i]);
        if (spec_.divergence <= Divergence::kSoftCe) {
          (*slope)[i] += factor * (ps - std::exp(log_t_[i]));
        }
      }
      mean += ps * u[i];
    }
    for (size_t i = 0; i < z_.size(); ++i) {
      (*slope)[i] += factor * std::exp(log_s_[i]) * (u[i] - mean);
    }
    return value;
  }

  // One class's share of D, and the derivative that is not of the form p - target.
  double teacher_term(double ls, double lt, double* u) const {
    const double ps = std::exp(ls), pt = std::exp(lt);
    switch (spec_.divergence) {
      case Divergence::kForwardKl:
        return pt > 0.0 ? pt * (lt - ls) : 0.0;
      case Divergence::kSoftCe:
        return pt > 0.0 ? -pt * ls : 0.0;
      case Divergence::kReverseKl:
        *u = ps > 0.0 ? ls - lt : 0.0;
        return ps * *u;
      case Divergence::kTvd:
        *u = ps > pt ? 0.5 : ps < pt ? -0.5 : 0.0;
        return 0.5 * std::abs(ps - pt);
      default: {  // JSD
        const double tiny = std::numeric_limits<double>::min();
        const double mixture = std::max(ps + spec_.beta * (pt - ps), tiny);
        const double to_student = std::log(std::max(ps, tiny) / mixture);
        const double to_teacher = std::log(std::max(pt, tiny) / mixture);
        *u = (1.0 - spec_.beta) * to_student;
        return spec_.beta * pt * to_teacher + (1.0 - spec_.beta) * ps * to_student;
      }
    }
  }

  void write(const std::vector<double>& slope, double weight, double* grad) const {
    const double cap = spec_.student_softcap;
    for (size_t i = 0; i < z_.size(); ++i) {
      double chain = spec_.student_scale * weight;
      if (cap != 0.0) chain *= z_[i] == -kInf ? 0.0 : 1.0 - (z_[i] / cap) * (z_[i] / cap);
      grad[i] = slope[i] * chain;
    }
    std::fill(grad + z_.size(), grad + columns_, 0.0);
  }

  const KdLossSpec& spec_;
  const int64_t columns_;
  std::vector<double> z_, t_, log_s_, log_t_;
};

}  // namespace kd
