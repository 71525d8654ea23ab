// Compiles the file named by KD_PER_ISA_FILE once per instruction set, in a namespace of its own.
//
// Why not one object file per set with -mavx512f: the linker could then keep an AVX-512 copy of a
// template of the standard library for everybody. Here only the code inside the pragma is affected,
// so every header must be included before this one. No include guard: each op includes it.

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define KD_ISA avx512
#define KD_LANES 16
#include "common/simd.h"
#include KD_PER_ISA_FILE
#undef KD_ISA
#undef KD_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define KD_ISA avx2
#define KD_LANES 8
#include "common/simd.h"
#include KD_PER_ISA_FILE
#undef KD_ISA
#undef KD_LANES
#pragma GCC pop_options

#endif

#define KD_ISA baseline
#define KD_LANES 4
#include "common/simd.h"
#include KD_PER_ISA_FILE
#undef KD_ISA
#undef KD_LANES
