// The architectures that this library has code for, as nvcc names them, with _ between.

#define TEXT_OF(archs) #archs
#define TEXT(archs) TEXT_OF(archs)

extern "C" __attribute__((visibility("default"))) const char* bigops_cuda_archs() {
  return TEXT(BIGOPS_CUDA_ARCHS);
}
