// Memory between two stretches that must not be touched.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>

namespace fusedres::emulator {

constexpr int kPoison = 0xFF;  // NaN in every floating type

struct Guarded {
  static constexpr size_t kGuard = 1 << 20;
  char* base = nullptr;
  size_t asked = 0, inside = 0;

  explicit Guarded(size_t bytes) : asked(bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    inside = (std::max<size_t>(bytes, 1) + page - 1) / page * page;
    base = static_cast<char*>(mmap(nullptr, inside + 2 * kGuard, PROT_NONE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(begin(), inside, PROT_READ | PROT_WRITE);
  }
  ~Guarded() { munmap(base, inside + 2 * kGuard); }
  Guarded(const Guarded&) = delete;

  char* begin() const { return base + kGuard; }
  char* end() const { return begin() + inside; }
  bool holds(const void* p) const { return p >= base && p < end() + kGuard; }
};

// The buffer near whose `start` the address lies, or nullptr.
const Guarded* buffer_at(const void* address, const void** start);

}  // namespace fusedres::emulator
