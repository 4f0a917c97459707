// The kernels for CPUs with AVX2 and FMA.
#include "cpu/kernels.h"

#ifdef FUSEDRES_X86_SETS
#include "cpu/common.h"

#pragma GCC target("avx2,fma,bmi,bmi2,f16c")

#define FUSEDRES_ISA avx2
#define FUSEDRES_VECTOR_BYTES 32
#define FUSEDRES_TILE_ROWS 6
#define FUSEDRES_TILE_VECTORS 2
#define FUSEDRES_TILE
#include "cpu/table.h"
#endif
