// A handful of rows of x times a matrix, on one thread: what a decoding step consists of. Each number of y is summed in the
// same order however many rows there are, so a batch gives to the last bit what one sample gives alone.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "vec.h"

constexpr int64_t AHEAD = 8192;  // bytes

// A matrix W (O, K) is read a line at a time: VECS vectors of weights, of which the k-th lands in place(k). SUMS is into how
// many parts a number of y is summed, where one chain of additions would take longer than the memory does.
template <typename scalar_t>
struct Dense {
  static constexpr int VECS = sizeof(float) / sizeof(scalar_t), SUMS = 1;
  const scalar_t* weights;
  int64_t K;

  Dense(const at::Tensor& W) : weights(W.data_ptr<scalar_t>()), K(W.size(1)) {}
  static int place(int k) { return VECS == 1 ? k : k % 2 * LANES + k / 2; }
  int64_t row_bytes() const { return K * sizeof(scalar_t); }
  const scalar_t* address(int64_t o, int64_t k) const { return weights + o * K + k; }
  float at(int64_t o, int64_t k) const { return static_cast<float>(*address(o, k)); }
  float scale(int64_t) const { return 1; }

  void load(int64_t o, int64_t k, vec* out) const {
    if constexpr (VECS == 1) {
      out[0] = ::load(address(o, k));
    } else {  // of two bf16 in a word, a shift leaves one, a mask the other
      typedef uint32_t words __attribute__((vector_size(LANES * sizeof(uint32_t))));
      words pairs;
      std::memcpy(&pairs, address(o, k), sizeof pairs);
      const words even = pairs << 16, odd = pairs & 0xffff0000u;
      std::memcpy(&out[0], &even, sizeof even);
      std::memcpy(&out[1], &odd, sizeof odd);
    }
  }
};

// One row of x as floats, each whole line in the order in which matrix_t::load gives the weights.
template <typename matrix_t, typename in_t>
void arrange(const in_t* x, int64_t K, float* out) {
  constexpr int WIDTH = matrix_t::VECS * LANES;
  const int64_t whole = K - K % WIDTH;
  for (int64_t at = 0; at < whole; at += WIDTH)
    for (int k = 0; k < WIDTH; ++k) out[at + matrix_t::place(k)] = static_cast<float>(x[at + k]);
  for (int64_t k = whole; k < K; ++k) out[k] = static_cast<float>(x[k]);
}

// R rows of x times OUT rows of W, from the first on.
template <int R, int OUT, typename matrix_t, typename out_t>
void tile(const float* x, const matrix_t& W, int64_t first, int64_t K, int64_t O, out_t* y) {
  constexpr int VECS = matrix_t::VECS, SUMS = matrix_t::SUMS, WIDTH = VECS * LANES;
  vec acc[R][OUT][SUMS] = {};
  int64_t k = 0;
#pragma GCC unroll 4
  for (; k + WIDTH <= K; k += WIDTH) {
    vec w[OUT][VECS];
    for (int o = 0; o < OUT; ++o) W.load(first + o, k, w[o]);
    if (OUT == 1) __builtin_prefetch(reinterpret_cast<const char*>(W.address(first, k)) + AHEAD);
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < VECS; ++p) {
        const vec xr = load(x + r * K + k + p * LANES);
        for (int o = 0; o < OUT; ++o) acc[r][o][p % SUMS] += xr * w[o][p];
      }
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < OUT; ++o) {
      vec total = acc[r][o][0];
      for (int part = 1; part < SUMS; ++part) total += acc[r][o][part];
      float s = sum(total);
      for (int64_t rest = k; rest < K; ++rest) s += x[r * K + rest] * W.at(first + o, rest);
      y[r * O + first + o] = static_cast<out_t>(s * W.scale(first + o));
    }
}

// All rows of x times OUT rows of W, four rows at a time.
template <int OUT, typename matrix_t, typename out_t>
void strip(const float* x, const matrix_t& W, int64_t first, int64_t rows, int64_t K, int64_t O, out_t* y) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* xr = x + r * K;
    out_t* yr = y + r * O;
    switch (std::min<int64_t>(4, rows - r)) {
      case 1: tile<1, OUT>(xr, W, first, K, O, yr); break;
      case 2: tile<2, OUT>(xr, W, first, K, O, yr); break;
      case 3: tile<3, OUT>(xr, W, first, K, O, yr); break;
      default: tile<4, OUT>(xr, W, first, K, O, yr);
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
template <typename matrix_t, typename out_t>
void outputs(const float* x, const matrix_t& W, int64_t rows, int64_t K, int64_t O, int64_t begin, int64_t end,
             out_t* y) {
  int64_t o = begin;
  // With few rows memory is the limit, and one straight line through W is what its prefetchers follow best. With more
  // it is arithmetic, and four rows of W at a time quarter what is loaded of x.
  if constexpr (matrix_t::SUMS == 1)
    if (rows > 4)
      for (; o + 4 <= end; o += 4) strip<4>(x, W, o, rows, K, O, y);
  for (; o < end; ++o) strip<1>(x, W, o, rows, K, O, y);
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

// Rows of so many bytes that are worth a thread: some 64 KiB.
inline int64_t grain(int64_t bytes) { return std::max<int64_t>(1, (64 * 1024) / bytes); }
