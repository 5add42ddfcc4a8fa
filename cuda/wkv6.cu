// Kernels of the WKV-6 operator; wkv6.h has the formulas and what the launchers take, docs/wkv-cuda.md the reckoning.
//
// - Forward cuts a state's rows, as y[i] needs row i only. Backward cuts its columns, as gr, gk, gw and gu are sums over
//   i at fixed j; only gv crosses blocks: each leaves its part, and a small kernel adds them.
// - Sums along the uncut side are taken for four steps (16 values) at a time.
// - Backward meets S_t in reverse. From a chunk's saved state it walks forward once, keeping every fourth state in
//   shared memory; then, group by group from the end, it recomputes four states in registers. It never divides by a
//   decay, and finds gw from S and G themselves, not as a difference of sums, which cancels where decays are strong.
#include "wkv6.h"
#include "wkv_tiles.cuh"

namespace wkv6 {
namespace {

using namespace wkv;

template <int N>
using Geometry = wkv::Geometry<N, slices(N)>;  // 64, 128, 128 threads

// One step of the state's recurrence on a thread's tile.
__device__ inline void advance(float (&next)[TILE][TILE], const float (&S)[TILE][TILE], const float (&d)[TILE],
                               const float (&k)[TILE], const float (&v)[TILE]) {
#pragma unroll
  for (int i = 0; i < TILE; i++)
#pragma unroll
    for (int j = 0; j < TILE; j++) next[i][j] = fmaf(d[j], S[i][j], k[j] * v[i]);
}

// d = exp(-exp(w)), and its slope in w. The slope's limit is 0 where exp(w) overflows.
struct Decay {
  float d, slope;
  __device__ explicit Decay(float w) {
    const float rate = expf(w);
    d = expf(-rate);
    slope = d > 0.f ? -d * rate : 0.f;
  }
};

template <int N>
struct ForwardShared {
  float r[CHUNK * N], k[CHUNK * N], d[CHUNK * N];
  float v[CHUNK * Geometry<N>::slice];  // y takes its place, group by group
  float bonus[CHUNK];                   // sum_j r u k
};

template <typename T, int N>
__global__ void __launch_bounds__(Geometry<N>::threads) forward_kernel(const Forward args) {
  using G = Geometry<N>;
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
  float u[TILE];
  load4(u, p.u + place.h * N + first_of<N>());
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
    stage<G::slice>(static_cast<const T *>(p.v) + first + place.from, place.stride, steps, rows, shared.v);
    stage<N>(static_cast<const T *>(p.w) + first, place.stride, steps, rows, -INFINITY, [&](int at, float4 w) {
      *reinterpret_cast<float4 *>(shared.d + at) = make_float4(Decay(w.x).d, Decay(w.y).d, Decay(w.z).d, Decay(w.w).d);
    });
    __syncthreads();  // the chunk is staged
    dot_rows<N>(shared.r, shared.k, u, rows, shared.bonus);
    __syncthreads();  // bonus is complete

    for (int t = 0; t < groups * GROUP; t += GROUP) {
      float y[VALUES] = {};
#pragma unroll
      for (int s = 0; s < GROUP; s++) {
        float r[TILE], k[TILE], d[TILE], v[TILE];
        load4(r, shared.r + (t + s) * N + col);
        load4(k, shared.k + (t + s) * N + col);
        load4(d, shared.d + (t + s) * N + col);
        load4(v, shared.v + (t + s) * G::slice + row);
#pragma unroll
        for (int i = 0; i < TILE; i++)
#pragma unroll
          for (int j = 0; j < TILE; j++) y[s * TILE + i] = fmaf(r[j], S[i][j], y[s * TILE + i]);
        advance(S, S, d, k, v);
      }
      reduce_scatter<G::lanes, VALUES>(y);
      __syncwarp();  // these rows of v belong to this warp, which has read them
      if (owner) {
#pragma unroll
        for (int q = 0; q < G::owned; q++) {
          const int step = t + (held + q) / TILE;
          float &v = shared.v[step * G::slice + row + (held + q) % TILE];
          v = fmaf(shared.bonus[step], v, y[q]);
        }
      }
    }
    __syncthreads();  // y is complete; r, k, d are read
    unstage<G::slice, T>(shared.v, static_cast<T *>(args.y) + first + place.from, place.stride, steps);
  }
  float *final_state = args.final_state + place.matrix + tile;
#pragma unroll
  for (int i = 0; i < TILE; i++) store4_global(final_state + i * N, S[i]);
}

template <int N>
struct BackwardShared {
  using G = Geometry<N>;
  float r[CHUNK * G::slice], k[CHUNK * G::slice], slope[CHUNK * G::slice];  // gr, gk, gw take their places
  float d[CHUNK * G::slice];
  float v[CHUNK * N], gy[CHUNK * N];
  float bonus[CHUNK], gyv[CHUNK];                           // sum_j r u k over the slice; sum_i gy v
  float gv[G::strips][GROUP][N];                            // parts of gv, one for each strip of columns
  float states[CHUNK / GROUP - 1][TILE][G::threads][TILE];  // before each group but the last; each thread its own
  float gu[GROUP][G::slice];                                // parts of gu, one for each step of a group
};

template <typename T, int N>
__global__ void __launch_bounds__(Geometry<N>::threads, 3) backward_kernel(const Backward args) {
  using G = Geometry<N>;
  DYNAMIC_SHARED(dynamic);
  auto &shared = *reinterpret_cast<BackwardShared<N> *>(dynamic);
  const Problem &p = args.problem;
  const Place<G, CHUNK> place(p);
  const int lane = threadIdx.x % G::lanes, strip = threadIdx.x / G::lanes;
  const int row = lane * TILE, col = strip * TILE;           // of the tile: in the state, in the slice
  const int64_t tile = int64_t(row) * N + place.from + col;  // of the tile in a state

  // After a reduction this lane holds the sums of the values held, held + 1 ...; of lanes with the same, one is owner.
  const bool owner = lane % G::copies == 0;
  const int held = lane / G::copies * G::owned;
  float u[G::owned], gu[G::owned] = {};
#pragma unroll
  for (int q = 0; q < G::owned; q++) u[q] = p.u[place.h * N + place.from + col + (held + q) % TILE];

  float g[TILE][TILE] = {};  // dL/dS after the step at hand
  if (args.g_final_state)
#pragma unroll
    for (int i = 0; i < TILE; i++) load4(g[i], args.g_final_state + place.matrix + tile + i * N);
  float *gv_part = args.gv_parts + int64_t(place.from / G::slice) * p.B * p.T * place.stride;

  for (int chunk = place.chunks - 1; chunk >= 0; chunk--) {
    const int steps = place.steps_in(chunk), groups = groups_of(steps), rows = rows_of(steps);
    const int64_t first = place.first + int64_t(chunk) * CHUNK * place.stride, mine = first + place.from;
    stage<G::slice>(static_cast<const T *>(p.r) + mine, place.stride, steps, rows, shared.r);
    stage<G::slice>(static_cast<const T *>(p.k) + mine, place.stride, steps, rows, shared.k);
    stage<G::slice>(static_cast<const T *>(p.w) + mine, place.stride, steps, rows, -INFINITY, [&](int at, float4 w) {
      const Decay x(w.x), y(w.y), z(w.z), last(w.w);
      *reinterpret_cast<float4 *>(shared.d + at) = make_float4(x.d, y.d, z.d, last.d);
      *reinterpret_cast<float4 *>(shared.slope + at) = make_float4(x.slope, y.slope, z.slope, last.slope);
    });
    stage<N>(static_cast<const T *>(p.v) + first, place.stride, steps, rows, shared.v);
    stage<N>(static_cast<const T *>(args.gy) + first, place.stride, steps, rows, shared.gy);

    float S[GROUP][TILE][TILE];  // before each step of a group
    const float *saved = args.chunk_states + place.saved(p, chunk) + tile;
#pragma unroll
    for (int i = 0; i < TILE; i++) load4(S[0][i], saved + i * N);
    __syncthreads();  // the chunk is staged
    float scale[TILE];
    load4(scale, p.u + place.h * N + place.from + first_of<G::slice>());
    dot_rows<G::slice>(shared.r, shared.k, scale, rows, shared.bonus);
    dot_rows<N>(shared.gy, shared.v, {1.f, 1.f, 1.f, 1.f}, rows, shared.gyv);
    __syncthreads();  // bonus and gyv are complete

    for (int group = 0; group < groups - 1; group++) {
#pragma unroll
      for (int i = 0; i < TILE; i++) store4_shared(shared.states[group][i][threadIdx.x], S[0][i]);
#pragma unroll
      for (int s = 0; s < GROUP; s++) {
        const int t = group * GROUP + s;
        float k[TILE], d[TILE], v[TILE];
        load4(k, shared.k + t * G::slice + col);
        load4(d, shared.d + t * G::slice + col);
        load4(v, shared.v + t * N + row);
        advance(S[0], S[0], d, k, v);
      }
    }

    for (int group = groups - 1; group >= 0; group--) {
      const int t = group * GROUP;
      if (group < groups - 1)
#pragma unroll
        for (int i = 0; i < TILE; i++) load4(S[0][i], shared.states[group][i][threadIdx.x]);
#pragma unroll
      for (int s = 0; s < GROUP - 1; s++) {
        float k[TILE], d[TILE], v[TILE];
        load4(k, shared.k + (t + s) * G::slice + col);
        load4(d, shared.d + (t + s) * G::slice + col);
        load4(v, shared.v + (t + s) * N + row);
        advance(S[s + 1], S[s], d, k, v);
      }

      float gr[VALUES] = {}, gk[VALUES] = {}, gd[VALUES] = {};
#pragma unroll
      for (int s = GROUP - 1; s >= 0; s--) {
        float r[TILE], k[TILE], d[TILE], v[TILE], gy[TILE], gv[TILE] = {};
        load4(r, shared.r + (t + s) * G::slice + col);
        load4(k, shared.k + (t + s) * G::slice + col);
        load4(d, shared.d + (t + s) * G::slice + col);
        load4(v, shared.v + (t + s) * N + row);
        load4(gy, shared.gy + (t + s) * N + row);
#pragma unroll
        for (int i = 0; i < TILE; i++)
#pragma unroll
          for (int j = 0; j < TILE; j++) {
            const int value = s * TILE + j;
            gr[value] = fmaf(gy[i], S[s][i][j], gr[value]);
            gk[value] = fmaf(v[i], g[i][j], gk[value]);
            gd[value] = fmaf(S[s][i][j], g[i][j], gd[value]);
            gv[i] = fmaf(k[j], g[i][j], gv[i]);
            g[i][j] = fmaf(d[j], g[i][j], r[j] * gy[i]);
          }
        store4_shared(&shared.gv[strip][s][row], gv);
      }
      reduce_scatter<G::lanes, VALUES>(gr);
      reduce_scatter<G::lanes, VALUES>(gk);
      reduce_scatter<G::lanes, VALUES>(gd);
      __syncwarp();  // these columns of r, k and slope belong to this warp, which has read them
      if (owner) {
#pragma unroll
        for (int q = 0; q < G::owned; q++) {
          const int step = t + (held + q) / TILE, at = step * G::slice + col + (held + q) % TILE;
          const float r = shared.r[at], k = shared.k[at], gyv = shared.gyv[step];
          shared.r[at] = fmaf(u[q] * k, gyv, gr[q]);
          shared.k[at] = fmaf(u[q] * r, gyv, gk[q]);
          shared.slope[at] *= gd[q];
          gu[q] = fmaf(r * k, gyv, gu[q]);
        }
      }
      __syncthreads();  // the strips' parts of gv are complete
      if (const int s = threadIdx.x / G::lanes, i = row; s < GROUP && t + s < steps) {  // a thread: four rows of a step
        float sum[TILE], part[TILE];
        load4(sum, shared.gy + (t + s) * N + i);
#pragma unroll
        for (int e = 0; e < TILE; e++) sum[e] *= shared.bonus[t + s];
#pragma unroll
        for (int c = 0; c < G::strips; c++) {
          load4(part, &shared.gv[c][s][i]);
#pragma unroll
          for (int e = 0; e < TILE; e++) sum[e] += part[e];
        }
        store4_global(gv_part + first + (t + s) * place.stride + i, sum);
      }
      __syncthreads();  // gv is read; after the first group of a chunk, gr, gk, gw are complete as well
    }
    unstage<G::slice, T>(shared.r, static_cast<T *>(args.gr) + mine, place.stride, steps);
    unstage<G::slice, T>(shared.k, static_cast<T *>(args.gk) + mine, place.stride, steps);
    unstage<G::slice, T>(shared.slope, static_cast<T *>(args.gw) + mine, place.stride, steps);
  }

#pragma unroll
  for (int i = 0; i < TILE; i++) store4_global(args.gstate + place.matrix + tile + i * N, g[i]);
  if (owner) {
#pragma unroll
    for (int q = 0; q < G::owned; q++) shared.gu[(held + q) / TILE][col + (held + q) % TILE] = gu[q];
  }
  __syncthreads();  // gu of each step of a group is complete
  if (const int c = threadIdx.x; c < G::slice) {
    float sum = 0.f;
#pragma unroll
    for (int s = 0; s < GROUP; s++) sum += shared.gu[s][c];
    args.gu[place.head * N + place.from + c] = sum;
  }
}

}  // namespace

void forward(const Forward &args, CUstream_st *stream) {
  run_for(args.problem, [&](auto number, auto size) {
    using T = decltype(number);
    constexpr int N = size;
    using G = Geometry<N>;
    const int64_t blocks = int64_t(args.problem.B) * args.problem.H * G::slices;
    launch(forward_kernel<T, N>, blocks, G::threads, sizeof(ForwardShared<N>), stream, args);
  });
}

void backward(const Backward &args, CUstream_st *stream) {
  run_for(args.problem, [&](auto number, auto size) {
    using T = decltype(number);
    constexpr int N = size;
    using G = Geometry<N>;
    const int64_t blocks = int64_t(args.problem.B) * args.problem.H * G::slices;
    launch(backward_kernel<T, N>, blocks, G::threads, sizeof(BackwardShared<N>), stream, args);
    sum_parts<T, G::slices>({args.problem, args.gv_parts, args.gv}, stream);
  });
}

}  // namespace wkv6
