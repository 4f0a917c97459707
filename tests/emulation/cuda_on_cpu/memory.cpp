#include "memory.h"

#include <cstring>
#include <map>
#include <memory>

#include "machine.h"

namespace fusedres::emulator {
namespace {

std::map<void*, std::unique_ptr<Guarded>> buffers;  // by the start of what was asked for

}  // namespace

void* guarded_memory(size_t bytes, bool flush_to_end) {
  auto buffer = std::make_unique<Guarded>(bytes);
  char* p = flush_to_end ? buffer->end() - bytes : buffer->begin();
  std::memset(buffer->begin(), kPoison, buffer->inside);
  buffers[p] = std::move(buffer);
  return p;
}

void free_guarded(void* p) { buffers.erase(p); }

bool nothing_written_beside() {
  const auto poison = [](char c) { return static_cast<unsigned char>(c) == kPoison; };
  return std::all_of(buffers.begin(), buffers.end(), [&](const auto& entry) {
    const auto& [start, buffer] = entry;
    char* first = static_cast<char*>(start);
    return std::all_of(buffer->begin(), first, poison) &&
           std::all_of(first + buffer->asked, buffer->end(), poison);
  });
}

const Guarded* buffer_at(const void* address, const void** start) {
  for (const auto& [first, buffer] : buffers) {
    *start = first;
    if (buffer->holds(address)) return buffer.get();
  }
  return nullptr;
}

}  // namespace fusedres::emulator
