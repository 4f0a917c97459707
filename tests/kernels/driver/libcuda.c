// A libcuda.so.1 without a GPU: everything succeeds, launches are counted and their grids kept.
#include <stdint.h>
#include <string.h>

typedef int Result;
typedef struct {  // the beginning of CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void *stream;
} Launch;

static int launches;
static unsigned programs;

int stub_launches(void) { return launches; }
unsigned stub_programs(void) { return programs; }

Result cuLaunchKernelEx(const Launch *launch, void *function, void **arguments, void **extra) {
  ++launches;
  programs = launch->grid[0];
  return 0;
}
Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  memcpy(data, &pointer, sizeof pointer);
  return 0;
}
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = 232448;  // of all attributes only the bytes of shared memory are looked at
  return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0;  // threads a block
  return 0;
}
#define SUCCEEDS(name) \
  Result name(void) { return 0; }
SUCCEEDS(cuInit)
SUCCEEDS(cuDeviceGet)
SUCCEEDS(cuCtxGetLimit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuOccupancyMaxActiveClusters)
SUCCEEDS(cuTensorMapEncodeTiled)
Result cuGetErrorString(Result error, const char **text) {
  *text = "an error of the stub";
  return 0;
}
#define GIVES(name) \
  Result name(void **handle) { return *handle = (void *)16, 0; }
GIVES(cuCtxGetCurrent)
GIVES(cuDevicePrimaryCtxRetain)
GIVES(cuModuleGetFunction)
GIVES(cuModuleLoadData)
