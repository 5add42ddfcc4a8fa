// What the WKV operators of both generations share on the CPU. Shapes and dtypes are checked by the Python side: inputs
// (B, T, H, N) contiguous, of one dtype; those of (H, N) and the states fp32; lengths (B,) int64. Gradients of what a
// batch shares come per sample.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <type_traits>

using Lengths = c10::optional<at::Tensor>;

struct Sizes {
  int64_t B, T, H;
  bool shared_state;
  const int64_t* lengths;  // null: every sample has T steps

  int64_t steps(int64_t b) const { return lengths ? lengths[b] : T; }
};

inline Sizes sizes_of(const at::Tensor& r, bool shared_state, const Lengths& lengths) {
  return {r.size(0), r.size(1), r.size(2), shared_state, lengths ? lengths->data_ptr<int64_t>() : nullptr};
}

// What is filled step by step. Steps beyond a length are not visited.
inline at::Tensor allocate(at::IntArrayRef sizes, const at::TensorOptions& options, const Lengths& lengths) {
  return lengths ? at::zeros(sizes, options) : at::empty(sizes, options);
}

// body(a value of the type of r's numbers, the head size as a constant)
template <typename Body>
void with_type_and_head_size(const at::Tensor& r, Body body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, r.scalar_type(), "wkv on the CPU", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) switch (r.size(3)) {
        case 32: return body(scalar_t{}, std::integral_constant<int, 32>{});
        case 64: return body(scalar_t{}, std::integral_constant<int, 64>{});
        case 128: return body(scalar_t{}, std::integral_constant<int, 128>{});
      }
    TORCH_CHECK(false, "wkv: fp32, bf16 or fp16 with heads of 32, 64 or 128, not ", r.scalar_type(), ", ", r.size(3));
  });
}
