// Small dense matrices for the WKV operator: fp32, rows of N floats one after the other, N a multiple of 16. Sixteen
// accumulators stay in registers while the common index runs; a row of b is loaded once for four rows of the result.
#pragma once
#include "vec.h"

// What is loaded before this is not loaded again after it. Without it, GCC makes a memory operand of every use of a
// row, and the products run at the speed of the loads, 4/5 of that of the multiplications.
inline void keep_in_registers() { asm volatile("" ::: "memory"); }

// out[t] = sum_m a[t, m] b[m] for t < T, m < M; added to out if `add`. a[t, m] lies at a + t * a_row + m * a_column.
template <int N, bool add = false>
inline void multiply(float* out, int T, const float* a, int a_row, int a_column, const float* b, int M) {
  constexpr int V = N < 4 * LANES ? N / LANES : 4;
  for (int t = 0; t < T; t += 4)
    for (int j = 0; j < N; j += V * LANES) {
      float* to = out + t * N + j;
      vec sum[4][V];
      for (int x = 0; x < 4; ++x)
        for (int c = 0; c < V; ++c) sum[x][c] = add ? load(to + x * N + c * LANES) : vec{};
      for (int m = 0; m < M; ++m) {
        vec row[V];
        for (int c = 0; c < V; ++c) row[c] = load(b + m * N + j + c * LANES);
        keep_in_registers();
        for (int x = 0; x < 4; ++x)
          for (int c = 0; c < V; ++c) sum[x][c] += a[(t + x) * a_row + m * a_column] * row[c];
      }
      for (int x = 0; x < 4; ++x)
        for (int c = 0; c < V; ++c) store(to + x * N + c * LANES, sum[x][c]);
    }
}

// out[m, j] = scale x[m, j] + sum_t a[t, m] b[t, j] for m, j < N and t < T; the scale is scale[m] if `by_row`, else
// scale[j].
template <int N, bool by_row>
inline void decay_and_add(float* out, const float* x, const float* scale, const float* a, const float* b, int T) {
  constexpr int V = N < 4 * LANES ? N / LANES : 4;
  for (int j = 0; j < N; j += V * LANES)
    for (int m = 0; m < N; m += 4) {
      vec sum[4][V];
      for (int i = 0; i < 4; ++i)
        for (int c = 0; c < V; ++c) {
          const int at = j + c * LANES;
          sum[i][c] = load(x + (m + i) * N + at) * (by_row ? broadcast(scale[m + i]) : load(scale + at));
        }
      for (int t = 0; t < T; ++t) {
        vec row[V];
        for (int c = 0; c < V; ++c) row[c] = load(b + t * N + j + c * LANES);
        keep_in_registers();
        for (int i = 0; i < 4; ++i)
          for (int c = 0; c < V; ++c) sum[i][c] += a[t * N + m + i] * row[c];
      }
      for (int i = 0; i < 4; ++i)
        for (int c = 0; c < V; ++c) store(out + (m + i) * N + j + c * LANES, sum[i][c]);
    }
}

// out[t * out_row + s] = a[t] . b[s] for t, s < T.
template <int N, int T>
inline void dots(float* out, int out_row, const float* a, const float* b) {
  constexpr int R = T < 4 ? T : 4;
  for (int t = 0; t < T; t += R)
    for (int s = 0; s < T; s += R) {
      vec part[LANES] = {};
      for (int j = 0; j < N; j += LANES) {
        vec row[R];
        for (int y = 0; y < R; ++y) row[y] = load(b + (s + y) * N + j);
        keep_in_registers();
        for (int x = 0; x < R; ++x)
          for (int y = 0; y < R; ++y) part[R * x + y] += load(a + (t + x) * N + j) * row[y];
      }
      const vec all = sums(part);
      for (int x = 0; x < R; ++x)
        for (int y = 0; y < R; ++y) out[(t + x) * out_row + s + y] = all[R * x + y];
    }
}

template <int N>
inline float dot(const float* a, const float* b) {
  vec s{};
  for (int j = 0; j < N; j += LANES) s += load(a + j) * load(b + j);
  return sum(s);
}

// sum_j a[j] b[j] c[j]
template <int N>
inline float dot(const float* a, const float* b, const float* c) {
  vec s{};
  for (int j = 0; j < N; j += LANES) s += load(a + j) * load(b + j) * load(c + j);
  return sum(s);
}

template <int N>
inline void scale_rows(float* a, int T, const float* scale) {
  for (int j = 0; j < N; j += LANES) {
    const vec x = load(scale + j);
    for (int t = 0; t < T; ++t) store(a + t * N + j, load(a + t * N + j) * x);
  }
}

// out[j, i] = x[i, j], N x N
template <int N>
inline void transpose(float* out, const float* x) {
  for (int i = 0; i < N; i += LANES)
    for (int j = 0; j < N; j += LANES) {
      vec tile[LANES];
      for (int l = 0; l < LANES; ++l) tile[l] = load(x + (i + l) * N + j);
      transpose_tile(tile);
      for (int l = 0; l < LANES; ++l) store(out + (j + l) * N + i, tile[l]);
    }
}

// Rows of any type `stride` apart, and back.
template <int N, typename scalar_t>
inline void read_rows(float* out, const scalar_t* x, int64_t stride, int64_t T) {
  for (int64_t t = 0; t < T; ++t)
    for (int j = 0; j < N; j += LANES) store(out + t * N + j, load(x + t * stride + j));
}

template <int N>
inline void write_rows(float* out, int64_t stride, int64_t T, const float* x) {
  for (int64_t t = 0; t < T; ++t)
    for (int j = 0; j < N; j += LANES) store(out + t * stride + j, load(x + t * N + j));
}

template <int N, typename scalar_t>
inline void write_rows(scalar_t* out, int64_t stride, int64_t T, const float* x) {
  for (int64_t t = 0; t < T; ++t)
    for (int j = 0; j < N; ++j) out[t * stride + j] = static_cast<scalar_t>(x[t * N + j]);
}

// Rows that lie pages apart are not seen coming by the processor's own prefetching.
template <int N, int for_writing, typename scalar_t>
inline void prefetch_rows(const scalar_t* x, int64_t stride, int64_t T) {
  for (int64_t t = 0; t < T; ++t)
    for (int j = 0; j < N; j += 64 / sizeof(scalar_t)) __builtin_prefetch(x + t * stride + j, for_writing, 2);
}
