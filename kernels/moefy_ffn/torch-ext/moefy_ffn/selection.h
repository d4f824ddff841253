// Which experts run for a token, by its router's scores: the k best of them, or as many as the token needs.
//
// For the latter, scores become strengths, by softmax or each by its sigmoid. An expert has a need, the least setting
// with which it runs: with THRESHOLD, 1 - its strength / the token's largest; with TOP_P, the share of the token's
// strength that stronger experts have; with LEVEL, -log(its strength). Steps and precision are those of
// moefy_hf/modeling/selection.py, so that needs that rounding makes equal there are equal here.

#pragma once

#include <algorithm>
#include <vector>

#include "activations.h"

namespace {

enum Selection { TOP_K, THRESHOLD, TOP_P, LEVEL };
enum Strengths { SOFTMAX, SIGMOID };

struct Selector {
  int32_t selection, kind;  // kind: of strengths
  float setting;
  int64_t n, k;  // of n experts; k is TOP_K's
  std::vector<uint32_t> keys;
  std::vector<float> strengths;
  std::vector<uint64_t> heap;

  static constexpr float LEAST = 1e-30f;  // divisors and strengths in logarithms are no smaller
  static float floored(float a) { return a < LEAST ? LEAST : a; }  // nan stays nan

  // From n scores to the experts that run, the first of the n being `first`: k of them; or n slots, -1 where none
  void select(const float *scores, int32_t first, int32_t *out) {
    if (selection == TOP_K) return best(scores, first, out);
    weigh(scores);
    const auto put = [&](int64_t e, float need) { out[e] = need <= setting ? first + e : -1; };
    if (selection == TOP_P) return strongest(first, out);
    const float most = floored(largest(strengths.data()));
    for (int64_t e = 0; e < n; ++e)
      put(e, selection == THRESHOLD ? 1 - strengths[e] / most : -std::log(floored(strengths[e])));
  }

  // As torch.topk: nan is larger than any number, of equals the first; in increasing order
  void best(const float *scores, int32_t first, int32_t *out) {
    keys.resize(n);
    for (int64_t e = 0; e < n; ++e) {  // ordered as the scores are
      uint32_t b;
      memcpy(&b, scores + e, 4);
      keys[e] = scores[e] != scores[e] ? ~0u : b & 0x80000000u ? ~b : b | 0x80000000u;
    }
    uint32_t least = 0;  // the key of the k-th best, from its highest bit on
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t tried = least | 1u << bit;
      int32_t reached = 0;
      for (const uint32_t key : keys) reached += key >= tried;
      if (reached >= k) least = tried;
      if (reached == k) break;
    }
    int64_t equals = k;
    for (const uint32_t key : keys) equals -= key > least;
    for (int64_t e = 0; e < n; ++e)
      if (keys[e] > least || (keys[e] == least && equals-- > 0)) *out++ = first + e;
  }

  float largest(const float *of) const {  // nan if there is any
    float found = -std::numeric_limits<float>::infinity();
    for (int64_t e = 0; e < n; ++e) found = of[e] > found || of[e] != of[e] ? of[e] : found;
    return found;
  }

  float total() const {
    double sum = 0;
    for (const float s : strengths) sum += s;
    return sum;
  }

  void weigh(const float *scores) {
    strengths.assign(scores, scores + n);
    strengths.resize((n + LANES - 1) / LANES * LANES);
    const float most = kind == SOFTMAX ? largest(scores) : 0;
    for (float *s = strengths.data(); s < strengths.data() + n; s += LANES) {
      const vec score = load<vec>(s);
      store(s, kind == SOFTMAX ? exponential(score - most) : 1.0f / (1.0f + exponential(-score)));
    }
    strengths.resize(n);
    const float sum = kind == SOFTMAX ? total() : 1;
    for (float &s : strengths) s /= sum;
  }

  // TOP_P: one expert after the other, of equals the first, until the next one's need is beyond the setting
  void strongest(int32_t first, int32_t *out) {
    const float sum = total();
    std::fill_n(out, n, -1);
    heap.resize(n);
    for (int64_t e = 0; e < n; ++e) {
      uint32_t b;  // of numbers that are not negative, ordered as they are
      memcpy(&b, &strengths[e], 4);
      heap[e] = uint64_t(b) << 32 | (~0u - e);
    }
    std::make_heap(heap.begin(), heap.end());
    double before = 0;
    for (auto end = heap.end(); end != heap.begin(); --end) {
      const int64_t e = ~0u - uint32_t(heap.front());
      const float need = std::min(1 - (sum - float(before)) / floored(sum), 1.0f);  // sums differ by order
      if (!(need <= setting)) break;  // nan: none
      out[e] = first + e;
      before += strengths[e];
      std::pop_heap(heap.begin(), end);
    }
  }
};

struct Pairs {  // of one block, sorted by expert
  std::vector<int64_t> starts;  // (E + 1) where each expert's begin
  std::vector<int32_t> tokens, used;  // used: the experts that have any

  void sort(const int32_t *index, int64_t count, int64_t k, int64_t experts) {
    starts.assign(experts + 1, 0);
    used.clear();
    for (int64_t i = 0; i < count * k; ++i)
      if (index[i] >= 0) ++starts[index[i] + 1];
    for (int64_t e = 0; e < experts; ++e) {
      if (starts[e + 1]) used.push_back(e);
      starts[e + 1] += starts[e];
    }
    tokens.resize(starts[experts]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count * k; ++i)
      if (index[i] >= 0) tokens[next[index[i]]++] = i / k;
  }
};

}  // namespace
