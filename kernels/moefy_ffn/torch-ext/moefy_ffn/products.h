// The two products of an expert, on rows as the model keeps them: x w^T, a dot product each, and h w, a sum of rows.
//
// Rows come from memory that no cache holds: while some are multiplied, the next ones are fetched into the cache, in
// even portions.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

template <class Number>
using Rows = const Number *const *;  // where each row is

template <class Number>
inline void fetch(const Number *p) {
  __builtin_prefetch(p, 0, 3);
}

// n tokens, in portions that differ by one at most
template <class Do>
inline void in_groups(int64_t n, Do &&each) {
  const int64_t groups = (n + TOKENS - 1) / TOKENS;
  for (int64_t g = 0; g < groups; ++g) each(n * g / groups, n * (g + 1) / groups, g, groups);
}

// f(n), as a constant where n is MANY, which it mostly is
template <int MANY, class Do>
inline void with_count(int64_t n, Do &&each) {
  if (n == MANY) each(std::integral_constant<int64_t, MANY>{});
  else each(n);
}

// Rows that are multiplied at once, by T tokens: STREAMS, where the registers have room for as many sums of each
constexpr int64_t STREAMS = 8;
constexpr int rows_of(int T) { return T * STREAMS + T + 1 <= 2 * LANES ? STREAMS : ROWS; }

// Rows that tokens in these groups go over, each reading part of as many that come next: all stay in the cache. One
// group waits for memory, and does best close behind it
inline int64_t chunk_of(int64_t tokens) { return tokens > 2 * TOKENS ? 32 : tokens > TOKENS ? 16 : STREAMS; }

// out[t * stride + r] = x[t] . rows[r] for T tokens and R rows; `x` is staged: zero beyond d
template <class P, int T, int R>
inline void dots(const typename P::Token *const *x, Rows<typename P::Number> rows, int64_t d, float *out,
                 int64_t stride, Rows<typename P::Number> ahead, int64_t ahead_count) {
  constexpr int64_t COLUMNS = P::WIDTH * LANES;
  vec sums[T][R] = {};
  const auto step = [&](int64_t i, Rows<typename P::Number> from, int64_t at) {
    typename P::Piece tokens[T];
    for (int t = 0; t < T; ++t) tokens[t] = P::token(x[t] + i);
    for (int r = 0; r < R; ++r) {
      const typename P::Piece row = P::row(from[r] + at);
      for (int t = 0; t < T; ++t) P::dot(sums[t][r], tokens[t], row);
    }
  };
  const typename P::Number *here[R];
  std::copy(rows, rows + R, here);
  int64_t i = 0;
  with_count<R>(ahead_count, [&](auto count) {
    for (; i + COLUMNS <= d; i += COLUMNS) {
      for (int64_t r = 0; r < count; ++r) fetch(ahead[r] + i);
      step(i, here, i);
    }
  });
  if (i < d) {
    typename P::Number rest[R][COLUMNS] = {};
    for (int r = 0; r < R; ++r) {
      std::copy(rows[r] + i, rows[r] + d, rest[r]);
      here[r] = rest[r];
    }
    step(i, here, 0);
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; r += 4) {
      vec four[4] = {};
      for (int q = r; q < std::min(r + 4, R); ++q) four[q - r] = sums[t][q];
      const quad found = sums_of(four);
      for (int q = r; q < std::min(r + 4, R); ++q) out[t * stride + q] = found[q - r];
    }
}

// The same for rows [first, n), R at once, then fewer
template <class P, int T, int R = rows_of(T)>
void dots_of(const typename P::Token *const *x, Rows<typename P::Number> rows, int64_t first, int64_t n, int64_t d,
             float *out, int64_t stride, Rows<typename P::Number> ahead, int64_t ahead_count) {
  int64_t r = first;
  for (; r + R <= n; r += R) {
    const int64_t from = ahead_count * r / n, to = ahead_count * (r + R) / n;
    dots<P, T, R>(x, rows + r, d, out + r, stride, ahead + from, to - from);
  }
  if constexpr (R > 1) dots_of<P, T, (R > ROWS) ? ROWS : 1>(x, rows, r, n, d, out, stride, ahead, ahead_count);
}

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

// f(std::integral_constant<int, T>) for a T that is known only now, 1 to TOKENS
template <class Do, int T = TOKENS>
inline void with_tokens(int64_t tokens, Do &&each) {
  if constexpr (T > 1) {
    if (tokens < T) return with_tokens<Do, T - 1>(tokens, static_cast<Do &&>(each));
  }
  each(std::integral_constant<int, T>{});
}

// out (tokens, n; a row of `stride` per token) = x w^T, for the first n rows of w; others, up to `all`, are read next
template <class P>
void multiply(const typename P::Token *const *x, int64_t tokens, Rows<typename P::Number> w, int64_t n, int64_t all,
              int64_t d, float *out, int64_t stride) {
  const int64_t chunk = chunk_of(tokens);
  for (int64_t first = 0; first < n; first += chunk) {
    const int64_t last = std::min(first + chunk, n), ahead = std::min(chunk, all - last);
    in_groups(tokens, [&](int64_t begin, int64_t end, int64_t group, int64_t groups) {
      const int64_t from = last + ahead * group / groups, to = last + ahead * (group + 1) / groups;
      with_tokens(end - begin, [&](auto size) {
        dots_of<P, size>(x + begin, w + first, 0, last - first, d, out + begin * stride + first, stride, w + from,
                         to - from);
      });
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
