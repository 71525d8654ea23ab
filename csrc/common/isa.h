// Instruction sets the CPU kernels are compiled for, and the one this machine runs.
#pragma once

namespace kd {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best one the processor has; KDKERNELS_ISA=baseline|avx2|avx512 in the environment lowers it
// (read once, when the library is loaded).
Isa current_isa();

const char* isa_name(Isa isa);

// The address of a function that for_each_isa.h has compiled, for the set in use.
#if defined(__x86_64__)
#define KD_BEST_ISA(function)                                    \
  (::kd::current_isa() == ::kd::Isa::kAvx512 ? &avx512::function \
   : ::kd::current_isa() == ::kd::Isa::kAvx2 ? &avx2::function   \
                                             : &baseline::function)
#else
#define KD_BEST_ISA(function) (&baseline::function)
#endif

}  // namespace kd
