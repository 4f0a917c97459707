// What Python sets and asks of the emulation, by ctypes.
#include "machine.h"

using namespace fusedres::emulator;

extern "C" {

void emulator_set(uint64_t seed, int resident) {
  settings.seed = seed;
  settings.resident = resident;
}
void* emulator_allocate(size_t bytes, bool flush_to_end) {
  return guarded_memory(bytes, flush_to_end);
}
void emulator_free(void* p) { free_guarded(p); }
bool emulator_intact() { return nothing_written_beside(); }

}  // extern "C"
