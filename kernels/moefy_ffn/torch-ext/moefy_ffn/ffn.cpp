// One routed FFN on a CPU, float32: score the experts, select k per token, and compute those only.
//
// Weights are read where the model keeps them, a row of d numbers per neuron: expert e is the rows [e*m, (e+1)*m) of
// up, gate and down. A block of tokens goes through five steps, each shared out over the threads:
//
//   scores (T, E) -> k experts per token -> pairs (token, expert), sorted by expert
//   -> hidden (pairs, m) = act(gate x) * up x, an expert at a time -> y (T, d) += hidden * down, a slice of columns each
//
// Few tokens are bound by the memory that the selected rows come from, many by the arithmetic.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

extern "C" {

enum Activation { RELU, GELU, GELU_TANH, SILU, RELU_SQUARED };

struct Ffn {
  const float *router;     // (E, d), or null: the experts are given
  const float *up, *gate;  // (f, d); gate is null in an ungated FFN
  const float *down;       // (f, d)
  const float *up_bias, *gate_bias, *down_bias;  // (f), (f), (d), or null
  int64_t d, num_experts, expert_size, k;
  int32_t activation;
};
}

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int64_t BLOCK = 256;  // tokens at once: their inputs, outputs and hidden neurons stay in the cache
constexpr int64_t SLICE = 64;   // columns of y are shared out in multiples of this
typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

inline vec load(const float *p) { return *reinterpret_cast<const vec *>(p); }
inline void store(float *p, vec v) { *reinterpret_cast<vec *>(p) = v; }

// out[t * stride + r] = x[t] . w[r] for T tokens and R consecutive rows of w
template <int T, int R>
inline void dots(const float *const *x, const float *w, int64_t d, float *out, int64_t stride) {
  vec sums[T][R] = {};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    vec rows[R];
    for (int r = 0; r < R; ++r) rows[r] = load(w + r * d + i);
    for (int t = 0; t < T; ++t) {
      const vec token = load(x[t] + i);
      for (int r = 0; r < R; ++r) sums[t][r] += token * rows[r];
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int lane = 0; lane < LANES; ++lane) sum += sums[t][r][lane];
      for (int64_t rest = i; rest < d; ++rest) sum += x[t][rest] * w[r * d + rest];
      out[t * stride + r] = sum;
    }
}

template <int T>
inline void dots_of(const float *const *x, const float *w, int64_t rows, int64_t d, float *out, int64_t stride) {
  constexpr int R = T == 1 ? 4 : 3;  // T * R sums, R rows and a token fit the registers
  int64_t r = 0;
  for (; r + R <= rows; r += R) dots<T, R>(x, w + r * d, d, out + r, stride);
  for (; r < rows; ++r) dots<T, 1>(x, w + r * d, d, out + r, stride);
}

// out (tokens, rows; a row of `stride` per token) = x w^T
void multiply(const float *const *x, int64_t tokens, const float *w, int64_t rows, int64_t d, float *out,
              int64_t stride) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) dots_of<4>(x + t, w, rows, d, out + t * stride, stride);
  if (t + 2 <= tokens) dots_of<2>(x + t, w, rows, d, out + t * stride, stride), t += 2;
  if (t < tokens) dots_of<1>(x + t, w, rows, d, out + t * stride, stride);
}

inline float activate(float a, int32_t kind) {
  switch (kind) {
    case RELU: return a < 0 ? 0 : a;  // nan stays nan
    case RELU_SQUARED: return a < 0 ? 0 : a * a;
    case GELU: return 0.5f * a * (1 + std::erf(a * 0.70710678118654752f));
    case GELU_TANH: return 0.5f * a * (1 + std::tanh(0.79788456080286536f * (a + 0.044715f * a * a * a)));
    default: return a / (1 + std::exp(-a));
  }
}

// y[t] += sum over r of h[r * T + t] * rows[r], for T tokens and R rows: rows are read once, in one stream each
template <int T, int R>
inline void add_rows(float *const *y, const float *const *rows, const float *h, int64_t columns) {
  int64_t i = 0;
  for (; i + LANES <= columns; i += LANES) {
    vec read[R];
    for (int r = 0; r < R; ++r) read[r] = load(rows[r] + i);
    for (int t = 0; t < T; ++t) {
      vec sum = load(y[t] + i);
      for (int r = 0; r < R; ++r) sum += h[r * T + t] * read[r];
      store(y[t] + i, sum);
    }
  }
  for (; i < columns; ++i)
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) y[t][i] += h[r * T + t] * rows[r][i];
}

// y[t] += h[t] * down for T tokens of one expert; rows whose neuron is exactly zero for all of them are not read
template <int T>
inline void add_expert(float *const *y, const float *h, int64_t m, const float *down, int64_t d, int64_t columns) {
  constexpr int R = 4;
  const float *rows[R];
  float factors[R * T];
  int held = 0;
  for (int64_t r = 0; r < m; ++r) {
    bool active = false;
    for (int t = 0; t < T; ++t) active |= (factors[held * T + t] = h[t * m + r]) != 0;
    if (!active) continue;
    rows[held++] = down + r * d;
    if (held == R) add_rows<T, R>(y, rows, factors, columns), held = 0;
  }
  for (int r = 0; r < held; ++r) add_rows<T, 1>(y, rows + r, factors + r * T, columns);
}

// The k best of E scores, as torch.topk: nan is larger than any number; in the order of the experts
void select(const float *scores, int64_t experts, int64_t k, int32_t *out, std::vector<int32_t> &order) {
  order.resize(experts);
  for (int64_t e = 0; e < experts; ++e) order[e] = e;
  const auto better = [&](int32_t a, int32_t b) {
    const float x = scores[a], y = scores[b];
    if (std::isnan(x) || std::isnan(y)) return std::isnan(x) && (!std::isnan(y) || a < b);
    return x > y || (x == y && a < b);
  };
  if (k < experts) std::nth_element(order.begin(), order.begin() + k, order.end(), better);
  std::copy(order.begin(), order.begin() + k, out);
  std::sort(out, out + k);
}

struct Pairs {  // of one block, sorted by expert
  std::vector<int64_t> starts;  // (E + 1) where each expert's begin
  std::vector<int32_t> tokens;

  void sort(const int32_t *index, int64_t count, int64_t k, int64_t experts) {
    starts.assign(experts + 1, 0);
    tokens.resize(count * k);
    for (int64_t i = 0; i < count * k; ++i) ++starts[index[i] + 1];
    for (int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count * k; ++i) tokens[next[index[i]]++] = i / k;
  }
};

void hidden_of(const Ffn &f, const float *x, const Pairs &pairs, int64_t e, float *hidden) {
  const int64_t first = pairs.starts[e], count = pairs.starts[e + 1] - first, m = f.expert_size, from = e * m;
  if (count == 0) return;
  thread_local std::vector<const float *> inputs;
  thread_local std::vector<float> gates;
  inputs.resize(count);
  for (int64_t i = 0; i < count; ++i) inputs[i] = x + pairs.tokens[first + i] * f.d;
  float *h = hidden + first * m;
  multiply(inputs.data(), count, f.up + from * f.d, m, f.d, h, m);
  if (f.gate) {
    gates.resize(count * m);
    multiply(inputs.data(), count, f.gate + from * f.d, m, f.d, gates.data(), m);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t r = 0; r < m; ++r) {
      const float a = h[i * m + r] + (f.up_bias ? f.up_bias[from + r] : 0);
      const float g = f.gate ? gates[i * m + r] + (f.gate_bias ? f.gate_bias[from + r] : 0) : 0;
      h[i * m + r] = f.gate ? activate(g, f.activation) * a : activate(a, f.activation);
    }
}

void outputs_of(const Ffn &f, const Pairs &pairs, const float *hidden, float *y, int64_t begin, int64_t end) {
  const int64_t m = f.expert_size, columns = end - begin;
  for (int64_t e = 0; e < f.num_experts; ++e) {
    const float *down = f.down + e * m * f.d + begin;
    int64_t i = pairs.starts[e];
    const int64_t last = pairs.starts[e + 1];
    const auto place = [&](int64_t pair) { return y + pairs.tokens[pair] * f.d + begin; };
    for (; i + 4 <= last; i += 4) {
      float *const rows[] = {place(i), place(i + 1), place(i + 2), place(i + 3)};
      add_expert<4>(rows, hidden + i * m, m, down, f.d, columns);
    }
    if (i + 2 <= last) {
      float *const rows[] = {place(i), place(i + 1)};
      add_expert<2>(rows, hidden + i * m, m, down, f.d, columns), i += 2;
    }
    if (i < last) {
      float *const rows[] = {place(i)};
      add_expert<1>(rows, hidden + i * m, m, down, f.d, columns);
    }
  }
}

}  // namespace

// x, y (tokens, d); index (tokens, k): the experts, written where there is a router, else read.
extern "C" void moefy_ffn(const Ffn *ffn, const float *x, int32_t *index, float *y, int64_t tokens, int32_t threads) {
  const Ffn &f = *ffn;
  const int64_t block = std::min(tokens, BLOCK), slices = (f.d + SLICE - 1) / SLICE;
  std::vector<float> scores(f.router ? block * f.num_experts : 0), hidden(block * f.k * f.expert_size);
  Pairs pairs;
#pragma omp parallel num_threads(threads)
  {
    std::vector<const float *> inputs(block);
    std::vector<int32_t> order;
    const int64_t workers = omp_get_num_threads(), worker = omp_get_thread_num();
    const int64_t begin = worker * slices / workers * SLICE, end = std::min((worker + 1) * slices / workers * SLICE, f.d);
    for (int64_t start = 0; start < tokens; start += block) {
      const int64_t count = std::min(block, tokens - start);
      const float *in = x + start * f.d;
      float *out = y + start * f.d;
      if (f.router) {
        const int64_t first = worker * f.num_experts / workers, last = (worker + 1) * f.num_experts / workers;
        for (int64_t t = 0; t < count; ++t) inputs[t] = in + t * f.d;
        multiply(inputs.data(), count, f.router + first * f.d, last - first, f.d, scores.data() + first, f.num_experts);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; ++t)
          select(scores.data() + t * f.num_experts, f.num_experts, f.k, index + (start + t) * f.k, order);
      }
#pragma omp single
      pairs.sort(index + start * f.k, count, f.k, f.num_experts);
#pragma omp for schedule(dynamic, 1)
      for (int64_t e = 0; e < f.num_experts; ++e) hidden_of(f, in, pairs, e, hidden.data());
      for (int64_t t = 0; t < count; ++t)
        for (int64_t i = begin; i < end; ++i) out[t * f.d + i] = f.down_bias ? f.down_bias[i] : 0;
      outputs_of(f, pairs, hidden.data(), out, begin, end);
#pragma omp barrier
    }
  }
}
