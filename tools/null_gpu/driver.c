/* The CUDA driver of a null device, as Triton's launcher and torch ask for it: kernels are loaded and launched, and do nothing. */
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/mman.h>

#include "device.h"

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = CUDA_RELEASE; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = limit_of(attribute);
    return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxFromGreenCtx(void **context, void *green) { return 1; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxSetLimit(int limit, unsigned long value) { return 0; }
int cuCtxGetLimit(unsigned long *value, int limit) { *value = 1048576; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "null device"; return 0; }
int cuGetProcAddress_v2(const char *name, void **place, int version, unsigned long flags, void *result) { return 500; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads of a block, registers */
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int preference) { return 0; }
int cuLaunchKernel(void) { return 0; }
int cuLaunchKernelEx(void) { return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *settings) { *count = 1; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, void *function, int threads, unsigned long shared) { *count = 2; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuPointerGetAttribute(void *found, int attribute, unsigned long place) { *(unsigned long *)found = place; return 0; }
int cuMemHostGetDevicePointer(void **found, void *place, unsigned flags) { *found = place; return 0; }
int cuStreamSynchronize(void *stream) { return 0; }

/* Segments that grow (expandable_segments of torch's allocator): address space is memory, so mapping does nothing. */
int cuMemAddressReserve(void **place, size_t bytes, size_t alignment, void *wanted, unsigned long long flags) {
    *place = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *place == MAP_FAILED ? 2 : 0;
}
int cuMemAddressFree(void *place, size_t bytes) { return munmap(place, bytes) ? 1 : 0; }
int cuMemCreate(unsigned long long *handle, size_t bytes, const void *settings, unsigned long long flags) {
    static unsigned long long made = 1;
    *handle = made++;
    return 0;
}
int cuMemRelease(unsigned long long handle) { return 0; }
int cuMemMap(void *place, size_t bytes, size_t offset, unsigned long long handle, unsigned long long flags) { return 0; }
int cuMemUnmap(void *place, size_t bytes) { return madvise(place, bytes, MADV_DONTNEED) ? 1 : 0; }
int cuMemSetAccess(void *place, size_t bytes, const void *access, size_t count) { return 0; }
