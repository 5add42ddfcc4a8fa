// Shapes and dtypes are checked by the Python side: r, k, v, w (B, T, H, N) contiguous, of one dtype; u (H, N) and the
// states fp32; lengths (B,) int64. Gradients of u and the state come per sample.
#pragma once
#include <ATen/ATen.h>

constexpr int64_t CHUNK = 32;  // steps between the states that the forward pass keeps for the backward pass

std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv6_forward_cpu(const at::Tensor& r, const at::Tensor& k,
                                                                const at::Tensor& v, const at::Tensor& w,
                                                                const at::Tensor& u, const at::Tensor& state,
                                                                const c10::optional<at::Tensor>& lengths,
                                                                bool save_states);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv6_backward_cpu(
    const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w, const at::Tensor& u,
    const at::Tensor& chunk_states, const c10::optional<at::Tensor>& lengths, const at::Tensor& gy,
    const at::Tensor& g_final);
