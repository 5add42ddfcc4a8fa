// Binds the kernels of wkv6.cu and wkv7.cu to torch: what Backends of rwkv_speech.lm.wkv need, as
// torch.ops.rwkv_speech_cuda.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "wkv6.h"
#include "wkv7.h"
#include "wkv_schemas.h"

namespace {

using at::Tensor;
using Lengths = std::optional<Tensor>;
using Named = std::pair<const char *, const Tensor &>;

wkv::Dtype dtype_of(const Tensor &x) {
  switch (x.scalar_type()) {
    case at::kFloat: return wkv::Dtype::fp32;
    case at::kBFloat16: return wkv::Dtype::bf16;
    case at::kHalf: return wkv::Dtype::fp16;
    default: TORCH_CHECK(false, "wkv: r must be fp32, bf16 or fp16, not ", x.scalar_type());
  }
}

// The kernels take contiguous tensors on one device and move 16 bytes at a time.
void check(const Tensor &x, const char *name, const Tensor &r, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK(x.device() == r.device(), "wkv: ", name, " must be on ", r.device(), ", not on ", x.device());
  TORCH_CHECK(x.scalar_type() == dtype, "wkv: ", name, " must be ", dtype, ", not ", x.scalar_type());
  TORCH_CHECK(x.sizes() == shape, "wkv: ", name, " must have the shape ", shape, ", not ", x.sizes());
  TORCH_CHECK(x.is_contiguous(), "wkv: ", name, " must be contiguous");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, "wkv: ", name, " must be 16-byte aligned");
}

// steps: all that have the shape of r.
wkv::Shape shape_of(const Tensor &r, std::initializer_list<Named> steps, const Lengths &lengths) {
  TORCH_CHECK(r.is_cuda() && r.dim() == 4, "wkv: r must be (B, T, H, N) on a CUDA device");
  const int64_t B = r.size(0), T = r.size(1), H = r.size(2), N = r.size(3);
  TORCH_CHECK(N == 32 || N == 64 || N == 128, "wkv: the head size must be 32, 64 or 128, not ", N);
  constexpr int MOST = 8;  // blocks that share a head
  TORCH_CHECK(B >= 1 && T >= 1 && H >= 1 && T < INT32_MAX && B * H <= INT32_MAX / MOST,
              "wkv: cannot compute the shape ", r.sizes());
  check(r, "r", r, r.scalar_type(), r.sizes());
  for (const auto &[name, x] : steps) check(x, name, r, r.scalar_type(), r.sizes());
  if (lengths) {
    TORCH_CHECK(lengths->device() == r.device() && lengths->scalar_type() == at::kLong && lengths->is_contiguous() &&
                    lengths->sizes() == at::IntArrayRef({B}),
                "wkv: lengths must be (B,) = (", B, ",) of int64 on ", r.device());
  }
  return {int32_t(B), int32_t(T), int32_t(H), int32_t(N), dtype_of(r),
          lengths ? lengths->const_data_ptr<int64_t>() : nullptr};
}

// Kernels leave positions after a sample's end as they were.
Tensor output_like(const Tensor &r, const Lengths &lengths) {
  return lengths ? at::zeros_like(r) : at::empty_like(r);
}

int64_t chunks_of(int64_t T, int chunk) { return (T + chunk - 1) / chunk; }

// y (B, T, H, N), the final state (B, H, N, N) and, with save_states, the states before each chunk of steps
// (B, H, ceil(T / CHUNK), N, N), else none of them (0, H, ...).
template <typename Problem, typename Args>
std::tuple<Tensor, Tensor, Tensor> run_forward(const Problem &problem, int chunk,
                                               void (*launch)(const Args &, CUstream_st *), const Tensor &r,
                                               const Tensor &state, const Lengths &lengths, bool save_states) {
  const int64_t B = problem.B, H = problem.H, N = problem.N;
  const bool shared = state.dim() == 3;
  if (shared) check(state, "state", r, at::kFloat, {H, N, N});
  else check(state, "state", r, at::kFloat, {B, H, N, N});
  const Tensor y = output_like(r, lengths), final_state = at::empty({B, H, N, N}, state.options());
  const std::array<int64_t, 5> saved = {save_states ? B : 0, H, chunks_of(problem.T, chunk), N, N};
  const Tensor chunk_states = lengths ? at::zeros(saved, state.options()) : at::empty(saved, state.options());
  launch({problem, state.const_data_ptr<float>(), shared, y.mutable_data_ptr(), final_state.mutable_data_ptr<float>(),
          save_states ? chunk_states.mutable_data_ptr<float>() : nullptr},
         c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, final_state, chunk_states};
}

void check_backward(const wkv::Shape &shape, int chunk, const Tensor &r, const Tensor &chunk_states,
                    const Tensor &g_final) {
  const int64_t B = shape.B, H = shape.H, N = shape.N;
  check(chunk_states, "chunk_states", r, at::kFloat, {B, H, chunks_of(shape.T, chunk), N, N});
  check(g_final, "g_final", r, at::kFloat, {B, H, N, N});
}

namespace rwkv6 {

wkv6::Problem problem_of(const Tensor &r, const Tensor &k, const Tensor &v, const Tensor &w, const Tensor &u,
                         const wkv::Shape &shape) {
  check(u, "u", r, at::kFloat, {shape.H, shape.N});
  return {shape,
          r.const_data_ptr(),
          k.const_data_ptr(),
          v.const_data_ptr(),
          w.const_data_ptr(),
          u.const_data_ptr<float>()};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor &r, const Tensor &k, const Tensor &v, const Tensor &w,
                                           const Tensor &u, const Tensor &state, const Lengths &lengths,
                                           bool save_states) {
  const c10::cuda::CUDAGuard guard(r.device());
  const wkv::Shape shape = shape_of(r, {{"k", k}, {"v", v}, {"w", w}}, lengths);
  return run_forward(problem_of(r, k, v, w, u, shape), wkv6::CHUNK, wkv6::forward, r, state, lengths, save_states);
}

// Gradients of r, k, v, w, and those of u (B, H, N) and the state (B, H, N, N) for each sample.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor &r, const Tensor &k, const Tensor &v, const Tensor &w, const Tensor &u, const Tensor &chunk_states,
    const Lengths &lengths, const Tensor &gy, const Tensor &g_final) {
  const c10::cuda::CUDAGuard guard(r.device());
  const wkv::Shape shape = shape_of(r, {{"k", k}, {"v", v}, {"w", w}, {"gy", gy}}, lengths);
  check_backward(shape, wkv6::CHUNK, r, chunk_states, g_final);
  const int64_t B = shape.B, T = shape.T, H = shape.H, N = shape.N;
  const Tensor gr = output_like(r, lengths), gk = output_like(r, lengths), gv = output_like(r, lengths),
               gw = output_like(r, lengths);
  const Tensor gu = at::empty({B, H, N}, u.options()), g_state = at::empty_like(g_final);
  const Tensor parts = at::empty({wkv6::slices(N), B, T, H, N}, u.options());
  wkv6::backward({problem_of(r, k, v, w, u, shape), chunk_states.const_data_ptr<float>(), gy.const_data_ptr(),
                  g_final.const_data_ptr<float>(), gr.mutable_data_ptr(), gk.mutable_data_ptr(), gv.mutable_data_ptr(),
                  gw.mutable_data_ptr(), gu.mutable_data_ptr<float>(), g_state.mutable_data_ptr<float>(),
                  parts.mutable_data_ptr<float>()},
                 c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {gr, gk, gv, gw, gu, g_state};
}

}  // namespace rwkv6

namespace rwkv7 {

wkv7::Problem problem_of(const Tensor &r, const Tensor &w, const Tensor &k, const Tensor &v, const Tensor &a,
                         const Tensor &b, const wkv::Shape &shape) {
  return {shape,
          r.const_data_ptr(),
          w.const_data_ptr(),
          k.const_data_ptr(),
          v.const_data_ptr(),
          a.const_data_ptr(),
          b.const_data_ptr()};
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor &r, const Tensor &w, const Tensor &k, const Tensor &v,
                                           const Tensor &a, const Tensor &b, const Tensor &state,
                                           const Lengths &lengths, bool save_states) {
  const c10::cuda::CUDAGuard guard(r.device());
  const wkv::Shape shape = shape_of(r, {{"w", w}, {"k", k}, {"v", v}, {"a", a}, {"b", b}}, lengths);
  return run_forward(problem_of(r, w, k, v, a, b, shape), wkv7::CHUNK, wkv7::forward, r, state, lengths, save_states);
}

// Gradients of r, w, k, v, a, b, and that of the state (B, H, N, N) for each sample.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor &r, const Tensor &w, const Tensor &k, const Tensor &v, const Tensor &a, const Tensor &b,
    const Tensor &chunk_states, const Lengths &lengths, const Tensor &gy, const Tensor &g_final) {
  const c10::cuda::CUDAGuard guard(r.device());
  const wkv::Shape shape = shape_of(r, {{"w", w}, {"k", k}, {"v", v}, {"a", a}, {"b", b}, {"gy", gy}}, lengths);
  check_backward(shape, wkv7::CHUNK, r, chunk_states, g_final);
  const int64_t B = shape.B, T = shape.T, H = shape.H, N = shape.N;
  const Tensor gr = output_like(r, lengths), gw = output_like(r, lengths), gk = output_like(r, lengths),
               gv = output_like(r, lengths), ga = output_like(r, lengths), gb = output_like(r, lengths);
  const Tensor g_state = at::empty_like(g_final);
  int multiprocessors;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, r.get_device()));
  const int slices = wkv7::backward_slices(N, B * H, multiprocessors);
  const Tensor parts = at::empty({5, slices > 1 ? slices : 0, B, T, H, N}, g_final.options());
  wkv7::backward({problem_of(r, w, k, v, a, b, shape), chunk_states.const_data_ptr<float>(), gy.const_data_ptr(),
                  g_final.const_data_ptr<float>(), gr.mutable_data_ptr(), gw.mutable_data_ptr(), gk.mutable_data_ptr(),
                  gv.mutable_data_ptr(), ga.mutable_data_ptr(), gb.mutable_data_ptr(),
                  g_state.mutable_data_ptr<float>(), slices, parts.mutable_data_ptr<float>()},
                 c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {gr, gw, gk, gv, ga, gb, g_state};
}

}  // namespace rwkv7

}  // namespace

TORCH_LIBRARY(rwkv_speech_cuda, m) {
  define_wkv(m);
}

TORCH_LIBRARY_IMPL(rwkv_speech_cuda, CUDA, m) {
  m.impl("wkv6_forward", rwkv6::forward);
  m.impl("wkv6_backward", rwkv6::backward);
  m.impl("wkv7_forward", rwkv7::forward);
  m.impl("wkv7_backward", rwkv7::backward);
}
