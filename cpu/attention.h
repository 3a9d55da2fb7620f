// attention.h - the CPU's attention, made fast. What it computes is reference::attention in reference.h.
//
// Slots are processed in blocks with a running softmax (Milakov & Gimelshein, arXiv 1805.02867), so no matrix of rows x
// slots ever exists. Many rows are limited by arithmetic: their scores stay in the L1 cache from one product to the
// next. A single row is limited by reading the KV cache, so each key and value is read once, for all the query heads
// that share it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "../model.h"
#include "simd.h"

namespace speed::fast {

// ---- many rows ----------------------------------------------------------------------------------------------------

// Query rows are the lanes of vectors. A product of a key with all of them is then one multiply-add a dimension, and a
// row's softmax stays in its lane. Rows of all the query heads that share a key head are processed together.

// One number for each of `tile` query rows.
struct PerQuery {
  Vector part[2];
  float operator[](size_t j) const { return part[j / lanes][j % lanes]; }
  void set(size_t j, float x) { part[j / lanes][j % lanes] = x; }
};
constexpr size_t tile = 2 * lanes;
// Sums kept in registers at once. A sum is two registers, and operands need three more: of 32 with AVX-512, else of 16.
constexpr size_t sums_at_once = lanes == 16 ? 12 : 6;

// y[r] = sum over i < n of a[r * row + i * step] * b[i], or y[r] += that sum, for r < rows
template <bool add, size_t R = sums_at_once>
void product(PerQuery* y, const float* a, size_t row, size_t step, const PerQuery* b, size_t n, size_t rows) {
  for (; rows >= R; rows -= R, y += R, a += R * row) {
    Vector sum[R][2];
    for (size_t r = 0; r < R; ++r)
      for (size_t j = 0; j < 2; ++j) sum[r][j] = add ? y[r].part[j] : Vector{};
    for (size_t i = 0; i < n; ++i)
      for (size_t r = 0; r < R; ++r)
        for (size_t j = 0; j < 2; ++j) sum[r][j] += a[r * row + i * step] * b[i].part[j];
    for (size_t r = 0; r < R; ++r)
      for (size_t j = 0; j < 2; ++j) y[r].part[j] = sum[r][j];
  }
  if constexpr (R > 1) product<add, R - 1>(y, a, row, step, b, n, rows);
}

// The running softmax of `tile` query rows.
struct QueryTile {
  static constexpr size_t slot_block = 128;  // the scores of a block, 8 or 16 KiB, fit the L1 cache

  std::vector<PerQuery> q, out;  // [head_dim]: scaled queries; sums of weighted values
  PerQuery row_max, sum;         // of the scores; of their exponentials
  size_t sees[tile];             // slots that a row sees; they never decrease from one row to the next

  // Adds the next block of slots, from s0 on, to the sums.          k, v [slots, head_dim]
  void add_slots(const float* k, const float* v, size_t s0, size_t head_dim) {
    if (sees[tile - 1] <= s0) return;
    const size_t slots = std::min(slot_block, sees[tile - 1] - s0);
    PerQuery score[slot_block];
    product<false>(score, k, head_dim, 1, q.data(), head_dim, slots);
    for (size_t s = std::max(sees[0], s0) - s0; s < slots; ++s)
      for (size_t j = 0; j < tile; ++j)
        if (sees[j] <= s0 + s) score[s].set(j, -INFINITY);
    for (size_t j = 0; j < 2; ++j) {
      Vector block_max = row_max.part[j], block_sum = {};
      for (size_t s = 0; s < slots; ++s) block_max = score[s].part[j] > block_max ? score[s].part[j] : block_max;
      for (size_t s = 0; s < slots; ++s) block_sum += score[s].part[j] = exp(score[s].part[j] - block_max);
      const Vector factor = exp(row_max.part[j] - block_max);
      for (size_t i = 0; i < head_dim; ++i) out[i].part[j] *= factor;
      sum.part[j] = sum.part[j] * factor + block_sum;
      row_max.part[j] = block_max;
    }
    product<true>(out.data(), v, 1, head_dim, score, slots, head_dim);
  }
};

// Attention of n > 1 rows. A row's result has the same bits whatever other rows are in the call.
inline void attend_rows(float* o, const float* q, const LayerCache<float>& cache, size_t n, size_t seen, size_t n_heads,
                        size_t n_kv_heads, size_t head_dim) {
  constexpr size_t row_block = 32;
  const size_t blocks = (n + row_block - 1) / row_block, group = n_heads / n_kv_heads, width = n_heads * head_dim;
  const float scale = 1 / std::sqrt(float(head_dim));
#pragma omp parallel
  {
    const size_t max_tiles = (row_block * group + tile - 1) / tile;
    const auto scratch = std::make_unique<QueryTile[]>(max_tiles);  // an array: nvcc rejects std::vector<QueryTile>
    for (QueryTile& t : std::span(scratch.get(), max_tiles)) t.q.resize(head_dim), t.out.resize(head_dim);
#pragma omp for schedule(dynamic)
    for (size_t item = 0; item < blocks * n_kv_heads; ++item) {  // the last rows see most slots: start with them
      const size_t r0 = (blocks - 1 - item / n_kv_heads) * row_block, g = item % n_kv_heads,
                   rows = std::min(row_block, n - r0), all = rows * group, first = g * cache.capacity * head_dim;
      const std::span tiles(scratch.get(), (all + tile - 1) / tile);
      // Column c is query row r0 + c / group of head g * group + c % group; columns past the end repeat the last, so
      // that every tile is full.
      auto each_column = [&](auto use) {
        for (size_t c = 0; c < tiles.size() * tile; ++c) {
          const size_t at = std::min(c, all - 1), r = r0 + at / group, h = g * group + at % group;
          use(tiles[c / tile], c % tile, r, r * width + h * head_dim);
        }
      };
      for (QueryTile& t : tiles) {
        std::fill(t.out.begin(), t.out.end(), PerQuery{});
        for (size_t j = 0; j < 2; ++j) t.row_max.part[j] = Vector{} - INFINITY, t.sum.part[j] = Vector{};
      }
      each_column([&](QueryTile& t, size_t j, size_t r, size_t at) {
        t.sees[j] = seen + r;
        for (size_t i = 0; i < head_dim; ++i) t.q[i].set(j, scale * q[at + i]);
      });
      for (size_t s0 = 0; s0 < seen + r0 + rows - 1; s0 += QueryTile::slot_block)
        for (QueryTile& t : tiles)
          t.add_slots(cache.k + first + s0 * head_dim, cache.v + first + s0 * head_dim, s0, head_dim);
      each_column([&](const QueryTile& t, size_t j, size_t, size_t at) {
        for (size_t i = 0; i < head_dim; ++i) o[at + i] = t.out[i][j] / t.sum[j];
      });
    }
  }
}

// ---- one row ------------------------------------------------------------------------------------------------------
// `Size` is a number, or a type that holds one: loops whose length the compiler knows are twice as fast.

constexpr size_t decode_block = 256;  // slots of one block
constexpr size_t heads_at_once = 8;
constexpr size_t prefetch_ahead = 1024;  // floats

// score = e^(score - row_max), row_max the largest score          score [slots]; returns {row_max, sum of the results}
inline std::array<float, 2> exponentials(float* score, size_t slots) {
  float row_max = -INFINITY, sum = 0;
#pragma omp simd reduction(max : row_max)
  for (size_t s = 0; s < slots; ++s) row_max = score[s] > row_max ? score[s] : row_max;
#pragma omp simd reduction(+ : sum)
  for (size_t s = 0; s < slots; ++s) sum += score[s] = exp(score[s] - row_max);
  return {row_max, sum};
}

// score [heads, slots] = scale * q k^T          k [slots, head_dim]; q [heads, head_dim]
template <class Size>
void scores(float (*score)[decode_block], const float* q, const float* k, size_t heads, size_t slots, Size head_dim,
            float scale) {
  size_t s = 0;
  for (; s + 4 <= slots; s += 4) {
    const float* key = k + s * head_dim;
    for (size_t i = 0; i < 4 * head_dim; i += 16) __builtin_prefetch(key + prefetch_ahead + i);
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

// Some heads that share keys and values, over one block of slots. A head's partial result is the sum of its weighted
// values, its largest score, and the sum of its weights.
// partials [heads, head_dim + 2]; q [heads, head_dim]; k, v [slots, head_dim]
template <class Size>
void attend_block(float* partials, const float* q, const float* k, const float* v, size_t heads, size_t slots,
                  Size head_dim, float scale) {
  const size_t width = head_dim + 2;
  float score[heads_at_once][decode_block];
  scores(score, q, k, heads, slots, head_dim, scale);
  for (size_t h = 0; h < heads; ++h) {
    std::fill_n(partials + h * width, size_t(head_dim), 0.0f);
    std::ranges::copy(exponentials(score[h], slots), partials + h * width + head_dim);
  }
  constexpr size_t step = 8;
  for (size_t s = 0; s < slots; s += step) {
    const size_t m = std::min(step, slots - s);
    for (size_t i = 0; i < m * head_dim; i += 16) __builtin_prefetch(v + s * head_dim + prefetch_ahead + i);
    for (size_t h = 0; h < heads; ++h) add_values<8>(partials + h * width, score[h] + s, v + s * head_dim, m, head_dim);
  }
}

// Attention of one row. Threads process blocks of slots; their partial results are joined at the end, always in the
// same order (flash-decoding: Dao et al., 2023). `partials` is scratch memory.
template <class Size>
void attend_row(float* o, const float* q, const LayerCache<float>& cache, size_t seen, size_t n_heads,
                size_t n_kv_heads, Size head_dim, std::vector<float>& partials, bool threads) {
  const size_t blocks = (seen + decode_block - 1) / decode_block, group = n_heads / n_kv_heads, width = head_dim + 2;
  const float scale = 1 / std::sqrt(float(head_dim));
  partials.resize(blocks * n_heads * width);
#pragma omp parallel for collapse(2) schedule(dynamic) if (threads)
  for (size_t g = 0; g < n_kv_heads; ++g)
    for (size_t b = 0; b < blocks; ++b) {
      const size_t s = b * decode_block, first = (g * cache.capacity + s) * head_dim;
      for (size_t h = g * group; h < (g + 1) * group; h += heads_at_once)
        attend_block(partials.data() + (b * n_heads + h) * width, q + h * head_dim, cache.k + first, cache.v + first,
                     std::min(heads_at_once, (g + 1) * group - h), std::min(decode_block, seen - s), head_dim, scale);
    }
  for (size_t h = 0; h < n_heads; ++h) {
    auto part = [&](size_t b) { return partials.data() + (b * n_heads + h) * width; };
    float row_max = -INFINITY, sum = 0, *out = o + h * head_dim;
    for (size_t b = 0; b < blocks; ++b) row_max = std::max(row_max, part(b)[head_dim]);
    std::fill_n(out, size_t(head_dim), 0.0f);
    for (size_t b = 0; b < blocks; ++b) {
      const float weight = exp(part(b)[head_dim] - row_max);
      sum += weight * part(b)[head_dim + 1];
      for (size_t i = 0; i < head_dim; ++i) out[i] += weight * part(b)[i];
    }
    for (size_t i = 0; i < head_dim; ++i) out[i] /= sum;
  }
}

}  // namespace speed::fast
