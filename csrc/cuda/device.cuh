// What the kernels ask of a GPU, and nothing else: memory in 16-byte accesses, asynchronous copies, barriers, clusters.
//
// device_on_host.h is the same in plain C++, a block's threads being fibers: the kernels above it are the same lines,
// so that the tests run them without a GPU (tests/native/cuda_test.cpp). What only a GPU can show is this file.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../common/dtypes.h"

#define VCPO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define VCPO_DEVICE __device__ __forceinline__

namespace vcpo {
namespace device {

// Bulk copies, transaction barriers and clusters are there from compute capability 9.0 on. A kernel that needs them is
// compiled for older ones to nothing but `unsupported`; launchers never start it there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasBulk = true;
#else
constexpr bool kHasBulk = false;
#endif
VCPO_DEVICE void unsupported() { __trap(); }

using Vector = uint4;  // 16 bytes: the widest access that a thread has

VCPO_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
VCPO_DEVICE std::int64_t block() { return blockIdx.x; }
VCPO_DEVICE void block_sync() { __syncthreads(); }
VCPO_DEVICE void warp_sync() { __syncwarp(); }
VCPO_DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xFFFFFFFFu, x, lanes); }

VCPO_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// 2^x to 2 ulp; results below the smallest normal number are 0.
VCPO_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Rows are streamed: nothing of them is worth a place in L1. Volatile, since in place the same address is written.
VCPO_DEVICE Vector load16(const void* from) {
  Vector v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
VCPO_DEVICE void store16(void* to, Vector v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// --- two packed entries and back: one conversion instruction each way ---

template <class T>
VCPO_DEVICE float2 unpack2(std::uint32_t word);
template <>
VCPO_DEVICE float2 unpack2<BFloat16>(std::uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
}
template <>
VCPO_DEVICE float2 unpack2<Float16>(std::uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}

template <class T>
VCPO_DEVICE std::uint32_t pack2(float low, float high);
template <>
VCPO_DEVICE std::uint32_t pack2<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}
template <>
VCPO_DEVICE std::uint32_t pack2<Float16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const std::uint32_t&>(pair);
}

// --- copies by each thread, into its own place in shared memory (sm_80) ---

VCPO_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
VCPO_DEVICE void copy16_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
VCPO_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
VCPO_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- copies by the bulk copy engine, which report to a barrier in shared memory (sm_90) ---

using Barrier = std::uint64_t;

VCPO_DEVICE void barrier_init(Barrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// Makes initialised barriers known to the copy engine.
VCPO_DEVICE void barrier_init_done() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

VCPO_DEVICE void copy_bulk(void* shared, const void* global, std::uint32_t bytes, Barrier* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
VCPO_DEVICE void barrier_wait(Barrier* barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --- clusters (sm_90) ---

VCPO_DEVICE int cluster_rank() {
  std::uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
VCPO_DEVICE int cluster_size() {
  std::uint32_t blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}
VCPO_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Only that all have come here; what they wrote need not have arrived.
VCPO_DEVICE void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// Four floats at the same place in the shared memory of another block of the cluster.
VCPO_DEVICE float4 load_of_block(const void* own, int rank) {
  std::uint32_t address;
  float4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

}  // namespace device
}  // namespace vcpo

#else
#include "device_on_host.h"
#endif
