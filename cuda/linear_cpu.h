#pragma once
#include <ATen/ATen.h>

// x (..., K) and weight (O, K), contiguous, both fp32 or both bf16 -> (..., O), accumulated in fp32.
at::Tensor few_rows_linear_cpu(const at::Tensor& x, const at::Tensor& weight);

// x (G, R, K) and matrix (G, K, O), likewise -> (G, R, O): the low-rank factors, which lie the other way round.
at::Tensor few_rows_matmul_cpu(const at::Tensor& x, const at::Tensor& matrix);
