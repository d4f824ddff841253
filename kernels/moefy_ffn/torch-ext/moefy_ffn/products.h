// x w^T: each token's dot products with rows of weights, wherever a model keeps them.
//
// Rows come from memory that no cache holds: while some are multiplied, the next ones are fetched into the cache, in
// even portions.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

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

}  // namespace
