// Binds the kernels of wkv6.cu to torch: what a Backend of rwkv_speech.lm.wkv needs, as torch.ops.rwkv_speech_cuda.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "wkv6.h"

namespace {

using at::Tensor;

wkv6::Dtype dtype_of(const Tensor &x) {
  switch (x.scalar_type()) {
    case at::kFloat: return wkv6::Dtype::fp32;
    case at::kBFloat16: return wkv6::Dtype::bf16;
    case at::kHalf: return wkv6::Dtype::fp16;
    default: TORCH_CHECK(false, "wkv6: r must be fp32, bf16 or fp16, not ", x.scalar_type());
  }
}

// The kernels take contiguous tensors on one device and move 16 bytes at a time.
void check(const Tensor &x, const char *name, const Tensor &r, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK(x.device() == r.device(), "wkv6: ", name, " must be on ", r.device(), ", not on ", x.device());
  TORCH_CHECK(x.scalar_type() == dtype, "wkv6: ", name, " must be ", dtype, ", not ", x.scalar_type());
  TORCH_CHECK(x.sizes() == shape, "wkv6: ", name, " must have the shape ", shape, ", not ", x.sizes());
  TORCH_CHECK(x.is_contiguous(), "wkv6: ", name, " must be contiguous");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, "wkv6: ", name, " must be 16-byte aligned");
}

wkv6::Problem problem_of(const Tensor &r, const Tensor &k, const Tensor &v, const Tensor &w, const Tensor &u,
                         const std::optional<Tensor> &lengths) {
  TORCH_CHECK(r.is_cuda() && r.dim() == 4, "wkv6: r must be (B, T, H, N) on a CUDA device");
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  TORCH_CHECK(N == 32 || N == 64 || N == 128, "wkv6: the head size must be 32, 64 or 128, not ", N);
  TORCH_CHECK(B >= 1 && T >= 1 && H >= 1 && T < INT32_MAX && B * H <= INT32_MAX / wkv6::gv_slices(N),
              "wkv6: cannot compute the shape ", r.sizes());
  check(r, "r", r, r.scalar_type(), r.sizes());
  check(k, "k", r, r.scalar_type(), r.sizes());
  check(v, "v", r, r.scalar_type(), r.sizes());
  check(w, "w", r, r.scalar_type(), r.sizes());
  check(u, "u", r, at::kFloat, {H, N});
  if (lengths) {
    TORCH_CHECK(lengths->device() == r.device() && lengths->scalar_type() == at::kLong && lengths->is_contiguous() &&
                    lengths->sizes() == at::IntArrayRef({B}),
                "wkv6: lengths must be (B,) = (", B, ",) of int64 on ", r.device());
  }
  return {int32_t(B), int32_t(T), int32_t(H), int32_t(N), dtype_of(r), r.const_data_ptr(), k.const_data_ptr(),
          v.const_data_ptr(), w.const_data_ptr(), u.const_data_ptr<float>(),
          lengths ? lengths->const_data_ptr<int64_t>() : nullptr};
}

// Kernels leave positions after a sample's end as they were.
Tensor output_like(const Tensor &r, const std::optional<Tensor> &lengths) {
  return lengths ? at::zeros_like(r) : at::empty_like(r);
}

int64_t chunks_of(int64_t T) { return (T + wkv6::CHUNK - 1) / wkv6::CHUNK; }

// y (B, T, H, N), the final state (B, H, N, N) and, with save_states, the states before each chunk of steps
// (B, H, ceil(T / CHUNK), N, N), else none of them (0, H, ...).
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor &r, const Tensor &k, const Tensor &v, const Tensor &w,
                                           const Tensor &u, const Tensor &state, const std::optional<Tensor> &lengths,
                                           bool save_states) {
  const c10::cuda::CUDAGuard guard(r.device());
  const wkv6::Problem problem = problem_of(r, k, v, w, u, lengths);
  const int64_t B = problem.B, T = problem.T, H = problem.H, N = problem.N;
  const bool shared = state.dim() == 3;
  if (shared) check(state, "state", r, at::kFloat, {H, N, N});
  else check(state, "state", r, at::kFloat, {B, H, N, N});
  const Tensor y = output_like(r, lengths), final_state = at::empty({B, H, N, N}, u.options());
  const std::array<int64_t, 5> saved = {save_states ? B : 0, H, chunks_of(T), N, N};
  const Tensor chunk_states = lengths ? at::zeros(saved, u.options()) : at::empty(saved, u.options());
  wkv6::forward({problem, state.const_data_ptr<float>(), shared, y.mutable_data_ptr(),
                 final_state.mutable_data_ptr<float>(), save_states ? chunk_states.mutable_data_ptr<float>() : nullptr},
                c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, final_state, chunk_states};
}

// Gradients of r, k, v, w, and those of u (B, H, N) and the state (B, H, N, N) for each sample.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor &r, const Tensor &k, const Tensor &v, const Tensor &w, const Tensor &u, const Tensor &chunk_states,
    const std::optional<Tensor> &lengths, const Tensor &gy, const Tensor &g_final) {
  const c10::cuda::CUDAGuard guard(r.device());
  const wkv6::Problem problem = problem_of(r, k, v, w, u, lengths);
  const int64_t B = problem.B, T = problem.T, H = problem.H, N = problem.N;
  check(chunk_states, "chunk_states", r, at::kFloat, {B, H, chunks_of(T), N, N});
  check(gy, "gy", r, r.scalar_type(), r.sizes());
  check(g_final, "g_final", r, at::kFloat, {B, H, N, N});
  const Tensor gr = output_like(r, lengths), gk = output_like(r, lengths), gv = output_like(r, lengths),
               gw = output_like(r, lengths);
  const Tensor gu = at::empty({B, H, N}, u.options()), g_state = at::empty({B, H, N, N}, u.options());
  const Tensor gv_parts = at::empty({wkv6::gv_slices(N), B, T, H, N}, u.options());
  wkv6::backward({problem, chunk_states.const_data_ptr<float>(), gy.const_data_ptr(), g_final.const_data_ptr<float>(),
                  gr.mutable_data_ptr(), gk.mutable_data_ptr(), gv.mutable_data_ptr(), gw.mutable_data_ptr(),
                  gu.mutable_data_ptr<float>(), g_state.mutable_data_ptr<float>(), gv_parts.mutable_data_ptr<float>()},
                 c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {gr, gk, gv, gw, gu, g_state};
}

}  // namespace

TORCH_LIBRARY(rwkv_speech_cuda, m) {
  m.def(
      "wkv6_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor? lengths, bool save_states)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "wkv6_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor chunk_states, Tensor? lengths, Tensor gy,"
      " Tensor g_final) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rwkv_speech_cuda, CUDA, m) {
  m.impl("wkv6_forward", forward);
  m.impl("wkv6_backward", backward);
}
