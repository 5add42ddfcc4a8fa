// The WKV-6 operator on CUDA: launchers that take raw device pointers, so that neither side needs the other's headers.
//
// Per sample b and head h, with the state S[value i][key j] (formulas: RWKV-6, "Eagle and Finch", arXiv:2404.05892):
//     d_t = exp(-exp(w_t))
//     y_t[i] = sum_j r_t[j] (S[i][j] + u[j] k_t[j] v_t[i]),    then    S[i][j] <- d_t[j] S[i][j] + k_t[j] v_t[i]
#pragma once
#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace wkv6 {

constexpr int CHUNK = 24;  // steps between two saved states

enum class Dtype : int32_t { fp32, bf16, fp16 };

// All tensors are contiguous and 16-byte aligned. `lengths` may be null: every sample then has T steps. With `lengths`,
// the outputs of shape (B, T, H, N) must be zero beforehand: positions at or after a sample's length are not written.
struct Problem {
  int32_t B, T, H, N;  // N: 32, 64 or 128
  Dtype dtype;         // of r, k, v, w, y and their gradients
  const void *r, *k, *v, *w;  // (B, T, H, N)
  const float *u;             // (H, N)
  const int64_t *lengths;     // (B,) or null; values are clamped to 0..T
};

struct Forward {
  Problem problem;
  const float *state;    // (H, N, N) if shared_state, else (B, H, N, N)
  int32_t shared_state;  // 0 or 1
  void *y;               // (B, T, H, N)
  float *final_state;    // (B, H, N, N), after each sample's own length
  float *chunk_states;   // (B, H, ceil(T / CHUNK), N, N): the state before each chunk that a sample reaches; or null
};

struct Backward {
  Problem problem;
  const float *chunk_states;   // as Forward left them
  const void *gy;              // (B, T, H, N)
  const float *g_final_state;  // (B, H, N, N) or null for zero
  void *gr, *gk, *gv, *gw;     // (B, T, H, N)
  float *gu, *gstate;          // (B, H, N), (B, H, N, N): per sample, for the caller to sum
  float *gv_parts;             // (gv_slices(N), B, T, H, N), workspace
};

// Blocks that share one sample and head, each of which leaves its part of gv.
constexpr int gv_slices(int N) { return N == 128 ? 8 : N / 32; }

// Both are asynchronous; a failed launch is left for cudaGetLastError.
void forward(const Forward &, CUstream_st *stream);
void backward(const Backward &, CUstream_st *stream);

}  // namespace wkv6
