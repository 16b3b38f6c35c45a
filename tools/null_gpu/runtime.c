/* The CUDA runtime and cuBLAS of a null device: memory is the host's and copies are real, but kernels and matrix products do nothing.

   NULL_GPU_VIRTUAL=1: copies larger than LARGE are left out, so that device memory is address space alone. Models larger than the
   host's memory then run, and torch's CUDA allocator reports what they take. NULL_GPU_COUNT: the number of devices (1).

   Symbols that neither this file nor nccl.c defines are answered with success (build.py makes them). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "device.h"

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, LARGE = 1 << 16, PAGE = 4096 };
static const size_t TOTAL = 150000000000UL, TAKEN = 1000000000UL;

static __thread int current_device;

int null_gpu_is_virtual(void) {
    static int known = -1;
    if (known < 0) known = getenv("NULL_GPU_VIRTUAL") != NULL;
    return known;
}

int null_gpu_leaves_out(size_t bytes) { return null_gpu_is_virtual() && bytes > LARGE; }

static void *zeroed(size_t bytes) {
    void *place = NULL;
    if (posix_memalign(&place, 512, bytes + 512)) return NULL;
    return memset(place, 0, bytes + 512);
}

/* Zeros that cost nothing until they are touched, which kernels never do. The page before them holds their size. */
static void *device_memory(size_t bytes) {
    size_t *place = mmap(NULL, bytes + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) return NULL;
    *place = bytes + 2 * PAGE;
    return (char *)place + PAGE;
}
static void give_back(void *place) {
    if (place) munmap((char *)place - PAGE, *(size_t *)((char *)place - PAGE));
}

/* Devices. */
int cudaGetDeviceCount(int *count) {
    const char *text = getenv("NULL_GPU_COUNT");
    *count = text ? atoi(text) : 1;
    return SUCCESS;
}
int cudaGetDevice(int *device) { *device = current_device; return SUCCESS; }
int cudaSetDevice(int device) { current_device = device; return SUCCESS; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = limit_of(attribute);
    return SUCCESS;
}
int cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "NULL H200");
    found->major = limit_of(cudaDevAttrComputeCapabilityMajor);
    found->totalGlobalMem = TOTAL;
    found->multiProcessorCount = limit_of(cudaDevAttrMultiProcessorCount);
    found->warpSize = limit_of(cudaDevAttrWarpSize);
    found->maxThreadsPerMultiProcessor = limit_of(cudaDevAttrMaxThreadsPerMultiProcessor);
    found->maxThreadsPerBlock = limit_of(cudaDevAttrMaxThreadsPerBlock);
    found->sharedMemPerBlock = limit_of(cudaDevAttrMaxSharedMemoryPerBlock);
    found->sharedMemPerBlockOptin = limit_of(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    found->sharedMemPerMultiprocessor = limit_of(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    found->regsPerMultiprocessor = found->regsPerBlock = limit_of(cudaDevAttrMaxRegistersPerBlock);
    found->l2CacheSize = limit_of(cudaDevAttrL2CacheSize);
    found->maxBlocksPerMultiProcessor = limit_of(cudaDevAttrMaxBlocksPerMultiprocessor);
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    return SUCCESS;
}
int cudaDeviceGetPCIBusId(char *text, int size, int device) { snprintf(text, size, "0000:0%d:00.0", device); return SUCCESS; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return SUCCESS; }
int cudaDriverGetVersion(int *version) { *version = CUDA_RELEASE; return SUCCESS; }
int cudaRuntimeGetVersion(int *version) { *version = CUDA_RELEASE; return SUCCESS; }
const char *cudaGetErrorString(int error) { return "null device"; }
const char *cudaGetErrorName(int error) { return "null device"; }
int cudaGetDriverEntryPointByVersion(const char *name, void **place, unsigned version, unsigned long long flags, int *result) {
    static void *driver;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW);
    void *found = driver ? dlsym(driver, name) : NULL;
    *place = found ? found : dlsym(RTLD_DEFAULT, "cudaPeekAtLastError");
    if (result) *result = 0;
    return SUCCESS;
}

/* Streams and events are distinct numbers; all work is done when it is asked for. An event is a millisecond after any other. */
int cudaStreamCreate(void **stream) { *stream = (void *)1; return SUCCESS; }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    static long made = 16;
    *stream = (void *)made++;
    return SUCCESS;
}
int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return SUCCESS; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return SUCCESS; }
int cudaEventCreateWithFlags(void **event, unsigned flags) {
    static long made = 16;
    *event = (void *)made++;
    return SUCCESS;
}
int cudaEventCreate(void **event) { return cudaEventCreateWithFlags(event, 0); }
int cudaEventElapsedTime(float *milliseconds, void *first, void *last) { *milliseconds = 1; return SUCCESS; }

/* Memory. */
int cudaMalloc(void **place, size_t bytes) {
    *place = device_memory(bytes);
    return *place ? SUCCESS : OUT_OF_MEMORY;
}
int cudaMallocAsync(void **place, size_t bytes, void *stream) { return cudaMalloc(place, bytes); }
int cudaFree(void *place) { give_back(place); return SUCCESS; }
int cudaFreeAsync(void *place, void *stream) { return cudaFree(place); }
int cudaHostAlloc(void **place, size_t bytes, unsigned flags) {
    *place = zeroed(bytes);
    return *place ? SUCCESS : OUT_OF_MEMORY;
}
int cudaFreeHost(void *place) { free(place); return SUCCESS; }
int cudaMemGetInfo(size_t *available, size_t *total) { *total = TOTAL; *available = TOTAL - TAKEN; return SUCCESS; }
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    if (!null_gpu_leaves_out(bytes)) memmove(to, from, bytes);
    return SUCCESS;
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) { return cudaMemcpy(to, from, bytes, kind); }
int cudaMemcpyPeerAsync(void *to, int device, const void *from, int other, size_t bytes, void *stream) {
    return cudaMemcpy(to, from, bytes, 0);
}
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t rows, int kind, void *stream) {
    for (size_t row = 0; row < rows; row++) memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return SUCCESS;
}
int cudaMemset(void *place, int value, size_t bytes) {
    if (!null_gpu_leaves_out(bytes)) memset(place, value, bytes);
    return SUCCESS;
}
int cudaMemsetAsync(void *place, int value, size_t bytes, void *stream) { return cudaMemset(place, value, bytes); }
int cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *place) {
    memset(found, 0, sizeof *found);
    return SUCCESS;
}

/* Kernels. */
int cudaLaunchKernel(const void *kernel) { return SUCCESS; }
int cudaLaunchKernelExC(const void *settings) { return SUCCESS; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = limit_of(cudaDevAttrMaxThreadsPerBlock);
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = 90;
    found->maxDynamicSharedSizeBytes = 232448;
    return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads, size_t shared) { *blocks = 4; return SUCCESS; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads, size_t shared, unsigned flags) {
    *blocks = 4;
    return SUCCESS;
}

/* Matrix products. */
int cublasCreate_v2(void **handle) { *handle = (void *)1; return SUCCESS; }
int cublasGetVersion_v2(void *handle, int *version) { *version = 130000; return SUCCESS; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return SUCCESS; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { *made = (void *)1; return SUCCESS; }
int cublasLtMatrixLayoutCreate(void **made, int type, long rows, long columns, long leading) { *made = (void *)1; return SUCCESS; }
int cublasLtMatmulPreferenceCreate(void **made) { *made = (void *)1; return SUCCESS; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   void *results, int *found) {
    memset(results, 0, 96);
    *found = 1;
    return SUCCESS;
}
