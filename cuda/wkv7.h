// The WKV-7 operator on CUDA.
//
// Per sample b and head h, with the state S[value i][key j] (formulas: RWKV-7, "Goose", arXiv:2503.14456):
//     d_t = exp(-exp(-1/2) sigmoid(w_t)),    u_t[i] = sum_j S[i][j] a_t[j]
//     S[i][j] <- d_t[j] S[i][j] + u_t[i] b_t[j] + v_t[i] k_t[j],    then    y_t[i] = sum_j r_t[j] S[i][j]
#pragma once
#include "wkv.h"

namespace wkv7 {

constexpr int CHUNK = 16;  // steps between two saved states

struct Problem : wkv::Shape {
  const void *r, *w, *k, *v, *a, *b;  // (B, T, H, N)
};

using Forward = wkv::Forward<Problem>;

struct Backward {
  Problem problem;
  const float *chunk_states;          // as Forward left them
  const void *gy;                     // (B, T, H, N)
  const float *g_final_state;         // (B, H, N, N) or null for zero
  void *gr, *gw, *gk, *gv, *ga, *gb;  // (B, T, H, N)
  float *gstate;                      // (B, H, N, N): per sample, for the caller to sum
  int32_t slices;                     // what backward_slices() gives
  float *parts;                       // (5, slices, B, T, H, N), workspace; null where slices is 1
};

// Blocks that share one sample and head in the backward pass. Of more than one each leaves its parts of gr, gw, gk, ga
// and gb. Heads of 64 are cut only where half of the device's multiprocessors would have nothing to do otherwise; a
// whole head of 128 does not fit in one.
constexpr int backward_slices(int N, int64_t heads, int multiprocessors) {
  return N == 128 ? 8 : N == 64 && 2 * heads <= multiprocessors ? 2 : 1;
}

// Both are asynchronous; a failed launch is left for cudaGetLastError.
void forward(const Forward &, CUstream_st *stream);
void backward(const Backward &, CUstream_st *stream);

}  // namespace wkv7
