// What gcc's -fsanitize=thread calls before every access to memory, in place of its own library: a
// build for races links this, and needs no other part of that sanitizer.
#include "machine.h"
#include "races.h"

using fusedres::emulator::on_access;

extern "C" {

#define FUSEDRES_ACCESS(bytes)                                               \
  void __tsan_read##bytes(void* p) { on_access(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { on_access(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { on_access(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { on_access(p, bytes, true); }
FUSEDRES_ACCESS(1)
FUSEDRES_ACCESS(2)
FUSEDRES_ACCESS(4)
FUSEDRES_ACCESS(8)
FUSEDRES_ACCESS(16)
#undef FUSEDRES_ACCESS

void __tsan_read_range(void* p, size_t bytes) { on_access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { on_access(p, bytes, true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() { fusedres::emulator::watch_races = true; }

}  // extern "C"
