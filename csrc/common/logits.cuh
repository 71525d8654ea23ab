// Logits on the GPU: how they become exponents of 2.
#pragma once

#include "common/rows.cuh"

namespace kd {

constexpr float kLn2 = 0.693147180559945309f;
constexpr double kLog2E = 1.44269504088896340736;
constexpr float kNan = __builtin_nanf("");
// Below any logit that matters, but finite: differences of maxima are never NaN.
constexpr float kLowest = -1e30f;

// From the stored x to the exponent of 2.
struct LogitRule {
  float per_logit;  // c, times scale where plain
  float natural;    // from a difference of z to one of logits: scale where plain, else 1
  float scale;
  float softcap;      // 0: none
  float per_softcap;  // 1 / softcap
  bool plain;         // no softcap and a positive scale: z is x, the scale is in per_logit
};

inline LogitRule logit_rule(double scale, double softcap, double temperature) {
  const bool plain = softcap == 0.0 && scale > 0.0;
  return {static_cast<float>(kLog2E / temperature * (plain ? scale : 1.0)),
          static_cast<float>(plain ? scale : 1.0),
          static_cast<float>(scale),
          static_cast<float>(softcap),
          static_cast<float>(softcap != 0.0 ? 1.0 / softcap : 0.0),
          plain};
}

// tanh to about 2 ulp without a branch.
__device__ __forceinline__ float tanh_f32(float x) {
  const float t = fabsf(x);
  const float s = x * x;
  float p = fmaf(s, 1.57394409e-2f, -5.23039624e-2f);
  p = fmaf(p, s, 1.33152977e-1f);
  p = fmaf(p, s, -3.33327681e-1f);
  const float near = fmaf(p * s, x, x);
  const float e = exp2_approx(t * static_cast<float>(2.0 * kLog2E));
  const float far = copysignf(1.0f - __fdividef(2.0f, e + 1.0f), x);
  return t < 0.55f ? near : far;
}

// Stored logits to z, in place.
template <int kSize>
__device__ __forceinline__ void to_z(const LogitRule& rule, float (&x)[kSize]) {
  if (rule.plain) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    float z = x[i] * rule.scale;
    if (rule.softcap != 0.0f && z != kMinusInf) {
      const float y = z * rule.per_softcap;
      // One step of Newton makes it the quotient; infinity has none.
      const float quotient = fmaf(fmaf(-y, rule.softcap, z), rule.per_softcap, y);
      z = rule.softcap * tanh_f32(quotient == quotient ? quotient : y);
    }
    x[i] = z;
  }
}

__device__ __forceinline__ float exponent(const LogitRule& rule, float z, float max) {
  return __fmul_rn(z - max, rule.per_logit);
}

}  // namespace kd
