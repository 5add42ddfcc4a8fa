// y = x W^T for a handful of rows of x: a decoding step. Such a product does little but read W once, so what counts is
// to keep the memory busy with few instructions. Each number of y is summed in the same order however many rows there
// are, so a batch gives to the last bit what one sample gives alone.
#include "linear_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "few_rows.h"
#include "packed.h"

namespace {

template <typename scalar_t, typename matrix_t>
void product(const at::Tensor& input, const matrix_t& W, const at::Tensor& output) {
  const int64_t O = output.size(-1), K = input.size(-1), rows = input.numel() / K;
  scalar_t* y = output.data_ptr<scalar_t>();
  std::vector<float> x(rows * K);
  for (int64_t r = 0; r < rows; ++r) arrange<matrix_t>(input.data_ptr<scalar_t>() + r * K, K, x.data() + r * K);
  at::parallel_for(0, O, grain(W.row_bytes()), [&](int64_t begin, int64_t end) {
    outputs(x.data(), W, rows, K, O, begin, end, y);
  });
}

template <typename scalar_t>
void products(const at::Tensor& input, const at::Tensor& matrix, const at::Tensor& output) {
  const int64_t G = matrix.size(0), K = matrix.size(1), O = matrix.size(2), rows = input.size(1);
  const scalar_t *M = matrix.data_ptr<scalar_t>(), *in = input.data_ptr<scalar_t>();
  scalar_t* y = output.data_ptr<scalar_t>();
  const std::vector<float> x(in, in + G * rows * K);
  const int64_t strips = (O + COLUMNS - 1) / COLUMNS;
  at::parallel_for(0, G * strips, grain(K * COLUMNS * sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / strips;
      columns_from(x.data() + g * rows * K, M + g * K * O, rows, K, O, task % strips * COLUMNS, y + g * rows * O);
    }
  });
}

void check_types(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && weight.is_contiguous() &&
                  (weight.scalar_type() == at::kFloat || weight.scalar_type() == at::kBFloat16),
              "a few rows of fp32 or bf16, with a contiguous weight of the same type, not ", x.scalar_type(), " and ",
              weight.scalar_type());
}

at::Tensor output_of(const at::Tensor& x, int64_t width) {
  auto shape = x.sizes().vec();
  shape.back() = width;
  return at::empty(shape, x.options());
}

}  // namespace

at::Tensor few_rows_linear_cpu(const at::Tensor& x, const at::Tensor& weight) {
  check_types(x, weight);
  TORCH_CHECK(weight.dim() == 2 && x.size(-1) == weight.size(1), "few_rows_linear: x ", x.sizes(),
              " does not fit the weight ", weight.sizes());
  const auto y = output_of(x, weight.size(0)), rows = x.contiguous();
  if (x.scalar_type() == at::kFloat)
    product<float>(rows, Dense<float>(weight), y);
  else
    product<at::BFloat16>(rows, Dense<at::BFloat16>(weight), y);
  return y;
}

at::Tensor few_rows_packed_cpu(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale) {
  const int64_t K = x.size(-1), O = packed.size(0), blocks = (K + Nf4::BLOCK - 1) / Nf4::BLOCK;
  const bool is_int8 = packed.scalar_type() == at::kChar;
  TORCH_CHECK(packed.is_contiguous() && scale.is_contiguous() && packed.dim() == 2 &&
                  packed.size(1) == (is_int8 ? K : blocks * Nf4::BLOCK / 2) && scale.numel() == (is_int8 ? O : O * blocks),
              "few_rows_packed: x ", x.sizes(), " does not fit the packed weight ", packed.sizes(), ", scales ",
              scale.sizes());
  const auto y = output_of(x, O), rows = x.contiguous();
  with_packed(packed, scale, [&](const auto& W) {
    if (x.scalar_type() == at::kFloat)
      product<float>(rows, W, y);
    else
      product<at::BFloat16>(rows, W, y);
  });
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
