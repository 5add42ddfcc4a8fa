#pragma once
#include <ATen/ATen.h>

// A block of RWKV for one token of each of R samples, R small: x (R, C), the two token shifts (R, C), the states
// (R, H, N, N) or (H, N, N), and the block's weights in the order in which lm/step.py gives them, all fp32 or all bf16
// but for the states and packed matrices (lm/quantised.py), which are two tensors each. What is given back is new.

// -> x, att_shift, ffn_shift, wkv
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rwkv6_step_cpu(const at::Tensor& x,
                                                                          const at::Tensor& att_shift,
                                                                          const at::Tensor& ffn_shift,
                                                                          const at::Tensor& wkv, at::TensorList weights);

// v_first: (R, C) fp32 of the first layer, undefined in that layer -> x, v_first, att_shift, ffn_shift, wkv
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> rwkv7_step_cpu(
    const at::Tensor& x, const c10::optional<at::Tensor>& v_first, const at::Tensor& att_shift,
    const at::Tensor& ffn_shift, const at::Tensor& wkv, at::TensorList weights);
