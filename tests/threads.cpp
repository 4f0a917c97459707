// torch's parallel_for by threads that ThreadSanitizer understands: it cannot look into the OpenMP
// that torch brings, so every region there would look like a race. Loaded before torch (`make races`).
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" __attribute__((visibility("default"))) int32_t
torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void*),
                   void* context) {
  constexpr int64_t kThreads = 4;
  const int64_t share = std::max({grain, int64_t{1}, (end - begin + kThreads - 1) / kThreads});
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += share)
    threads.emplace_back(run, i, std::min(end, i + share), context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
