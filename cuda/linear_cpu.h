#pragma once
#include <ATen/ATen.h>

// x (..., K) and weight (O, K), contiguous, both fp32 or both bf16 -> (..., O), accumulated in fp32.
at::Tensor few_rows_linear_cpu(const at::Tensor& x, const at::Tensor& weight);

// The same with a matrix of lm/quantised.py: packed (O, bytes) int8 or uint8 (nf4), and its scales.
at::Tensor few_rows_packed_cpu(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& scale);

// x (G, R, K) and matrix (G, K, O), likewise -> (G, R, O): the low-rank factors, which lie the other way round.
at::Tensor few_rows_matmul_cpu(const at::Tensor& x, const at::Tensor& matrix);
