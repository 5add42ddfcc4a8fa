// y = x W^T for a handful of rows of x: a decoding step. Such a product does nothing but read W once, so what counts is
// to keep the memory busy: four rows of W stream side by side while the rows of x stay in the cache. Each row of y is summed
// in the same order however many rows there are, so a batch gives to the last bit what one sample gives alone.
#include "linear_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "vec.h"

namespace {

constexpr int OUT = 4;      // rows of W side by side
constexpr int TILE = 4;     // rows of x that share one reading of W from the cache

template <typename scalar_t, int R>
void tile(const float* x, const scalar_t* W, int64_t K, int outs, float (*y)[OUT]) {
  vec acc[R][OUT] = {};
  int64_t at = 0;
  for (; at + LANES <= K; at += LANES) {
    vec w[OUT];
    for (int o = 0; o < OUT; ++o) w[o] = load(W + std::min(o, outs - 1) * K + at);
    for (int r = 0; r < R; ++r) {
      const vec xr = load(x + r * K + at);
      for (int o = 0; o < OUT; ++o) acc[r][o] += xr * w[o];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < outs; ++o) {
      float s = sum(acc[r][o]);
      for (int64_t rest = at; rest < K; ++rest) s += x[r * K + rest] * static_cast<float>(W[o * K + rest]);
      y[r][o] = s;
    }
}

template <typename scalar_t>
void product(const float* x, const scalar_t* W, scalar_t* y, int64_t rows, int64_t K, int64_t O) {
  // At least some 64 KiB of W for each thread: less is not worth waking it.
  const int64_t grain = std::max<int64_t>(OUT, (64 * 1024) / (K * sizeof(scalar_t)));
  at::parallel_for(0, O, grain, [&](int64_t begin, int64_t end) {
    float part[TILE][OUT];
    for (int64_t o = begin; o < end; o += OUT) {
      const int outs = static_cast<int>(std::min<int64_t>(OUT, end - o));
      for (int64_t r0 = 0; r0 < rows; r0 += TILE) {
        const int64_t in_tile = std::min<int64_t>(TILE, rows - r0);
        switch (in_tile) {
          case 1: tile<scalar_t, 1>(x + r0 * K, W + o * K, K, outs, part); break;
          case 2: tile<scalar_t, 2>(x + r0 * K, W + o * K, K, outs, part); break;
          case 3: tile<scalar_t, 3>(x + r0 * K, W + o * K, K, outs, part); break;
          default: tile<scalar_t, TILE>(x + r0 * K, W + o * K, K, outs, part);
        }
        for (int64_t r = 0; r < in_tile; ++r)
          for (int i = 0; i < outs; ++i) y[(r0 + r) * O + o + i] = static_cast<scalar_t>(part[r][i]);
      }
    }
  });
}

}  // namespace

at::Tensor few_rows_linear_cpu(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t K = weight.size(1), O = weight.size(0);
  TORCH_CHECK(x.size(-1) == K && weight.dim() == 2 && weight.is_contiguous() && x.scalar_type() == weight.scalar_type(),
              "few_rows_linear: x ", x.sizes(), " does not fit the weight ", weight.sizes());
  const auto rows = x.reshape({-1, K}).to(at::kFloat).contiguous();
  auto shape = x.sizes().vec();
  shape.back() = O;
  const auto y = at::empty(shape, x.options());
  if (weight.scalar_type() == at::kFloat) {
    product(rows.data_ptr<float>(), weight.data_ptr<float>(), y.data_ptr<float>(), rows.size(0), K, O);
  } else {
    TORCH_CHECK(weight.scalar_type() == at::kBFloat16, "few_rows_linear: fp32 or bf16, not ", weight.scalar_type());
    product(rows.data_ptr<float>(), weight.data_ptr<at::BFloat16>(), y.data_ptr<at::BFloat16>(), rows.size(0), K, O);
  }
  return y;
}
