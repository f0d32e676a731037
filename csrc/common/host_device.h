// What csrc/common is compiled as: plain C++, or for both sides by nvcc.
#pragma once

#if defined(__CUDACC__)
#define VCPO_HOST_DEVICE __host__ __device__
#else
#define VCPO_HOST_DEVICE
#endif
