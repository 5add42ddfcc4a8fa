// What the WKV kernels of both generations are made of: how a state is cut, moving tiles between global memory, shared
// memory and registers, adding up, and launching.
//
// - The state of one sample and head is cut over blocks, along its rows or its columns. A thread holds a 4 x 4 tile of it
//   in registers. The threads along the uncut side are neighbours in one warp, so that sums along it are shuffles.
// - Time is walked in chunks. A chunk's inputs are staged in shared memory as fp32. Steps past a sample's length are
//   staged as zeros with a decay of 1, which leaves states as they are and gives zero gradients.
// - No atomics: results do not depend on the order of blocks.
#pragma once
#include <type_traits>

#include "wkv.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAUNCH(kernel, grid, block, shared_bytes, stream, args) kernel<<<grid, block, shared_bytes, stream>>>(args)
#define DYNAMIC_SHARED(name) extern __shared__ float4 name[]
#else
#include "cuda_stand_in.h"  // the tests' stand-in for the language: the same source, run on a CPU
#endif

namespace wkv {
namespace {

constexpr int WARP = 32;              // threads
constexpr int TILE = 4;               // values that a thread moves at a time: one float4
constexpr int ROWS = 8;               // steps are staged in multiples of this
constexpr int GROUP = 4;              // steps between two reductions, and of states recomputed in registers
constexpr int VALUES = GROUP * TILE;  // what a thread brings to a reduction: index = step * TILE + place in its tile
static_assert(ROWS % GROUP == 0, "chunks are walked in whole groups");

// Head size, and blocks that share a state.
template <int N, int SLICES>
struct Geometry {
  static constexpr int slices = SLICES;
  static constexpr int slice = N / slices;           // rows or columns of a block
  static constexpr int lanes = N / TILE;             // threads along the uncut side: 8, 16 or 32 neighbours of a warp
  static constexpr int strips = slice / TILE;        // threads along the cut side
  static constexpr int threads = lanes * strips;
  static constexpr int owned = VALUES > lanes ? VALUES / lanes : 1;  // sums that a lane holds after a reduction
  static constexpr int copies = lanes > VALUES ? lanes / VALUES : 1;  // lanes that hold the same sum
  static_assert(lanes <= WARP && threads % WARP == 0, "sums along the uncut side must stay in a warp");
};

// Where one block stands: its sample, head and slice of the state.
template <typename Geometry, int CHUNK>
struct Place {
  static_assert(CHUNK % ROWS == 0, "chunks are staged whole");
  static constexpr int N = Geometry::slice * Geometry::slices;
  int h, from;            // from: the first row or column of the slice
  int steps, chunks;      // the sample's own
  int64_t head, matrix;   // index of (b, h) in a (B, H) tensor; of its state
  int64_t first, stride;  // index of (b, 0, h, 0) in a (B, T, H, N) tensor; from step to step

  __device__ explicit Place(const Shape &p) {
    const int bh = blockIdx.x / Geometry::slices, b = bh / p.H;
    h = bh % p.H, from = blockIdx.x % Geometry::slices * Geometry::slice;
    steps = p.lengths ? int(max(int64_t(0), min(p.lengths[b], int64_t(p.T)))) : p.T;
    chunks = (steps + CHUNK - 1) / CHUNK;
    head = bh, matrix = head * N * N;
    first = (int64_t(b) * p.T * p.H + h) * N, stride = int64_t(p.H) * N;
  }

  __device__ int steps_in(int chunk) const { return min(CHUNK, steps - chunk * CHUNK); }

  // Index of the state before a chunk in (B, H, ceil(T / CHUNK), N, N).
  __device__ int64_t saved(const Shape &p, int chunk) const {
    return (head * ((p.T + CHUNK - 1) / CHUNK) + chunk) * N * N;
  }
};

__device__ inline int groups_of(int steps) { return (steps + GROUP - 1) / GROUP; }
__device__ inline int rows_of(int steps) { return (steps + ROWS - 1) / ROWS * ROWS; }

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

// Sums x over LANES neighbouring lanes (STRIDE apart) by halving: a lane sends away the half of the values that it will not keep.
// Lane l ends with the sums of values l * COUNT / LANES ... in x[0] ...; if LANES > COUNT, LANES / COUNT lanes agree.
template <int LANES, int COUNT, int STRIDE = 1>
__device__ inline void reduce_scatter(float *x) {
  if constexpr (LANES > 1) {
    constexpr int half = LANES / 2, mask = half * STRIDE;
    if constexpr (COUNT > 1) {
      const bool upper = threadIdx.x & mask;
#pragma unroll
      for (int q = 0; q < COUNT / 2; q++) {
        const float low = x[q], high = x[q + COUNT / 2];
        x[q] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, mask);
      }
      reduce_scatter<half, COUNT / 2, STRIDE>(x);
    } else {
      x[0] += __shfl_xor_sync(0xffffffffu, x[0], mask);
      reduce_scatter<half, 1, STRIDE>(x);
    }
  }
}

// Undoes the halving of reduce_scatter: all lanes get all sums.
template <int LANES, int COUNT>
__device__ inline void all_gather(float *x) {
  if constexpr (LANES > 1 && COUNT > 1) {
    constexpr int half = LANES / 2;
    all_gather<half, COUNT / 2>(x);
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int q = 0; q < COUNT / 2; q++) {
      const float mine = x[q], other = __shfl_xor_sync(0xffffffffu, mine, half);
      x[q] = upper ? other : mine, x[q + COUNT / 2] = upper ? mine : other;
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

// The way back: (steps, WIDTH) of fp32 in shared memory to a tensor (B, T, H, N) of Out. A thread reads just what it
// would stage of a tensor of T, so that the next chunk may be staged in the same place without a barrier.
template <int WIDTH, typename T, typename Out>
__device__ inline void unstage(const float *from, Out *to, int64_t stride, int steps) {
  constexpr int size = Pack<T>::size, packs = WIDTH / size;
  for (int q = threadIdx.x; q < steps * packs; q += blockDim.x) {
    const int t = q / packs, c = q % packs * size;
#pragma unroll
    for (int e = 0; e < size; e += Pack<Out>::size) {
      Pack<Out> pack;
#pragma unroll
      for (int x = 0; x < Pack<Out>::size; x++) from_float(from[t * WIDTH + c + e + x], pack.x[x]);
      pack.store(to + t * stride + c + e);
    }
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

// What slices have left of a gradient, to be added up.
struct Parts {
  Shape shape;
  const float *parts;  // (slices, B, T, H, N)
  void *sum;           // (B, T, H, N)
};

// A thread writes one pack.
template <typename T, int SLICES>
__global__ void sum_parts_kernel(const Parts args) {
  const Shape &p = args.shape;
  const int64_t count = int64_t(p.B) * p.T * p.H * p.N;
  const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * Pack<T>::size;
  if (at >= count) return;
  const int64_t step = at / (int64_t(p.H) * p.N);
  if (p.lengths && step % p.T >= p.lengths[step / p.T]) return;
  Pack<T> pack;
#pragma unroll
  for (int e = 0; e < Pack<T>::size; e += TILE) {
    float sum[TILE] = {}, part[TILE];
#pragma unroll
    for (int s = 0; s < SLICES; s++) {
      load4(part, args.parts + s * count + at + e);
#pragma unroll
      for (int q = 0; q < TILE; q++) sum[q] += part[q];
    }
#pragma unroll
    for (int q = 0; q < TILE; q++) from_float(sum[q], pack.x[e + q]);
  }
  pack.store(static_cast<T *>(args.sum) + at);
}

template <typename Kernel, typename Args>
void launch(Kernel kernel, int64_t blocks, int threads, int shared_bytes, CUstream_st *stream, const Args &args) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  LAUNCH(kernel, unsigned(blocks), unsigned(threads), shared_bytes, stream, args);
}

template <typename T, int SLICES>
void sum_parts(const Parts &args, CUstream_st *stream) {
  const Shape &p = args.shape;
  const int64_t threads = int64_t(p.B) * p.T * p.H * p.N / Pack<T>::size;
  launch(sum_parts_kernel<T, SLICES>, (threads + 255) / 256, 256, 0, stream, args);
}

template <typename T, typename Run>
void run_for_size(const Shape &p, Run run) {
  switch (p.N) {
    case 32: return run(T{}, std::integral_constant<int, 32>{});
    case 64: return run(T{}, std::integral_constant<int, 64>{});
    case 128: return run(T{}, std::integral_constant<int, 128>{});
  }
}

// run(a value of the type of r's numbers, the head size as a constant)
template <typename Run>
void run_for(const Shape &p, Run run) {
  switch (p.dtype) {
    case Dtype::fp32: return run_for_size<float>(p, run);
    case Dtype::bf16: return run_for_size<__nv_bfloat16>(p, run);
    case Dtype::fp16: return run_for_size<__half>(p, run);
  }
}

}  // namespace
}  // namespace wkv
