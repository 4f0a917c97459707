// Which library multiplies fp32 matrices on a CPU.
#pragma once

#include <cstdint>

namespace fusedres::cpu {

// torch multiplies fp32 through MKL on x86. MKL runs its widest code on Intel CPUs only; elsewhere
// oneDNN does at least as well on large products and costs some 15 us more a call, hence the bound.
// Measured: bench/NOTES.md.
inline bool prefer_onednn(int64_t M, int64_t N, int64_t K) {
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel");
  return !intel && M * N * K >= (int64_t{1} << 26);
#else
  return M * N * K < 0;
#endif
}

}  // namespace fusedres::cpu
