// What the WKV-6 kernels are made of: moving tiles between global memory, shared memory and registers, and adding up.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAUNCH(kernel, grid, block, shared_bytes, stream, args) kernel<<<grid, block, shared_bytes, stream>>>(args)
#define DYNAMIC_SHARED(name) extern __shared__ float4 name[]
#else
#include "cuda_stand_in.h"  // the tests' stand-in for the language: the same source, run on a CPU
#endif

namespace wkv6 {
namespace {

constexpr int WARP = 32;
constexpr int TILE = 4;  // values that a thread moves at a time: one float4
constexpr int ROWS = 8;  // steps are staged in multiples of this

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float x, float &out) { out = x; }
__device__ inline void from_float(float x, __nv_bfloat16 &out) { out = __float2bfloat16(x); }
__device__ inline void from_float(float x, __half &out) { out = __float2half(x); }

__device__ inline void load4(float (&x)[TILE], const float *from) {
  const float4 q = *reinterpret_cast<const float4 *>(from);
  x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
}

__device__ inline void store4_shared(float *to, const float (&x)[TILE]) {
  *reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

// By the intrinsic, as nvcc 13 splits some plain 16-byte stores to global memory into four.
__device__ inline void store4_global(float *to, const float (&x)[TILE]) {
  __stcg(reinterpret_cast<float4 *>(to), make_float4(x[0], x[1], x[2], x[3]));
}

template <typename T>
struct alignas(16) Pack {  // one 16-byte load or store
  static constexpr int size = 16 / sizeof(T);
  T x[size];

  __device__ void load(const T *from) { *reinterpret_cast<float4 *>(x) = *reinterpret_cast<const float4 *>(from); }
  __device__ void store(T *to) const {
    __stcg(reinterpret_cast<float4 *>(to), *reinterpret_cast<const float4 *>(x));
  }
};

// Sums x over LANES neighbouring lanes by halving: a lane sends away the half of the values that it will not keep.
// Lane l ends with the sums of values l * COUNT / LANES ... in x[0] ...; if LANES > COUNT, LANES / COUNT lanes agree.
template <int LANES, int COUNT>
__device__ inline void reduce_scatter(float *x) {
  if constexpr (LANES > 1) {
    constexpr int half = LANES / 2;
    if constexpr (COUNT > 1) {
      const bool upper = threadIdx.x & half;
#pragma unroll
      for (int q = 0; q < COUNT / 2; q++) {
        const float low = x[q], high = x[q + COUNT / 2];
        x[q] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, half);
      }
      reduce_scatter<half, COUNT / 2>(x);
    } else {
      x[0] += __shfl_xor_sync(0xffffffffu, x[0], half);
      reduce_scatter<half, 1>(x);
    }
  }
}

// Copies (steps, WIDTH) of a (B, T, H, N) tensor to shared memory as fp32, `missing` in the rows up to `rows`.
// put(index, float4) stores four neighbouring values of the (rows, WIDTH) tile.
template <int WIDTH, typename T, typename Put>
__device__ inline void stage(const T *from, int64_t stride, int steps, int rows, float missing, Put put) {
  constexpr int packs = WIDTH / Pack<T>::size;
  for (int q = threadIdx.x; q < rows * packs; q += blockDim.x) {
    const int t = q / packs, c = q % packs * Pack<T>::size;
    float x[Pack<T>::size];
    if (t < steps) {
      Pack<T> pack;
      pack.load(from + t * stride + c);
#pragma unroll
      for (int e = 0; e < Pack<T>::size; e++) x[e] = to_float(pack.x[e]);
    } else {
#pragma unroll
      for (int e = 0; e < Pack<T>::size; e++) x[e] = missing;
    }
#pragma unroll
    for (int e = 0; e < Pack<T>::size; e += 4) put(t * WIDTH + c + e, make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]));
  }
}

template <int WIDTH, typename T>
__device__ inline void stage(const T *from, int64_t stride, int steps, int rows, float *to) {
  stage<WIDTH>(from, stride, steps, rows, 0.f, [=](int at, float4 x) { *reinterpret_cast<float4 *>(to + at) = x; });
}

// The way back: (steps, WIDTH) of fp32 in shared memory to a (B, T, H, N) tensor. A thread reads just what it would
// stage, so that the next chunk may be staged in the same place without a barrier.
template <int WIDTH, typename T>
__device__ inline void unstage(const float *from, T *to, int64_t stride, int steps) {
  constexpr int packs = WIDTH / Pack<T>::size;
  for (int q = threadIdx.x; q < steps * packs; q += blockDim.x) {
    const int t = q / packs, c = q % packs * Pack<T>::size;
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < Pack<T>::size; e++) from_float(from[t * WIDTH + c + e], pack.x[e]);
    pack.store(to + t * stride + c);
  }
}

// The first of the columns that are the calling thread's in dot_rows.
template <int WIDTH>
__device__ inline int first_of() {
  return threadIdx.x % (WIDTH / TILE) * TILE;
}

// out[t] = sum_c scale[c] a[t][c] b[t][c] for `rows` rows of width WIDTH. WIDTH / TILE lanes share a row; the caller
// gives the factors of its own columns.
template <int WIDTH>
__device__ inline void dot_rows(const float *a, const float *b, const float (&scale)[TILE], int rows, float *out) {
  constexpr int lanes = WIDTH / TILE;
  static_assert(ROWS % (WARP / lanes) == 0, "all lanes of a warp must take part in a shuffle");
  for (int t = threadIdx.x / lanes; t < rows; t += blockDim.x / lanes) {
    float x[TILE], y[TILE], sum = 0.f;
    load4(x, a + t * WIDTH + first_of<WIDTH>());
    load4(y, b + t * WIDTH + first_of<WIDTH>());
#pragma unroll
    for (int e = 0; e < TILE; e++) sum = fmaf(scale[e] * x[e], y[e], sum);
    reduce_scatter<lanes, 1>(&sum);
    if (threadIdx.x % lanes == 0) out[t] = sum;
  }
}

}  // namespace
}  // namespace wkv6
