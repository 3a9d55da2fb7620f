// reference.h - every operation of the model as it is defined: loops that say what is computed and nothing else.
//
// The fast versions (cpu.h, gpu/kernels.cuh) are tested against these. Sums are made in double. Beside them:
// what products and attention cost (Counters), RoPE's frequencies, the likeliest token.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../model.h"

namespace speed {

// ---- operations ---------------------------------------------------------------------------------------------------

namespace reference {

// y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * w          x, y [n, d]; w [d]          Zhang & Sennrich, arXiv 1910.07467
inline void rmsnorm(float* y, const float* x, const bf16* w, size_t n, size_t d, float eps) {
  for (size_t r = 0; r < n; ++r) {
    double sum = 0;
    for (size_t i = 0; i < d; ++i) sum += double(x[r * d + i]) * x[r * d + i];
    const float scale = float(1 / std::sqrt(sum / double(d) + eps));
    for (size_t i = 0; i < d; ++i) y[r * d + i] = x[r * d + i] * scale * to_float(w[i]);
  }
}

// y = x w^T, or y += x w^T          x [n, in]; w [out, in]; y [n, out]
inline void matmul(float* y, const float* x, const bf16* w, size_t n, size_t in, size_t out, bool add) {
  for (size_t r = 0; r < n; ++r)
    for (size_t o = 0; o < out; ++o) {
      double sum = 0;
      for (size_t i = 0; i < in; ++i) sum += double(x[r * in + i]) * to_float(w[o * in + i]);
      y[r * out + o] = float(sum) + (add ? y[r * out + o] : 0);
    }
}

// Rotates the pairs (i, i + head_dim/2) of every head by the angle of its row.          Su et al., arXiv 2104.09864
// x [n, heads, head_dim], in place; cos, sin [n, head_dim/2]
inline void rope(float* x, const float* cos, const float* sin, size_t n, size_t heads, size_t head_dim) {
  const size_t half = head_dim / 2;
  for (size_t r = 0; r < n; ++r)
    for (size_t h = 0; h < heads; ++h) {
      float* p = x + (r * heads + h) * head_dim;
      for (size_t i = 0; i < half; ++i) {
        const float a = p[i], b = p[i + half], c = cos[r * half + i], s = sin[r * half + i];
        p[i] = a * c - b * s;
        p[i + half] = b * c + a * s;
      }
    }
}

// What one head of one row looks at: p = softmax(query keys^T / sqrt(head_dim)), of sum 1
// p [slots]; query [head_dim]; keys [slots, head_dim]          Vaswani et al., arXiv 1706.03762
inline void attention_weights(double* p, const float* query, const float* keys, size_t slots, size_t head_dim) {
  const double scale = 1 / std::sqrt(double(head_dim));
  double row_max = -INFINITY, sum = 0;
  for (size_t s = 0; s < slots; ++s) {
    p[s] = 0;
    for (size_t i = 0; i < head_dim; ++i) p[s] += double(query[i]) * keys[s * head_dim + i];
    row_max = std::max(row_max, p[s] *= scale);
  }
  for (size_t s = 0; s < slots; ++s) sum += p[s] = std::exp(p[s] - row_max);
  for (size_t s = 0; s < slots; ++s) p[s] /= sum;
}

// Grouped-query attention: row r sees the first seen + r slots of the cache. This is the whole causal
// mask: tokens that row r must not see have no slot, or a later one.          Ainslie et al., arXiv 2305.13245
// o, q [n, n_heads, head_dim]; query head h reads key head h / (n_heads / n_kv_heads)
inline void attention(float* o, const float* q, const LayerCache<float>& cache, size_t n, size_t seen, size_t n_heads,
                      size_t n_kv_heads, size_t head_dim) {
  for (size_t r = 0; r < n; ++r)
    for (size_t h = 0; h < n_heads; ++h) {
      const size_t first = h / (n_heads / n_kv_heads) * cache.capacity * head_dim;
      std::vector<double> p(seen + r);
      attention_weights(p.data(), q + (r * n_heads + h) * head_dim, cache.k + first, p.size(), head_dim);
      for (size_t i = 0; i < head_dim; ++i) {
        double value = 0;
        for (size_t s = 0; s < p.size(); ++s) value += p[s] * cache.v[first + s * head_dim + i];
        o[(r * n_heads + h) * head_dim + i] = float(value);
      }
    }
}

// gate = silu(gate) * up, silu(x) = x / (1 + e^-x)          gate, up [n]          Shazeer, arXiv 2002.05202
inline void swiglu(float* gate, const float* up, size_t n) {
  for (size_t i = 0; i < n; ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

}  // namespace reference

// ---- RoPE's frequencies -------------------------------------------------------------------------------------------

// Inverse frequencies, [head_dim/2], in fp32 as Hugging Face forms them, with Llama-3's scaling where the model has it:
// frequencies of wavelengths beyond original_context / low_freq_factor are divided by `factor`, those below
// original_context / high_freq_factor kept, those between interpolated.
inline std::vector<float> rope_frequencies(const Config& config, const float* divisors) {
  const int half = config.shape.head_dim / 2;
  std::vector<float> f(half);
  for (int i = 0; i < half; ++i) {
    f[i] = 1.0f / std::pow(float(config.rope_theta), float(2 * i) / float(config.shape.head_dim));
    if (divisors) f[i] /= divisors[i];
    if (!config.rope_scaling) continue;
    const RopeScaling& s = *config.rope_scaling;
    const float wavelength = float(2 * M_PI) / f[i];
    const float low = float(s.original_context) / s.low_freq_factor,
                high = float(s.original_context) / s.high_freq_factor;
    if (wavelength > low) {
      f[i] /= s.factor;
    } else if (wavelength >= high) {
      const float smooth =
          (float(s.original_context) / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
      f[i] = (1 - smooth) * (f[i] / s.factor) + smooth * f[i];
    }
  }
  return f;
}

// ---- what operations cost -----------------------------------------------------------------------------------------
// The backends call these as they run; the cost model in speed.cu predicts the same sums.

struct Counters {
  uint64_t flops = 0;         // matrix products and attention, 2 a multiply-add
  uint64_t weight_bytes = 0;  // parameters read, once a product or norm
  uint64_t kv_bytes = 0;      // KV cache read: the slots filled before this call's own rows, once a call
  // n rows times a matrix [out, in]
  void product(size_t n, size_t in, size_t out) {
    flops += 2 * n * in * out;
    weight_bytes += n ? in * out * sizeof(bf16) : 0;
  }
  // n rows, of which row r sees seen + r slots of a cache whose values have value_bytes each. `seen` includes row 0's
  // own slot, which the call has just written.
  void attention(size_t n, size_t seen, size_t n_heads, size_t n_kv_heads, size_t head_dim, size_t value_bytes) {
    flops += 4 * n_heads * head_dim * (n * seen + n * (n - 1) / 2);
    kv_bytes += (seen - 1) * 2 * n_kv_heads * head_dim * value_bytes;
  }
  Counters operator-(const Counters& o) const {
    return {flops - o.flops, weight_bytes - o.weight_bytes, kv_bytes - o.kv_bytes};
  }
  Counters& operator+=(const Counters& o) {
    flops += o.flops, weight_bytes += o.weight_bytes, kv_bytes += o.kv_bytes;
    return *this;
  }
};

inline Error not_a_number() {
  return Error(1, "logits", "not a number", "the weights are damaged: export the checkpoint again");
}

// The id of the largest logit, on ties the smallest. A NaN anywhere is an error, never an answer.
inline int arg_max(const float* logits, size_t vocab) {
  size_t best = 0;
  bool nan = false;
  for (size_t i = 0; i < vocab; ++i) {
    nan |= std::isnan(logits[i]);
    if (logits[i] > logits[best]) best = i;
  }
  if (nan) throw not_a_number();
  return int(best);
}

}  // namespace speed
