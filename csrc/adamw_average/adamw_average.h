// What the CPU and the CUDA kernels of adamw_average share: the table, checks, the numbers of a
// step.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/multi_tensor.h"

namespace kd {

// A row of the table; see Plan in kdkernels/ops/adamw_average/plan.py.
struct AdamwRow {
  int64_t param, grad, exp_avg, exp_avg_sq, average, master;  // addresses; 0: none
  int64_t step;                                               // address of one float32
  int64_t size;                                               // elements
  int64_t chunks_end;  // of all tensors up to and with this one
};
static_assert(sizeof(AdamwRow) == 9 * sizeof(int64_t));

struct AdamwDtypes {
  TableDtype param, grad;
  bool average, master;  // float32 where there is one
};

inline AdamwDtypes check_adamw_table(const char* op, const Tensor& table,
                                     const std::vector<int64_t>& dtypes) {
  check_table<AdamwRow>(op, table);
  STD_TORCH_CHECK(dtypes.size() == 4, op, ": dtypes must be four numbers, got ", dtypes.size());
  const AdamwDtypes d{check_table_dtype(op, dtypes[0], 0), check_table_dtype(op, dtypes[1], 0),
                      check_table_dtype(op, dtypes[2], -1) == TableDtype::kFloat,
                      check_table_dtype(op, dtypes[3], -1) == TableDtype::kFloat};
  STD_TORCH_CHECK(d.grad == d.param || d.grad == TableDtype::kFloat, op,
                  ": dtypes must have a gradient of float32 or of its param's dtype, got ",
                  dtypes[1], " with ", dtypes[0]);
  STD_TORCH_CHECK(!d.master || d.param != TableDtype::kFloat, op,
                  ": dtypes must have masters of 16-bit params only, got one of float32");
  return d;
}

// The numbers that the host knows; they are made in float64.
struct AdamwConstants {
  float sign;
  float beta1_log, beta1_rest;         // log(beta1), 1 - beta1
  float beta2, beta2_log, beta2_rest;  // beta2, log(beta2), 1 - beta2
  float eps, weight_decay;

  AdamwConstants(const char* op, const std::vector<double>& c) {
    STD_TORCH_CHECK(c.size() == 5, op, ": constants must be five numbers, got ", c.size());
    sign = c[4] != 0 ? -1.0f : 1.0f;
    beta1_log = static_cast<float>(std::log(c[0]));
    beta1_rest = static_cast<float>(1 - c[0]);
    beta2 = static_cast<float>(c[1]);
    beta2_log = static_cast<float>(std::log(c[1]));
    beta2_rest = static_cast<float>(1 - c[1]);
    eps = static_cast<float>(c[2]);
    weight_decay = static_cast<float>(c[3]);
  }
};

inline void check_adamw_scalars(const char* op, const Tensor& weight, const Tensor& lr,
                                const Tensor& factor, const Tensor* found_inf) {
  check_one_float(op, "weight", weight);
  check_one_float(op, "lr", lr);
  check_one_float(op, "factor", factor);
  if (found_inf != nullptr) check_one_float(op, "found_inf", *found_inf);
}

}  // namespace kd
