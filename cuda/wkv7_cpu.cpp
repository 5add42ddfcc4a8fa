// The WKV operator of RWKV-7 on the CPU.
//
//   S[i,j] <- d_t[j] S[i,j] + u_t[i] b_t[j] + v_t[i] k_t[j]      u_t[i] = sum_j S[i,j] a_t[j]   (S before the step)
//   y_t[i]  = sum_j S[i,j] r_t[j]                                d = exp(-exp(-1/2) sigmoid(w)),  i: value,  j: key
//
// Forward goes step by step: five multiplications for each number of S, fewer than blocks of matrix products take. S
// lies as [key, value], so that u, v and y lie along the lanes; one pass over S makes the step, y_t, and u_{t+1}.
//
// Backward takes a block of C steps at once. With P_t = d_1 ... d_t in each channel, and rows for steps,
//
//   R_t = r_t P_t,  A_t = a_t P_{t-1},  K_t = k_t / P_t,  B_t = b_t / P_t       L: lower triangle, L- without diagonal
//   U = L-(A B^T) U + L-(A K^T) V + A S^T
//   Y = L(R K^T) V + L(R B^T) U + R S^T             S' = (S + V^T K + U^T B) diag P_C
//
// (no decay is below 0.545, so that 1 / P stays below 2e4 in 16 steps), and with G' = dL/dS' diag P_C, W = [K; B],
// X = [V; U],
//
//   gX = [L(R K^T)  L(R B^T)]^T gY + W G'^T;   gU <- (I - L-(A B^T))^-T gU;   gV += L-(A K^T)^T gU
//   E = L(gY X^T),  F = L-(gU X^T);   gR = E W + gY S,  gA = F W + gU S,  gW = E^T R + F^T A + X G'
//   G = G' + gY^T R + gU^T A
//
// The logarithm of a decay is part of that of P_s for every s >= t, so that its gradient is a sum over those of
// R gR - K gK - B gB (and A gA, a step later), and at the end of the block of S' and dL/dS'.
//
// The forward pass leaves S before every second block, as [key, value]; from it and U the next is computed again.
#include "wkv7_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <memory>

#include "rows_cpu.h"

namespace {

constexpr int BLOCK = 16;                 // steps
constexpr int CHUNK = 2 * BLOCK;          // steps between the states that the forward pass keeps for the backward pass
constexpr int FEW = 8;                    // fewer steps are not worth transposing S
constexpr float STRONGEST = 0.60653066f;  // exp(-1/2)

inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }
inline vec decay(vec w) { return exp(-STRONGEST * sigmoid(w)); }

// One step as its formula reads, S and `next` (which may be S) being [value, key]. Sixteen rows at a time, to sum their
// products together.
template <typename scalar_t, int N>
void single_step(const float* S, float* next, const scalar_t* r, const scalar_t* w, const scalar_t* k,
                 const scalar_t* v, const scalar_t* a, const scalar_t* b, scalar_t* y) {
  constexpr int V = N / LANES;
  float values[N], sums_of_r[N];
  vec rt[V], d[V], kt[V], at[V], bt[V];
  read_rows<N>(values, v, 0, 1);
  for (int c = 0; c < V; ++c) {
    rt[c] = load(r + c * LANES);
    d[c] = decay(load(w + c * LANES));
    kt[c] = load(k + c * LANES);
    at[c] = load(a + c * LANES);
    bt[c] = load(b + c * LANES);
  }
  for (int i = 0; i < N; i += LANES) {
    vec part[LANES] = {};
    for (int l = 0; l < LANES; ++l)
      for (int c = 0; c < V; ++c) part[l] += load(S + (i + l) * N + c * LANES) * at[c];
    float u[LANES];
    store(u, sums(part));
    for (int l = 0; l < LANES; ++l) {
      part[l] = vec{};
      for (int c = 0; c < V; ++c) {
        const int64_t place = (i + l) * N + c * LANES;
        const vec s = d[c] * load(S + place) + u[l] * bt[c] + values[i + l] * kt[c];
        store(next + place, s);
        part[l] += s * rt[c];
      }
    }
    store(sums_of_r + i, sums(part));
  }
  write_rows<N>(y, 0, 1, sums_of_r);
}

// Inputs of some steps as floats.
template <int N>
struct alignas(64) Steps {
  float r[BLOCK][N], d[BLOCK][N], k[BLOCK][N], v[BLOCK][N], a[BLOCK + 1][N], b[BLOCK][N];
};

// `rows` steps of S as [key, value]; y takes the place of v. Columns are independent: some four vectors at a time.
template <int N>
void advance(float* S, Steps<N>& x, int rows) {
  constexpr int V = N < 4 * LANES ? N / LANES : 4;
  std::fill_n(x.a[rows], N, 0.0f);
  for (int i = 0; i < N; i += V * LANES) {
    vec u[V] = {};
    for (int j = 0; j < N; ++j)
      for (int c = 0; c < V; ++c) u[c] += x.a[0][j] * load(S + j * N + i + c * LANES);
    for (int t = 0; t < rows; ++t) {
      vec v[V], y[V] = {}, u_next[V] = {};
      for (int c = 0; c < V; ++c) v[c] = load(x.v[t] + i + c * LANES);
      for (int j = 0; j < N; ++j) {
        float* s = S + j * N + i;
        const float d = x.d[t][j], b = x.b[t][j], k = x.k[t][j], r = x.r[t][j], a = x.a[t + 1][j];
        for (int c = 0; c < V; ++c) {
          const vec next = d * load(s + c * LANES) + b * u[c] + k * v[c];
          store(s + c * LANES, next);
          y[c] += r * next;
          u_next[c] += a * next;
        }
      }
      for (int c = 0; c < V; ++c) {
        store(x.v[t] + i + c * LANES, y[c]);
        u[c] = u_next[c];
      }
    }
  }
}

template <typename scalar_t, int N>
void forward(const Sizes& n, const scalar_t* r, const scalar_t* w, const scalar_t* k, const scalar_t* v,
             const scalar_t* a, const scalar_t* b, const float* state, scalar_t* y, float* final_state,
             float* chunk_states) {
  struct Scratch {
    Steps<N> steps;
    alignas(64) float S[N * N];
  };
  const int64_t stride = n.H * N, chunks = (n.T + CHUNK - 1) / CHUNK;
  const int64_t grain = std::max<int64_t>(1, 16 / n.T);  // a head's single step is not worth waking a thread
  at::parallel_for(0, n.B * n.H, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Scratch> scratch(n.T < FEW ? nullptr : new Scratch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / n.H, h = task % n.H, steps = n.steps(sample);
      const int64_t first = sample * n.T * stride + h * N;
      const float* initial = state + (n.shared_state ? h : task) * N * N;
      float *last = final_state + task * N * N, *saved = chunk_states + task * chunks * N * N;
      if (steps < FEW) {
        if (chunk_states) transpose<N>(saved, initial);
        for (int64_t t = 0, at = first; t < steps; ++t, at += stride)
          single_step<scalar_t, N>(t == 0 ? initial : last, last, r + at, w + at, k + at, v + at, a + at, b + at,
                                   y + at);
        continue;
      }
      auto& [x, S] = *scratch;
      transpose<N>(S, initial);
      for (int64_t t = 0; t < steps; t += BLOCK) {
        if (chunk_states && t % CHUNK == 0) std::copy_n(S, N * N, saved + t / CHUNK * N * N);
        const int64_t at = first + t * stride, rows = std::min<int64_t>(BLOCK, steps - t);
        const int64_t ahead = std::min<int64_t>(BLOCK, steps - t - rows);
        prefetch_rows<N, 1>(y + at, stride, rows);
        for (const auto* p : {r, w, k, v, a, b}) prefetch_rows<N, 0>(p + at + BLOCK * stride, stride, ahead);
        read_rows<N>(x.r[0], r + at, stride, rows);
        read_rows<N>(x.k[0], k + at, stride, rows);
        read_rows<N>(x.v[0], v + at, stride, rows);
        read_rows<N>(x.a[0], a + at, stride, rows);
        read_rows<N>(x.b[0], b + at, stride, rows);
        for (int s = 0; s < rows; ++s)
          for (int j = 0; j < N; j += LANES) store(x.d[s] + j, decay(load(w + at + s * stride + j)));
        advance(S, x, rows);
        write_rows<N>(y + at, stride, rows, x.v[0]);
      }
      transpose<N>(last, S);
    }
  });
}

constexpr auto all_ones() {
  std::array<float, 128> x{};
  for (float& one : x) one = 1.0f;
  return x;
}
constexpr auto ALL_ONES = all_ones();
constexpr const float* ONES = ALL_ONES.data();

// A block on its way back. Two matrices of BLOCK rows that go through the same products lie one
// below the other. Steps beyond the sample's last are zeros with a decay of 1: they change nothing.
template <int N>
struct alignas(64) BackwardBlock {
  static constexpr int C = BLOCK, D = 2 * BLOCK;
  float RA[D][N], KB[D][N], VU[D][N], gYU[D][N];  // R and A, K and B, V and U, gY and gU
  float sigmoids[C][N], P[C + 1][N];              // P[t]: the decays before step t
  float seen[D][D];                               // L and L- of RA KB^T: what Y and U take of V and U
  float S[N * N];                                 // before the block

  struct Work {
    alignas(64) float gRA[D][N], gKB[D][N], gVU[D][N], EF[D][D], columns[N][D], S_by_key[N * N], G_by_key[N * N];
    float end[N];
  };

  template <typename scalar_t>
  void read(const scalar_t* r, const scalar_t* w, const scalar_t* k, const scalar_t* v, const scalar_t* a,
            const scalar_t* b, const scalar_t* gy, int64_t stride, int rows) {
    if (rows < C) {
      for (auto* x : {RA, KB, VU, gYU}) std::fill_n(x[0], D * N, 0.0f);
      std::fill_n(sigmoids[0], C * N, 0.0f);
    }
    read_rows<N>(RA[0], r, stride, rows);
    read_rows<N>(RA[C], a, stride, rows);
    read_rows<N>(KB[0], k, stride, rows);
    read_rows<N>(KB[C], b, stride, rows);
    read_rows<N>(VU[0], v, stride, rows);
    read_rows<N>(gYU[0], gy, stride, rows);
    for (int j = 0; j < N; j += LANES) {
      vec before = broadcast(1.0f);
      for (int t = 0; t < C; ++t) {
        vec s{};
        if (t < rows) s = sigmoid(load(w + t * stride + j));
        const vec after = before * exp(-STRONGEST * s), inverse = 1.0f / after;
        store(sigmoids[t] + j, s);
        store(P[t] + j, before);
        store(RA[t] + j, load(RA[t] + j) * after);
        store(RA[C + t] + j, load(RA[C + t] + j) * before);
        store(KB[t] + j, load(KB[t] + j) * inverse);
        store(KB[C + t] + j, load(KB[C + t] + j) * inverse);
        before = after;
      }
      store(P[C] + j, before);
    }
  }

  static void turn(float (&columns)[N][D], const float (&x)[D][N]) {
    for (int t = 0; t < D; t += LANES)
      for (int j = 0; j < N; j += LANES) {
        vec tile[LANES];
        for (int l = 0; l < LANES; ++l) tile[l] = load(x[t + l] + j);
        transpose_tile(tile);
        for (int l = 0; l < LANES; ++l) store(columns[j + l] + t, tile[l]);
      }
  }

  // Keeps what an earlier step has on a later one: in the upper half of the rows also on the same step.
  static void cut(float (&x)[D][D]) {
    for (int t = 0; t < C; ++t)
      for (int s = t; s < C; ++s) {
        x[C + t][s] = x[C + t][C + s] = 0.0f;
        if (s > t) x[t][s] = x[t][C + s] = 0.0f;
      }
  }

  // Row `from` of U, times a number of the triangle, added to row `to`.
  static void feed(float (&x)[D][N], int from, int to, float factor) {
    for (int j = 0; j < N; j += LANES) store(x[C + to] + j, load(x[C + to] + j) + factor * load(x[C + from] + j));
  }

  // U, from the state before the block as [key, value].
  void values(const float* S_by_key, Work& work) {
    transpose<N>(S, S_by_key);
    turn(work.columns, KB);
    multiply<D>(seen[0], D, RA[0], N, 1, work.columns[0], N);
    cut(seen);
    multiply<N>(VU[C], C, seen[C], D, 1, VU[0], C);
    multiply<N, true>(VU[C], C, RA[C], N, 1, S_by_key, N);
    for (int s = 0; s < C; ++s)
      for (int t = s + 1; t < C; ++t) feed(VU, s, t, seen[C + t][C + s]);
  }

  // The state after the block, as [key, value].
  void next(float* out, const float* S_by_key) const {
    decay_and_add<N, true>(out, S_by_key, ONES, KB[0], VU[0], D);
    for (int j = 0; j < N; ++j)
      for (int i = 0; i < N; i += LANES) store(out + j * N + i, load(out + j * N + i) * P[C][j]);
  }

  // All gradients, and G (dL/dS' before, dL/dS after). P[1..C] becomes the gradient of w.
  void back(float* G, Work& work) {
    auto& [gRA, gKB, gVU, EF, columns, S_by_key, G_by_key, end] = work;
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < N; j += LANES) store(G + i * N + j, load(G + i * N + j) * load(P[C] + j));
    transpose<N>(G_by_key, G);
    multiply<N>(gVU[0], D, seen[0], 1, D, gYU[0], C);
    multiply<N, true>(gVU[0], D, KB[0], N, 1, G_by_key, N);
    for (int t = C - 1; t >= 0; --t)
      for (int s = 0; s < t; ++s) feed(gVU, t, s, seen[C + t][C + s]);
    std::copy_n(gVU[C], C * N, gYU[C]);
    multiply<N, true>(gVU[0], C, seen[C], 1, D, gYU[C], C);

    turn(columns, VU);
    multiply<D>(EF[0], D, gYU[0], N, 1, columns[0], N);
    cut(EF);
    multiply<N>(gRA[0], D, EF[0], D, 1, KB[0], D);
    multiply<N, true>(gRA[0], D, gYU[0], N, 1, S, N);
    multiply<N>(gKB[0], D, VU[0], N, 1, G, N);
    for (int j = 0; j < N; j += LANES) {
      vec sum{};
      for (int i = 0; i < N; ++i) sum += load(G + i * N + j) * load(S + i * N + j);
      for (int t = 0; t < D; ++t) sum += load(gKB[t] + j) * load(KB[t] + j);
      store(end + j, sum);
    }
    multiply<N, true>(gKB[0], D, EF[0], 1, D, RA[0], D);
    decay_and_add<N, false>(G, G, ONES, gYU[0], RA[0], D);

    for (int j = 0; j < N; j += LANES) {
      vec sum = load(end + j);
      for (int t = C - 1; t >= 0; --t) {
        const auto product = [&](const float (&x)[D][N], const float (&g)[D][N], int at) {
          return load(x[at] + j) * load(g[at] + j);
        };
        sum += product(RA, gRA, t) - product(KB, gKB, t) - product(KB, gKB, C + t);
        const vec before = load(P[t] + j), after = load(P[t + 1] + j), s = load(sigmoids[t] + j);
        store(P[t + 1] + j, -STRONGEST * s * (1.0f - s) * sum);
        sum += product(RA, gRA, C + t);
        const vec inverse = 1.0f / after;
        store(gRA[t] + j, load(gRA[t] + j) * after);
        store(gRA[C + t] + j, load(gRA[C + t] + j) * before);
        store(gKB[t] + j, load(gKB[t] + j) * inverse);
        store(gKB[C + t] + j, load(gKB[C + t] + j) * inverse);
      }
    }
  }
};

template <typename scalar_t, int N>
void backward(const Sizes& n, const scalar_t* r, const scalar_t* w, const scalar_t* k, const scalar_t* v,
              const scalar_t* a, const scalar_t* b, const float* chunk_states, const scalar_t* gy,
              const float* g_final, scalar_t* gr, scalar_t* gw, scalar_t* gk, scalar_t* gv, scalar_t* ga,
              scalar_t* gb, float* g_state) {
  const int64_t stride = n.H * N, chunks = (n.T + CHUNK - 1) / CHUNK;
  at::parallel_for(0, n.B * n.H, 1, [&](int64_t begin, int64_t end) {
    struct Scratch {
      BackwardBlock<N> blocks[CHUNK / BLOCK];
      typename BackwardBlock<N>::Work work;
    };
    const std::unique_ptr<Scratch> scratch(new Scratch);
    auto& [blocks, work] = *scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sample = task / n.H, h = task % n.H, steps = n.steps(sample);
      const int64_t first = sample * n.T * stride + h * N;
      float* G = g_state + task * N * N;
      std::copy_n(g_final + task * N * N, N * N, G);
      for (int64_t t0 = (steps - 1) / CHUNK * CHUNK; t0 >= 0; t0 -= CHUNK) {
        const int64_t t1 = std::min(t0 + CHUNK, steps);
        const float* S_by_key = chunk_states + (task * chunks + t0 / CHUNK) * N * N;
        if (t0 > 0) prefetch_rows<N, 0>(S_by_key - N * N, N, N);
        for (int64_t t = t0; t < t1; t += BLOCK) {
          auto& x = blocks[(t - t0) / BLOCK];
          const int64_t at = first + t * stride, rows = std::min<int64_t>(BLOCK, t1 - t);
          // Next come the block after this one or, after the last, the first of the chunk before.
          const int64_t next = t + BLOCK < t1 ? t + BLOCK : t0 - CHUNK;
          const int64_t ahead = next < 0 ? 0 : std::min<int64_t>(BLOCK, steps - next);
          for (const auto* p : {r, w, k, v, a, b, gy}) prefetch_rows<N, 0>(p + first + next * stride, stride, ahead);
          x.read(r + at, w + at, k + at, v + at, a + at, b + at, gy + at, stride, rows);
          x.values(S_by_key, work);
          if (t + BLOCK < t1) x.next(work.S_by_key, S_by_key);
          S_by_key = work.S_by_key;
        }
        for (int64_t t = (t1 - 1) / BLOCK * BLOCK; t >= t0; t -= BLOCK) {
          auto& x = blocks[(t - t0) / BLOCK];
          const int64_t at = first + t * stride, rows = std::min<int64_t>(BLOCK, t1 - t);
          for (const auto* p : {gr, gw, gk, gv, ga, gb}) prefetch_rows<N, 1>(p + at, stride, rows);
          x.back(G, work);
          write_rows<N>(gr + at, stride, rows, work.gRA[0]);
          write_rows<N>(gw + at, stride, rows, x.P[1]);
          write_rows<N>(gk + at, stride, rows, work.gKB[0]);
          write_rows<N>(gv + at, stride, rows, work.gVU[0]);
          write_rows<N>(ga + at, stride, rows, work.gRA[BLOCK]);
          write_rows<N>(gb + at, stride, rows, work.gKB[BLOCK]);
        }
      }
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv7_forward_cpu(const at::Tensor& r, const at::Tensor& w,
                                                                const at::Tensor& k, const at::Tensor& v,
                                                                const at::Tensor& a, const at::Tensor& b,
                                                                const at::Tensor& state, const Lengths& lengths,
                                                                bool save_states) {
  const auto n = sizes_of(r, state.dim() == 3, lengths);
  const int64_t N = r.size(3), chunks = (n.T + CHUNK - 1) / CHUNK;
  const auto y = allocate(r.sizes(), r.options(), lengths);
  const auto final_state = at::empty({n.B, n.H, N, N}, state.options());
  const auto chunk_states = allocate({save_states ? n.B : 0, n.H, chunks, N, N}, state.options(), lengths);
  with_type_and_head_size(r, [&](auto number, auto size) {
    using scalar_t = decltype(number);
    forward<scalar_t, size.value>(n, r.data_ptr<scalar_t>(), w.data_ptr<scalar_t>(), k.data_ptr<scalar_t>(),
                                  v.data_ptr<scalar_t>(), a.data_ptr<scalar_t>(), b.data_ptr<scalar_t>(),
                                  state.data_ptr<float>(), y.data_ptr<scalar_t>(), final_state.data_ptr<float>(),
                                  save_states ? chunk_states.data_ptr<float>() : nullptr);
  });
  return {y, final_state, chunk_states};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv7_backward_cpu(
    const at::Tensor& r, const at::Tensor& w, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const at::Tensor& b, const at::Tensor& chunk_states, const Lengths& lengths, const at::Tensor& gy,
    const at::Tensor& g_final) {
  const auto n = sizes_of(r, false, lengths);
  const auto like = [&](const at::Tensor& x) { return allocate(x.sizes(), x.options(), lengths); };
  const auto gr = like(r), gw = like(w), gk = like(k), gv = like(v), ga = like(a), gb = like(b);
  const auto g_state = at::empty(g_final.sizes(), g_final.options());
  with_type_and_head_size(r, [&](auto number, auto size) {
    using scalar_t = decltype(number);
    backward<scalar_t, size.value>(
        n, r.data_ptr<scalar_t>(), w.data_ptr<scalar_t>(), k.data_ptr<scalar_t>(), v.data_ptr<scalar_t>(),
        a.data_ptr<scalar_t>(), b.data_ptr<scalar_t>(), chunk_states.data_ptr<float>(), gy.data_ptr<scalar_t>(),
        g_final.data_ptr<float>(), gr.data_ptr<scalar_t>(), gw.data_ptr<scalar_t>(), gk.data_ptr<scalar_t>(),
        gv.data_ptr<scalar_t>(), ga.data_ptr<scalar_t>(), gb.data_ptr<scalar_t>(), g_state.data_ptr<float>());
  });
  return {gr, gw, gk, gv, ga, gb, g_state};
}
