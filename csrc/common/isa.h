// Instruction sets the CPU kernels are compiled for, and the one this machine runs.
#pragma once

namespace kd {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best one the processor has; KDKERNELS_ISA=baseline|avx2|avx512 in the environment lowers it
// (read once, when the library is loaded).
Isa current_isa();

const char* isa_name(Isa isa);

}  // namespace kd
