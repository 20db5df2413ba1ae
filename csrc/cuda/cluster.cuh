// A cluster's blocks: consecutive ones of a grid, which run at the same time and reach each other's shared memory.
// Before sm_90 there are none, and a cluster of one block is nothing but that block.
#pragma once

#include "device.cuh"

namespace tokcomp::cuda {

constexpr int kMaxCluster = 8;  // that every GPU with clusters takes

#ifdef __CUDACC__
// Where `local`, an address in this block's shared memory, is in that of the cluster's block `rank`.
template <typename T>
__device__ __forceinline__ T* in_block(T* local, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(local, rank));
#else
  return local;
#endif
}

// A barrier in two halves: what came before any thread's arrival is seen by every thread that has waited.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#endif
}

// An arrival that hands no memory on, and so waits for none of this thread's stores.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#endif
}
#endif

__device__ __forceinline__ void sync_cluster(int blocks) {
  if (blocks == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

}  // namespace tokcomp::cuda
