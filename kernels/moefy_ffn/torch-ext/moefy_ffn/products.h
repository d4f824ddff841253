// The two products of an expert, on rows as the model keeps them: x w^T, a dot product each, and h w, a sum of rows.
//
// Rows are read from memory that no cache holds: while some are multiplied, the next ones are fetched into the cache,
// in even portions.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

// Rows at a time: they and the next ones stay in the cache. Few tokens wait for memory, and do better close behind it
inline int64_t chunk_of(int64_t tokens) { return tokens > 2 * TOKENS ? 32 : 16; }

template <class Number>
struct Ahead {  // consecutive rows to fetch
  const Number *rows;
  int64_t count;

  Ahead part(int64_t piece, int64_t pieces, int64_t d) const {
    const int64_t first = count * piece / pieces;
    return {rows + first * d, count * (piece + 1) / pieces - first};
  }
};

template <class Number>
inline void fetch(const Number *p) {
  __builtin_prefetch(p, 0, 2);
}

// n tokens, in portions that differ by one at most
template <class Do>
inline void in_groups(int64_t n, Do &&each) {
  const int64_t groups = (n + TOKENS - 1) / TOKENS;
  for (int64_t g = 0; g < groups; ++g) each(n * g / groups, n * (g + 1) / groups, g, groups);
}

// out[t * stride + r] = x[t] . w[r] for T tokens and R consecutive rows of w; `x` is staged: zero beyond d
template <class P, int T, int R>
inline void dots(const typename P::Token *const *x, const typename P::Number *w, int64_t d, float *out,
                 int64_t stride, Ahead<typename P::Number> ahead) {
  constexpr int64_t COLUMNS = P::WIDTH * LANES;
  vec sums[T][R] = {};
  const auto step = [&](int64_t i, const typename P::Number *rows, int64_t row_stride) {
    typename P::Piece tokens[T];
    for (int t = 0; t < T; ++t) tokens[t] = P::token(x[t] + i);
    for (int r = 0; r < R; ++r) {
      const typename P::Piece row = P::row(rows + r * row_stride);
      for (int t = 0; t < T; ++t) P::dot(sums[t][r], tokens[t], row);
    }
  };
  int64_t i = 0;
  for (; i + COLUMNS <= d; i += COLUMNS) {
    for (int64_t r = 0; r < ahead.count; ++r) fetch(ahead.rows + r * d + i);
    step(i, w + i, d);
  }
  if (i < d) {
    typename P::Number rest[R * COLUMNS] = {};
    for (int r = 0; r < R; ++r) std::copy(w + r * d + i, w + (r + 1) * d, rest + r * COLUMNS);
    step(i, rest, COLUMNS);
  }
  for (int t = 0; t < T; ++t) {
    vec four[4] = {};
    for (int r = 0; r < R; ++r) four[r] = sums[t][r];
    const quad found = sums_of(four);
    for (int r = 0; r < R; ++r) out[t * stride + r] = found[r];
  }
}

template <class P, int T>
void dots_of(const typename P::Token *const *x, const typename P::Number *w, int64_t rows, int64_t d, float *out,
             int64_t stride, Ahead<typename P::Number> ahead) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS)
    dots<P, T, ROWS>(x, w + r * d, d, out + r, stride, ahead.part(r / ROWS, std::max<int64_t>(rows / ROWS, 1), d));
  for (; r < rows; ++r) dots<P, T, 1>(x, w + r * d, d, out + r, stride, {w, 0});
}

// y[t] += the sum over n steps s of factors[s * T + t] times the s-th row (or pair of rows), for T tokens
template <class P, int T, int C>
inline void add_panel(float *const *y, int64_t at, const typename P::Number *const *rows, int64_t column, int64_t n,
                      const typename P::Factor *factors) {
  vec sums[T][C];
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < C; ++c) sums[t][c] = load<vec>(y[t] + at + c * LANES);
  for (int64_t s = 0; s < n; ++s) {
    decltype(P::spread(*factors)) factor[T], read[C];
    for (int t = 0; t < T; ++t) factor[t] = P::spread(factors[s * T + t]);
    for (int c = 0; c < C; c += P::WIDTH) P::read(rows + s * P::STEP, column + c * LANES, read + c);
    for (int c = 0; c < C; ++c)
      for (int t = 0; t < T; ++t) P::add(sums[t][c], factor[t], read[c]);
  }
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < C; ++c) store(y[t] + at + c * LANES, sums[t][c]);
}

// The same for columns [begin, end) of the rows
template <class P, int T>
void add_rows(float *const *y, const typename P::Number *const *rows, int64_t n, const typename P::Factor *factors,
              int64_t begin, int64_t end, const typename P::Number *const *ahead, int64_t ahead_count) {
  constexpr int64_t PIECE = P::WIDTH * LANES, PANEL = ROWS * LANES, LINE = 64 / sizeof(typename P::Number);
  int64_t i = begin;
  for (; i + PANEL <= end; i += PANEL) {
    for (int64_t r = 0; r < ahead_count; ++r)
      for (int64_t c = 0; c < PANEL; c += LINE) fetch(ahead[r] + i + c);
    add_panel<P, T, ROWS>(y, i, rows, i, n, factors);
  }
  for (; i + PIECE <= end; i += PIECE) add_panel<P, T, P::WIDTH>(y, i, rows, i, n, factors);
  if (i < end && n) {
    std::vector<typename P::Number> rest(n * P::STEP * PIECE);
    std::vector<const typename P::Number *> places(n * P::STEP);
    for (int64_t r = 0; r < n * P::STEP; ++r) {
      places[r] = rest.data() + r * PIECE;
      std::copy(rows[r] + i, rows[r] + end, rest.data() + r * PIECE);
    }
    add_panel<P, T, P::WIDTH>(y, i, places.data(), 0, n, factors);
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

// out (tokens, rows; a row of `stride` per token) = x w^T; `next` is read after these rows
template <class P>
void multiply(const typename P::Token *const *x, int64_t tokens, const typename P::Number *w, int64_t rows, int64_t d,
              float *out, int64_t stride, const typename P::Number *next) {
  const int64_t chunk = chunk_of(tokens);
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = std::min(chunk, rows - first), left = rows - first - count;
    const Ahead<typename P::Number> ahead =
        left ? Ahead<typename P::Number>{w + (first + count) * d, std::min(chunk, left)}
             : Ahead<typename P::Number>{next, next ? std::min(chunk, rows) : 0};
    in_groups(tokens, [&](int64_t begin, int64_t end, int64_t group, int64_t groups) {
      with_tokens(end - begin, [&](auto size) {
        dots_of<P, size>(x + begin, w + first * d, count, d, out + begin * stride + first, stride,
                         ahead.part(group, groups, d));
      });
    });
  }
}
