// A handful of rows of x times a matrix, on one thread: what a decoding step consists of. Each number of y is summed in the
// same order however many rows there are, so a batch gives to the last bit what one sample gives alone.
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int64_t AHEAD = 8192;  // bytes

// How 64 bytes of a row of W become vectors of floats, and where the k-th of their weights lands.
template <typename scalar_t>
struct Line;

template <>
struct Line<float> {
  static constexpr int VECS = 1;
  static void load(const float* w, vec* out) { out[0] = ::load(w); }
  static int place(int k) { return k; }
};

template <>
struct Line<at::BFloat16> {  // of two in a word, a shift leaves one, a mask the other
  static constexpr int VECS = 2;
  static void load(const at::BFloat16* w, vec* out) {
    typedef uint32_t words __attribute__((vector_size(LANES * sizeof(uint32_t))));
    words pairs;
    std::memcpy(&pairs, w, sizeof pairs);
    const words even = pairs << 16, odd = pairs & 0xffff0000u;
    std::memcpy(&out[0], &even, sizeof even);
    std::memcpy(&out[1], &odd, sizeof odd);
  }
  static int place(int k) { return k % 2 * LANES + k / 2; }
};

// One row of x as floats, each whole line in the order in which Line<scalar_t>::load gives the weights.
template <typename scalar_t, typename in_t>
void arrange(const in_t* x, int64_t K, float* out) {
  constexpr int WIDTH = Line<scalar_t>::VECS * LANES;
  const int64_t whole = K - K % WIDTH;
  for (int64_t at = 0; at < whole; at += WIDTH)
    for (int k = 0; k < WIDTH; ++k) out[at + Line<scalar_t>::place(k)] = static_cast<float>(x[at + k]);
  for (int64_t k = whole; k < K; ++k) out[k] = static_cast<float>(x[k]);
}

// R rows of x times OUT rows of W.
template <int R, int OUT, typename scalar_t, typename out_t>
void tile(const float* x, const scalar_t* W, int64_t K, int64_t O, out_t* y) {
  constexpr int VECS = Line<scalar_t>::VECS, WIDTH = VECS * LANES;
  vec acc[R][OUT] = {};
  int64_t k = 0;
#pragma GCC unroll 4
  for (; k + WIDTH <= K; k += WIDTH) {
    vec w[OUT][VECS];
    for (int o = 0; o < OUT; ++o) Line<scalar_t>::load(W + o * K + k, w[o]);
    if (OUT == 1) __builtin_prefetch(reinterpret_cast<const char*>(W + k) + AHEAD);
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < VECS; ++p) {
        const vec xr = load(x + r * K + k + p * LANES);
        for (int o = 0; o < OUT; ++o) acc[r][o] += xr * w[o][p];
      }
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < OUT; ++o) {
      float s = sum(acc[r][o]);
      for (int64_t rest = k; rest < K; ++rest) s += x[r * K + rest] * static_cast<float>(W[o * K + rest]);
      y[r * O + o] = static_cast<out_t>(s);
    }
}

// All rows of x times OUT rows of W, four rows at a time.
template <int OUT, typename scalar_t, typename out_t>
void strip(const float* x, const scalar_t* W, int64_t rows, int64_t K, int64_t O, out_t* y) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* xr = x + r * K;
    out_t* yr = y + r * O;
    switch (std::min<int64_t>(4, rows - r)) {
      case 1: tile<1, OUT>(xr, W, K, O, yr); break;
      case 2: tile<2, OUT>(xr, W, K, O, yr); break;
      case 3: tile<3, OUT>(xr, W, K, O, yr); break;
      default: tile<4, OUT>(xr, W, K, O, yr);
    }
  }
}

// R rows of x times V vectors of columns of a matrix M that lies the other way round, (K, O).
template <int R, int V, typename scalar_t, typename out_t>
void columns(const float* x, const scalar_t* M, int64_t K, int64_t O, out_t* y) {
  vec acc[R][V] = {};
  for (int64_t k = 0; k < K; ++k)
    for (int c = 0; c < V; ++c) {
      const vec m = load(M + k * O + c * LANES);
      for (int r = 0; r < R; ++r) acc[r][c] += m * x[r * K + k];
    }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < V; ++c) {
      float values[LANES];
      store(values, acc[r][c]);
      for (int l = 0; l < LANES; ++l) y[r * O + c * LANES + l] = static_cast<out_t>(values[l]);
    }
}

// All rows of x times V vectors of columns, four rows at a time.
template <int V, typename scalar_t, typename out_t>
void column_strip(const float* x, const scalar_t* M, int64_t rows, int64_t K, int64_t O, out_t* y) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* xr = x + r * K;
    out_t* yr = y + r * O;
    switch (std::min<int64_t>(4, rows - r)) {
      case 1: columns<1, V>(xr, M, K, O, yr); break;
      case 2: columns<2, V>(xr, M, K, O, yr); break;
      case 3: columns<3, V>(xr, M, K, O, yr); break;
      default: columns<4, V>(xr, M, K, O, yr);
    }
  }
}

// All rows of x (arranged) times W's rows begin to end.
template <typename scalar_t, typename out_t>
void outputs(const float* x, const scalar_t* W, int64_t rows, int64_t K, int64_t O, int64_t begin, int64_t end,
             out_t* y) {
  int64_t o = begin;
  // With few rows memory is the limit, and one straight line through W is what its prefetchers follow best. With more
  // it is arithmetic, and four rows of W at a time quarter what is loaded of x.
  if (rows > 4)
    for (; o + 4 <= end; o += 4) strip<4>(x, W + o * K, rows, K, O, y + o);
  for (; o < end; ++o) strip<1>(x, W + o * K, rows, K, O, y + o);
}

constexpr int64_t COLUMNS = 4 * LANES;  // that `columns_from` computes

// All rows of x times up to COLUMNS columns of M from the first on.
template <typename scalar_t, typename out_t>
void columns_from(const float* x, const scalar_t* M, int64_t rows, int64_t K, int64_t O, int64_t first, out_t* y) {
  const int64_t last = std::min(first + COLUMNS, O);
  if (first + COLUMNS == last) return column_strip<4>(x, M + first, rows, K, O, y + first);
  int64_t o = first;
  for (; o + LANES <= last; o += LANES) column_strip<1>(x, M + o, rows, K, O, y + o);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t rest = o; rest < last; ++rest) {
      float s = 0;
      for (int64_t k = 0; k < K; ++k) s += x[r * K + k] * static_cast<float>(M[k * O + rest]);
      y[r * O + rest] = static_cast<out_t>(s);
    }
}

// Numbers of an output that are worth a thread: at least some 64 KiB of weights.
template <typename scalar_t>
int64_t grain(int64_t K) {
  return std::max<int64_t>(1, (64 * 1024) / (K * sizeof(scalar_t)));
}
