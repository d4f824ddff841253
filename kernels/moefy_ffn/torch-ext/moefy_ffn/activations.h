// Activations of vectors, exact to a few float32 roundings; nan stays nan, as it does in torch.

#pragma once

#include "vectors.h"

namespace {

enum Activation { RELU, GELU, GELU_TANH, SILU, RELU_SQUARED, QUICK_GELU };

// e^x: 2^n times a polynomial over [-ln 2 / 2, ln 2 / 2]
inline vec exponential(vec x) {
  const vec clipped = x > 88.3f ? all(88.3f) : x < -87.3f ? all(-87.3f) : x;
  const vec shifted = clipped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the last bits are the nearest integer n
  const vec n = shifted - 12582912.0f;
  const vec r = clipped - n * 0.693359375f + n * 2.12194440e-4f;
  vec sum = all(1.9875691500e-4f);
  for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * r + next;
  sum = sum * r * r + r + 1.0f;
  const vec found = (vec)((bits)sum + ((bits)shifted << 23));
  return x > 88.3f ? all(std::numeric_limits<float>::infinity()) : x == x ? found : x;
}

inline vec times_sigmoid(vec a, vec of) { return a / (1.0f + exponential(-of)); }

// The error function (Abramowitz and Stegun 7.1.26, to 1.5e-7)
inline vec error_function(vec x) {
  const vec size = x < 0.0f ? -x : x, t = 1.0f / (1.0f + 0.3275911f * size);
  vec sum = all(1.061405429f);
  for (const float next : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) sum = sum * t + next;
  const vec found = 1.0f - sum * t * exponential(-size * size);
  return x < 0.0f ? -found : found;
}

inline vec activated(vec a, int32_t kind) {
  switch (kind) {
    case RELU: return a < 0.0f ? vec{} : a;
    case RELU_SQUARED: return a < 0.0f ? vec{} : a * a;
    case GELU: return 0.5f * a * (1.0f + error_function(a * 0.70710678f));
    case GELU_TANH: return times_sigmoid(a, 1.59576912f * (a + 0.044715f * a * a * a));
    case QUICK_GELU: return times_sigmoid(a, 1.702f * a);
    default: return times_sigmoid(a, a);
  }
}

// h[i] = act(gate[i]) * up[i], or act(up[i]) without a gate; the buffers are whole vectors long, h need not be
inline void activate(const float *up, const float *gate, int64_t n, int32_t kind, float *h) {
  for (int64_t i = 0; i < n; i += LANES) {
    const vec a = load<vec>(up + i);
    const vec found = gate ? activated(load<vec>(gate + i), kind) * a : activated(a, kind);
    if (i + LANES <= n) store(h + i, found);
    else memcpy(h + i, &found, (n - i) * sizeof *h);
  }
}

}  // namespace
