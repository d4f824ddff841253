// Vectors of float, and how numbers of a type are read into them: Float32 and Bfloat16 offer the same operations.
//
// A row is read in pieces of WIDTH vectors. bfloat16 numbers come in pairs, 32 bits each: the lower halves (the even
// columns) make one vector of float, the upper halves (the odd columns) another. Sums stay in that order until `put`.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#ifdef __SSE3__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
constexpr int TOKENS = 6;  // TOKENS times ROWS sums, TOKENS factors and a piece of a row fit 32 registers
#else
constexpr int LANES = 8;
constexpr int TOKENS = 3;  // 16 registers
#endif

namespace {

constexpr int ROWS = 4;
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t bits __attribute__((vector_size(LANES * 4)));
typedef float quad __attribute__((vector_size(16)));
struct bf16 { uint16_t high; };  // of a float

inline float number(float a) { return a; }
inline float number(bf16 a) {
  const uint32_t whole = uint32_t(a.high) << 16;
  float found;
  memcpy(&found, &whole, 4);
  return found;
}

template <class Vector, class Place>
inline Vector load(const Place *p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class Vector, class Place>
inline void store(Place *p, Vector v) {
  memcpy(p, &v, sizeof v);
}
inline vec all(float a) { return vec{} + a; }

// Vectors to bfloat16 in the upper halves of 32 bits: to the nearest, ties to even; nan stays nan
inline bits rounded(vec v) {
  const bits b = (bits)v;
  return v == v ? b + 0x7fff + ((b >> 16) & 1) : bits{} + 0x7fc00000;
}

inline uint32_t rounded(float a) {
  uint32_t b;
  memcpy(&b, &a, 4);
  return a == a ? b + 0x7fff + ((b >> 16) & 1) : 0x7fc00000;
}

inline void set(float &to, float a) { to = a; }
inline void set(bf16 &to, float a) { to.high = rounded(a) >> 16; }

inline quad folded(vec v) {
  quad parts[LANES / 4];
  memcpy(parts, &v, sizeof v);
  for (int n = LANES / 8; n; n /= 2)
    for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
  return parts[0];
}

// The sums over the lanes of each of four vectors
inline quad sums_of(const vec *v) {
  const quad a = folded(v[0]), b = folded(v[1]), c = folded(v[2]), d = folded(v[3]);
#ifdef __SSE3__
  return (quad)_mm_hadd_ps(_mm_hadd_ps((__m128)a, (__m128)b), _mm_hadd_ps((__m128)c, (__m128)d));
#else
  const auto sum = [](quad q) { return (q[0] + q[1]) + (q[2] + q[3]); };
  return quad{sum(a), sum(b), sum(c), sum(d)};
#endif
}

struct Float32 {
  typedef float Number, Token, Factor;
  typedef vec Piece;               // of a row, as `dot` takes it
  static constexpr int WIDTH = 1;  // vectors of float in a piece
  static constexpr int STEP = 1;   // rows that `add` takes at once

  static void stage(const float *x, int64_t d, Token *out) { memcpy(out, x, d * sizeof *x); }
  static Piece token(const Token *p) { return load<vec>(p); }
  static Piece row(const Number *p) { return load<vec>(p); }
  static void dot(vec &sum, Piece token, Piece row) { sum += token * row; }
  static Factor factor(const float *h) { return *h; }
  static vec spread(Factor f) { return all(f); }
  static void read(const Number *const *rows, int64_t i, vec *out) { out[0] = load<vec>(rows[0] + i); }
  static void add(vec &sum, vec factor, vec row) { sum += factor * row; }
  static void widen(const Number *p, vec *out) { out[0] = load<vec>(p); }
  static void put(Number *p, const vec *sums) { store(p, sums[0]); }
};

struct Bfloat16 {
  typedef bf16 Number;
  static constexpr int WIDTH = 2;

  static void widen(const Number *p, vec *out) {
    const bits pairs = load<bits>(p);
    out[0] = (vec)(pairs << 16), out[1] = (vec)(pairs & 0xffff0000);
  }
  static void put(Number *p, const vec *sums) {
    store(p, (rounded(sums[0]) >> 16) | (rounded(sums[1]) & 0xffff0000));
  }

#ifdef __AVX512BF16__
  typedef bf16 Token;
  typedef bits Piece;
  typedef uint32_t Factor;        // of two rows
  static constexpr int STEP = 2;  // their columns side by side make the pairs that one instruction multiplies

  static vec dpbf16(vec sum, bits a, bits b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
  }
  static void stage(const Number *x, int64_t d, Token *out) { memcpy(out, x, d * sizeof *x); }
  static Piece token(const Token *p) { return load<bits>(p); }
  static Piece row(const Number *p) { return load<bits>(p); }
  static void dot(vec &sum, Piece token, Piece row) { sum = dpbf16(sum, token, row); }
  static Factor factor(const float *h) {
    return rounded(h[0]) >> 16 | (rounded(h[1]) & 0xffff0000);
  }
  static bits spread(Factor f) { return bits{} + f; }
  static void read(const Number *const *rows, int64_t i, bits *out) {
    const bits a = load<bits>(rows[0] + i), b = load<bits>(rows[1] + i);
    out[0] = (a & 0xffff) | (b << 16), out[1] = (a >> 16) | (b & 0xffff0000);
  }
  static void add(vec &sum, bits factor, bits row) { sum = dpbf16(sum, factor, row); }
#else
  typedef float Token, Factor;  // a token's pieces are widened once
  struct Piece { vec parts[2]; };
  static constexpr int STEP = 1;

  static void stage(const Number *x, int64_t d, Token *out) {
    for (int64_t i = 0; i < d; ++i) {
      const int64_t in = i % (2 * LANES);
      out[i - in + in / 2 + in % 2 * LANES] = number(x[i]);
    }
  }
  static Piece token(const Token *p) { return {load<vec>(p), load<vec>(p + LANES)}; }
  static Piece row(const Number *p) {
    Piece piece;
    widen(p, piece.parts);
    return piece;
  }
  static void dot(vec &sum, const Piece &token, const Piece &row) {
    sum += token.parts[0] * row.parts[0];
    sum += token.parts[1] * row.parts[1];
  }
  static Factor factor(const float *h) { return *h; }
  static vec spread(Factor f) { return all(f); }
  static void read(const Number *const *rows, int64_t i, vec *out) { widen(rows[0] + i, out); }
  static void add(vec &sum, vec factor, vec row) { sum += factor * row; }
#endif
};

}  // namespace
