// attention.h - the CPU's attention, made fast. What it computes is definition::attention in cpu.h.
//
// Slots are taken a block at a time with a running softmax (Milakov & Gimelshein, arXiv 1805.02867), so no matrix of
// rows x slots ever exists. Many rows are bound by arithmetic: OpenBLAS makes their products. A single row is bound by
// the reading of the cache, so each key and value is read once, for all the query heads that share it.
#pragma once

#include <cblas.h>

#include <cmath>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace speed::fast {

constexpr size_t slot_block = 256;  // slots taken at once

// Takes one more block of a row's scores into its running softmax: scores become weights e^(score - most), those past
// `visible` become 0, and what was summed before is scaled to the new maximum.          score [slots]; out [head_dim]
inline void softmax_step(float* score, size_t visible, size_t slots, float& most, float& sum, float* out,
                         size_t head_dim) {
  float block_most = most;
#pragma omp simd reduction(max : block_most)
  for (size_t s = 0; s < visible; ++s) block_most = score[s] > block_most ? score[s] : block_most;
  const float factor = most == block_most ? 1.0f : exp(most - block_most);
  float block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
  for (size_t s = 0; s < visible; ++s) block_sum += score[s] = exp(score[s] - block_most);
  std::fill(score + visible, score + slots, 0.0f);
  if (factor != 1.0f)
    for (size_t i = 0; i < head_dim; ++i) out[i] *= factor;
  sum = sum * factor + block_sum;
  most = block_most;
}

// ---- many rows ----------------------------------------------------------------------------------------------------

// For a block of rows and the query heads that share a key head, scores and values are matrix products.
inline void attend_rows(float* o, const float* q, const LayerCache<float>& cache, size_t n, size_t seen, size_t n_heads,
                        size_t n_kv_heads, size_t head_dim) {
  constexpr size_t row_block = 64;
  const size_t blocks = (n + row_block - 1) / row_block, group = n_heads / n_kv_heads, width = n_heads * head_dim;
  const float scale = 1 / std::sqrt(float(head_dim));
#pragma omp parallel
  {
    const size_t most_rows = group * row_block;
    std::vector<float> query(most_rows * head_dim), out(most_rows * head_dim), score(most_rows * slot_block),
        most(most_rows), sum(most_rows);
#pragma omp for schedule(dynamic)
    for (size_t item = 0; item < blocks * n_kv_heads; ++item) {  // the last rows see most, so they are begun first
      const size_t r0 = (blocks - 1 - item / n_kv_heads) * row_block, g = item % n_kv_heads,
                   rows = std::min(row_block, n - r0), all = rows * group, first = g * cache.capacity * head_dim;
      // Row r of head g * group + j is row r * group + j here.
      for (size_t r = 0; r < rows; ++r)
        std::copy_n(q + (r0 + r) * width + g * group * head_dim, group * head_dim, query.data() + r * group * head_dim);
      std::fill(out.begin(), out.end(), 0.0f);
      std::fill(most.begin(), most.end(), -INFINITY);
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (size_t s0 = 0; s0 < seen + r0 + rows - 1; s0 += slot_block) {
        const size_t slots = std::min(slot_block, seen + r0 + rows - 1 - s0);
        const float *k = cache.k + first + s0 * head_dim, *v = cache.v + first + s0 * head_dim;
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, int(all), int(slots), int(head_dim), scale, query.data(),
                    int(head_dim), k, int(head_dim), 0, score.data(), int(slot_block));
        for (size_t i = 0; i < all; ++i) {
          const size_t sees = seen + r0 + i / group, visible = sees > s0 ? std::min(slots, sees - s0) : 0;
          softmax_step(score.data() + i * slot_block, visible, slots, most[i], sum[i], out.data() + i * head_dim,
                       head_dim);
        }
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, int(all), int(head_dim), int(slots), 1, score.data(),
                    int(slot_block), v, int(head_dim), 1, out.data(), int(head_dim));
      }
      for (size_t i = 0; i < all; ++i)
        for (size_t e = 0; e < head_dim; ++e)
          o[(r0 + i / group) * width + (g * group + i % group) * head_dim + e] = out[i * head_dim + e] / sum[i];
    }
  }
}

// ---- one row ------------------------------------------------------------------------------------------------------
// `Size` is a number, or a type that holds one: loops whose length the compiler knows are twice as fast.

constexpr size_t heads_at_once = 8;
constexpr size_t ahead = 1024;  // floats of the cache asked for before they are used

// score [heads, slots] = scale * q k^T          k [slots, head_dim]; q [heads, head_dim]
template <class Size>
void scores(float (*score)[slot_block], const float* q, const float* k, size_t heads, size_t slots, Size head_dim,
            float scale) {
  size_t s = 0;
  for (; s + 4 <= slots; s += 4) {
    const float* key = k + s * head_dim;
    for (size_t i = 0; i < 4 * head_dim; i += 16) __builtin_prefetch(key + ahead + i);
    for (size_t h = 0; h < heads; ++h) {
      const float* query = q + h * head_dim;
      Vector sum[4] = {};
      size_t i = 0;
      for (; i + lanes <= head_dim; i += lanes)
        for (size_t r = 0; r < 4; ++r) sum[r] += load(query + i) * load(key + r * head_dim + i);
      for (; i < head_dim; ++i)
        for (size_t r = 0; r < 4; ++r) sum[r][0] += query[i] * key[r * head_dim + i];
      const Four all = scale * sums(sum);
      std::memcpy(&score[h][s], &all, sizeof all);
    }
  }
  for (; s < slots; ++s)
    for (size_t h = 0; h < heads; ++h) {
      float all = 0;
      for (size_t i = 0; i < head_dim; ++i) all += q[h * head_dim + i] * k[s * head_dim + i];
      score[h][s] = all * scale;
    }
}

// out [head_dim] += weight [slots] v [slots, head_dim], from column i on, `vectors` at a time: their sums stay in
// registers.
template <size_t vectors, class Size>
void add_values(float* out, const float* weight, const float* v, size_t slots, Size head_dim, size_t i = 0) {
  for (; i + vectors * lanes <= head_dim; i += vectors * lanes) {
    Vector sum[vectors];
    std::memcpy(sum, out + i, sizeof sum);
    for (size_t s = 0; s < slots; ++s)
      for (size_t j = 0; j < vectors; ++j) sum[j] += weight[s] * load(v + s * head_dim + i + j * lanes);
    std::memcpy(out + i, sum, sizeof sum);
  }
  if constexpr (vectors > 1) add_values<vectors / 2>(out, weight, v, slots, head_dim, i);
  else
    for (; i < head_dim; ++i)
      for (size_t s = 0; s < slots; ++s) out[i] += weight[s] * v[s * head_dim + i];
}

// Some heads that share keys and values, over one block of slots: of each head the sum of its weighted values, the sum
// of its weights and its largest score.
// parts [heads, head_dim + 2]; q [heads, head_dim]; k, v [slots, head_dim]
template <class Size>
void attend_block(float* parts, const float* q, const float* k, const float* v, size_t heads, size_t slots,
                  Size head_dim, float scale) {
  const size_t width = head_dim + 2;
  float score[heads_at_once][slot_block];
  scores(score, q, k, heads, slots, head_dim, scale);
  for (size_t h = 0; h < heads; ++h) {
    float *part = parts + h * width, &sum = part[head_dim], &most = part[head_dim + 1];
    std::fill_n(part, width, 0.0f);
    most = -INFINITY;
    softmax_step(score[h], slots, slots, most, sum, part, head_dim);
  }
  constexpr size_t step = 8;
  for (size_t s = 0; s < slots; s += step) {
    const size_t m = std::min(step, slots - s);
    for (size_t i = 0; i < m * head_dim; i += 16) __builtin_prefetch(v + s * head_dim + ahead + i);
    for (size_t h = 0; h < heads; ++h) add_values<8>(parts + h * width, score[h] + s, v + s * head_dim, m, head_dim);
  }
}

// Threads take blocks of slots; the parts are joined at the end, always in the same order (flash-decoding: Dao et al.,
// 2023). `parts` is room for them.
template <class Size>
void attend_row(float* o, const float* q, const LayerCache<float>& cache, size_t seen, size_t n_heads,
                size_t n_kv_heads, Size head_dim, std::vector<float>& parts, bool threads) {
  const size_t blocks = (seen + slot_block - 1) / slot_block, group = n_heads / n_kv_heads, width = head_dim + 2;
  const float scale = 1 / std::sqrt(float(head_dim));
  parts.resize(blocks * n_heads * width);
#pragma omp parallel for collapse(2) schedule(dynamic) if (threads)
  for (size_t g = 0; g < n_kv_heads; ++g)
    for (size_t b = 0; b < blocks; ++b) {
      const size_t s = b * slot_block, first = (g * cache.capacity + s) * head_dim;
      for (size_t h = g * group; h < (g + 1) * group; h += heads_at_once)
        attend_block(parts.data() + (b * n_heads + h) * width, q + h * head_dim, cache.k + first, cache.v + first,
                     std::min(heads_at_once, (g + 1) * group - h), std::min(slot_block, seen - s), head_dim, scale);
    }
  for (size_t h = 0; h < n_heads; ++h) {
    auto part = [&](size_t b) { return parts.data() + (b * n_heads + h) * width; };
    float most = -INFINITY, sum = 0, *out = o + h * head_dim;
    for (size_t b = 0; b < blocks; ++b) most = std::max(most, part(b)[head_dim + 1]);
    std::fill_n(out, size_t(head_dim), 0.0f);
    for (size_t b = 0; b < blocks; ++b) {
      const float weight = exp(part(b)[head_dim + 1] - most);
      sum += weight * part(b)[head_dim];
      for (size_t i = 0; i < head_dim; ++i) out[i] += weight * part(b)[i];
    }
    for (size_t i = 0; i < head_dim; ++i) out[i] /= sum;
  }
}

}  // namespace speed::fast
