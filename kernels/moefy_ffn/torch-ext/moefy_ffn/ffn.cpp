// One routed FFN on a CPU: score the experts, select some per token, and compute those only. float32 or bfloat16
// numbers; sums are float32.
//
// Weights are read where the model keeps them, a row of d numbers per neuron: expert e is the rows [e*m, (e+1)*m) of
// up, gate and down. A block of tokens goes through these steps, each shared out over the threads:
//
//   scores (T, E - S), of a low-rank router by way of (T, rank) -> experts of each token, S of them always
//   -> pairs (token, expert), sorted by expert
//   -> hidden (pairs, m) = act(gate x) * up x, an expert at a time (one token: all its neurons as one list)
//   -> y (T, d) += hidden * down, a slice of columns each
//
// Few tokens are bound by the memory that the selected rows come from, many by the arithmetic.

#include <omp.h>

#include "router.h"
#include "selection.h"
#include "sums.h"

extern "C" {

struct Ffn {
  const void *router;      // (E - S, d), or null: the experts are given
  const void *router_in;   // (rank, d), or null; with it, router is (E - S, rank), and its scores router router_in x
  const void *up, *gate;   // (f, d); gate is null in an ungated FFN
  const void *down;        // (f, d)
  const void *up_bias, *gate_bias, *base;  // (f), (f), (d), or null
  const void *means;       // (E, d), or null: what an expert that runs takes away from `base`
  int64_t d, num_experts, expert_size, shared, rank;
  int32_t activation, is_bfloat16, router_is_bfloat16, selection, strengths;  // the last two: see selection.h
  float setting;           // of a selection other than TOP_K
};
}

namespace {

constexpr int64_t BLOCK = 256;  // tokens at once: their inputs and outputs stay in the cache
constexpr int64_t SLICE = 64;   // columns of y are shared out in multiples of this

// One FFN over blocks of tokens, its numbers of type P
template <class P>
struct Blocks {
  typedef typename P::Number Number;
  typedef typename P::Token Token;

  const Ffn &f;
  const int64_t k;
  const int64_t d = f.d, m = f.expert_size, padded = padded_of(d);
  const Number *up = (const Number *)f.up, *gate = (const Number *)f.gate, *down = (const Number *)f.down;
  const Number *means = (const Number *)f.means, *base = (const Number *)f.base;
  std::vector<Token> x;  // (block, padded) staged: other strides than powers of two, zero beyond d
  std::vector<float> wide;  // (block, padded) x for a float32 router of a bfloat16 FFN, else empty
  std::vector<float> y, scores, hidden;
  Router<P> router{f.router, f.router_in, f.num_experts - f.shared, d, f.rank};
  Router<Float32> wide_router{f.router, f.router_in, f.num_experts - f.shared, d, f.rank};  // of `wide`
  Pairs pairs;

  // Where the pairs' rows of x and y are, for one expert
  template <class Row>
  void places(std::vector<Row> &rows, Row first, int32_t expert) const {
    rows.clear();
    for (int64_t i = pairs.starts[expert]; i < pairs.starts[expert + 1]; ++i)
      rows.push_back(first + pairs.tokens[i] * padded);
  }

  // act(gate x) * up x (inputs, neurons) of the neurons that are listed; those in `next` come after them
  void hidden_of(const std::vector<const Token *> &inputs, const std::vector<int64_t> &neurons,
                 const std::vector<int64_t> &next, float *out) const {
    thread_local std::vector<const Number *> rows;
    thread_local std::vector<float> a, g;
    const int64_t n = neurons.size();
    rows.clear();
    for (const int64_t each : neurons) rows.push_back(up + each * d);
    if (gate)
      for (const int64_t each : neurons) rows.push_back(gate + each * d);
    for (const int64_t each : next) rows.push_back(up + each * d);
    const auto product = [&](int64_t first, const void *bias, std::vector<float> &sums) {
      sums.resize(inputs.size() * n + LANES);
      multiply<P>(inputs.data(), inputs.size(), rows.data() + first, n, rows.size() - first, d, sums.data(), n);
      for (size_t i = 0; bias && i < inputs.size(); ++i)
        for (int64_t r = 0; r < n; ++r) sums[i * n + r] += number(((const Number *)bias)[neurons[r]]);
    };
    product(0, f.up_bias, a);
    if (gate) product(n, f.gate_bias, g);
    activate(a.data(), gate ? g.data() : nullptr, inputs.size() * n, f.activation, out);
  }

  void neurons_of(size_t position, std::vector<int64_t> &neurons) const {
    if (position >= pairs.used.size()) return;
    for (int64_t r = 0; r < m; ++r) neurons.push_back(pairs.used[position] * m + r);
  }

  void hidden_of_expert(int64_t position) {
    thread_local std::vector<const Token *> inputs;
    thread_local std::vector<int64_t> neurons, next;
    const int32_t e = pairs.used[position];
    places<const Token *>(inputs, x.data(), e);
    neurons.clear(), next.clear();
    neurons_of(position, neurons);
    neurons_of(position + 1, next);
    hidden_of(inputs, neurons, next, hidden.data() + pairs.starts[e] * m);
  }

  // Of a block of one token, whose experts' neurons are one list
  void hidden_of_token(int64_t worker, int64_t workers) {
    std::vector<int64_t> neurons;
    for (size_t position = 0; position < pairs.used.size(); ++position) neurons_of(position, neurons);
    const int64_t n = neurons.size(), first = n * worker / workers, last = n * (worker + 1) / workers;
    hidden_of({x.data()}, {neurons.begin() + first, neurons.begin() + last}, {}, hidden.data() + first);
  }

  // Adds an expert's rows in [first, last) whose neuron is not zero for all of its tokens, and its mean after the last;
  // a token's neurons begin at `h`, which are the first's of `count`, and have places from `offset` on
  void add_terms(int64_t e, int64_t first, int64_t last, const float *h, int64_t count, int64_t offset,
                 Terms<P> &terms) const {
    for (int64_t r = first; r < last; ++r)
      for (int64_t t = 0; t < count; ++t)
        if (h[t * m + r] != 0) {
          terms.add(down + (e * m + r) * d, offset + r);
          break;
        }
    if (means && last == m) terms.add(means + e * d, Terms<P>::LESS);
  }

  // y (block, padded) += hidden * down in columns [begin, end), some rows of an expert at a time
  void outputs_of(int64_t begin, int64_t end) {
    std::vector<float *> outputs;
    std::vector<Group<P>> groups;
    Terms<P> now, next;
    const auto chunk_at = [&](size_t position) {
      const int32_t e = pairs.used[position];
      return chunk_of(pairs.starts[e + 1] - pairs.starts[e]);
    };
    const auto list = [&](size_t position, int64_t first, Terms<P> &terms) {
      terms.clear();
      if (position == pairs.used.size()) return;
      const int64_t e = pairs.used[position], from = pairs.starts[e], last = std::min(first + chunk_at(position), m);
      add_terms(e, first, last, hidden.data() + from * m, pairs.starts[e + 1] - from, 0, terms);
      terms.fill();
    };
    list(0, 0, now);
    for (size_t position = 0; position < pairs.used.size(); ++position) {
      const int32_t e = pairs.used[position];
      const float *h = hidden.data() + pairs.starts[e] * m;
      const int64_t chunk = chunk_at(position);
      places<float *>(outputs, y.data(), e);
      for (int64_t first = 0; first < m; first += chunk, std::swap(now, next)) {
        const bool ends = first + chunk >= m;
        list(position + ends, ends ? 0 : first + chunk, next);
        in_groups(outputs.size(), [&](int64_t from, int64_t to, int64_t group, int64_t count) {
          groups.resize(count);
          group_of(now, h + from * m, m, to - from, groups[group]);
        });
        add_groups<P>(outputs, now.rows, groups, begin, end, next.rows);
      }
    }
  }

  // The same for a block of one token: all its experts' rows are known, and read as STREAMS streams
  void output_of(int64_t begin, int64_t end) {
    Terms<P> terms;
    Group<P> group;
    for (const int32_t e : pairs.used) {
      const int64_t from = pairs.starts[e] * m;
      add_terms(e, 0, m, hidden.data() + from, 1, from, terms);
    }
    terms.fill();
    group_of(terms, hidden.data(), m, 1, group);
    float *const out[] = {y.data()};
    const int64_t rows = group.rows.size();
    for (int64_t r = 0; r < rows; r += STREAMS) {
      const int64_t count = std::min(STREAMS, rows - r), after = r + count;
      // The processor foresees long streams by itself, and fetching ahead costs it; it does less well with short ones
      const int64_t ahead = sizeof(Number) < sizeof(float) ? std::min(STREAMS, rows - after) : 0;
      add_rows<P, 1>(out, group.rows.data() + r, count / P::STEP, group.factors.data() + r / P::STEP, begin, end,
                     group.rows.data() + after, ahead);
    }
  }

  void put(int64_t t, int64_t begin, int64_t end, Number *out) const {
    constexpr int64_t PIECE = P::WIDTH * LANES;
    for (int64_t i = begin; i < end; i += PIECE) {
      Number piece[PIECE] = {}, bias[PIECE] = {};
      const int64_t columns = std::min(PIECE, end - i);
      vec sums[P::WIDTH], more[P::WIDTH] = {};
      for (int w = 0; w < P::WIDTH; ++w) sums[w] = load<vec>(y.data() + t * padded + i + w * LANES);
      if (base) {
        std::copy(base + i, base + i + columns, bias);
        P::widen(bias, more);
        for (int w = 0; w < P::WIDTH; ++w) sums[w] += more[w];
      }
      P::put(piece, sums);
      std::copy(piece, piece + columns, out + i);
    }
  }

  // What follows is one thread's share of a block of tokens

  // in (count, d)
  void stage(const Number *in, int64_t count) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      P::stage(in + t * d, d, x.data() + t * padded);
      std::fill_n(y.data() + t * padded, padded, 0.0f);
      for (int64_t i = 0; i < d && !wide.empty(); ++i) wide[t * padded + i] = number(in[t * d + i]);
    }
  }

  // Of what is staged: index (count, k)
  void choose(int32_t *index, int64_t count, int64_t worker, int64_t workers) {
    const int64_t routed = f.num_experts - f.shared;
    if (wide.empty()) router.score(x, scores, count, worker, workers);
    else wide_router.score(wide, scores, count, worker, workers);
    Selector selector{f.selection, f.strengths, f.setting, routed, k - f.shared};
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t e = 0; e < f.shared; ++e) index[t * k + e] = e;
      selector.select(scores.data() + t * routed, f.shared, index + t * k + f.shared);
    }
  }

  // Of what is staged and chosen: out (count, d)
  void compute(const int32_t *index, Number *out, int64_t count, int64_t worker, int64_t workers) {
    const int64_t slices = (d + SLICE - 1) / SLICE;
    const int64_t begin = worker * slices / workers * SLICE, end = std::min((worker + 1) * slices / workers * SLICE, d);
#pragma omp single
    {
      pairs.sort(index, count, k, f.num_experts);
      hidden.resize(pairs.tokens.size() * m);
    }
    if (count == 1) {
      hidden_of_token(worker, workers);
#pragma omp barrier
      output_of(begin, end);
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < int64_t(pairs.used.size()); ++i) hidden_of_expert(i);
      outputs_of(begin, end);
    }
    for (int64_t t = 0; t < count; ++t) put(t, begin, end, out + t * d);
#pragma omp barrier
  }
};

template <class P>
bool run(const Ffn &f, const void *x, int32_t *index, int64_t k, int64_t most, void *y, int64_t tokens,
         int32_t threads) {
  typedef typename P::Number Number;
  Blocks<P> blocks{f, k};
  const int64_t block = std::min(tokens, BLOCK);
  blocks.x.resize(block * blocks.padded);
  blocks.y.resize(block * blocks.padded);
  if (f.router) blocks.scores.resize(block * (f.num_experts - f.shared));
  if (f.router && f.router_is_bfloat16 != f.is_bfloat16) blocks.wide.resize(block * blocks.padded);
  (blocks.wide.empty() ? blocks.router.resize(block) : blocks.wide_router.resize(block));
  const bool limited = most >= 0;  // then all experts are chosen, and counted, before any of them runs
  bool few = true;
#pragma omp parallel num_threads(threads)
  {
    const int64_t worker = omp_get_thread_num(), workers = omp_get_num_threads();
    const auto in_blocks = [&](bool chooses, bool computes) {
      for (int64_t start = 0; start < tokens; start += block) {
        const int64_t count = std::min(block, tokens - start);
        blocks.stage((const Number *)x + start * f.d, count);
        if (chooses) blocks.choose(index + start * k, count, worker, workers);
        if (computes) blocks.compute(index + start * k, (Number *)y + start * f.d, count, worker, workers);
      }
    };
    if (limited) {
      in_blocks(f.router, false);
#pragma omp single
      few = std::count_if(index, index + tokens * k, [](int32_t e) { return e >= 0; }) <= most;
    }
    if (few) in_blocks(f.router && !limited, true);
  }
  return few;
}

}  // namespace

// x, y (tokens, d); index (tokens, k): the experts, written where there is a router, else read: -1 is no expert. Where
// a selection is not TOP_K, k is E. If they are more than `most` over all tokens, nothing is computed: false. No limit
// is -1.
extern "C" bool moefy_ffn(const Ffn *ffn, const void *x, int32_t *index, int64_t k, int64_t most, void *y,
                          int64_t tokens, int32_t threads) {
  if (ffn->is_bfloat16) return run<Bfloat16>(*ffn, x, index, k, most, y, tokens, threads);
  return run<Float32>(*ffn, x, index, k, most, y, tokens, threads);
}
