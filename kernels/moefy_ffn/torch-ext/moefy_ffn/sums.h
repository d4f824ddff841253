// h w: each token's sum of rows of weights, wherever a model keeps them.

#pragma once

#include "products.h"

namespace {

// A step of a sum: as many numbers of STEP rows as there are lanes, as `add` takes them
template <class P>
using Read = decltype(P::spread(typename P::Factor{}));

// y[t] += the sum over n steps s of factors[s * T + t] times a row (or pair of rows), for T tokens and C vectors from
// column `at` on; read(s, c, piece) gives that of a step from vector c on
template <class P, int T, int C, class Reader>
inline void add_panel(float *const *y, int64_t at, int64_t n, const typename P::Factor *factors, Reader &&read) {
  vec sums[T][C];
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < C; ++c) sums[t][c] = load<vec>(y[t] + at + c * LANES);
  for (int64_t s = 0; s < n; ++s) {
    Read<P> factor[T], numbers[P::WIDTH];
    for (int t = 0; t < T; ++t) factor[t] = P::spread(factors[s * T + t]);
    for (int c = 0; c < C; c += P::WIDTH) {
      read(s, c, numbers);
      for (int w = 0; w < P::WIDTH; ++w)
        for (int t = 0; t < T; ++t) P::add(sums[t][c + w], factor[t], numbers[w]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < C; ++c) store(y[t] + at + c * LANES, sums[t][c]);
}

constexpr int64_t PANEL = ROWS * LANES;  // columns

template <class P>
inline void fetch_panel(Rows<typename P::Number> rows, int64_t n, int64_t column) {
  constexpr int64_t LINE = 64 / sizeof(typename P::Number);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < PANEL; c += LINE) fetch(rows[r] + column + c);
}

// The same for N steps, where T * N factors fit the registers: each row is a stream of its own, to the end
template <class P, int T, int N>
inline void add_streams(float *const *y, Rows<typename P::Number> rows, const typename P::Factor *factors,
                        int64_t begin, int64_t end, Rows<typename P::Number> ahead, int64_t ahead_count) {
  const typename P::Number *here[N * P::STEP];
  std::copy(rows, rows + N * P::STEP, here);
  Read<P> factor[N][T], read[P::WIDTH];
  for (int s = 0; s < N; ++s)
    for (int t = 0; t < T; ++t) factor[s][t] = P::spread(factors[s * T + t]);
  with_count<STREAMS>(ahead_count, [&](auto count) {
    for (int64_t i = begin; i < end; i += P::WIDTH * LANES) {
      for (int64_t r = 0; r < count; ++r) fetch(ahead[r] + i);
      vec sums[T][P::WIDTH];
      for (int t = 0; t < T; ++t)
        for (int w = 0; w < P::WIDTH; ++w) sums[t][w] = load<vec>(y[t] + i + w * LANES);
      for (int s = 0; s < N; ++s) {
        P::read(here + s * P::STEP, i, read);
        for (int t = 0; t < T; ++t)
          for (int w = 0; w < P::WIDTH; ++w) P::add(sums[t][w], factor[s][t], read[w]);
      }
      for (int t = 0; t < T; ++t)
        for (int w = 0; w < P::WIDTH; ++w) store(y[t] + i + w * LANES, sums[t][w]);
    }
  });
}

// The same for columns [begin, end) of n steps of rows
template <class P, int T>
void add_rows(float *const *y, Rows<typename P::Number> rows, int64_t n, const typename P::Factor *factors,
              int64_t begin, int64_t end, Rows<typename P::Number> ahead, int64_t ahead_count) {
  constexpr int64_t PIECE = P::WIDTH * LANES;
  int64_t i = begin;
  const auto read = [&](int64_t s, int c, Read<P> *out) { P::read(rows + s * P::STEP, i + c * LANES, out); };
  if constexpr (rows_of(T) == STREAMS)
    if (n == STREAMS / P::STEP) {
      i += (end - begin) / PIECE * PIECE;
      add_streams<P, T, STREAMS / P::STEP>(y, rows, factors, begin, i, ahead, ahead_count);
    }
  for (; i + PANEL <= end; i += PANEL) {
    fetch_panel<P>(ahead, ahead_count, i);
    add_panel<P, T, ROWS>(y, i, n, factors, read);
  }
  for (; i + PIECE <= end; i += PIECE) add_panel<P, T, P::WIDTH>(y, i, n, factors, read);
  if (i < end && n) {
    std::vector<typename P::Number> rest(n * P::STEP * PIECE);
    std::vector<const typename P::Number *> places(n * P::STEP);
    for (int64_t r = 0; r < n * P::STEP; ++r) {
      places[r] = rest.data() + r * PIECE;
      std::copy(rows[r] + i, rows[r] + end, rest.data() + r * PIECE);
    }
    add_panel<P, T, P::WIDTH>(y, i, n, factors, [&](int64_t s, int, Read<P> *out) {
      P::read(places.data() + s * P::STEP, 0, out);
    });
  }
}

// Factors (steps, T) of T tokens, and their rows: those of the steps that are not zero for all of them
template <class P>
struct Group {
  std::vector<int32_t> steps;  // of all
  std::vector<const typename P::Number *> rows;
  std::vector<typename P::Factor> factors;

  void resize(int64_t n, int64_t tokens) { steps.resize(n), rows.resize(n * P::STEP), factors.resize(n * tokens); }
};

// Rows that outputs are sums of: of down, and means; and where each one's factor is in a token's hidden neurons
template <class P>
struct Terms {
  typedef typename P::Number Number;
  static constexpr int64_t LESS = -1, NOTHING = -2;  // factors of -1 and 0
  std::vector<const Number *> rows;
  std::vector<int64_t> places;

  void clear() { rows.clear(), places.clear(); }
  void add(const Number *row, int64_t place) { rows.push_back(row), places.push_back(place); }
  void fill() {  // whole steps
    while (rows.size() % P::STEP) add(rows.back(), NOTHING);
  }
};

// The terms of T tokens, their neurons `m` apart from `h` on, without steps that are zero for all of them
template <class P>
void group_of(const Terms<P> &terms, const float *h, int64_t m, int64_t T, Group<P> &group) {
  const int64_t all = terms.rows.size() / P::STEP;
  group.resize(all, T);
  int64_t n = 0;
  for (int64_t step = 0; step < all; ++step) {
    const int64_t *const places = terms.places.data() + step * P::STEP;
    typename P::Factor *const factors = group.factors.data() + n * T;
    bool active = false;
    for (int64_t t = 0; t < T; ++t) {
      float each[P::STEP];
      for (int i = 0; i < P::STEP; ++i) {
        each[i] = places[i] >= 0 ? h[t * m + places[i]] : places[i] == Terms<P>::LESS ? -1 : 0;
        active |= each[i] != 0;
      }
      factors[t] = P::factor(each);
    }
    std::copy_n(terms.rows.data() + step * P::STEP, P::STEP, group.rows.data() + n * P::STEP);
    group.steps[n] = step;
    n += active;  // else the next one takes its place
  }
  group.resize(n, T);
}

// y[t] += each group's rows times their factors, in columns [begin, end); `rows` are those of all groups. Where reading
// changes their numbers, and several groups read them, it is done once
template <class P>
void add_groups(const std::vector<float *> &y, const std::vector<const typename P::Number *> &rows,
                const std::vector<Group<P>> &groups, int64_t begin, int64_t end,
                const std::vector<const typename P::Number *> &ahead) {
  const int64_t steps = rows.size() / P::STEP;
  const int64_t panels = P::WIDTH > 1 && groups.size() > 1 ? (end - begin) / PANEL : 0, rest = begin + panels * PANEL;
  thread_local std::vector<Read<P>> read;  // (panels, steps, ROWS)
  if (int64_t(read.size()) < panels * steps * ROWS) read.resize(panels * steps * ROWS);
  for (int64_t s = 0; s < steps; ++s)
    for (int64_t c = 0; c < panels * ROWS; c += P::WIDTH)
      P::read(rows.data() + s * P::STEP, begin + c * LANES, read.data() + (c / ROWS * steps + s) * ROWS + c % ROWS);
  in_groups(y.size(), [&](int64_t from, int64_t to, int64_t g, int64_t count) {
    const Group<P> &group = groups[g];
    const int32_t *const which = group.steps.data();
    const int64_t n = group.steps.size();
    const int64_t first = ahead.size() * g / count, next = ahead.size() * (g + 1) / count - first;
    with_tokens(to - from, [&](auto size) {
      float *const *const out = y.data() + from;
      for (int64_t p = 0; p < panels; ++p) {
        const Read<P> *const panel = read.data() + p * steps * ROWS;
        fetch_panel<P>(ahead.data() + first, next, begin + p * PANEL);
        const auto take = [=](int64_t s, int c, Read<P> *piece) {
          for (int w = 0; w < P::WIDTH; ++w) piece[w] = panel[which[s] * ROWS + c + w];
        };
        add_panel<P, size, ROWS>(out, begin + p * PANEL, n, group.factors.data(), take);
      }
      add_rows<P, size>(out, group.rows.data(), n, group.factors.data(), rest, end, ahead.data() + first, next);
    });
  });
}

}  // namespace
