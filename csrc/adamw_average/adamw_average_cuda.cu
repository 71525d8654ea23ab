// adamw_average on the GPU: a block takes a chunk of a tensor, which it finds in the table. One
// launch for all tensors of a combination of dtypes; all numbers that change are read on the
// device.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "adamw_average/adamw_average.h"
#include "common/multi_tensor.cuh"

namespace kd {

namespace {

constexpr const char* kOp = "adamw_average";
// Gradients whose addresses go into one launch, by value: kernels take 4 KB.
constexpr int kAddresses = 256;

// What the kernel receives.
struct AdamwCall {
  Table<AdamwRow> table;
  const float* weight;  // all [], found_inf or null
  const float* lr;
  const float* factor;
  const float* found_inf;
  AdamwConstants constants;
};

// Param is of P, its gradient of G.
template <typename P, typename G, bool kAverage, bool kMaster>
__global__ void __launch_bounds__(kTableThreads) adamw_chunks(const AdamwCall call) {
  if (call.found_inf != nullptr && *call.found_inf != 0.0f) return;
  const Chunk<AdamwRow> chunk(call.table, blockIdx.x);
  const AdamwRow& row = chunk.row;
  // Without a launch that averages, the average need not be aligned (nor the master of none).
  const bool aligned = all_aligned(row.param, row.grad, row.exp_avg, row.exp_avg_sq,
                                   kAverage ? row.average : 0, kMaster ? row.master : 0);
  P* param = reinterpret_cast<P*>(row.param);
  const G* grad = reinterpret_cast<const G*>(row.grad);
  float* exp_avg = reinterpret_cast<float*>(row.exp_avg);
  float* exp_avg_sq = reinterpret_cast<float*>(row.exp_avg_sq);
  float* average = reinterpret_cast<float*>(row.average);
  float* master = reinterpret_cast<float*>(row.master);

  const AdamwConstants& c = call.constants;
  const float step = *reinterpret_cast<const float*>(row.step);
  const float lr = *call.lr, weight = kAverage ? *call.weight : 0.0f;
  const float factor = c.sign * *call.factor, decay = lr * c.weight_decay;
  // By expm1: 1 - beta2^t has three digits at the first steps.
  const float step_size = lr / -expm1f(step * c.beta1_log);
  const float root_scale = 1.0f / sqrtf(-expm1f(step * c.beta2_log));

  for (int64_t i = chunk.first + threadIdx.x * kTableSize; i < chunk.end;
       i += kTableThreads * kTableSize) {
    const int count = static_cast<int>(chunk.end - i < kTableSize ? chunk.end - i : kTableSize);
    float p[kTableSize], g[kTableSize], m[kTableSize], v[kTableSize], old[kTableSize];
    load_eight(grad + i, count, aligned, g);
    load_eight(exp_avg + i, count, aligned, m);
    load_eight(exp_avg_sq + i, count, aligned, v);
    if constexpr (kMaster) {
      load_eight(master + i, count, aligned, p);
    } else {
      load_eight(param + i, count, aligned, p);
    }
    if constexpr (kAverage) load_eight(average + i, count, aligned, old);
#pragma unroll
    for (int k = 0; k < kTableSize; ++k) {
      g[k] *= factor;
      // Not p * (1 - lr * weight_decay): that factor has three digits of the decay.
      p[k] = fmaf(-decay, p[k], p[k]);
      m[k] = fmaf(c.beta1_rest, g[k] - m[k], m[k]);
      v[k] = fmaf(c.beta2_rest, g[k] * g[k], c.beta2 * v[k]);
      p[k] -= step_size * m[k] / fmaf(sqrtf(v[k]), root_scale, c.eps);
    }
    store_eight(exp_avg + i, count, aligned, m);
    store_eight(exp_avg_sq + i, count, aligned, v);
    store_eight(param + i, count, aligned, p);
    if constexpr (kMaster) store_eight(master + i, count, aligned, p);
    if constexpr (kAverage) {
#pragma unroll
      for (int k = 0; k < kTableSize; ++k) {
        const float now = kMaster ? p[k] : rounded<P>(p[k]);
        // A weight of 1 is a copy, not one within a rounding.
        old[k] = weight == 1.0f ? now : fmaf(weight, now - old[k], old[k]);
      }
      store_eight(average + i, count, aligned, old);
    }
  }
}

struct AddressesCall {
  AdamwRow* rows;
  int count;
  int64_t addresses[kAddresses];
};

__global__ void __launch_bounds__(kAddresses)
    write_addresses(const __grid_constant__ AddressesCall call) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < call.count) call.rows[i].grad = call.addresses[i];
}

template <typename P, typename G>
auto kernel_of(const AdamwDtypes& d) {
  if constexpr (!std::is_same_v<P, float>) {
    if (d.master)
      return d.average ? &adamw_chunks<P, G, true, true> : &adamw_chunks<P, G, false, true>;
  }
  return d.average ? &adamw_chunks<P, G, true, false> : &adamw_chunks<P, G, false, false>;
}

const float* pointer_to(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

void adamw_average_update(Tensor table, Tensor weight, Tensor lr, Tensor factor,
                          std::optional<Tensor> found_inf, std::vector<double> constants,
                          std::vector<int64_t> dtypes, int64_t chunks) {
  const AdamwDtypes d = check_adamw_table(kOp, table, dtypes);
  check_adamw_scalars(kOp, weight, lr, factor, found_inf ? &*found_inf : nullptr);
  if (chunks == 0) return;
  const AdamwCall call{Table<AdamwRow>(table),
                       pointer_to(weight),
                       pointer_to(lr),
                       pointer_to(factor),
                       found_inf ? pointer_to(*found_inf) : nullptr,
                       AdamwConstants(kOp, constants)};
  const LaunchScope scope(table);
  with_dtype(d.param, [&]<typename P>() {
    if constexpr (!std::is_void_v<P>) {
      launch_kernel(kOp, scope, table_shape(kOp, chunks),
                    d.grad == d.param ? kernel_of<P, P>(d) : kernel_of<P, float>(d), call);
    }
  });
}

void adamw_average_grads(Tensor table, std::vector<int64_t> addresses) {
  check_table<AdamwRow>(kOp, table);
  const int64_t all = table.size(0);
  STD_TORCH_CHECK(static_cast<int64_t>(addresses.size()) == all, kOp,
                  ": addresses must be as many as the rows of the table, ", all, ", got ",
                  addresses.size());
  const LaunchScope scope(table);
  AdamwRow* rows = static_cast<AdamwRow*>(table.mutable_data_ptr());
  for (int64_t first = 0; first < all; first += kAddresses) {
    AddressesCall call{
        rows + first, static_cast<int>(std::min<int64_t>(kAddresses, all - first)), {}};
    std::copy_n(addresses.data() + first, call.count, call.addresses);
    launch_kernel(kOp, scope, {1, kAddresses}, &write_addresses, call);
  }
}

}  // namespace

}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("adamw_average_update", TORCH_BOX(&kd::adamw_average_update));
  m.impl("adamw_average_grads", TORCH_BOX(&kd::adamw_average_grads));
}
