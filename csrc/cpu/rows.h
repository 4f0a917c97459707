// The CPU kernels: a program's stages over rows [begin, end). They allocate row buffers and nothing
// else, never throw (but for memory), and know no threads: ops.cpp cuts the rows and adds up what
// the cuts return.
#pragma once

#include "params.h"

namespace fusedres::cpu {

// y[m] = stages(input[m])
template <class A>
void forward_rows(const Program<A>& program, const Rows& y, int64_t begin, int64_t end);

// Sums of d and d^2 down the rows, d = (what reaches the norm) - shift; each vector (width).
template <class A>
void column_statistics(const Program<A>& program, const A* shift, double* sums, double* squares,
                       int64_t begin, int64_t end);

// dinput, dresidual and the column sums of rows [begin, end).
template <class A>
void backward_rows(const Backward<A>& backward, int64_t begin, int64_t end);

// For batch statistics, before backward_rows: the sums of dh, the norm's gradient, and of dh * c.
template <class A>
void norm_gradient_sums(const Backward<A>& backward, A* dh_sum, A* dhc_sum, int64_t begin,
                        int64_t end);

}  // namespace fusedres::cpu
