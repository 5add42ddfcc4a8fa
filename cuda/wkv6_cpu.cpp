// The WKV operator of RWKV-6 on the CPU.
//
//   y_t[i]  = sum_j r_t[j] (S[i,j] + u[j] k_t[j] v_t[i])
//   S[i,j] <- d_t[j] S[i,j] + k_t[j] v_t[i]                      d = exp(-exp(w)),  i: value,  j: key
//
// Each (sample, head) is one task: its state, N x N floats (16 KiB at N = 64), stays in the first-level cache while
// time runs through it. Rows of the state lie along j, so r, k and d are held in registers for a whole step.
//
// Backward runs the recurrence of G = dL/dS from the last step to the first,
//
//   G_t[i,j] = d_t[j] G_{t+1}[i,j] + r_t[j] gy_t[i]
//   gr_t[j] = sum_i gy_t[i] S_t[i,j] + u[j] k_t[j] (gy_t . v_t)       gv_t[i] = sum_j G_{t+1}[i,j] k_t[j] + gy_t[i] (r_t u k_t)
//   gk_t[j] = sum_i v_t[i] G_{t+1}[i,j] + u[j] r_t[j] (gy_t . v_t)    gd_t[j] = sum_i G_{t+1}[i,j] S_t[i,j]
//
// and needs S_t on the way: the forward pass leaves the state before every CHUNK-th step, and the states of one chunk
// at a time are computed again. (Running S backwards would divide by a decay that may be zero.)
#include "wkv6_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <memory>

#include "vec.h"

namespace {

constexpr int ROWS = 16;  // rows of the state that the backward pass takes at a time

template <int N>
struct Row {  // N floats in registers
  static constexpr int V = N / LANES;
  vec x[V];

  template <typename scalar_t>
  static Row from(const scalar_t* p) {
    Row row;
    for (int c = 0; c < V; ++c) row.x[c] = load(p + c * LANES);
    return row;
  }
  void to(float* p) const {
    for (int c = 0; c < V; ++c) store(p + c * LANES, x[c]);
  }
  template <typename scalar_t>
  void to(scalar_t* p) const {
    float values[N];
    to(values);
    for (int j = 0; j < N; ++j) p[j] = static_cast<scalar_t>(values[j]);
  }
};

template <int N>
Row<N> operator*(const Row<N>& a, const Row<N>& b) {
  Row<N> out;
  for (int c = 0; c < Row<N>::V; ++c) out.x[c] = a.x[c] * b.x[c];
  return out;
}

template <int N>
float dot(const Row<N>& a, const Row<N>& b) {
  vec s{};
  for (int c = 0; c < Row<N>::V; ++c) s += a.x[c] * b.x[c];
  return sum(s);
}

struct Sizes {
  int64_t B, T, H;
  bool shared_state;
  const int64_t* lengths;  // null: every sample has T steps

  int64_t steps(int64_t b) const { return lengths ? lengths[b] : T; }
};

template <typename scalar_t, int N>
void forward(const Sizes& n, const scalar_t* r, const scalar_t* k, const scalar_t* v, const float* d, const float* u,
             const float* state, scalar_t* y, float* final_state, float* chunk_states) {
  constexpr int V = Row<N>::V;
  const int64_t stride = n.H * N, chunks = (n.T + CHUNK - 1) / CHUNK;
  const int64_t grain = std::max<int64_t>(1, 16 / n.T);  // a head's single step is not worth waking a thread
  at::parallel_for(0, n.B * n.H, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / n.H, h = task % n.H, first = b * n.T * stride + h * N;
      float vt[N], yt[N];
      float* S = final_state + task * N * N;
      std::copy_n(state + (n.shared_state ? h : task) * N * N, N * N, S);
      const auto bonus = Row<N>::from(u + h * N);

      for (int64_t t = 0; t < n.steps(b); ++t) {
        if (chunk_states && t % CHUNK == 0) std::copy_n(S, N * N, chunk_states + (task * chunks + t / CHUNK) * N * N);
        const int64_t at = first + t * stride;
        const auto rt = Row<N>::from(r + at), kt = Row<N>::from(k + at), dt = Row<N>::from(d + at);
        Row<N>::from(v + at).to(vt);
        const float now = dot(rt * bonus, kt);
        for (int i = 0; i < N; ++i) {
          float* row = S + i * N;
          vec acc{};
          for (int c = 0; c < V; ++c) {
            const vec s = load(row + c * LANES);
            acc += rt.x[c] * s;
            store(row + c * LANES, dt.x[c] * s + kt.x[c] * vt[i]);
          }
          yt[i] = sum(acc) + now * vt[i];
        }
        Row<N>::from(yt).to(y + at);
      }
    }
  });
}

// What the backward pass of one chunk works on, as fp32 rows: inputs, and sums over the value index i.
template <int N>
struct ChunkRows {
  float r[CHUNK][N], k[CHUNK][N], v[CHUNK][N], d[CHUNK][N], gy[CHUNK][N];
  float gr[CHUNK][N], gk[CHUNK][N], gd[CHUNK][N], gv[CHUNK][N];
  float now[CHUNK];             // r_t u k_t
  float S[CHUNK][ROWS * N];     // some rows of the state before each step
};

template <typename scalar_t, int N>
void backward(const Sizes& n, const scalar_t* r, const scalar_t* k, const scalar_t* v, const float* e, const float* d,
              const float* u, const float* chunk_states, const scalar_t* gy, const float* g_final, scalar_t* gr,
              scalar_t* gk, scalar_t* gv, scalar_t* gw, float* gu, float* g_state) {
  constexpr int V = Row<N>::V;
  const int64_t stride = n.H * N, chunks = (n.T + CHUNK - 1) / CHUNK;
  at::parallel_for(0, n.B * n.H, 1, [&](int64_t begin, int64_t end) {
    const auto rows = std::make_unique<ChunkRows<N>>();
    auto& c = *rows;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / n.H, h = task % n.H, first = b * n.T * stride + h * N, steps = n.steps(b);
      float* G = g_state + task * N * N;
      std::copy_n(g_final + task * N * N, N * N, G);
      const auto bonus = Row<N>::from(u + h * N);
      Row<N> gu_sum{};

      for (int64_t chunk = (steps + CHUNK - 1) / CHUNK - 1; chunk >= 0; --chunk) {
        const int64_t t0 = chunk * CHUNK, length = std::min(CHUNK, steps - t0);
        for (int64_t t = 0; t < length; ++t) {
          const int64_t at = first + (t0 + t) * stride;
          Row<N>::from(r + at).to(c.r[t]);
          Row<N>::from(k + at).to(c.k[t]);
          Row<N>::from(v + at).to(c.v[t]);
          Row<N>::from(d + at).to(c.d[t]);
          Row<N>::from(gy + at).to(c.gy[t]);
          c.now[t] = dot(Row<N>::from(c.r[t]) * bonus, Row<N>::from(c.k[t]));
          Row<N>{}.to(c.gr[t]);
          Row<N>{}.to(c.gk[t]);
          Row<N>{}.to(c.gd[t]);
        }
        // A few rows of the state at a time: their states of the whole chunk fit the first-level cache.
        for (int i0 = 0; i0 < N; i0 += ROWS) {
          std::copy_n(chunk_states + ((task * chunks + chunk) * N + i0) * N, ROWS * N, c.S[0]);
          for (int64_t t = 0; t + 1 < length; ++t) {
            const auto kt = Row<N>::from(c.k[t]), dt = Row<N>::from(c.d[t]);
            for (int i = 0; i < ROWS; ++i)
              for (int q = 0; q < V; ++q) {
                const int at = i * N + q * LANES;
                store(c.S[t + 1] + at, dt.x[q] * load(c.S[t] + at) + kt.x[q] * c.v[t][i0 + i]);
              }
          }
          for (int64_t t = length - 1; t >= 0; --t) {
            const auto rt = Row<N>::from(c.r[t]), kt = Row<N>::from(c.k[t]), dt = Row<N>::from(c.d[t]);
            auto gr_sum = Row<N>::from(c.gr[t]), gk_sum = Row<N>::from(c.gk[t]), gd_sum = Row<N>::from(c.gd[t]);
            for (int i = 0; i < ROWS; ++i) {
              const float vi = c.v[t][i0 + i], gyi = c.gy[t][i0 + i];
              float* row = G + (i0 + i) * N;
              vec acc{};
              for (int q = 0; q < V; ++q) {
                const vec g = load(row + q * LANES), s = load(c.S[t] + i * N + q * LANES);
                gr_sum.x[q] += s * gyi;
                gk_sum.x[q] += g * vi;
                gd_sum.x[q] += g * s;
                acc += g * kt.x[q];
                store(row + q * LANES, dt.x[q] * g + rt.x[q] * gyi);
              }
              c.gv[t][i0 + i] = sum(acc) + c.now[t] * gyi;
            }
            gr_sum.to(c.gr[t]);
            gk_sum.to(c.gk[t]);
            gd_sum.to(c.gd[t]);
          }
        }
        for (int64_t t = 0; t < length; ++t) {
          const int64_t at = first + (t0 + t) * stride;
          const auto rt = Row<N>::from(c.r[t]), kt = Row<N>::from(c.k[t]);
          auto gr_row = Row<N>::from(c.gr[t]), gk_row = Row<N>::from(c.gk[t]);
          const float gy_v = dot(Row<N>::from(c.gy[t]), Row<N>::from(c.v[t]));
          for (int q = 0; q < V; ++q) {
            gr_row.x[q] += bonus.x[q] * kt.x[q] * gy_v;
            gk_row.x[q] += bonus.x[q] * rt.x[q] * gy_v;
            gu_sum.x[q] += rt.x[q] * kt.x[q] * gy_v;
          }
          gr_row.to(gr + at);
          gk_row.to(gk + at);
          Row<N>::from(c.gv[t]).to(gv + at);
          auto gw_row = Row<N>::from(c.gd[t]) * Row<N>::from(d + at) * Row<N>::from(e + at);
          for (int q = 0; q < V; ++q) gw_row.x[q] = -gw_row.x[q];
          gw_row.to(gw + at);
        }
      }
      gu_sum.to(gu + task * N);
    }
  });
}

template <typename Body>
void with_head_size(int64_t N, Body body) {
  switch (N) {
    case 32: return body(std::integral_constant<int, 32>{});
    case 64: return body(std::integral_constant<int, 64>{});
    case 128: return body(std::integral_constant<int, 128>{});
    default: TORCH_CHECK(false, "wkv6: head size ", N, " is not one of 32, 64, 128");
  }
}

Sizes sizes_of(const at::Tensor& r, bool shared_state, const c10::optional<at::Tensor>& lengths) {
  return {r.size(0), r.size(1), r.size(2), shared_state, lengths ? lengths->data_ptr<int64_t>() : nullptr};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv6_forward_cpu(const at::Tensor& r, const at::Tensor& k,
                                                                const at::Tensor& v, const at::Tensor& w,
                                                                const at::Tensor& u, const at::Tensor& state,
                                                                const c10::optional<at::Tensor>& lengths,
                                                                bool save_states) {
  const auto n = sizes_of(r, state.dim() == 3, lengths);
  const int64_t N = r.size(3), chunks = (n.T + CHUNK - 1) / CHUNK;
  const auto d = w.to(at::kFloat).exp().neg_().exp_();
  const auto allocate = [&](at::IntArrayRef sizes, const at::TensorOptions& options) {
    return lengths ? at::zeros(sizes, options) : at::empty(sizes, options);  // steps beyond a length are not visited
  };
  const auto y = allocate(r.sizes(), r.options());
  const auto final_state = at::empty({n.B, n.H, N, N}, state.options());
  const auto chunk_states = allocate({save_states ? n.B : 0, n.H, chunks, N, N}, state.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, r.scalar_type(), "wkv6_forward_cpu", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      with_head_size(N, [&](auto size) {
        forward<scalar_t, size.value>(n, r.data_ptr<scalar_t>(), k.data_ptr<scalar_t>(), v.data_ptr<scalar_t>(),
                                      d.data_ptr<float>(), u.data_ptr<float>(), state.data_ptr<float>(),
                                      y.data_ptr<scalar_t>(), final_state.data_ptr<float>(),
                                      save_states ? chunk_states.data_ptr<float>() : nullptr);
      });
    }
  });
  return {y, final_state, chunk_states};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv6_backward_cpu(
    const at::Tensor& r, const at::Tensor& k, const at::Tensor& v, const at::Tensor& w, const at::Tensor& u,
    const at::Tensor& chunk_states, const c10::optional<at::Tensor>& lengths, const at::Tensor& gy,
    const at::Tensor& g_final) {
  const auto n = sizes_of(r, false, lengths);
  const int64_t N = r.size(3);
  const auto e = w.to(at::kFloat).exp(), d = e.neg().exp_();
  const auto like = [&](const at::Tensor& x) {
    return lengths ? at::zeros(x.sizes(), x.options()) : at::empty(x.sizes(), x.options());
  };
  const auto gr = like(r), gk = like(k), gv = like(v), gw = like(w);
  const auto gu = at::empty({n.B, n.H, N}, u.options()), g_state = at::empty({n.B, n.H, N, N}, u.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, r.scalar_type(), "wkv6_backward_cpu", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      with_head_size(N, [&](auto size) {
        backward<scalar_t, size.value>(
            n, r.data_ptr<scalar_t>(), k.data_ptr<scalar_t>(), v.data_ptr<scalar_t>(), e.data_ptr<float>(),
            d.data_ptr<float>(), u.data_ptr<float>(), chunk_states.data_ptr<float>(), gy.data_ptr<scalar_t>(),
            g_final.data_ptr<float>(), gr.data_ptr<scalar_t>(), gk.data_ptr<scalar_t>(), gv.data_ptr<scalar_t>(),
            gw.data_ptr<scalar_t>(), gu.data_ptr<float>(), g_state.data_ptr<float>());
      });
    }
  });
  return {gr, gk, gv, gw, gu, g_state};
}
