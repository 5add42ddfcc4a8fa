// A block of RWKV for one token of a few samples, as one call: at this size the dozens of small operations that a block
// consists of take as long to call as its matrices take to read. Everything between the weights is fp32.
#include "step_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <initializer_list>
#include <variant>
#include <vector>

#include "few_rows.h"
#include "packed.h"
#include "wkv6_cpu.h"
#include "wkv7_cpu.h"

namespace {

constexpr float LAYER_NORM_EPS = 1e-5f, GROUP_NORM_EPS = 64e-5f, KEY_NORM_EPS = 1e-12f;

vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

// What a step works on: R rows of C numbers, heads of N, and the weights one after the other.
template <typename scalar_t>
class Step {
 public:
  const int64_t R, C, H, N;

  Step(const at::Tensor& x, const at::Tensor& wkv, at::TensorList weights)
      : R(x.size(0)), C(x.size(1)), H(wkv.size(-3)), N(wkv.size(-1)), weights_(weights) {
    for (const at::Tensor& w : weights) TORCH_CHECK(w.is_contiguous(), "a step takes contiguous weights");
  }

  const scalar_t* next() { return weights_[at_++].template data_ptr<scalar_t>(); }
  int64_t size(int64_t dim) const { return weights_[at_].size(dim); }  // of the weight that comes next

  using Matrix = std::variant<Dense<scalar_t>, Int8, Nf4>;

  // The next weight, (O, K); of a packed one the scales follow.
  Matrix matrix() {
    const at::Tensor& w = weights_[at_++];
    if (w.scalar_type() == at::kChar) return Int8(w, weights_[at_++]);
    if (w.scalar_type() == at::kByte) return Nf4(w, weights_[at_++]);
    return Dense<scalar_t>(w);
  }

  std::vector<float> rows(int64_t width) const { return std::vector<float>(R * width); }

  std::vector<float> floats(const at::Tensor& x) const {
    const scalar_t* p = x.template data_ptr<scalar_t>();
    return {p, p + x.numel()};
  }

  at::Tensor tensor(const std::vector<float>& x, const at::TensorOptions& options) const {
    at::Tensor out = at::empty({R, C}, options);
    std::copy(x.begin(), x.end(), out.template data_ptr<scalar_t>());
    return out;
  }

  // body(row's offset + channel, channel) for each vector of channels
  template <typename Body>
  void each(Body body) const {
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < C; c += LANES) body(r * C + c, c);
  }

  std::vector<float> layer_norm(const std::vector<float>& x) {
    const scalar_t *weight = next(), *bias = next();
    auto out = rows(C);
    norm(x, C, LAYER_NORM_EPS, weight, bias, out);
    return out;
  }

  std::vector<float> norm_heads(const at::Tensor& y) {
    const scalar_t *weight = next(), *bias = next();
    const float* p = y.data_ptr<float>();
    auto out = rows(C);
    norm(std::vector<float>(p, p + R * C), N, GROUP_NORM_EPS, weight, bias, out);
    return out;
  }

  // x + (before - x) * the next weight
  std::vector<float> mix(const std::vector<float>& x, const std::vector<float>& before) {
    const scalar_t* weight = next();
    auto out = rows(C);
    each([&](int64_t i, int64_t c) {
      const vec now = load(&x[i]);
      store(&out[i], now + (load(&before[i]) - now) * load(weight + c));
    });
    return out;
  }

  struct Product {
    const std::vector<float>& x;
    float* y;
  };

  // Several products with the next weights, (O, K) each, shared out to the threads together.
  void multiply(std::initializer_list<Product> products) {
    struct Task {
      Matrix W;
      std::vector<float> x;
      int64_t K, O, first;
      float* y;
    };
    std::vector<Task> tasks;
    int64_t total = 0, most = 1;
    for (const Product& product : products) {
      const int64_t O = size(0), K = product.x.size() / R;
      Task task{matrix(), std::vector<float>(R * K), K, O, total, product.y};
      std::visit(
          [&](const auto& W) {
            for (int64_t r = 0; r < R; ++r)
              arrange<std::decay_t<decltype(W)>>(&product.x[r * K], K, &task.x[r * K]);
            most = std::max(most, W.row_bytes());
          },
          task.W);
      tasks.push_back(std::move(task));
      total += O;
    }
    at::parallel_for(0, total, grain(most), [&](int64_t begin, int64_t end) {
      for (const Task& t : tasks) {
        const int64_t from = std::max(begin - t.first, int64_t{0}), to = std::min(end - t.first, t.O);
        if (from < to)
          std::visit([&](const auto& W) { outputs(t.x.data(), W, R, t.K, t.O, from, to, t.y); }, t.W);
      }
    });
  }

  // x (R, K) times M (K, O)
  std::vector<float> times(const float* x, const scalar_t* M, int64_t K, int64_t O) const {
    auto y = rows(O);
    const int64_t strips = (O + COLUMNS - 1) / COLUMNS;
    at::parallel_for(0, strips, grain(K * COLUMNS * sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) columns_from(x, M, R, K, O, s * COLUMNS, y.data());
    });
    return y;
  }

  // offset + between(x w1) w2, of the next three weights; without an offset, of the next two
  template <typename Between>
  std::vector<float> low_rank(const std::vector<float>& x, bool offset, Between between) {
    const scalar_t* add = offset ? next() : nullptr;
    const int64_t D = size(1);
    auto low = times(x.data(), next(), C, D);
    for (float& z : low) z = between(z);
    auto out = times(low.data(), next(), D, C);
    if (add) each([&](int64_t i, int64_t c) { store(&out[i], load(&out[i]) + load(add + c)); });
    return out;
  }

  at::Tensor heads(const std::vector<float>& x) const {
    return at::from_blob(const_cast<float*>(x.data()), {R, 1, H, N}, at::kFloat);
  }

 private:
  at::TensorList weights_;
  size_t at_ = 0;

  // Of each `width` numbers, which divides C; x and out are (R, C).
  void norm(const std::vector<float>& x, int64_t width, float eps, const scalar_t* weight, const scalar_t* bias,
            std::vector<float>& out) const {
    for (int64_t at = 0; at < R * C; at += width) {
      vec total{}, squares{};
      for (int64_t i = at; i < at + width; i += LANES) total += load(&x[i]);
      const float mean = sum(total) / width;
      for (int64_t i = at; i < at + width; i += LANES) {
        const vec centred = load(&x[i]) - mean;
        squares += centred * centred;
      }
      const float scale = 1.0f / std::sqrt(sum(squares) / width + eps);
      for (int64_t i = at; i < at + width; i += LANES)
        store(&out[i], (load(&x[i]) - mean) * scale * load(weight + i % C) + load(bias + i % C));
    }
  }
};

float same(float x) { return x; }
float tanh_of(float x) { return std::tanh(x); }
float sigmoid_of(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void add(std::vector<float>& x, const std::vector<float>& y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

template <typename scalar_t>
void square_of_relu(std::vector<float>& x) {
  for (float& z : x) z = z > 0 ? z * z : 0;
}

template <typename scalar_t>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> step6(const at::Tensor& x_in, const at::Tensor& att_shift,
                                                                 const at::Tensor& ffn_shift, const at::Tensor& wkv,
                                                                 at::TensorList weights) {
  Step<scalar_t> step(x_in, wkv, weights);
  const int64_t R = step.R, C = step.C;
  auto x = step.floats(x_in);

  const auto xa = step.layer_norm(x), before = step.floats(att_shift);
  const auto shifted = step.mix(xa, before);
  const int64_t D = step.size(1) / 5;
  auto low = step.times(shifted.data(), step.next(), C, 5 * D);
  for (float& z : low) z = std::tanh(z);
  const scalar_t* w2 = step.next();
  std::vector<float> mixed[5];  // w, k, v, r, g
  for (int64_t part = 0; part < 5; ++part) {
    auto own = step.rows(D);
    for (int64_t r = 0; r < R; ++r) std::copy_n(&low[(r * 5 + part) * D], D, &own[r * D]);
    mixed[part] = step.times(own.data(), w2 + part * D * C, D, C);
    const scalar_t* maa = step.next();
    step.each([&](int64_t i, int64_t c) {
      const vec now = load(&xa[i]);
      store(&mixed[part][i], now + (load(&before[i]) - now) * (load(maa + c) + load(&mixed[part][i])));
    });
  }
  const auto w = step.low_rank(mixed[0], true, tanh_of);
  auto r = step.rows(C), k = step.rows(C), v = step.rows(C), g = step.rows(C), out = step.rows(C);
  step.multiply({{mixed[3], r.data()}, {mixed[1], k.data()}, {mixed[2], v.data()}, {mixed[4], g.data()}});
  const scalar_t* faaaa = step.next();
  const std::vector<float> u(faaaa, faaaa + C);
  const auto bonus = at::from_blob(const_cast<float*>(u.data()), {step.H, step.N}, at::kFloat);
  const auto [y, state, _] =
      wkv6_forward_cpu(step.heads(r), step.heads(k), step.heads(v), step.heads(w), bonus, wkv, {}, false);
  auto heads = step.norm_heads(y);
  step.each([&](int64_t i, int64_t) { store(&heads[i], load(&heads[i]) * load(&g[i]) * sigmoid(load(&g[i]))); });
  step.multiply({{heads, out.data()}});
  add(x, out);

  const auto xf = step.layer_norm(x), ffn_before = step.floats(ffn_shift);
  const auto xk = step.mix(xf, ffn_before), xr = step.mix(xf, ffn_before);
  auto key = step.rows(step.size(0)), gate = step.rows(C);
  step.multiply({{xk, key.data()}, {xr, gate.data()}});
  square_of_relu<scalar_t>(key);
  step.multiply({{key, out.data()}});
  step.each([&](int64_t i, int64_t) { store(&x[i], load(&x[i]) + sigmoid(load(&gate[i])) * load(&out[i])); });
  const auto options = x_in.options();
  return {step.tensor(x, options), step.tensor(xa, options), step.tensor(xf, options), state};
}

template <typename scalar_t>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> step7(
    const at::Tensor& x_in, const c10::optional<at::Tensor>& v_first, const at::Tensor& att_shift,
    const at::Tensor& ffn_shift, const at::Tensor& wkv, at::TensorList weights) {
  Step<scalar_t> step(x_in, wkv, weights);
  const int64_t R = step.R, C = step.C, N = step.N;
  auto x = step.floats(x_in);

  const auto xa = step.layer_norm(x), before = step.floats(att_shift);
  const auto x_r = step.mix(xa, before), x_w = step.mix(xa, before), x_k = step.mix(xa, before),
             x_v = step.mix(xa, before), x_a = step.mix(xa, before), x_g = step.mix(xa, before);
  auto r = step.rows(C), k = step.rows(C), v = step.rows(C), out = step.rows(C);
  step.multiply({{x_r, r.data()}, {x_k, k.data()}, {x_v, v.data()}});
  const auto w = step.low_rank(x_w, true, tanh_of);
  const auto rate = step.low_rank(x_a, true, same);
  const auto gate = step.low_rank(x_g, false, sigmoid_of);
  const scalar_t *k_k = step.next(), *k_a = step.next(), *r_k = step.next();
  auto first = v;
  if (v_first) {
    const auto mixed = step.low_rank(x_v, true, same);
    first = {v_first->data_ptr<float>(), v_first->data_ptr<float>() + R * C};
    step.each([&](int64_t i, int64_t) {
      const vec own = load(&v[i]);
      store(&v[i], own + (load(&first[i]) - own) * sigmoid(load(&mixed[i])));
    });
  }
  auto a = step.rows(C), b = step.rows(C), now = step.rows(C);
  for (int64_t at = 0; at < R * C; at += N) {  // each head
    vec squares{}, bonus{};
    for (int64_t i = at; i < at + N; i += LANES) {
      const vec removed = load(&k[i]) * load(k_k + i % C);
      store(&a[i], removed);
      squares += removed * removed;
    }
    const float norm = std::max(std::sqrt(sum(squares)), KEY_NORM_EPS);
    for (int64_t i = at; i < at + N; i += LANES) {
      const vec removed = load(&a[i]) / norm, share = sigmoid(load(&rate[i]));
      store(&a[i], -removed);
      store(&b[i], removed * share);
      const vec key = load(&k[i]) * (1.0f + (share - 1.0f) * load(k_a + i % C));
      store(&k[i], key);
      bonus += load(&r[i]) * key * load(r_k + i % C);
    }
    const float total = sum(bonus);
    for (int64_t i = at; i < at + N; i += LANES) store(&now[i], total * load(&v[i]));
  }
  const auto [y, state, _] = wkv7_forward_cpu(step.heads(r), step.heads(w), step.heads(k), step.heads(v), step.heads(a),
                                              step.heads(b), wkv, {}, false);
  auto heads = step.norm_heads(y);
  step.each([&](int64_t i, int64_t) { store(&heads[i], (load(&heads[i]) + load(&now[i])) * load(&gate[i])); });
  step.multiply({{heads, out.data()}});
  add(x, out);

  const auto xf = step.layer_norm(x);
  const auto xk = step.mix(xf, step.floats(ffn_shift));
  auto key = step.rows(step.size(0));
  step.multiply({{xk, key.data()}});
  square_of_relu<scalar_t>(key);
  step.multiply({{key, out.data()}});
  add(x, out);
  const auto options = x_in.options();
  at::Tensor values = v_first ? *v_first : at::empty({R, C}, options.dtype(at::kFloat));
  if (!v_first) std::copy(first.begin(), first.end(), values.data_ptr<float>());
  return {step.tensor(x, options), values, step.tensor(xa, options), step.tensor(xf, options), state};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rwkv6_step_cpu(const at::Tensor& x,
                                                                          const at::Tensor& att_shift,
                                                                          const at::Tensor& ffn_shift,
                                                                          const at::Tensor& wkv,
                                                                          at::TensorList weights) {
  return x.scalar_type() == at::kFloat ? step6<float>(x, att_shift, ffn_shift, wkv, weights)
                                       : step6<at::BFloat16>(x, att_shift, ffn_shift, wkv, weights);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> rwkv7_step_cpu(
    const at::Tensor& x, const c10::optional<at::Tensor>& v_first, const at::Tensor& att_shift,
    const at::Tensor& ffn_shift, const at::Tensor& wkv, at::TensorList weights) {
  return x.scalar_type() == at::kFloat ? step7<float>(x, v_first, att_shift, ffn_shift, wkv, weights)
                                       : step7<at::BFloat16>(x, v_first, att_shift, ffn_shift, wkv, weights);
}
