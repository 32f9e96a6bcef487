/* A stand-in for NVIDIA's driver, for tests without a GPU: triton's own launcher calls it. Nothing
   runs, but it refuses what NVIDIA's would: grids, shared memory, and tensor descriptors by the
   limits that the CUDA driver API gives for cuTensorMapEncodeTiled. */

#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static long encoded, launched;

static CUresult refused(const char *what) {
  fprintf(stderr, "refused: %s\n", what);
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *size, const cuuint64_t *stride,
                                const cuuint32_t *box, const cuuint32_t *step,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  int bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  int span = 128;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_32B) span = 32;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_64B) span = 64;
  if ((uintptr_t)address % 16) return refused("an address that 16 does not divide");
  if (rank < 1 || rank > 5) return refused("the rank");
  for (unsigned i = 0; i < rank; i++) {
    if (size[i] < 1 || size[i] > 1ull << 32) return refused("a size");
    if (box[i] < 1 || box[i] > 256) return refused("a side of the box");
    if (step[i] != 1) return refused("a step");
    if (i + 1 < rank && (stride[i] % 16 || !stride[i] || stride[i] >= 1ull << 40))
      return refused("a stride");
  }
  if (box[0] * bytes % 16) return refused("an inner side of the box that 16 bytes do not divide");
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && box[0] * bytes > span)
    return refused("an inner side longer than the swizzle");
  memset(map, 0, sizeof *map);
  encoded++;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *launch, CUfunction function, void **arguments,
                          void **extra) {
  if (!launch->gridDimX || !launch->gridDimY || !launch->gridDimZ ||
      launch->gridDimX > INT32_MAX || launch->gridDimY > 65535 || launch->gridDimZ > 65535)
    return refused("a grid");
  if (launch->blockDimX * launch->blockDimY * launch->blockDimZ > 1024)
    return refused("a number of threads");
  if (launch->sharedMemBytes > 232448) return refused("shared memory");
  launched++;
  return CUDA_SUCCESS;
}

void counts(long *descriptors, long *launches) {
  *descriptors = encoded;
  *launches = launched;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 1;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;              /* a CPU's memory will do */
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "the tests' driver refused it";
  return CUDA_SUCCESS;
}
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)1;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *number, CUfunction function,
                                      const CUlaunchConfig *launch) {
  *number = 1;
  return CUDA_SUCCESS;
}
