// The list of a sparse teacher's row. Part of kd_loss_row.h, hence compiled once per instruction
// set and without an include guard.
//
// The listed classes are taken out of the blocks that pass 1 sums, so that the student's mass
// outside of the list is a sum and not a difference from 1. They are then met one by one.

namespace kd::KD_ISA {

struct NoList {
  explicit NoList(const KdLossCall&) {}
};

class List {
 public:
  explicit List(const KdLossCall& call)
      : call_(call), first_(blocks_of(call.spec.classes)), next_(call.topk), id_(call.topk) {
    const int64_t padded = (call.topk + kLanes - 1) / kLanes * kLanes;
    for (auto* values : {&z_, &log_p_, &p_, &e_, &slope_}) values->resize(padded);
  }

  // Reads the row's list: without padding, and of a repeated class the first entry.
  void open(int64_t row) {
    const int64_t* ids = call_.topk_ids + row * call_.topk;
    const float* logprobs = call_.topk_logprobs + row * call_.topk;
    std::fill(first_.begin(), first_.end(), -1);
    size_ = 0;
    for (int64_t k = 0; k < call_.topk; ++k) {
      const int64_t id = ids[k];
      if (id < 0 || listed(id)) continue;
      id_[size_] = id;
      log_p_[size_] = logprobs[k];
      next_[size_] = first_[id / kBlock];
      first_[id / kBlock] = size_++;
    }
    max_ = -__builtin_inff();
  }

  // The block without its listed classes, whose logits are kept.
  const float* take(int64_t block, const float* s, int n, float* buffer) {
    if (first_[block] < 0) return s;
    if (s != buffer) std::memcpy(buffer, s, n * sizeof(float));
    for (int i = first_[block]; i >= 0; i = next_[i]) {
      float& z = buffer[id_[i] - block * kBlock];
      z_[i] = z;
      max_ = std::max(max_, z);
      z = -__builtin_inff();
    }
    return buffer;
  }

  float max_logit() const { return max_; }

  // Adds the listed classes to the sums over the others; from both follow D and its gradient.
  template <Softmax M>
  void meet(Sums& sums, double inv_t) {
    const double tail = sums.student, tail_live = sums.live;
    const double tail_logits = sums.logits, tail_cross = sums.cross;
    exponentials(sums.student_ref, inv_t);
    for (int i = 0; i < size_; ++i) {
      const double z = static_cast<double>(z_[i]) - sums.student_ref;
      sums.student += e_[i];
      if (M == Softmax::kSquare) sums.student_ce += e_[i] * e_[i];
      if (M == Softmax::kSeparate) sums.student_ce += std::exp(z);
      if (z_[i] > -__builtin_inff()) {
        sums.logits += z;
        sums.live += 1;
      }
    }
    ref_ = sums.student_ref;
    inv_t_ = inv_t;
    per_total_ = 1.0 / sums.student;
    log_total_ = std::log(sums.student);
    // Of the classes outside: the student's mass, and sums of log q and of q log q.
    tail_q_ = tail * per_total_;
    tail_live_ = tail_live;
    const double tail_log_q = tail_logits * inv_t - tail_live * log_total_;
    const double tail_entropy = tail_cross * inv_t * per_total_ - tail_q_ * log_total_;
    teacher_mass();
    tail_slope_ = tail_uniform_ = tail_mean_ = 0.0;
    if (call_.spec.reverse()) {
      reverse(tail_entropy);
    } else {
      forward(tail_log_q);
    }
  }

  double divergence() const { return divergence_; }
  // The gradient of D for z / T of a class outside: slope * q - uniform, or with kListedEntropy
  // q * (z - mean) / T for z relative to the reference.
  double tail_slope() const { return tail_slope_; }
  double tail_uniform() const { return tail_uniform_; }
  double tail_mean() const { return tail_mean_; }

  // Writes the gradients of a block's listed classes over what stands there.
  template <Softmax M>
  void put(int64_t block, double factor, double ce, double spread, float* out) const {
    for (int i = first_[block]; i >= 0; i = next_[i]) {
      const double e = e_[i];
      double hard = e;
      if (M == Softmax::kSquare) hard = e * e;
      if (M == Softmax::kSeparate) hard = std::exp(static_cast<double>(z_[i]) - ref_);
      const double shared = z_[i] > -__builtin_inff() ? spread : 0.0;
      out[id_[i] - block * kBlock] = factor * slope_[i] + ce * hard - shared;
    }
  }

 private:
  bool listed(int64_t id) const {
    for (int i = first_[id / kBlock]; i >= 0; i = next_[i]) {
      if (id_[i] == id) return true;
    }
    return false;
  }

  // p of the teacher and exp((z - ref) / T) of the student.
  void exponentials(float ref, double inv_t) {
    const Split at_t = split(kLog2E * inv_t), at_1 = split(kLog2E);
    Mask live;
    for (int i = 0; i < size_; i += kLanes) {
      store(&e_[i], exp2_scaled(load(&z_[i]) - ref, at_t, &live));
      store(&p_[i], exp2_scaled(load(&log_p_[i]), at_1, &live));
    }
  }

  // The teacher's listed mass, at most 1, and what is left of it.
  void teacher_mass() {
    double mass = 0;
    for (int i = 0; i < size_; ++i) mass += p_[i];
    const bool others = size_ < call_.spec.classes;
    rest_ = others ? std::max(0.0, 1.0 - mass) : 0.0;
    const double divisor = std::max(mass, 1.0);
    mass_ = mass / divisor;
    per_divisor_ = 1.0 / divisor;
    log_divisor_ = std::log(divisor);
  }

  double p(int i) const { return p_[i] * per_divisor_; }
  double log_p(int i) const { return log_p_[i] - log_divisor_; }
  double q(int i) const { return e_[i] * per_total_; }
  double log_q(int i) const { return (static_cast<double>(z_[i]) - ref_) * inv_t_ - log_total_; }

  void forward(double tail_log_q) {
    const Tail kind = call_.spec.tail;
    double listed_q = 0, value = 0;
    for (int i = 0; i < size_; ++i) {
      listed_q += q(i);
      if (p_[i] > 0) value += p(i) * (log_p(i) - log_q(i));
    }
    double of_q = mass_, of_p = 1.0;  // gradient of a listed class: of_q * q - of_p * p
    if (kind == Tail::kRenorm) {
      of_q = of_p = 0.0;
      if (mass_ > 0) {
        value = value / mass_ + std::log(listed_q) - std::log(mass_);
        of_q = 1.0 / listed_q;
        of_p = 1.0 / mass_;
      } else {
        value = 0.0;
      }
    } else if (kind == Tail::kNone) {
      tail_slope_ = mass_;
    } else {
      of_q = tail_slope_ = mass_ + rest_;
      if (kind == Tail::kBucket && rest_ > 0) {
        value += rest_ * (std::log(rest_) - std::log(tail_q_));
        tail_slope_ = tail_q_ > 0 ? tail_slope_ - rest_ / tail_q_ : 0.0;
      } else if (kind == Tail::kUniform && rest_ > 0) {
        const double each = tail_live_ > 0 ? rest_ / tail_live_ : 0.0;
        value += tail_live_ > 0 ? rest_ * std::log(each) - each * tail_log_q : __builtin_inf();
        tail_uniform_ = each;
      }
    }
    for (int i = 0; i < size_; ++i) slope_[i] = of_q * q(i) - of_p * p(i);
    divergence_ = value;
  }

  void reverse(double tail_entropy) {
    const Tail kind = call_.spec.tail;
    const double log_rest = std::log(std::max(rest_, kLeastTail));
    double listed_q = 0, value = 0;
    for (int i = 0; i < size_; ++i) {
      listed_q += q(i);
      if (e_[i] > 0) value += q(i) * (log_q(i) - log_p(i));
    }
    double scale = 1.0, mean;  // gradient of a listed class: scale * q * (log q - log p - mean)
    if (kind == Tail::kRenorm) {
      scale = listed_q > 0 ? 1.0 / listed_q : 0.0;
      value *= scale;
      mean = value;
      if (scale > 0) value -= std::log(listed_q) - std::log(mass_);
    } else if (kind == Tail::kNone) {
      mean = value + listed_q - 1.0;
      tail_slope_ = -(value + listed_q);
    } else if (kind == Tail::kBucket) {
      const double log_ratio = tail_q_ > 0 ? std::log(tail_q_) - log_rest : 0.0;
      value += tail_q_ * log_ratio;
      mean = value;
      tail_slope_ = log_ratio - value;
    } else {
      const double log_each = tail_live_ > 0 ? log_rest - std::log(tail_live_) : 0.0;
      value += tail_entropy - tail_q_ * log_each;
      mean = value;
      tail_slope_ = 1.0;
      tail_mean_ = (log_total_ + log_each + value) / inv_t_;
    }
    for (int i = 0; i < size_; ++i) {
      slope_[i] = e_[i] > 0 ? scale * q(i) * (log_q(i) - log_p(i) - mean) : 0.0;
    }
    divergence_ = value;
  }

  const KdLossCall& call_;
  std::vector<int> first_;        // per block: its first entry, -1 without any
  std::vector<int> next_;         // per entry: the next of its block
  std::vector<int64_t> id_;       // the columns listed
  std::vector<float> z_, log_p_;  // the student's logit, the teacher's log-probability
  std::vector<float> p_, e_;      // their exponentials
  std::vector<float> slope_;      // gradient of D for z / T
  int size_ = 0;
  float max_ = 0;
  double ref_ = 0, inv_t_ = 1, per_total_ = 1, log_total_ = 0;
  double tail_q_ = 0, tail_live_ = 0;
  double mass_ = 0, rest_ = 0, per_divisor_ = 1, log_divisor_ = 0;
  double divergence_ = 0, tail_slope_ = 0, tail_uniform_ = 0, tail_mean_ = 0;
};

}  // namespace kd::KD_ISA
