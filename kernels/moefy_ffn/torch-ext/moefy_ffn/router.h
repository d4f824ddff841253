// The scores that a router gives a block of tokens: router x, or, of low rank, router (router_in x).

#pragma once

#include "products.h"

namespace {

// The stride of rows of d numbers that are zero beyond: whole pieces, and no power of two
inline int64_t padded_of(int64_t d) { return (d + 2 * LANES - 1) / (2 * LANES) * (2 * LANES) + LANES; }

// A router of numbers of type R; its methods are one thread's share of a block
template <class R>
struct Router {
  const void *matrix, *before;  // (experts, d), null; or (experts, rank), (rank, d)
  const int64_t experts, d, rank;
  std::vector<float> between = {};  // (block, rank), and as staged
  std::vector<typename R::Token> staged = {};

  void resize(int64_t block) {
    if (before) between.resize(block * rank), staged.resize(block * padded_of(rank));
  }

  // scores (count, experts) of tokens as they are staged for R
  void score(const std::vector<typename R::Token> &tokens, std::vector<float> &scores, int64_t count, int64_t worker,
             int64_t workers) {
    if (!before) return linear(matrix, experts, d, tokens, scores, count, worker, workers);
    linear(before, rank, d, tokens, between, count, worker, workers);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      std::vector<typename R::Number> row(rank);
      for (int64_t i = 0; i < rank; ++i) set(row[i], between[t * rank + i]);
      R::stage(row.data(), rank, staged.data() + t * padded_of(rank));
    }
    linear(matrix, experts, rank, staged, scores, count, worker, workers);
  }

  // out (count, rows) = tokens (count, width) w^T
  static void linear(const void *w, int64_t rows, int64_t width, const std::vector<typename R::Token> &tokens,
                     std::vector<float> &out, int64_t count, int64_t worker, int64_t workers) {
    const int64_t first = worker * rows / workers, last = (worker + 1) * rows / workers;
    std::vector<const typename R::Token *> inputs;
    for (int64_t t = 0; t < count; ++t) inputs.push_back(tokens.data() + t * padded_of(width));
    std::vector<const typename R::Number *> places;
    for (int64_t r = first; r < last; ++r) places.push_back((const typename R::Number *)w + r * width);
    multiply<R>(inputs.data(), count, places.data(), last - first, last - first, width, out.data() + first, rows);
  }
};

}  // namespace
