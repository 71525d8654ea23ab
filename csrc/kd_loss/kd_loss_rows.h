// One row of kd_loss on vectors; compiled once per instruction set by common/for_each_isa.h.
//
// Pass 1 reads both rows once, in blocks that stay in the first-level cache: the running maximum is
// raised to the block's, then exponentials relative to it are summed and kept in scratch, which
// stays in the second-level cache. Pass 2 turns scratch into the gradient: no exponential is
// computed twice. JSD and TVD need both normalisers first and take a pass over scratch in between.

namespace kd::KD_ISA {

// Bytes by which memory is asked for before it is used. The hardware's own prefetch stops at the
// end of each 4 KB page: 6.5 ms without this, 3.8 ms with it (512 x 32000 float32, 2 cores; 2
// KB: 5.5 ms).
constexpr int64_t kAhead = 8192;
constexpr float kTiny = 1.17549435e-38f;
constexpr double kLog2E = 1.4426950408889634;

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
constexpr bool kStudentExpectation = D == Divergence::kReverseKl || D == Divergence::kNegEntropy;
template <Divergence D>
constexpr bool kTwoStage = D == Divergence::kJsd || D == Divergence::kTvd;

static inline float max_of_block(const float* x, int n) {
  Vec m0 = load(x), m1 = m0;
  int i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    m0 = max(load(x + i), m0);
    m1 = max(load(x + i + kLanes), m1);
  }
  for (; i < n; i += kLanes) m0 = max(load(x + i), m0);
  return max_lane(max(m0, m1));
}

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
    const Vec es = exp2_scaled(ds, at_t);
    student += es;
    if constexpr (kKeep) store(a + i, es);
    if constexpr (M == Softmax::kSquare) student_ce = fma(es, es, student_ce);
    if constexpr (M == Softmax::kSeparate) {
      const Vec e1 = exp2_scaled(ds, at_1);
      student_ce += e1;
      if constexpr (kKeep) store(c + i, e1);
    }
    if constexpr (D == Divergence::kNegEntropy) {
      cross = select(es > 0.0f, fma(es, ds, cross), cross);
      if constexpr (kKeep) store(b + i, ds);
    }
    if constexpr (kHasTeacher<D>) {
      const Vec dt = load(t + i) - teacher_ref;
      const Vec et = exp2_scaled(dt, at_t);
      teacher += et;
      if constexpr (D == Divergence::kReverseKl) {
        const Vec difference = ds - dt;
        cross = select(es > 0.0f, fma(es, difference, cross), cross);
        if constexpr (kKeep) store(b + i, difference);
      } else {
        // A class without teacher mass adds nothing, also where a logit is -inf.
        if constexpr (D == Divergence::kForwardKl) {
          cross = select(et > 0.0f, fma(et, dt - ds, cross), cross);
        }
        if constexpr (D == Divergence::kSoftCe) {
          cross = select(et > 0.0f, fma(et, -ds, cross), cross);
        }
        if constexpr (kKeep) store(b + i, et);
      }
    }
  }
  sums.student += sum(student);
  if constexpr (M != Softmax::kShared) sums.student_ce += sum(student_ce);
  if constexpr (kHasTeacher<D>) sums.teacher += sum(teacher);
  if constexpr (kHasTeacher<D> || D == Divergence::kNegEntropy) sums.cross += sum(cross);
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

// Scale, soft-cap; a masked class (-inf) stays masked.
static inline Vec transform(Vec x, float scale, float cap) {
  Vec z = x * scale;
  if (cap != 0.0f) {
    const IntVec masked = z == -__builtin_inff();
    z = select(masked, z, cap * tanh(z / cap));
  }
  return z;
}

// Floats of `n` logits from p on, padded with -inf to whole vectors: p itself where nothing has to
// be done, else `buffer`.
template <typename T>
static const float* load_block(const char* row, int64_t column, int n, float scale, float cap,
                               float* buffer) {
  const T* p = reinterpret_cast<const T*>(row) + column;
  const bool as_is = scale == 1.0f && cap == 0.0f;
  const int whole = n / kLanes * kLanes;
  if constexpr (std::is_same_v<T, float>) {
    if (as_is && whole == n) return p;
  }
  for (int i = 0; i < whole; i += kLanes) {
    store(buffer + i, as_is ? load(p + i) : transform(load(p + i), scale, cap));
  }
  if (whole < n) {
    const Vec tail = load_first(p + whole, n - whole);
    store(buffer + whole, select(first_lanes(n - whole), as_is ? tail : transform(tail, scale, cap),
                                 splat(-__builtin_inff())));
  }
  return buffer;
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

// The memory side of a row, by dtype: one indirect call a block keeps the arithmetic out of the
// dtype's templates.
using LoadBlock = const float* (*)(const char*, int64_t, int, float, float, float*);
using StoreBlock = void (*)(char*, int64_t, const float*, int, bool);

static LoadBlock loader(Dtype dtype) {
  if (dtype == Dtype::kBf16) return &load_block<Bf16>;
  if (dtype == Dtype::kHalf) return &load_block<Half>;
  return &load_block<float>;
}

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
  const Vec student = splat(k.student_inv * to_student);
  const Vec ce_norm = splat(k.student_ce_inv * to_ce);
  const Vec teacher = splat(k.teacher_inv * to_teacher);
  const Vec uniform = splat(k.uniform), mean = splat(k.mean);
  for (int i = 0; i < n; i += kLanes) {
    const Vec es = load(a + i);
    const Vec ps = D == Divergence::kJsd ? es : es * student;
    Vec p1 = ps;
    if constexpr (M == Softmax::kSquare) p1 = es * es * ce_norm;
    if constexpr (M == Softmax::kSeparate) p1 = load(c + i) * ce_norm;
    Vec part = ps;
    if constexpr (D == Divergence::kForwardKl || D == Divergence::kSoftCe) {
      part = ps - load(b + i) * teacher;
    }
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
    Vec g = part * k.divergence - uniform;
    if constexpr (D != Divergence::kNone || M != Softmax::kShared) {
      g = fma(p1, splat(k.ce), g);
    } else {
      g = ps * k.ce - uniform;
    }
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

template <Divergence D, Softmax M>
class Row {
 public:
  Row(const KdLossCall& call, float* scratch)
      : call_(call),
        spec_(call.spec),
        inv_t_(D == Divergence::kNone ? 1.0 : 1.0 / call.spec.temperature),
        load_student_(loader(call.student_dtype)),
        load_teacher_(loader(call.teacher_dtype)),
        store_grad_(storer(call.student_dtype)) {
    const int64_t blocks = blocks_of(spec_.classes);
    keep_ = {scratch, scratch + blocks * kBlock, scratch + 2 * blocks * kBlock,
             scratch + 3 * blocks * kBlock, scratch + 3 * blocks * kBlock + blocks};
    smooth_ = (spec_.needs_ce() && spec_.label_smoothing != 0.0) || D == Divergence::kSpike;
  }

  RowTerms run(int64_t row) {
    student_ = call_.student + row * call_.student_stride * bytes_of(call_.student_dtype);
    if (kHasTeacher<D>) {
      teacher_ = call_.teacher + row * call_.teacher_stride * bytes_of(call_.teacher_dtype);
    }
    label_ = spec_.needs_labels() ? call_.labels[row] : -1;
    sums_ = Sums{};
    if (call_.grad != nullptr || kTwoStage<D>) {
      read<true>();
    } else {
      read<false>();
    }
    const RowTerms terms = finish();
    if (call_.grad != nullptr) {
      const double weight = call_.row_weights == nullptr ? 1.0 : call_.row_weights[row];
      write(call_.grad + row * call_.grad_stride * bytes_of(call_.student_dtype),
            weight * call_.scale);
    }
    return terms;
  }

 private:
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
      raise(max_of_block(s, n), &sums_.student_ref, [&](double by) {
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
    if (M == Softmax::kShared) sums_.student_ce = sums_.student;
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
    // The middle pass of JSD has normalised the exponentials that are squared here.
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
  void write(char* grad, double weight) {
    const double outer = weight * spec_.student_scale;
    double divergence = outer * spec_.kd_weight * inv_t_;
    double at_label = 0.0, uniform = 0.0;
    if constexpr (D == Divergence::kSpike) {
      at_label += divergence * spike_;
      uniform += divergence * share_;
    }
    if constexpr (kStudentExpectation<D>) {
      mean_ = sums_.cross / sums_.student;
      divergence *= inv_t_;  // the differences kept are not yet divided by T
    }
    if constexpr (D == Divergence::kJsd) divergence *= 1.0 - spec_.beta;
    if constexpr (D == Divergence::kTvd) divergence *= 0.5;
    if (spec_.ce_weight != 0.0) {
      at_label += outer * spec_.ce_weight * (1.0 - spec_.label_smoothing);
      if (spec_.label_smoothing != 0.0) {
        uniform += outer * spec_.ce_weight * spec_.label_smoothing / sums_.live;
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
    if (smooth_ && sums_.live != spec_.classes) {
      // Masked classes take no share of the smoothing.
      const float* s = student_block(block, buffer);
      for (int i = 0; i < n; i += kLanes) {
        const IntVec live = load(s + i) > -__builtin_inff();
        store(out + i, select(live, load(out + i), Vec{}));
      }
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
  bool smooth_;
  const char* student_ = nullptr;
  const char* teacher_ = nullptr;
  int64_t label_;
  Sums sums_;
  double lse_ = 0, mean_ = 0, share_ = 0, spike_ = 0;
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

template <Divergence D>
static void with_softmax(const KdLossCall& call, int64_t begin, int64_t end, float* scratch,
                         RowTerms* terms) {
  const bool needs_ce = call.spec.needs_ce() || call.spec.z_loss != 0.0;
  if (D == Divergence::kNone || !needs_ce || call.spec.temperature == 1.0) {
    return run_rows<D, Softmax::kShared>(call, begin, end, scratch, terms);
  }
  if (call.spec.temperature == 2.0) {
    return run_rows<D, Softmax::kSquare>(call, begin, end, scratch, terms);
  }
  return run_rows<D, Softmax::kSeparate>(call, begin, end, scratch, terms);
}

// Rows [begin, end) of a call; `scratch` holds scratch_floats(classes), 64-byte aligned.
void kd_loss_rows(const KdLossCall& call, int64_t begin, int64_t end, float* scratch,
                  RowTerms* terms) {
  switch (call.spec.divergence) {
    case Divergence::kNone:
      return with_softmax<Divergence::kNone>(call, begin, end, scratch, terms);
    case Divergence::kForwardKl:
      return with_softmax<Divergence::kForwardKl>(call, begin, end, scratch, terms);
    case Divergence::kSoftCe:
      return with_softmax<Divergence::kSoftCe>(call, begin, end, scratch, terms);
    case Divergence::kReverseKl:
      return with_softmax<Divergence::kReverseKl>(call, begin, end, scratch, terms);
    case Divergence::kJsd:
      return with_softmax<Divergence::kJsd>(call, begin, end, scratch, terms);
    case Divergence::kTvd:
      return with_softmax<Divergence::kTvd>(call, begin, end, scratch, terms);
    case Divergence::kSpike:
      return with_softmax<Divergence::kSpike>(call, begin, end, scratch, terms);
    case Divergence::kNegEntropy:
      return with_softmax<Divergence::kNegEntropy>(call, begin, end, scratch, terms);
  }
}

}  // namespace kd::KD_ISA
