// attention.cuh - grouped-query attention as CUDA kernels: prefill_attention for a prompt's rows, decode_attention and
// combine_slices for few rows. Contracts use the names of kernels.cuh.
#pragma once

#include "kernels.cuh"

namespace speed {

namespace kernel {

constexpr float lowest = -1e30f;  // below every score, and finite, so that no difference of two is NaN

// Rows of E values in shared memory. A load for the tensor cores (ldmatrix) reads a 16-byte piece from each of eight
// rows at once. They must lie in different banks, so a row's pieces are permuted by its number.
template <int E>
struct Tile {
  static constexpr int pieces = E / 8;
  static DEVICE int at(int row, int piece) {
    return (row * pieces + (piece ^ (pieces < 8 ? row / 2 % pieces : row % 8))) * 8;
  }
  // Starts to copy rows, `stride` apart, by all threads of the block; rows from `valid` on are zeros and not read. A
  // thread copies the same piece of every rows_at_once-th row. The permutation repeats every 8 rows, so both of its
  // addresses only grow by a constant, which saves a tenth of the instructions of an attention tile (668, not 743).
  template <int Rows, int Threads>
  static DEVICE void copy(bf16* tile, const bf16* from, size_t stride, int valid) {
    constexpr int rows_at_once = Threads / pieces;
    static_assert(rows_at_once % 8 == 0 && Rows % rows_at_once == 0);
    const int row = int(threadIdx.x) / pieces, piece = int(threadIdx.x) % pieces;
    tile += at(row, piece), from += row * stride + piece * 8;
#pragma unroll
    for (int j = 0; j < Rows; j += rows_at_once) copy_async_16(tile + j * E, from + j * stride, row + j < valid);
  }
};

constexpr int prefill_threads = 128, prefill_rows = 128;  // of a block
template <int E>
constexpr int prefill_slots = E == 128 ? 32 : 64;  // of a tile of the cache: the registers hold no more scores
template <int E>
constexpr size_t prefill_shared_bytes = (prefill_rows + 2 * prefill_slots<E>)*E * sizeof(bf16);

// Grouped-query attention of many rows: row r sees the first seen + r slots of the cache, seen >= 1.
// o, q [n, h, E]; k, v [g, capacity, E]; query head i reads key head i / (h/g); scale = log2(e) / sqrt(E)
//
// FlashAttention-2 (Dao, arXiv 2307.08691): a block computes 128 rows of one query head, a warp 32 of them, over the
// slots in tiles. S = Q K^T and O += P V run on tensor cores. The softmax is updated tile by tile (Milakov &
// Gimelshein, arXiv 1805.02867), in powers of two. There is one tile of keys and one of values: each is copied while
// the other is used. Slots past the last that a block's rows see are not read; their place holds zeros, since 0 * NaN
// is NaN. Grid: h, then tiles of rows, the last rows first, because they see the most slots. Moves 4 n h E bytes, and
// the cache once a block out of L2. Bound by the tensor cores: 4 h E FLOPs a row and slot.
template <int E>
__global__ void __launch_bounds__(prefill_threads)
    prefill_attention(bf16* o, const bf16* q, const bf16* k, const bf16* v, size_t capacity, int n, int seen,
                      int kv_heads, float scale) {
  constexpr int threads = prefill_threads, tile = prefill_slots<E>;
  bf16 *q_tile = shared_memory<bf16>(), *k_tile = q_tile + prefill_rows * E, *v_tile = k_tile + tile * E;
  const int heads = int(gridDim.x), head = int(blockIdx.x), first = int(gridDim.y - 1 - blockIdx.y) * prefill_rows;
  const int rows = n - first < prefill_rows ? n - first : prefill_rows;
  const int slots = seen + first + rows - 1;  // that the block's last row sees
  const int lane = int(threadIdx.x) % warp_size, warp_row = int(threadIdx.x) / warp_size * 32;
  const size_t width = size_t(heads) * E, cache = size_t(head / (heads / kv_heads)) * capacity * E;
  q += first * width + size_t(head) * E, o += first * width + size_t(head) * E;
  k += cache, v += cache;

  Tile<E>::template copy<prefill_rows, threads>(q_tile, q, width, rows);
  Tile<E>::template copy<tile, threads>(k_tile, k, E, slots);
  copy_async_commit();

  // A warp's rows are two times 16. Of these a thread has rows lane/4 and lane/4 + 8, index [i][half] below, and of
  // each the columns 8 j + lane%4 * 2 and the next, as the tensor cores lay a result out (see cuda.cuh).
  float out[2][E / 8][4] = {}, row_max[2][2], sum[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) row_max[i][0] = row_max[i][1] = lowest, sum[i][0] = sum[i][1] = 0;

  // Where this lane's row of a load begins. By the permutation of a tile, the pieces two further on lie at ^ 16.
  const int q_at = Tile<E>::at(warp_row + lane % 16, lane / 16),
            k_at = Tile<E>::at(lane / 16 * 8 + lane % 8, lane / 8 % 2), v_at = Tile<E>::at(lane % 16, lane / 16);

  for (int slot = 0; slot < slots; slot += tile) {
    copy_async_wait<0>();
    sync_threads();  // the keys are here, and nobody reads the last values any more
    Tile<E>::template copy<tile, threads>(v_tile, v + size_t(slot) * E, E, slots - slot);
    copy_async_commit();

    float score[2][tile / 8][4] = {};
#pragma unroll
    for (int step = 0; step < E / 16; ++step) {
      uint32_t a[2][4], b[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_matrix_x4(a[i], q_tile + i * 16 * E + (q_at ^ step * 16));
#pragma unroll
      for (int j = 0; j < tile / 16; ++j) {
        load_matrix_x4(b, k_tile + j * 16 * E + (k_at ^ step * 16));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};  // slots 0 to 7, 8 to 15
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_m16n8k16(score[i][2 * j], a[i], low);
          mma_m16n8k16(score[i][2 * j + 1], a[i], high);
        }
      }
    }

    const bool all_seen = slot + tile <= seen + first + warp_row;  // by the warp's first row
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!all_seen) {
          const int visible = seen + first + warp_row + i * 16 + half * 8 + lane / 4 - slot;
#pragma unroll
          for (int j = 0; j < tile / 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              if (j * 8 + lane % 4 * 2 + c >= visible) score[i][j][2 * half + c] = -INFINITY;
        }
        float m = row_max[i][half];
#pragma unroll
        for (int j = 0; j < tile / 8; ++j) m = fmaxf(m, fmaxf(score[i][j][2 * half], score[i][j][2 * half + 1]));
        m = fmaxf(m, shuffle_xor(m, 1));
        m = fmaxf(m, shuffle_xor(m, 2));
        const float factor = exp2_fast((row_max[i][half] - m) * scale), shift = m * scale;
        row_max[i][half] = m;
        sum[i][half] *= factor;
#pragma unroll
        for (int j = 0; j < tile / 8; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& p = score[i][j][2 * half + c];
            p = exp2_fast(fmaf(p, scale, -shift));
            sum[i][half] += p;
          }
#pragma unroll
        for (int j = 0; factor != 1.0f && j < E / 8; ++j)
          out[i][j][2 * half] *= factor, out[i][j][2 * half + 1] *= factor;
      }

    copy_async_wait<0>();
    sync_threads();  // the values are here, and nobody reads these keys any more
    if (slot + tile < slots)
      Tile<E>::template copy<tile, threads>(k_tile, k + size_t(slot + tile) * E, E, slots - slot - tile);
    copy_async_commit();

#pragma unroll
    for (int step = 0; step < tile / 16; ++step) {
      uint32_t a[2][4], b[4];
#pragma unroll
      for (int i = 0; i < 2; ++i)  // the layout of the scores is that of this product's operand
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const float* p = &score[i][2 * step + part / 2][part % 2 * 2];
          a[i][part] = pack_bf16(p[0], p[1]);
        }
#pragma unroll
      for (int j = 0; j < E / 16; ++j) {
        load_matrix_x4_transposed(b, v_tile + step * 16 * E + (v_at ^ j * 16));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_m16n8k16(out[i][2 * j], a[i], low);
          mma_m16n8k16(out[i][2 * j + 1], a[i], high);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float all = sum[i][half];
      all += shuffle_xor(all, 1);
      all += shuffle_xor(all, 2);
      const float share = 1.0f / all;
      const int row = warp_row + i * 16 + half * 8 + lane / 4;
      if (row >= rows) continue;
#pragma unroll
      for (int j = 0; j < E / 8; ++j) {
        const uint32_t pair = pack_bf16(out[i][j][2 * half] * share, out[i][j][2 * half + 1] * share);
        store_4(o + row * width + j * 8 + lane % 4 * 2, pair);
      }
    }
}

constexpr int decode_threads = 256, decode_step = 16;  // slots of a warp's step
constexpr int decode_heads = 8;                        // query heads that share a key head, at most
template <int E>
constexpr size_t decode_shared_bytes = decode_threads / warp_size* decode_heads*(E + 2) * sizeof(float);

// Attention of a few rows over a cache that may be long: row r sees *begin + ahead + r slots, at least 1.
// q [n, h, E]; k, v [g, capacity, E]; partials [n, h, slices, E + 2]; scale = log2(e) / sqrt(E); h/g <= 8
//
// Flash-decoding (Dao et al., 2023): the slots are split into slices, one a block (grid: slices, g, n). A block writes
// for every query head the sum of weighted values, the sum of the weights, and the largest score; combine_slices adds
// them up. All query heads of a group share each load of keys and values: their scores are one product on the tensor
// cores. The inner index of a product may be permuted, so a lane's 16-byte loads are its operands without any exchange:
// of the keys, and of the queries in the same order; of the values, two slots' words give two operands by exchanging
// halves. Slots past the last are not read. Moves the slots once: 4 g E bytes each.
template <int E>
__global__ void __launch_bounds__(decode_threads, 1)
    decode_attention(float* partials, const bf16* q, const bf16* k, const bf16* v, size_t capacity,
                     const uint32_t* begin, int ahead, int heads, float scale) {
  constexpr int warps = decode_threads / warp_size, pieces = E / 32, words = E / 16;
  const int slice = int(blockIdx.x), slices = int(gridDim.x), kv_head = int(blockIdx.y), row = int(blockIdx.z);
  const int group = heads / int(gridDim.y), lane = int(threadIdx.x) % warp_size, warp = int(threadIdx.x) / warp_size;
  const int quad = lane / 4, t = lane % 4;  // names of cuda.cuh: g and t
  const int slots = int(*begin) + ahead + row, steps = (slots + decode_step - 1) / decode_step;
  const int from = int(int64_t(steps) * slice / slices), to = int(int64_t(steps) * (slice + 1) / slices);
  q += (size_t(row) * heads + kv_head * group) * E;
  k += size_t(kv_head) * capacity * E, v += size_t(kv_head) * capacity * E;
  auto clamped = [&](int slot) { return size_t(slot < slots ? slot : slots - 1) * E; };

  uint4 query[pieces];  // lane: query head `quad`, values 32 j + 8 t and the next seven
#pragma unroll
  for (int j = 0; j < pieces; ++j)
    query[j] = quad < group ? load_16(q + size_t(quad) * E + 32 * j + 8 * t) : uint4{0, 0, 0, 0};

  // out[w]: of the dimensions of this lane's word w the even one, heads 2t and 2t + 1, then the odd one.
  float out[words][4] = {}, row_max = lowest, sum = 0;
  for (int step = from + warp; step < to; step += warps) {
    const int slot = step * decode_step;
    uint4 key[2][pieces];
    uint32_t value[4][words];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < pieces; ++j) key[half][j] = load_16(k + clamped(slot + half * 8 + quad) + 32 * j + 8 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // slots 2t, 2t + 1, 2t + 8, 2t + 9
      const bf16* p = v + clamped(slot + 2 * t + i % 2 + i / 2 * 8);
      if constexpr (E >= 64) {
#pragma unroll
        for (int j = 0; j < E / 64; ++j) {
          const uint4 w = load_16(p + 64 * j + 8 * quad);
          value[i][4 * j] = w.x, value[i][4 * j + 1] = w.y, value[i][4 * j + 2] = w.z, value[i][4 * j + 3] = w.w;
        }
      } else {  // 32 dimensions are four pieces for eight quads: each takes a half
        const uint4 w = load_16(p + quad / 2 * 8);
        value[i][0] = quad % 2 ? w.z : w.x, value[i][1] = quad % 2 ? w.w : w.y;
      }
    }

    sync_warp();             // the compiler may not move loads past it: all 16 are issued before the first is used
    float score[2][4] = {};  // [half][0, 1]: head `quad`, slots 8 half + 2t and the next
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < pieces; ++j) {
        const uint32_t a0[4] = {query[j].x, 0, query[j].y, 0}, b0[2] = {key[half][j].x, key[half][j].y};
        const uint32_t a1[4] = {query[j].z, 0, query[j].w, 0}, b1[2] = {key[half][j].z, key[half][j].w};
        mma_m16n8k16(score[half], a0, b0);
        mma_m16n8k16(score[half], a1, b1);
      }
    float m = row_max;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (slot + half * 8 + 2 * t + c >= slots) score[half][c] = -INFINITY;
        m = fmaxf(m, score[half][c]);
      }
    m = fmaxf(m, shuffle_xor(m, 1));
    m = fmaxf(m, shuffle_xor(m, 2));
    const float factor = exp2_fast((row_max - m) * scale), shift = m * scale;
    row_max = m;
    sum *= factor;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        score[half][c] = exp2_fast(fmaf(score[half][c], scale, -shift));
        sum += score[half][c];
      }

    const float even = shuffle(factor, 8 * t), odd = shuffle(factor, 8 * t + 4);  // of heads 2t and 2t + 1
    const uint32_t b[2] = {pack_bf16(score[0][0], score[0][1]), pack_bf16(score[1][0], score[1][1])};
#pragma unroll
    for (int w = 0; w < words; ++w) {
      out[w][0] *= even, out[w][1] *= odd, out[w][2] *= even, out[w][3] *= odd;
      const uint32_t a[4] = {
          permute_bytes(value[0][w], value[1][w], 0x5410), permute_bytes(value[0][w], value[1][w], 0x7632),
          permute_bytes(value[2][w], value[3][w], 0x5410), permute_bytes(value[2][w], value[3][w], 0x7632)};
      mma_m16n8k16(out[w], a, b);
    }
  }
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);

  // The block's warps are combined in shared memory: [warps, 8 heads, E + 2].
  float* shared = shared_memory<float>();
  auto partial = [&](int w, int head) { return shared + (w * decode_heads + head) * (E + 2); };
#pragma unroll
  for (int w = 0; w < words; ++w) {
    const int i = E >= 64 ? w / 4 * 64 + quad * 8 + w % 4 * 2 : quad * 4 + w * 2;
    partial(warp, 2 * t)[i] = out[w][0], partial(warp, 2 * t)[i + 1] = out[w][2];
    partial(warp, 2 * t + 1)[i] = out[w][1], partial(warp, 2 * t + 1)[i + 1] = out[w][3];
  }
  if (t == 0) partial(warp, quad)[E] = sum, partial(warp, quad)[E + 1] = row_max;
  sync_threads();
  for (int item = int(threadIdx.x); item < group * (E + 2); item += decode_threads) {
    const int head = item / (E + 2), i = item % (E + 2);
    float m = lowest, total = 0;
    for (int w = 0; w < warps; ++w) m = fmaxf(m, partial(w, head)[E + 1]);
    for (int w = 0; w < warps; ++w) total += exp2_fast((partial(w, head)[E + 1] - m) * scale) * partial(w, head)[i];
    partials[((size_t(row) * heads + kv_head * group + head) * slices + slice) * (E + 2) + i] = i == E + 1 ? m : total;
  }
}

// o [n, h, e] from the partial results of decode_attention          partials [n, h, slices, e + 2]
// Grid: h, n; a thread a value.
__global__ void combine_slices(bf16* o, const float* partials, int slices, int e, float scale) {
  const size_t head = size_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const int i = int(threadIdx.x);
  partials += head * slices * (e + 2);
  float m = lowest, sum = 0, value = 0;
  for (int s = 0; s < slices; ++s) m = fmaxf(m, partials[s * (e + 2) + e + 1]);
  for (int s = 0; s < slices; ++s) {
    const float weight = exp2_fast((partials[s * (e + 2) + e + 1] - m) * scale);
    sum += weight * partials[s * (e + 2) + e];
    value += weight * partials[s * (e + 2) + i];
  }
  o[head * e + i] = round_bf16(value / sum);
}

}  // namespace kernel

}  // namespace speed
