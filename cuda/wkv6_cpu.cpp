// The WKV operator of RWKV-6 on the CPU.
//
//   y_t[i]  = sum_j r_t[j] (S[i,j] + u[j] k_t[j] v_t[i])
//   S[i,j] <- d_t[j] S[i,j] + k_t[j] v_t[i]                      d = exp(-exp(w)),  i: value,  j: key
//
// Step by step, each state is read and written once for two multiplications per number. Over a block of B steps all of
// it is products of small matrices, which keep the arithmetic units busy. With P(a,b) = d_a ... d_{b-1} in each channel
// j, a block that starts from the state S leaves S':
//
//   y_t = S (P(0,t) r_t) + sum_{s<=t} A[t,s] v_s       A[t,s] = sum_j r_t k_s P(s+1,t) for s < t,  A[t,t] = r_t . u k_t
//   S'  = S diag P(0,B) + sum_s v_s (P(s+1,B) k_s)^T
//
// P(s+1,t) as P(0,t) / P(0,s+1) would overflow where decays are strong, so A is filled by halves: for s in the first
// half of a block and t in the second, with m between them, P(s+1,t) = P(s+1,m) P(m,t), neither of which exceeds 1, and
// within a half the same holds again. We start from blocks of one step and double them, keeping r_t times the decays
// from the start of its block to t, and k_s times those from s to the end of its block; after the last doubling they
// are what S needs. Nothing is divided, and no decay is too strong: d = 0 is like any other.
//
// Backward leads from G' = dL/dS' to G = dL/dS. With M[t,s] = gy_t . v_s,
//
//   G    = G' diag P(0,B) + sum_t gy_t (P(0,t) r_t)^T
//   gv_s = G' (P(s+1,B) k_s)   + sum_{t>=s} A[t,s] gy_t
//   gr_t = P(0,t) (S^T gy_t)   + sum_{s<t} M[t,s] P(s+1,t) k_s + M[t,t] u k_t
//   gk_s = P(s+1,B) (G'^T v_s) + sum_{t>s} M[t,s] P(s+1,t) r_t + M[s,s] u r_s
//
// The gradient of a decay, d_t gd_t[j] = d_t sum_i S_t[i,j] (dL/dS_{t+1})[i,j], collects what flows across step t: from
// S to G', from S to each later r, from each earlier k to G', and from each earlier k to each later r. All but the
// first are summands of r gr and k gk above: a running sum adds them up at each doubling, and once more for S and G'.
// (The shorter d_t gd_t = d_{t+1} gd_{t+1} + r_{t+1} gr_{t+1} - k_t gk_t, bonus left out, is a difference of large
// numbers and loses all digits where d is small.)
//
// S at the start of each block is computed again from the states that the forward pass left every CHUNK steps.
#include "wkv6_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "rows_cpu.h"

namespace {

constexpr int64_t CHUNK = 32;  // steps between the states that the forward pass keeps for the backward pass
constexpr int BLOCK = 16;      // steps; must divide CHUNK and be a power of two

template <int N>
struct alignas(64) Block {
  float r[BLOCK][N], k[BLOCK][N], v[BLOCK][N];  // r and k times the decays since, or until, a block's bounds
  float decay[BLOCK][N];                        // of a whole block, at its first step
  float A[BLOCK][BLOCK] = {};                   // s <= t

  // From blocks of one step to one block. At each doubling, join(h, a) is called before the blocks of h steps at a and
  // a + h become one.
  template <int h = 1, typename Join>
  void grow(const Join& join) {
    for (int a = 0; a < BLOCK; a += 2 * h) {
      const int m = a + h;
      dots<N, h>(&A[m][a], BLOCK, r[m], k[a]);
      join(std::integral_constant<int, h>{}, a);
      scale_rows<N>(r[m], h, decay[a]);
      scale_rows<N>(k[a], h, decay[m]);
      scale_rows<N>(decay[a], 1, decay[m]);
    }
    if constexpr (2 * h < BLOCK) grow<2 * h>(join);
  }
};

// One step as its formula reads, for the few that fill no block. S is [value, key].
template <typename scalar_t, int N>
void single_step(float* S, const scalar_t* r, const scalar_t* k, const scalar_t* v, const scalar_t* w, const float* u,
                 scalar_t* y) {
  constexpr int V = N / LANES;
  float values[N], sums[N];
  read_rows<N>(values, v, 0, 1);
  vec rt[V], kt[V], dt[V], uk{};
  for (int c = 0; c < V; ++c) {
    rt[c] = load(r + c * LANES);
    kt[c] = load(k + c * LANES);
    dt[c] = exp(-exp(load(w + c * LANES)));
    uk += rt[c] * load(u + c * LANES) * kt[c];
  }
  const float now = sum(uk);
  for (int i = 0; i < N; ++i) {
    vec acc{};
    for (int c = 0; c < V; ++c) {
      float* s = S + i * N + c * LANES;
      acc += rt[c] * load(s);
      store(s, dt[c] * load(s) + kt[c] * values[i]);
    }
    sums[i] = sum(acc) + now * values[i];
  }
  write_rows<N>(y, 0, 1, sums);
}

template <typename scalar_t, int N>
void forward(const Sizes& n, const scalar_t* r, const scalar_t* k, const scalar_t* v, const scalar_t* w,
             const float* u, const float* state, scalar_t* y, float* final_state, float* chunk_states) {
  struct Scratch {
    Block<N> block;
    alignas(64) float S[N * N], y[BLOCK][N];  // S as [key, value]: y and v then lie along the lanes
  };
  const int64_t stride = n.H * N, chunks = (n.T + CHUNK - 1) / CHUNK;
  const int64_t grain = std::max<int64_t>(1, 16 / n.T);  // a head's single step is not worth waking a thread
  at::parallel_for(0, n.B * n.H, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Scratch> scratch(n.T < BLOCK ? nullptr : new Scratch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / n.H, h = task % n.H, first = b * n.T * stride + h * N, steps = n.steps(b);
      const float *initial = state + (n.shared_state ? h : task) * N * N, *bonus = u + h * N;
      float *last = final_state + task * N * N, *saved = chunk_states + task * chunks * N * N;
      int64_t t = 0;
      if (steps < BLOCK) {
        std::copy_n(initial, N * N, last);
      } else {
        auto& [x, S, yt] = *scratch;
        transpose<N>(S, initial);
        for (; t + BLOCK <= steps; t += BLOCK) {
          if (chunk_states && t % CHUNK == 0) transpose<N>(saved + t / CHUNK * N * N, S);
          const int64_t at = first + t * stride, next = at + BLOCK * stride;
          const int64_t ahead = std::min<int64_t>(BLOCK, steps - t - BLOCK);
          prefetch_rows<N, 1>(y + at, stride, BLOCK);
          for (const auto* p : {r, k, v, w}) prefetch_rows<N, 0>(p + next, stride, ahead);
          read_rows<N>(x.r[0], r + at, stride, BLOCK);
          read_rows<N>(x.k[0], k + at, stride, BLOCK);
          read_rows<N>(x.v[0], v + at, stride, BLOCK);
          for (int s = 0; s < BLOCK; ++s) {
            for (int j = 0; j < N; j += LANES) store(x.decay[s] + j, exp(-exp(load(w + at + s * stride + j))));
            x.A[s][s] = dot<N>(x.r[s], bonus, x.k[s]);
          }
          x.grow([](auto, int) {});
          multiply<N>(yt[0], BLOCK, x.r[0], N, 1, S, N);
          multiply<N, true>(yt[0], BLOCK, x.A[0], BLOCK, 1, x.v[0], BLOCK);
          decay_and_add<N, true>(S, S, x.decay[0], x.k[0], x.v[0], BLOCK);
          write_rows<N>(y + at, stride, BLOCK, yt[0]);
        }
        transpose<N>(last, S);
      }
      for (; t < steps; ++t) {
        const int64_t at = first + t * stride;
        if (chunk_states && t % CHUNK == 0) std::copy_n(last, N * N, saved + t / CHUNK * N * N);
        single_step<scalar_t, N>(last, r + at, k + at, v + at, w + at, bonus, y + at);
      }
    }
  });
}

// A block on its way back. Steps beyond the sample's last are zeros with a decay of 1: they change nothing.
template <int N>
struct BackwardBlock : Block<N> {
  using Block<N>::r, Block<N>::k, Block<N>::v, Block<N>::decay, Block<N>::A;
  float S[N * N];                                        // [value, key], before the block
  float gy[BLOCK][N], gr[BLOCK][N], gk[BLOCK][N];
  float since[BLOCK][N], until[BLOCK][N];                // the decays that r and k are multiplied with
  float e[BLOCK][N], d_gd[BLOCK][N];                     // e = exp(w)
  float M[BLOCK][BLOCK] = {};

  template <typename scalar_t>
  void read(const scalar_t* rt, const scalar_t* kt, const scalar_t* vt, const scalar_t* wt, const scalar_t* gyt,
            int64_t stride, int64_t rows, const float* bonus, float* gu) {
    std::fill_n(r[0], 3 * BLOCK * N, 0.0f);
    std::fill_n(gy[0], BLOCK * N, 0.0f);
    std::fill_n(e[0], 2 * BLOCK * N, 0.0f);
    std::fill_n(since[0], 2 * BLOCK * N, 1.0f);
    read_rows<N>(r[0], rt, stride, rows);
    read_rows<N>(k[0], kt, stride, rows);
    read_rows<N>(v[0], vt, stride, rows);
    read_rows<N>(gy[0], gyt, stride, rows);
    read_rows<N>(e[0], wt, stride, rows);
    for (int t = 0; t < BLOCK; ++t) {
      A[t][t] = dot<N>(r[t], bonus, k[t]);
      M[t][t] = dot<N>(gy[t], v[t]);
      for (int j = 0; j < N; j += LANES) {
        const vec et = t < rows ? exp(load(e[t] + j)) : vec{}, gain = load(bonus + j) * M[t][t];
        store(e[t] + j, et);
        store(decay[t] + j, exp(-et));
        store(gr[t] + j, gain * load(k[t] + j));
        store(gk[t] + j, gain * load(r[t] + j));
        store(gu + j, load(gu + j) + load(r[t] + j) * load(k[t] + j) * M[t][t]);
      }
    }
  }

  void grow() {
    Block<N>::grow([this](auto half, int a) {
      constexpr int h = half;
      const int m = a + h;
      alignas(64) float g[(h < 4 ? 4 : h) * N];
      dots<N, h>(&M[m][a], BLOCK, gy[m], v[a]);
      few<h>(g, &M[m][a], BLOCK, 1, k[a]);
      to_r(m, h, g);
      few<h>(g, &M[m][a], 1, BLOCK, r[m]);
      to_k(a, h, g);
      scale_rows<N>(since[m], h, decay[a]);
      scale_rows<N>(until[a], h, decay[m]);
    });
  }

  // Adds the gradients g of r[t], as it now stands, for T steps from `first`, and what flowed to them past other steps.
  void to_r(int first, int T, const float* g) {
    for (int j = 0; j < N; j += LANES) {
      vec later{};
      for (int t = first + T - 1; t >= first; --t) {
        const vec gt = load(g + (t - first) * N + j);
        store(d_gd[t] + j, load(d_gd[t] + j) + later);
        store(gr[t] + j, load(gr[t] + j) + load(since[t] + j) * gt);
        later += load(r[t] + j) * gt;
      }
    }
  }

  // The same for k[t].
  void to_k(int first, int T, const float* g) {
    for (int j = 0; j < N; j += LANES) {
      vec earlier{};
      for (int t = first; t < first + T; ++t) {
        const vec gt = load(g + (t - first) * N + j);
        store(d_gd[t] + j, load(d_gd[t] + j) + earlier);
        store(gk[t] + j, load(gk[t] + j) + load(until[t] + j) * gt);
        earlier += load(k[t] + j) * gt;
      }
    }
  }

  // `multiply` of h x h by h rows, also for one and two.
  template <int h>
  static void few(float* out, const float* a, int a_row, int a_column, const float* b) {
    if constexpr (h >= 4) return multiply<N>(out, h, a, a_row, a_column, b, h);
    for (int t = 0; t < h; ++t)
      for (int j = 0; j < N; j += LANES) {
        vec sum{};
        for (int m = 0; m < h; ++m) sum += a[t * a_row + m * a_column] * load(b + m * N + j);
        store(out + t * N + j, sum);
      }
  }

  // d gd, complete once what flowed from S to G is added; then gw = -e d gd, in its place.
  void to_w(const float* G) {
    for (int j = 0; j < N; j += LANES) {
      vec through{};
      for (int i = 0; i < N; ++i) through += load(G + i * N + j) * load(S + i * N + j);
      through *= load(decay[0] + j);
      for (int t = 0; t < BLOCK; ++t) store(d_gd[t] + j, -load(e[t] + j) * (load(d_gd[t] + j) + through));
    }
  }
};

template <typename scalar_t, int N>
void backward(const Sizes& n, const scalar_t* r, const scalar_t* k, const scalar_t* v, const scalar_t* w,
              const float* u, const float* chunk_states, const scalar_t* gy, const float* g_final, scalar_t* gr,
              scalar_t* gk, scalar_t* gv, scalar_t* gw, float* gu, float* g_state) {
  struct Scratch {
    BackwardBlock<N> blocks[CHUNK / BLOCK];
    alignas(64) float G_by_key[N * N], out[BLOCK][N], gu[N];
  };
  const int64_t stride = n.H * N, chunks = (n.T + CHUNK - 1) / CHUNK;
  at::parallel_for(0, n.B * n.H, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Scratch> scratch(new Scratch);
    auto& [blocks, G_by_key, out, gu_sum] = *scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / n.H, h = task % n.H, first = b * n.T * stride + h * N, steps = n.steps(b);
      float* G = g_state + task * N * N;
      std::copy_n(g_final + task * N * N, N * N, G);
      std::fill_n(gu_sum, N, 0.0f);
      for (int64_t chunk = (steps - 1) / CHUNK; chunk >= 0; --chunk) {
        const int64_t t0 = chunk * CHUNK, t1 = std::min(t0 + CHUNK, steps);
        const float* saved = chunk_states + (task * chunks + chunk) * N * N;
        if (chunk > 0) prefetch_rows<N, 0>(saved - N * N, N, N);
        std::copy_n(saved, N * N, blocks[0].S);
        for (int64_t t = t0; t < t1; t += BLOCK) {
          auto& x = blocks[(t - t0) / BLOCK];
          const int64_t at = first + t * stride, rows = std::min<int64_t>(BLOCK, t1 - t);
          // Next come the block after this one or, after the last, the first of the chunk before.
          const int64_t next = t + BLOCK < t1 ? t + BLOCK : t0 - CHUNK;
          const int64_t ahead = next < 0 ? 0 : std::min<int64_t>(BLOCK, steps - next);
          for (const auto* p : {r, k, v, w, gy}) prefetch_rows<N, 0>(p + first + next * stride, stride, ahead);
          x.read(r + at, k + at, v + at, w + at, gy + at, stride, rows, u + h * N, gu_sum);
          x.grow();
          for (const auto* p : {gr, gk, gv, gw}) prefetch_rows<N, 1>(p + at, stride, rows);
          multiply<N>(out[0], BLOCK, x.gy[0], N, 1, x.S, N);
          x.to_r(0, BLOCK, out[0]);
          write_rows<N>(gr + at, stride, rows, x.gr[0]);
          if (t + BLOCK < t1) {
            float* S_next = blocks[(t - t0) / BLOCK + 1].S;
            decay_and_add<N, false>(S_next, x.S, x.decay[0], x.v[0], x.k[0], BLOCK);
          }
        }
        for (int64_t t = (t1 - 1) / BLOCK * BLOCK; t >= t0; t -= BLOCK) {
          auto& x = blocks[(t - t0) / BLOCK];
          const int64_t at = first + t * stride, rows = std::min<int64_t>(BLOCK, t1 - t);
          multiply<N>(out[0], BLOCK, x.v[0], N, 1, G, N);
          x.to_k(0, BLOCK, out[0]);
          write_rows<N>(gk + at, stride, rows, x.gk[0]);
          x.to_w(G);
          write_rows<N>(gw + at, stride, rows, x.d_gd[0]);
          transpose<N>(G_by_key, G);
          multiply<N>(out[0], BLOCK, x.k[0], N, 1, G_by_key, N);
          multiply<N, true>(out[0], BLOCK, x.A[0], 1, BLOCK, x.gy[0], BLOCK);
          write_rows<N>(gv + at, stride, rows, out[0]);
          decay_and_add<N, false>(G, G, x.decay[0], x.gy[0], x.r[0], BLOCK);
        }
      }
      std::copy_n(gu_sum, N, gu + task * N);
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv6_forward_cpu(const at::Tensor& r, const at::Tensor& k,
                                                                const at::Tensor& v, const at::Tensor& w,
                                                                const at::Tensor& u, const at::Tensor& state,
                                                                const Lengths& lengths, bool save_states) {
  const auto n = sizes_of(r, state.dim() == 3, lengths);
  const int64_t N = r.size(3), chunks = (n.T + CHUNK - 1) / CHUNK;
  const auto y = allocate(r.sizes(), r.options(), lengths);
  const auto final_state = at::empty({n.B, n.H, N, N}, state.options());
  const auto chunk_states = allocate({save_states ? n.B : 0, n.H, chunks, N, N}, state.options(), lengths);
  with_type_and_head_size(r, [&](auto number, auto size) {
    using scalar_t = decltype(number);
    forward<scalar_t, size.value>(n, r.data_ptr<scalar_t>(), k.data_ptr<scalar_t>(), v.data_ptr<scalar_t>(),
                                  w.data_ptr<scalar_t>(), u.data_ptr<float>(), state.data_ptr<float>(),
                                  y.data_ptr<scalar_t>(), final_state.data_ptr<float>(),
                                  save_states ? chunk_states.data_ptr<float>() : nullptr);
  });
  return {y, final_state, chunk_states};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv6_backward_cpu(
    const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w, const at::Tensor& u,
    const at::Tensor& chunk_states, const Lengths& lengths, const at::Tensor& gy, const at::Tensor& g_final) {
  const auto n = sizes_of(r, false, lengths);
  const int64_t N = r.size(3);
  const auto like = [&](const at::Tensor& x) { return allocate(x.sizes(), x.options(), lengths); };
  const auto gr = like(r), gk = like(k), gv = like(v), gw = like(w);
  const auto gu = at::empty({n.B, n.H, N}, u.options()), g_state = at::empty({n.B, n.H, N, N}, u.options());
  with_type_and_head_size(r, [&](auto number, auto size) {
    using scalar_t = decltype(number);
    backward<scalar_t, size.value>(
        n, r.data_ptr<scalar_t>(), k.data_ptr<scalar_t>(), v.data_ptr<scalar_t>(), w.data_ptr<scalar_t>(),
        u.data_ptr<float>(), chunk_states.data_ptr<float>(), gy.data_ptr<scalar_t>(), g_final.data_ptr<float>(),
        gr.data_ptr<scalar_t>(), gk.data_ptr<scalar_t>(), gv.data_ptr<scalar_t>(), gw.data_ptr<scalar_t>(),
        gu.data_ptr<float>(), g_state.data_ptr<float>());
  });
  return {gr, gk, gv, gw, gu, g_state};
}
