// Which kernels this CPU runs, and the scratch of its threads.
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

#ifdef FUSEDRES_X86_SETS
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedres::cpu {

#define FUSEDRES_SET(isa)                 \
  namespace isa {                         \
  extern const Kernels<float> of_float;   \
  extern const Kernels<double> of_double; \
  }
FUSEDRES_SET(baseline)
#ifdef FUSEDRES_X86_SETS
FUSEDRES_SET(avx2)
FUSEDRES_SET(avx512)
#endif

namespace {

struct Set {
  const char* name;
  bool here, pairs, tiles;
  const Kernels<float>* of_float;
  const Kernels<double>* of_double;
};

bool intel() {
#if defined(__x86_64__)
  static const bool found = __builtin_cpu_is("intel");
  return found;
#else
  return false;
#endif
}

// Linux gives a process AMX's registers when it asks for them.
bool may_use_amx() {
#if defined(FUSEDRES_X86_SETS) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // EDX of leaf 7
  constexpr long kRequest = 0x1023, kTileData = 18;       // ARCH_REQ_XCOMP_PERM, XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

std::vector<Set> all_sets() {
  std::vector<Set> sets;
#ifdef FUSEDRES_X86_SETS
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("x86-64-v4");
  const bool pairs = wide && __builtin_cpu_supports("avx512bf16");
  sets.push_back(
      {"amx-bf16", pairs && may_use_amx(), true, true, &avx512::of_float, &avx512::of_double});
  sets.push_back({"avx512-bf16", pairs, true, false, &avx512::of_float, &avx512::of_double});
  sets.push_back({"avx512", wide, false, false, &avx512::of_float, &avx512::of_double});
  sets.push_back({"avx2", bool(__builtin_cpu_supports("x86-64-v3")), false, false, &avx2::of_float,
                  &avx2::of_double});
#endif
  sets.push_back({"baseline", true, false, false, &baseline::of_float, &baseline::of_double});
  return sets;
}

Set choose() {
  const char* const asked = std::getenv("FUSEDRES_CPU");
  std::string names;
  for (const Set& set : all_sets()) {
    if (set.here && (!asked || !*asked || set.name == std::string(asked))) return set;
    if (set.here) names += names.empty() ? set.name : std::string(", ") + set.name;
  }
  throw std::invalid_argument("FUSEDRES_CPU is '" + std::string(asked) + "', this CPU has " +
                              names);
}

constexpr int64_t kFewRows = 16;

// Bytes of a core's L2.
int64_t level_2() {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return found;
#endif
  return int64_t{2} << 20;
}

// The largest packed weight, in bytes, for which blocks of rows beat the library's product of the
// whole matrix and a pass: what a share of L3 holds; of bf16 pairs, which the library multiplies as
// fast as we do, less unless many rows pay for the packing. On Intel CPUs, for which MKL is made,
// what L2 holds beside the rows, and less backward, where there are two products; of 16-bit types
// that are converted, which costs the library a pass, 4 MiB.
int64_t largest_weight(DType dtype, bool pairs, int64_t M, bool backward) {
  if (!intel()) return int64_t{1} << (pairs && M < 1024 ? 22 : 24);
  if (pairs) return int64_t{1} << 20;
  if (dtype != DType::float32) return int64_t{1} << 22;
  return backward ? level_2() / 8 : level_2() / 8 * 5;
}

const Set& chosen() {
  static const Set set = choose();
  return set;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *chosen().of_float;
}
template <>
const Kernels<double>& kernels<double>() {
  return *chosen().of_double;
}

const char* instruction_set() { return chosen().name; }

bool multiplies_pairs() { return chosen().pairs; }
bool multiplies_tiles() { return chosen().tiles; }

bool own_product(int64_t M, int64_t N, int64_t K, DType dtype, bool backward) {
  if (dtype == DType::float64) return false;  // it is there to be compared with torch
  const bool pairs = dtype == DType::bfloat16 && multiplies_pairs();
  // Packing costs as much as five rows of the product; where the library has no fast one, less.
  if (M < kFewRows && !multiply_in_float32(dtype, M)) return false;
  return N * K * (pairs ? 2 : 4) <= largest_weight(dtype, pairs, M, backward);
}

// oneDNN multiplies bf16 in software where an x86 CPU has no instruction for it, two to four times
// slower than fp32, but for so few rows that to read the weight is all: bench/NOTES.md. fp16 on CPUs
// without it 10 to 80 times.
bool multiply_in_float32(DType dtype, int64_t M) {
#if defined(__x86_64__)
  if (dtype == DType::bfloat16) return !multiplies_pairs() && M >= kFewRows / 4;
#endif
  return dtype == DType::float16;
}

// torch multiplies fp32 through MKL on x86. MKL runs its widest code on Intel CPUs only; elsewhere
// oneDNN does at least as well on large products and costs some 15 us more a call, hence the bound.
// Measured: bench/NOTES.md.
bool prefer_onednn(int64_t M, int64_t N, int64_t K) {
#if defined(__x86_64__)
  return !intel() && M * N * K >= (int64_t{1} << 26);
#else
  return M * N * K < 0;
#endif
}

void* scratch(size_t bytes) {
  constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(void* memory) const { ::operator delete(memory, kAlign); }
  };
  thread_local std::unique_ptr<void, Delete> memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    size = 0;
    memory.reset();
    memory.reset(::operator new(bytes, kAlign));
    size = bytes;
  }
  return memory.get();
}

}  // namespace fusedres::cpu
