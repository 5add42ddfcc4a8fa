// What the launchers of both WKV operators take: raw device pointers, so that neither side needs the other's headers.
#pragma once
#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace wkv {

enum class Dtype : int32_t { fp32, bf16, fp16 };

// All tensors are contiguous and 16-byte aligned. `lengths` may be null: every sample then has T steps. With `lengths`,
// the outputs of shape (B, T, H, N) must be zero beforehand: positions at or after a sample's length are not written.
struct Shape {
  int32_t B, T, H, N;      // N: 32, 64 or 128
  Dtype dtype;             // of tensors (B, T, H, N)
  const int64_t *lengths;  // (B,) or null; values are clamped to 0..T
};

// Problem: an operator's Shape and inputs.
template <typename Problem>
struct Forward {
  Problem problem;
  const float *state;    // (H, N, N) if shared_state, else (B, H, N, N)
  int32_t shared_state;  // 0 or 1
  void *y;               // (B, T, H, N)
  float *final_state;    // (B, H, N, N), after each sample's own length
  float *chunk_states;   // (B, H, ceil(T / chunk), N, N): the state before each chunk that a sample reaches; or null
};

}  // namespace wkv
