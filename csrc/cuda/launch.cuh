// Launching a kernel: every return code is checked, and raised with the kernel's name and sizes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "../common/rows.h"
#include "plan.h"

namespace vcpo {

// What a launch is for, as an error tells it.
struct Purpose {
  const char* kernel;
  const Rows& rows;
};

inline void check(cudaError_t code, const Purpose& purpose, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // or the next call of anyone in this thread, PyTorch included, would report it as its own
  const Rows& r = purpose.rows;
  throw std::runtime_error(std::string(purpose.kernel) + " on rows [" + std::to_string(r.outer) + ", " +
                           std::to_string(r.inner) + ", " + std::to_string(r.vocabulary) + "]: " + call + ": " +
                           cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")");
}

// This runtime is linked statically, so that it does not share the caller's idea of a current device.
inline Device device_of(int ordinal, const Purpose& purpose) {
  int major = 0, minor = 0, shared = 0;
  check(cudaSetDevice(ordinal), purpose, "cudaSetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal), purpose, "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal), purpose, "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal), purpose,
        "cudaDeviceGetAttribute");
  if (major < 8)
    throw std::runtime_error(std::string(purpose.kernel) + " needs compute capability 8.0 or later, device " +
                             std::to_string(ordinal) + " has " + std::to_string(major) + "." + std::to_string(minor));
  return {ordinal, 10 * major + minor, shared};
}

struct Shape {
  int warps;
  std::size_t shared_bytes;
  int cluster = 1;
};

// One block, or one cluster, a row.
template <class... Parameters, class... Arguments>
void launch(const Purpose& purpose, const Shape& shape, cudaStream_t stream, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  const std::int64_t blocks = purpose.rows.outer * purpose.rows.inner * shape.cluster;
  if (blocks > std::numeric_limits<int>::max())
    throw std::runtime_error(std::string(purpose.kernel) + ": more than 2^31 - 1 blocks; split the rows");
  constexpr std::size_t kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          purpose, "cudaFuncSetAttribute");
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(32 * shape.warps));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), purpose, "launch");
}

// The C++ type of a dtype, as an argument: work(T{}).
template <class Work>
void with_type(Dtype dtype, const Work& work) {
  switch (dtype) {
    case Dtype::kFloat32:
      return work(float{});
    case Dtype::kBFloat16:
      return work(BFloat16{});
    case Dtype::kFloat16:
      return work(Float16{});
  }
}

// A run-time flag as a type: work(std::true_type{}) or work(std::false_type{}).
template <class Work>
void with_flag(bool flag, const Work& work) {
  flag ? work(std::true_type{}) : work(std::false_type{});
}

}  // namespace vcpo
