#pragma once
#include "wkv_cpu.h"

std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv6_forward_cpu(const at::Tensor& r, const at::Tensor& k,
                                                                const at::Tensor& v, const at::Tensor& w,
                                                                const at::Tensor& u, const at::Tensor& state,
                                                                const Lengths& lengths, bool save_states);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv6_backward_cpu(
    const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w, const at::Tensor& u,
    const at::Tensor& chunk_states, const Lengths& lengths, const at::Tensor& gy, const at::Tensor& g_final);
