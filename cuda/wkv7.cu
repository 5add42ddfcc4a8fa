// Kernels of the WKV-7 operator; wkv7.h has the formulas and what the launchers take, docs/wkv-cuda.md the reckoning.
//
// - Both passes may cut a state's rows only: u[i], and in the backward pass the gradient gu[i], are sums over a whole row
//   that each step begins with. gv is a sum over a row, too; gr, gw, gk, ga and gb are sums over rows. Where rows are
//   cut over blocks in the backward pass, each leaves its part of these five, and a small kernel adds them.
// - Sums over a row are shuffles. What the step waits for (u, gu) is summed at once; y and gv for four steps (16 values)
//   at a time. Sums over rows go through shared memory, four steps at a time.
// - Backward meets S_t in reverse. From a chunk's saved state it walks forward once, keeping u and every fourth state in
//   shared memory; then, group by group from the end, it recomputes four states in registers. It never divides by a
//   decay.
#include "wkv7.h"
#include "wkv_tiles.cuh"

namespace wkv7 {
namespace {

using namespace wkv;

constexpr float STRONGEST = 0.60653066f;  // exp(-1/2): minus the logarithm of the strongest decay

// One step of the state's recurrence on a thread's tile.
__device__ inline void advance(float (&next)[TILE][TILE], const float (&S)[TILE][TILE], const float (&d)[TILE],
                               const float (&u)[TILE], const float (&b)[TILE], const float (&v)[TILE],
                               const float (&k)[TILE]) {
#pragma unroll
  for (int i = 0; i < TILE; i++)
#pragma unroll
    for (int j = 0; j < TILE; j++) next[i][j] = fmaf(d[j], S[i][j], fmaf(u[i], b[j], v[i] * k[j]));
}

// x[i] = sum_j m[i][j] c[j] over a whole row of the state, for the four rows of a thread's tile.
template <int LANES>
__device__ inline void row_sums(float (&x)[TILE], const float (&m)[TILE][TILE], const float (&c)[TILE]) {
#pragma unroll
  for (int i = 0; i < TILE; i++) {
    x[i] = m[i][0] * c[0];
#pragma unroll
    for (int j = 1; j < TILE; j++) x[i] = fmaf(m[i][j], c[j], x[i]);
  }
  reduce_scatter<LANES, TILE>(x);
  all_gather<LANES, TILE>(x);
}

// d = exp(-exp(-1/2) sigmoid(w)), and its slope in w. With e = exp(-|w|), sigmoid' = e / (1 + e)^2 for either sign.
struct Decay {
  float d, slope;
  __device__ explicit Decay(float w) {
    const float e = expf(-fabsf(w)), larger = __fdividef(1.f, 1.f + e), smaller = e * larger;
    d = expf(-STRONGEST * (w < 0.f ? smaller : larger));
    slope = -STRONGEST * larger * smaller * d;
  }
};

template <int N>
using ForwardGeometry = Geometry<N, N == 128 ? 8 : N / 32>;  // 64, 128, 128 threads

template <int N>
struct ForwardShared {
  float r[CHUNK * N], d[CHUNK * N], k[CHUNK * N], a[CHUNK * N], b[CHUNK * N];
  float v[CHUNK * ForwardGeometry<N>::slice];  // y takes its place, group by group
};

template <typename T, int N>
__global__ void __launch_bounds__(ForwardGeometry<N>::threads, 6) forward_kernel(const Forward args) {
  using G = ForwardGeometry<N>;
  DYNAMIC_SHARED(dynamic);
  auto &shared = *reinterpret_cast<ForwardShared<N> *>(dynamic);
  const Problem &p = args.problem;
  const Place<G, CHUNK> place(p);
  const int lane = threadIdx.x % G::lanes;
  const int col = lane * TILE, row = threadIdx.x / G::lanes * TILE;  // of the tile: in the state, in the slice
  const int64_t tile = int64_t(place.from + row) * N + col;          // of the tile in a state

  // After a reduction this lane holds the sums of the values held, held + 1 ...; of lanes with the same, one is owner.
  const bool owner = lane % G::copies == 0;
  const int held = lane / G::copies * G::owned;
  float S[TILE][TILE];
  const float *initial = args.state + (args.shared_state ? int64_t(place.h) * N * N : place.matrix) + tile;
#pragma unroll
  for (int i = 0; i < TILE; i++) load4(S[i], initial + i * N);

  for (int chunk = 0; chunk < place.chunks; chunk++) {
    const int steps = place.steps_in(chunk), groups = groups_of(steps), rows = rows_of(steps);
    const int64_t first = place.first + int64_t(chunk) * CHUNK * place.stride;
    if (args.chunk_states) {
      float *saved = args.chunk_states + place.saved(p, chunk) + tile;
#pragma unroll
      for (int i = 0; i < TILE; i++) store4_global(saved + i * N, S[i]);
    }
    stage<N>(static_cast<const T *>(p.r) + first, place.stride, steps, rows, shared.r);
    stage<N>(static_cast<const T *>(p.k) + first, place.stride, steps, rows, shared.k);
    stage<N>(static_cast<const T *>(p.a) + first, place.stride, steps, rows, shared.a);
    stage<N>(static_cast<const T *>(p.b) + first, place.stride, steps, rows, shared.b);
    stage<G::slice>(static_cast<const T *>(p.v) + first + place.from, place.stride, steps, rows, shared.v);
    stage<N>(static_cast<const T *>(p.w) + first, place.stride, steps, rows, -INFINITY, [&](int at, float4 w) {
      *reinterpret_cast<float4 *>(shared.d + at) = make_float4(Decay(w.x).d, Decay(w.y).d, Decay(w.z).d, Decay(w.w).d);
    });
    __syncthreads();  // the chunk is staged

    for (int t = 0; t < groups * GROUP; t += GROUP) {
      float y[VALUES] = {};
#pragma unroll
      for (int s = 0; s < GROUP; s++) {
        float r[TILE], d[TILE], k[TILE], a[TILE], b[TILE], v[TILE], u[TILE];
        load4(a, shared.a + (t + s) * N + col);
        row_sums<G::lanes>(u, S, a);
        load4(r, shared.r + (t + s) * N + col);
        load4(d, shared.d + (t + s) * N + col);
        load4(k, shared.k + (t + s) * N + col);
        load4(b, shared.b + (t + s) * N + col);
        load4(v, shared.v + (t + s) * G::slice + row);
        advance(S, S, d, u, b, v, k);
#pragma unroll
        for (int i = 0; i < TILE; i++)
#pragma unroll
          for (int j = 0; j < TILE; j++) y[s * TILE + i] = fmaf(r[j], S[i][j], y[s * TILE + i]);
      }
      reduce_scatter<G::lanes, VALUES>(y);
      __syncwarp();  // these rows of v belong to this warp, which has read them
      if (owner) {
#pragma unroll
        for (int q = 0; q < G::owned; q++) shared.v[(t + (held + q) / TILE) * G::slice + row + (held + q) % TILE] = y[q];
      }
    }
    __syncthreads();  // y is complete; the inputs are read
    unstage<G::slice, T>(shared.v, static_cast<T *>(args.y) + first + place.from, place.stride, steps);
  }
  float *final_state = args.final_state + place.matrix + tile;
#pragma unroll
  for (int i = 0; i < TILE; i++) store4_global(final_state + i * N, S[i]);
}

constexpr int SUMS = 5;  // gradients that are sums over rows: those of r, w, k, a, b, in this order

template <typename G>
struct BackwardShared {
  static constexpr int N = G::lanes * TILE;
  static constexpr int together = WARP / G::lanes;        // strips of rows in a warp
  static constexpr int kept = SUMS * TILE / together;     // sums that a lane holds after a reduction over these
  float r[CHUNK * N], slope[CHUNK * N], k[CHUNK * N], a[CHUNK * N], b[CHUNK * N];  // their gradients take their places
  float d[CHUNK * N];
  float v[CHUNK * G::slice], gy[CHUNK * G::slice], u[CHUNK * G::slice];  // gv takes the place of v
  float parts[G::threads / WARP][GROUP][G::lanes][SUMS][TILE];           // sums over the rows of each warp
  float states[CHUNK / GROUP][TILE][G::threads][TILE];                   // before each group; each thread its own
};

template <typename T, typename G>
__global__ void __launch_bounds__(G::threads, 1) backward_kernel(const Backward args) {
  using Shared = BackwardShared<G>;
  constexpr int N = Shared::N;
  DYNAMIC_SHARED(dynamic);
  auto &shared = *reinterpret_cast<Shared *>(dynamic);
  const Problem &p = args.problem;
  const Place<G, CHUNK> place(p);
  const int lane = threadIdx.x % G::lanes, warp = threadIdx.x / WARP;
  const int col = lane * TILE, row = threadIdx.x / G::lanes * TILE;  // of the tile: in the state, in the slice
  const int64_t tile = int64_t(place.from + row) * N + col;          // of the tile in a state

  // After a reduction this lane holds the sums of the values held, held + 1 ...; of lanes with the same, one is owner.
  const bool owner = lane % G::copies == 0;
  const int held = lane / G::copies * G::owned;
  const int kept = threadIdx.x % WARP / G::lanes * Shared::kept;  // the same, for sums over the rows of a warp

  float g[TILE][TILE] = {};  // dL/dS after the step at hand
  if (args.g_final_state)
#pragma unroll
    for (int i = 0; i < TILE; i++) load4(g[i], args.g_final_state + place.matrix + tile + i * N);

  for (int chunk = place.chunks - 1; chunk >= 0; chunk--) {
    const int steps = place.steps_in(chunk), groups = groups_of(steps), rows = rows_of(steps);
    const int64_t first = place.first + int64_t(chunk) * CHUNK * place.stride, mine = first + place.from;
    stage<N>(static_cast<const T *>(p.r) + first, place.stride, steps, rows, shared.r);
    stage<N>(static_cast<const T *>(p.k) + first, place.stride, steps, rows, shared.k);
    stage<N>(static_cast<const T *>(p.a) + first, place.stride, steps, rows, shared.a);
    stage<N>(static_cast<const T *>(p.b) + first, place.stride, steps, rows, shared.b);
    stage<N>(static_cast<const T *>(p.w) + first, place.stride, steps, rows, -INFINITY, [&](int at, float4 w) {
      const Decay x(w.x), y(w.y), z(w.z), last(w.w);
      *reinterpret_cast<float4 *>(shared.d + at) = make_float4(x.d, y.d, z.d, last.d);
      *reinterpret_cast<float4 *>(shared.slope + at) = make_float4(x.slope, y.slope, z.slope, last.slope);
    });
    stage<G::slice>(static_cast<const T *>(p.v) + mine, place.stride, steps, rows, shared.v);
    stage<G::slice>(static_cast<const T *>(args.gy) + mine, place.stride, steps, rows, shared.gy);

    float S[GROUP + 1][TILE][TILE];  // before each step of a group, and after it
    const float *saved = args.chunk_states + place.saved(p, chunk) + tile;
#pragma unroll
    for (int i = 0; i < TILE; i++) load4(S[GROUP][i], saved + i * N);
    __syncthreads();  // the chunk is staged

    for (int group = 0; group < groups; group++) {
#pragma unroll
      for (int i = 0; i < TILE; i++) store4_shared(shared.states[group][i][threadIdx.x], S[GROUP][i]);
#pragma unroll
      for (int s = 0; s < GROUP; s++) {
        const int t = group * GROUP + s;
        float d[TILE], k[TILE], a[TILE], b[TILE], v[TILE], u[TILE];
        load4(a, shared.a + t * N + col);
        row_sums<G::lanes>(u, S[GROUP], a);
        if (lane == 0) store4_shared(shared.u + t * G::slice + row, u);
        load4(d, shared.d + t * N + col);
        load4(k, shared.k + t * N + col);
        load4(b, shared.b + t * N + col);
        load4(v, shared.v + t * G::slice + row);
        advance(S[GROUP], S[GROUP], d, u, b, v, k);
      }
    }
    __syncwarp();  // u of this warp's rows is complete

    for (int group = groups - 1; group >= 0; group--) {
      const int t = group * GROUP;
#pragma unroll
      for (int i = 0; i < TILE; i++) load4(S[0][i], shared.states[group][i][threadIdx.x]);
#pragma unroll
      for (int s = 0; s < GROUP - 1; s++) {
        float d[TILE], k[TILE], b[TILE], v[TILE], u[TILE];
        load4(d, shared.d + (t + s) * N + col);
        load4(k, shared.k + (t + s) * N + col);
        load4(b, shared.b + (t + s) * N + col);
        load4(v, shared.v + (t + s) * G::slice + row);
        load4(u, shared.u + (t + s) * G::slice + row);
        advance(S[s + 1], S[s], d, u, b, v, k);
      }

      float gv[VALUES] = {};
#pragma unroll
      for (int s = GROUP - 1; s >= 0; s--) {
        float r[TILE], d[TILE], k[TILE], a[TILE], b[TILE], v[TILE], gy[TILE], u[TILE], gu[TILE];
        float sums[SUMS * TILE] = {};
        load4(r, shared.r + (t + s) * N + col);
        load4(d, shared.d + (t + s) * N + col);
        load4(k, shared.k + (t + s) * N + col);
        load4(a, shared.a + (t + s) * N + col);
        load4(b, shared.b + (t + s) * N + col);
        load4(v, shared.v + (t + s) * G::slice + row);
        load4(gy, shared.gy + (t + s) * G::slice + row);
        load4(u, shared.u + (t + s) * G::slice + row);
#pragma unroll
        for (int i = 0; i < TILE; i++)
#pragma unroll
          for (int j = 0; j < TILE; j++) g[i][j] = fmaf(r[j], gy[i], g[i][j]);
        row_sums<G::lanes>(gu, g, b);
#pragma unroll
        for (int i = 0; i < TILE; i++)
#pragma unroll
          for (int j = 0; j < TILE; j++) {
            const auto add = [&](int sum, float x, float y) { sums[sum * TILE + j] = fmaf(x, y, sums[sum * TILE + j]); };
            add(0, gy[i], S[s + 1][i][j]);
            add(1, g[i][j], S[s][i][j]);
            add(2, v[i], g[i][j]);
            add(3, gu[i], S[s][i][j]);
            add(4, u[i], g[i][j]);
            gv[s * TILE + i] = fmaf(k[j], g[i][j], gv[s * TILE + i]);
            g[i][j] = fmaf(d[j], g[i][j], gu[i] * a[j]);
          }
        reduce_scatter<Shared::together, SUMS * TILE, G::lanes>(sums);
        float *part = shared.parts[warp][s][lane][0] + kept;
#pragma unroll
        for (int q = 0; q < Shared::kept; q++) part[q] = sums[q];
      }
      reduce_scatter<G::lanes, VALUES>(gv);
      __syncwarp();  // these rows of v belong to this warp, which has read them
      if (owner) {
#pragma unroll
        for (int q = 0; q < G::owned; q++) shared.v[(t + (held + q) / TILE) * G::slice + row + (held + q) % TILE] = gv[q];
      }
#pragma unroll
      for (int i = 0; i < TILE; i++)
#pragma unroll
        for (int j = 0; j < TILE; j++) S[GROUP][i][j] = S[0][i][j];
      __syncthreads();  // the warps' parts are complete
      for (int q = threadIdx.x; q < GROUP * N; q += G::threads) {
        const int s = q / N, c = q % N, at = t * N + q;
        float sums[SUMS] = {};
#pragma unroll
        for (int from = 0; from < G::threads / WARP; from++)
#pragma unroll
          for (int sum = 0; sum < SUMS; sum++) sums[sum] += shared.parts[from][s][c / TILE][sum][c % TILE];
        shared.r[at] = sums[0];
        shared.slope[at] *= sums[1];
        shared.k[at] = sums[2];
        shared.a[at] = sums[3];
        shared.b[at] = sums[4];
      }
      __syncthreads();  // the parts are read; after the first group of a chunk, the gradients are complete as well
    }
    unstage<G::slice, T>(shared.v, static_cast<T *>(args.gv) + mine, place.stride, steps);
    const float *const found[SUMS] = {shared.r, shared.slope, shared.k, shared.a, shared.b};
    void *const wanted[SUMS] = {args.gr, args.gw, args.gk, args.ga, args.gb};
#pragma unroll
    for (int sum = 0; sum < SUMS; sum++)
      if constexpr (G::slices == 1) {
        unstage<N, T>(found[sum], static_cast<T *>(wanted[sum]) + first, place.stride, steps);
      } else {
        const int64_t part = sum * G::slices + place.from / G::slice;
        unstage<N, T>(found[sum], args.parts + part * p.B * p.T * place.stride + first, place.stride, steps);
      }
  }
#pragma unroll
  for (int i = 0; i < TILE; i++) store4_global(args.gstate + place.matrix + tile + i * N, g[i]);
}

template <typename T, int N, int SLICES>
void run_backward(const Backward &args, CUstream_st *stream) {
  using G = Geometry<N, SLICES>;
  const Problem &p = args.problem;
  launch(backward_kernel<T, G>, int64_t(p.B) * p.H * SLICES, G::threads, sizeof(BackwardShared<G>), stream, args);
  if constexpr (SLICES > 1) {
    const float *parts = args.parts;
    for (void *sum : {args.gr, args.gw, args.gk, args.ga, args.gb}) {
      sum_parts<T, SLICES>({p, parts, sum}, stream);
      parts += SLICES * int64_t(p.B) * p.T * p.H * N;
    }
  }
}

}  // namespace

void forward(const Forward &args, CUstream_st *stream) {
  run_for(args.problem, [&](auto number, auto size) {
    using T = decltype(number);
    constexpr int N = size;
    using G = ForwardGeometry<N>;
    const int64_t blocks = int64_t(args.problem.B) * args.problem.H * G::slices;
    launch(forward_kernel<T, N>, blocks, G::threads, sizeof(ForwardShared<N>), stream, args);
  });
}

void backward(const Backward &args, CUstream_st *stream) {
  run_for(args.problem, [&](auto number, auto size) {
    using T = decltype(number);
    constexpr int N = size;
    if constexpr (N == 64) {
      if (args.slices == 2) return run_backward<T, N, 2>(args, stream);
    }
    run_backward<T, N, N == 128 ? 8 : 1>(args, stream);
  });
}

}  // namespace wkv7
