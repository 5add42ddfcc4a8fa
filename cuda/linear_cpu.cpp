// y = x W^T for a handful of rows of x: a decoding step. Such a product does little but read W once, so what counts is
// to keep the memory busy with few instructions. Each number of y is summed in the same order however many rows there
// are, so a batch gives to the last bit what one sample gives alone.
#include "linear_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "vec.h"

namespace {

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

// One row of x as floats, each whole line in the order of Line::load.
template <typename scalar_t>
void arrange(const scalar_t* x, int64_t K, float* out) {
  constexpr int WIDTH = Line<scalar_t>::VECS * LANES;
  const int64_t whole = K - K % WIDTH;
  for (int64_t at = 0; at < whole; at += WIDTH)
    for (int k = 0; k < WIDTH; ++k) out[at + Line<scalar_t>::place(k)] = static_cast<float>(x[at + k]);
  for (int64_t k = whole; k < K; ++k) out[k] = static_cast<float>(x[k]);
}

// R rows of x times OUT rows of W.
template <typename scalar_t, int R, int OUT>
void tile(const float* x, const scalar_t* W, int64_t K, int64_t O, scalar_t* y) {
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
      y[r * O + o] = static_cast<scalar_t>(s);
    }
}

// All rows of x times OUT rows of W, four rows at a time.
template <typename scalar_t, int OUT>
void strip(const float* x, const scalar_t* W, int64_t rows, int64_t K, int64_t O, scalar_t* y) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* xr = x + r * K;
    scalar_t* yr = y + r * O;
    switch (std::min<int64_t>(4, rows - r)) {
      case 1: tile<scalar_t, 1, OUT>(xr, W, K, O, yr); break;
      case 2: tile<scalar_t, 2, OUT>(xr, W, K, O, yr); break;
      case 3: tile<scalar_t, 3, OUT>(xr, W, K, O, yr); break;
      default: tile<scalar_t, 4, OUT>(xr, W, K, O, yr);
    }
  }
}

template <typename scalar_t>
void product(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& output) {
  const int64_t O = weight.size(0), K = weight.size(1), rows = input.numel() / K;
  const scalar_t* W = weight.data_ptr<scalar_t>();
  scalar_t* y = output.data_ptr<scalar_t>();
  std::vector<float> x(rows * K);
  for (int64_t r = 0; r < rows; ++r) arrange(input.data_ptr<scalar_t>() + r * K, K, x.data() + r * K);
  // At least some 64 KiB of W for each thread: less is not worth waking it.
  const int64_t grain = std::max<int64_t>(1, (64 * 1024) / (K * sizeof(scalar_t)));
  at::parallel_for(0, O, grain, [&](int64_t begin, int64_t end) {
    int64_t o = begin;
    // With few rows memory is the limit, and one straight line through W is what its prefetchers follow best. With more
    // it is arithmetic, and four rows of W at a time quarter what is loaded of x.
    if (rows > 4)
      for (; o + 4 <= end; o += 4) strip<scalar_t, 4>(x.data(), W + o * K, rows, K, O, y + o);
    for (; o < end; ++o) strip<scalar_t, 1>(x.data(), W + o * K, rows, K, O, y + o);
  });
}

// R rows of x times V vectors of columns of a matrix M that lies the other way round, (K, O).
template <typename scalar_t, int R, int V>
void columns(const float* x, const scalar_t* M, int64_t K, int64_t O, scalar_t* y) {
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
      for (int l = 0; l < LANES; ++l) y[r * O + c * LANES + l] = static_cast<scalar_t>(values[l]);
    }
}

// All rows of x times V vectors of columns, four rows at a time.
template <typename scalar_t, int V>
void column_strip(const float* x, const scalar_t* M, int64_t rows, int64_t K, int64_t O, scalar_t* y) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* xr = x + r * K;
    scalar_t* yr = y + r * O;
    switch (std::min<int64_t>(4, rows - r)) {
      case 1: columns<scalar_t, 1, V>(xr, M, K, O, yr); break;
      case 2: columns<scalar_t, 2, V>(xr, M, K, O, yr); break;
      case 3: columns<scalar_t, 3, V>(xr, M, K, O, yr); break;
      default: columns<scalar_t, 4, V>(xr, M, K, O, yr);
    }
  }
}

template <typename scalar_t>
void products(const at::Tensor& input, const at::Tensor& matrix, const at::Tensor& output) {
  constexpr int64_t WIDTH = 4 * LANES;
  const int64_t G = matrix.size(0), K = matrix.size(1), O = matrix.size(2), rows = input.size(1);
  const scalar_t *M = matrix.data_ptr<scalar_t>(), *in = input.data_ptr<scalar_t>();
  scalar_t* out = output.data_ptr<scalar_t>();
  const std::vector<float> x(in, in + G * rows * K);
  const int64_t strips = (O + WIDTH - 1) / WIDTH;
  const int64_t grain = std::max<int64_t>(1, (64 * 1024) / (K * WIDTH * sizeof(scalar_t)));
  at::parallel_for(0, G * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / strips, first = task % strips * WIDTH, last = std::min(first + WIDTH, O);
      const float* xg = x.data() + g * rows * K;
      const scalar_t* m = M + g * K * O;
      scalar_t* y = out + g * rows * O;
      int64_t o = first;
      if (o + WIDTH == last) {
        column_strip<scalar_t, 4>(xg, m + o, rows, K, O, y + o);
        continue;
      }
      for (; o + LANES <= last; o += LANES) column_strip<scalar_t, 1>(xg, m + o, rows, K, O, y + o);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t rest = o; rest < last; ++rest) {
          float s = 0;
          for (int64_t k = 0; k < K; ++k) s += xg[r * K + k] * static_cast<float>(m[k * O + rest]);
          y[r * O + rest] = static_cast<scalar_t>(s);
        }
    }
  });
}

void check_types(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && weight.is_contiguous() &&
                  (weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16),
              "a few rows of fp32 or bf16, with a contiguous weight of the same type, not ", x.scalar_type(), " and ",
              weight.scalar_type());
}

}  // namespace

at::Tensor few_rows_linear_cpu(const at::Tensor& x, const at::Tensor& weight) {
  check_types(x, weight);
  TORCH_CHECK(weight.dim() == 2 && x.size(-1) == weight.size(1), "few_rows_linear: x ", x.sizes(),
              " does not fit the weight ", weight.sizes());
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  const auto y = at::empty(shape, x.options()), rows = x.contiguous();
  if (x.scalar_type() == at::kFloat)
    product<float>(rows, weight, y);
  else
    product<at::BFloat16>(rows, weight, y);
  return y;
}

at::Tensor few_rows_matmul_cpu(const at::Tensor& x, const at::Tensor& matrix) {
  check_types(x, matrix);
  TORCH_CHECK(x.dim() == 3 && matrix.dim() == 3 && x.size(0) == matrix.size(0) && x.size(2) == matrix.size(1),
              "few_rows_matmul: x ", x.sizes(), " does not fit the matrix ", matrix.sizes());
  const auto y = at::empty({x.size(0), x.size(1), matrix.size(2)}, x.options()), rows = x.contiguous();
  if (x.scalar_type() == at::kFloat)
    products<float>(rows, matrix, y);
  else
    products<at::BFloat16>(rows, matrix, y);
  return y;
}
