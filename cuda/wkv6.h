// The WKV-6 operator on CUDA.
//
// Per sample b and head h, with the state S[value i][key j] (formulas: RWKV-6, "Eagle and Finch", arXiv:2404.05892):
//     d_t = exp(-exp(w_t))
//     y_t[i] = sum_j r_t[j] (S[i][j] + u[j] k_t[j] v_t[i]),    then    S[i][j] <- d_t[j] S[i][j] + k_t[j] v_t[i]
#pragma once
#include "wkv.h"

namespace wkv6 {

constexpr int CHUNK = 24;  // steps between two saved states

struct Problem : wkv::Shape {
  const void *r, *k, *v, *w;  // (B, T, H, N)
  const float *u;             // (H, N)
};

using Forward = wkv::Forward<Problem>;

struct Backward {
  Problem problem;
  const float *chunk_states;   // as Forward left them
  const void *gy;              // (B, T, H, N)
  const float *g_final_state;  // (B, H, N, N) or null for zero
  void *gr, *gk, *gv, *gw;     // (B, T, H, N)
  float *gu, *gstate;          // (B, H, N), (B, H, N, N): per sample, for the caller to sum
  float *gv_parts;             // (slices(N), B, T, H, N), workspace
};

// Blocks that share one sample and head; in the backward pass each leaves its part of gv.
constexpr int slices(int N) { return N == 128 ? 8 : N / 32; }

// Both are asynchronous; a failed launch is left for cudaGetLastError.
void forward(const Forward &, CUstream_st *stream);
void backward(const Backward &, CUstream_st *stream);

}  // namespace wkv6
