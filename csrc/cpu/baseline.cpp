// The kernels for every CPU of the compiler's own target: x86-64 (SSE2), aarch64 (NEON), ...
#include "cpu/common.h"

#define FUSEDRES_ISA baseline
#define FUSEDRES_VECTOR_BYTES 16
#ifdef __x86_64__  // 16 registers
#define FUSEDRES_TILE_ROWS 4
#define FUSEDRES_TILE_VECTORS 2
#else  // 32
#define FUSEDRES_TILE_ROWS 6
#define FUSEDRES_TILE_VECTORS 4
#endif
#define FUSEDRES_TILE
#include "cpu/table.h"
