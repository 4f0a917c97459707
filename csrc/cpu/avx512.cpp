// The kernels for CPUs with AVX-512; where a CPU has products of bf16 pairs, or AMX's, they are used.
#include "cpu/kernels.h"

#ifdef FUSEDRES_X86_SETS
#include <immintrin.h>

#include "cpu/common.h"

#pragma GCC target( \
    "prefer-vector-width=512,avx512f,avx512vl,avx512dq,avx512bw,avx512cd,avx2,fma,bmi,bmi2,f16c")

#define FUSEDRES_ISA avx512
#define FUSEDRES_VECTOR_BYTES 64
#define FUSEDRES_TILE_ROWS 6
#define FUSEDRES_TILE_VECTORS 4
#define FUSEDRES_TILE __attribute__((target("avx512bf16,amx-tile,amx-bf16")))
#define FUSEDRES_PAIRS
#include "cpu/table.h"
#endif
