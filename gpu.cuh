// gpu.cuh - the operations of cpu.h once more, as CUDA kernels for one NVIDIA GPU.
//
// The plain version of each, which runs on every GPU from compute capability 8.0 on: first the kernels (namespace
// kernel), each with its contract, then `Gpu`, which offers them to forward.h under the names that `Cpu` has.
//
// Weights, cache and the inputs of tensor cores are bf16, all sums fp32, and so is the residual stream. Many rows go
// through cuBLAS and tensor cores. A single row, a generated token, is bound by the reading of weights and cache: its
// products are matrix-vector kernels that take in what comes after them, and all kernels of a token are one CUDA graph,
// so whatever changes from token to token (ids, positions, slots) is in device memory. No sum depends on the order in
// which blocks run: two runs give the same bits.
//
// Plain names in contracts: n rows of a call, d hidden, e head_dim, h query heads, g key/value heads, f MLP width. What
// a kernel must move is what it reads and writes once; tables of a few KiB are left out.
#pragma once

#include <functional>

#include "cpu.h"
#include "device.cuh"

namespace speed {

namespace kernel {

constexpr int warp_size = 32;

// ---- eight values at a time ---------------------------------------------------------------------------------------
// 16 bytes of bf16 are the widest load a thread has. Addresses are multiples of 16.

DEVICE void load_8(float (&y)[8], uint4 v) {
  const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) y[2 * i] = low_bf16(pairs[i]), y[2 * i + 1] = high_bf16(pairs[i]);
}
DEVICE void load_8(float (&y)[8], const bf16* p) { load_8(y, load_16(p)); }
DEVICE void load_8(float (&y)[8], const float* p) {
  const uint4 low = load_16(p), high = load_16(p + 4);
  memcpy(y, &low, 16), memcpy(y + 4, &high, 16);
}
DEVICE void store_8(bf16* p, const float (&x)[8]) {
  store_16(p, {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])});
}
DEVICE void store_8(float* p, const float (&x)[8]) {
  uint4 low, high;
  memcpy(&low, x, 16), memcpy(&high, x + 4, 16);
  store_16(p, low), store_16(p + 4, high);
}

// ---- sums ---------------------------------------------------------------------------------------------------------

// The sum of v over the warp's lanes, in every lane. Whole warp.
DEVICE float warp_sum(float v) {
#pragma unroll
  for (int mask = warp_size / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}

// The same over the block, by way of `parts` [warps] in shared memory. Whole block.
DEVICE float block_sum(float v, float* parts) {
  v = warp_sum(v);
  if (threadIdx.x % warp_size == 0) parts[threadIdx.x / warp_size] = v;
  sync_threads();
  float sum = 0;
  for (unsigned w = 0; w < blockDim.x / warp_size; ++w) sum += parts[w];
  return sum;
}

// ---- element by element -------------------------------------------------------------------------------------------

// x[r] = table[ids[r]]          table [V, d]; ids [n]; x [n, d]; d in multiples of 8
// A block a row. Moves n d (2 + 4) bytes.
__global__ void embed(float* x, const bf16* table, const int* ids, int d) {
  const bf16* from = table + size_t(ids[blockIdx.x]) * d;
  float* to = x + size_t(blockIdx.x) * d;
  for (int i = int(threadIdx.x) * 8; i < d; i += int(blockDim.x) * 8) {
    float v[8];
    load_8(v, from + i);
    store_8(to + i, v);
  }
}

// y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * w          x, y [n, d]; w [d]; d in multiples of 8      arXiv 1910.07467
// A block a row; shared memory: a float a warp. Moves n d (4 + 2) bytes; the second reading of x finds it in L1.
__global__ void rmsnorm(bf16* y, const float* x, const bf16* w, int d, float eps) {
  const size_t row = size_t(blockIdx.x) * d;
  float sum = 0, v[8], scale[8];
  for (int i = int(threadIdx.x) * 8; i < d; i += int(blockDim.x) * 8) {
    load_8(v, x + row + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[j] * v[j];
  }
  const float norm = 1.0f / sqrtf(block_sum(sum, shared_memory<float>()) / float(d) + eps);
  for (int i = int(threadIdx.x) * 8; i < d; i += int(blockDim.x) * 8) {
    load_8(v, x + row + i);
    load_8(scale, w + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= norm * scale[j];
    store_8(y + row + i, v);
  }
}

// gate = silu(gate) * up, silu(x) = x / (1 + e^-x)
DEVICE float silu(float x) { return x / (1.0f + exp2_fast(-1.44269504f * x)); }

// The same for many          gate, up [count], in multiples of 8      arXiv 2002.05202
// A thread for eight. Moves 6 bytes a value.
__global__ void swiglu(bf16* gate, const bf16* up, size_t count) {
  const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (i >= count) return;
  float a[8], b[8];
  load_8(a, gate + i);
  load_8(b, up + i);
#pragma unroll
  for (int j = 0; j < 8; ++j) a[j] = silu(a[j]) * b[j];
  store_8(gate + i, a);
}

// ---- RoPE ---------------------------------------------------------------------------------------------------------

// Cosine and sine of an fp32 angle of any size, to fp32: multiples of pi/2 are taken off in double precision, with pi/2
// in two parts, and Taylor's series are right to 1e-11 on what is left. (The library's own use local memory.)
DEVICE void cos_sin(float angle, float& c, float& s) {
  const double turns = rint(double(angle) * 0.63661977236758134308);
  const double r = fma(-turns, 6.123233995736766036e-17, fma(-turns, 1.5707963267948965580, double(angle))), r2 = r * r;
  double sine = -1.0 / 39916800, cosine = -1.0 / 3628800;
  sine = fma(sine, r2, 1.0 / 362880), cosine = fma(cosine, r2, 1.0 / 40320);
  sine = fma(sine, r2, -1.0 / 5040), cosine = fma(cosine, r2, -1.0 / 720);
  sine = fma(sine, r2, 1.0 / 120), cosine = fma(cosine, r2, 1.0 / 24);
  sine = fma(sine, r2, -1.0 / 6), cosine = fma(cosine, r2, -1.0 / 2);
  sine = fma(sine * r2, r, r), cosine = fma(cosine, r2, 1.0);
  const int quadrant = int(int64_t(turns) & 3);
  c = float(quadrant % 2 ? sine : cosine) * (quadrant == 1 || quadrant == 2 ? -1.0f : 1.0f);
  s = float(quadrant % 2 ? cosine : sine) * (quadrant >= 2 ? -1.0f : 1.0f);
}

// cos, sin [n, half] of position * frequency, the angle formed in fp32          frequencies [half]; positions [n]
// A thread a value. Moves 8 n half bytes.
__global__ void rope_angles(float* cos, float* sin, const float* frequencies, const int* positions, int n, int half) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size_t(n) * half) return;
  cos_sin(float(positions[i / half]) * frequencies[i % half], cos[i], sin[i]);
}

// Rotates eight pairs: `low` of a head's first half, `high` as far into its second.          arXiv 2104.09864
DEVICE void rotate_8(float (&low)[8], float (&high)[8], const float* cos, const float* sin) {
  float c[8], s[8];
  load_8(c, cos);
  load_8(s, sin);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float a = low[j], b = high[j];
    low[j] = a * c[j] - b * s[j];
    high[j] = b * c[j] + a * s[j];
  }
}

// Rotates every head of x by the angle of its row, in place          x [n, heads, e]; cos, sin [n, e/2]
// A thread for eight pairs; e in multiples of 16. Moves 4 bytes a value.
__global__ void rope(bf16* x, const float* cos, const float* sin, int n, int heads, int e) {
  const int half = e / 2, groups = half / 8;
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size_t(n) * heads * groups) return;
  const size_t head = i / groups, angle = head / heads * half + i % groups * 8;
  bf16* p = x + head * e + i % groups * 8;
  float low[8], high[8];
  load_8(low, p);
  load_8(high, p + half);
  rotate_8(low, high, cos + angle, sin + angle);
  store_8(p, low);
  store_8(p + half, high);
}

// Puts rows of keys, rotated, and of values into slots [first, first + n) of a cache      k, v [n, g, e]
// cache_k, cache_v [g, capacity, e]; cos, sin [n, e/2], null: k is as it should be. As `rope`; moves 8 n g e bytes.
__global__ void append(bf16* cache_k, bf16* cache_v, size_t capacity, size_t first, const bf16* k, const bf16* v,
                       const float* cos, const float* sin, int n, int heads, int e) {
  const int half = e / 2, groups = half / 8;
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size_t(n) * heads * groups) return;
  const size_t head = i / groups, row = head / heads, at = i % groups * 8;
  const size_t from = head * e + at, to = (head % heads * capacity + first + row) * e + at;
  float low[8], high[8];
  load_8(low, k + from);
  load_8(high, k + from + half);
  if (cos) rotate_8(low, high, cos + row * half + at, sin + row * half + at);
  store_8(cache_k + to, low);
  store_8(cache_k + to + half, high);
  store_16(cache_v + to, load_16(v + from));
  store_16(cache_v + to + half, load_16(v + from + half));
}

// ---- one row times a matrix ---------------------------------------------------------------------------------------
// What a generated token's time goes into: every weight is read once, at the rate of memory.

constexpr int matvec_threads = 128;

// The products of x [in] with pairs of weight rows, handed to `rows`, which says which rows make a pair (what is done
// with the two sums then needs no other thread) and what becomes of them:
//   pairs(), first(p), second(p)   how many pairs; the two rows of pair p, [in]
//   done(p, a, b)                  called by one thread with the two sums
// A warp a pair: each lane has eight 16-byte loads of weights under way. in in multiples of 8. Moves 4 in bytes a pair;
// x comes out of L1.
template <class Rows>
__global__ void __launch_bounds__(matvec_threads) matvec(const bf16* x, int in, Rows rows) {
  const int p = int(blockIdx.x) * (matvec_threads / warp_size) + int(threadIdx.x) / warp_size;
  const int lane = int(threadIdx.x) % warp_size;
  if (p >= rows.pairs()) return;
  const bf16 *first = rows.first(p), *second = rows.second(p);
  constexpr int step = warp_size * 8, deep = 4;
  float a = 0, b = 0;
  auto add = [&](uint4 w0, uint4 w1, uint4 v) {
    float f[8], s[8], y[8];
    load_8(f, w0), load_8(s, w1), load_8(y, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) a += f[j] * y[j], b += s[j] * y[j];
  };
  int i = lane * 8;
  for (; i + (deep - 1) * step < in; i += deep * step) {
    uint4 w0[deep], w1[deep], v[deep];
#pragma unroll
    for (int u = 0; u < deep; ++u) {
      w0[u] = load_16_once(first + i + u * step);
      w1[u] = load_16_once(second + i + u * step);
      v[u] = load_16(x + i + u * step);
    }
#pragma unroll
    for (int u = 0; u < deep; ++u) add(w0[u], w1[u], v[u]);
  }
  for (; i < in; i += step) add(load_16_once(first + i), load_16_once(second + i), load_16(x + i));
  a = warp_sum(a), b = warp_sum(b);
  if (lane == 0) rows.done(p, a, b);
}

// y = w x, or y += w x          w [out, in]; y [out], T float or bf16
template <class T>
struct Product {
  T* y;
  const bf16* w;
  int in, out;
  bool add;
  DEVICE int pairs() const { return (out + 1) / 2; }
  DEVICE const bf16* first(int p) const { return w + size_t(2 * p) * in; }
  DEVICE const bf16* second(int p) const { return w + size_t(2 * p + 1 < out ? 2 * p + 1 : 2 * p) * in; }
  DEVICE void done(int p, float a, float b) const {
    put(2 * p, a);
    if (2 * p + 1 < out) put(2 * p + 1, b);
  }
  DEVICE void put(int i, float v) const {
    if constexpr (sizeof(T) == sizeof(float)) y[i] = add ? y[i] + v : v;
    else y[i] = round_bf16(v);
  }
};

// Queries: q [h, e] = rope(w x)          w [h e, in]; cos, sin [e/2]. A pair is what RoPE turns.
struct Queries {
  bf16* q;
  const bf16* w;
  const float *cos, *sin;
  int in, heads, e;
  DEVICE int pairs() const { return heads * e / 2; }
  DEVICE int row(int p) const { return p / (e / 2) * e + p % (e / 2); }
  DEVICE const bf16* first(int p) const { return w + size_t(row(p)) * in; }
  DEVICE const bf16* second(int p) const { return w + size_t(row(p) + e / 2) * in; }
  DEVICE void done(int p, float a, float b) const {
    const float c = cos[p % (e / 2)], s = sin[p % (e / 2)];
    q[row(p)] = round_bf16(a * c - b * s);
    q[row(p) + e / 2] = round_bf16(b * c + a * s);
  }
};

// Keys, rotated, and values into slot *begin + ahead of a cache          wk, wv [g e, in]; cos, sin [e/2]
struct KeysValues {
  bf16 *cache_k, *cache_v;  // [g, capacity, e]
  size_t capacity;
  const uint32_t* begin;
  uint32_t ahead;
  const bf16 *wk, *wv;
  const float *cos, *sin;
  int in, heads, e;
  DEVICE int pairs() const { return heads * e; }  // keys first
  DEVICE const bf16* first(int p) const {
    const int half = e / 2, keys = heads * half, i = p % keys;
    return (p < keys ? wk : wv) + (size_t(i / half) * e + i % half) * in;
  }
  DEVICE const bf16* second(int p) const { return first(p) + size_t(e / 2) * in; }
  DEVICE void done(int p, float a, float b) const {
    const int half = e / 2, keys = heads * half, i = p % keys;
    const size_t to = (size_t(i / half) * capacity + *begin + ahead) * e + i % half;
    if (p < keys) {
      const float c = cos[i % half], s = sin[i % half];
      cache_k[to] = round_bf16(a * c - b * s);
      cache_k[to + half] = round_bf16(b * c + a * s);
    } else {
      cache_v[to] = round_bf16(a);
      cache_v[to + half] = round_bf16(b);
    }
  }
};

// y [f] = silu(gate x) * (up x)          gate, up [f, in]. A pair is the same row of both.
struct Gated {
  bf16* y;
  const bf16 *gate, *up;
  int in, f;
  DEVICE int pairs() const { return f; }
  DEVICE const bf16* first(int p) const { return gate + size_t(p) * in; }
  DEVICE const bf16* second(int p) const { return up + size_t(p) * in; }
  DEVICE void done(int p, float a, float b) const { y[p] = round_bf16(silu(a) * b); }
};

// ---- attention ----------------------------------------------------------------------------------------------------

constexpr float lowest = -1e30f;  // below every score, and finite, so that no difference of two is NaN

// Rows of E values in shared memory. The eight 16-byte pieces that a tensor core's load takes from eight rows at once
// must lie in different banks, so a row's pieces are permuted by its number.
template <int E>
struct Tile {
  static constexpr int pieces = E / 8;
  static DEVICE int at(int row, int piece) {
    return (row * pieces + (piece ^ (pieces < 8 ? row / 2 % pieces : row % 8))) * 8;
  }
  // Starts to copy rows, `stride` apart, by all threads of the block; rows from `valid` on are zeros and not read.
  template <int Rows, int Threads>
  static DEVICE void copy(bf16* tile, const bf16* from, size_t stride, int valid) {
#pragma unroll 2
    for (int j = 0; j < Rows * pieces / Threads; ++j) {
      const int i = j * Threads + int(threadIdx.x), row = i / pieces, piece = i % pieces;
      copy_async_16(tile + at(row, piece), from + row * stride + piece * 8, row < valid);
    }
  }
};

constexpr int prefill_threads = 128, prefill_rows = 128;  // of a block
template <int E>
constexpr int prefill_slots = E == 128 ? 32 : 64;  // of a tile of the cache: as many as the registers hold scores of
template <int E>
constexpr size_t prefill_shared_bytes = (prefill_rows + 2 * prefill_slots<E>)*E * sizeof(bf16);

// Grouped-query attention of many rows: row r sees the first seen + r slots of the cache, seen >= 1.
// o, q [n, h, E]; k, v [g, capacity, E]; query head i reads key head i / (h/g); scale = log2(e) / sqrt(E)
//
// FlashAttention-2 (Dao, arXiv 2307.08691): a block takes 128 rows of one query head, a warp 32 of them, and goes
// through the slots in tiles. Scores S = Q K^T and O += P V are products of the tensor cores; the softmax is kept
// running (Milakov & Gimelshein, arXiv 1805.02867), in powers of two. There is one tile of keys and one of values: each
// is copied while the other is used. Slots past the last that a block's rows see are not read; zeros stand for them,
// since 0 * NaN is NaN. Grid: h, then tiles of rows, the last rows first, because they see most.
// Moves 4 n h E bytes, and the cache once a block out of L2. Bound by the tensor cores: 4 h E FLOPs a row and slot.
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

  // A warp's rows are two times 16. Of these a thread has rows lane/4 and lane/4 + 8, index [i][half] below, and of each
  // the columns 8 j + lane%4 * 2 and the next, as the tensor cores lay a result out (see device.cuh).
  float out[2][E / 8][4] = {}, most[2][2], sum[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) most[i][0] = most[i][1] = lowest, sum[i][0] = sum[i][1] = 0;

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
        float m = most[i][half];
#pragma unroll
        for (int j = 0; j < tile / 8; ++j) m = fmaxf(m, fmaxf(score[i][j][2 * half], score[i][j][2 * half + 1]));
        m = fmaxf(m, shuffle_xor(m, 1));
        m = fmaxf(m, shuffle_xor(m, 2));
        const float factor = exp2_fast((most[i][half] - m) * scale), shift = m * scale;
        most[i][half] = m;
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
      for (int i = 0; i < 2; ++i)  // a result of the scores' product is laid out as an operand of this one
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
        memcpy(o + row * width + j * 8 + lane % 4 * 2, &pair, sizeof pair);
      }
    }
}

constexpr int decode_threads = 256, decode_step = 16;  // slots a warp takes at a time
constexpr int decode_heads = 8;                        // query heads that share a key head, at most
template <int E>
constexpr size_t decode_shared_bytes = decode_threads / warp_size* decode_heads*(E + 2) * sizeof(float);

// Attention of a few rows over a cache that may be long: row r sees *begin + ahead + r slots, at least 1.
// q [n, h, E]; k, v [g, capacity, E]; parts [n, h, slices, E + 2]; scale = log2(e) / sqrt(E); h/g <= 8
//
// Flash-decoding (Dao et al., 2023): the slots are cut into slices, each for a block of its own (grid: slices, g, n),
// which leaves for every query head its sum of weighted values, the sum of the weights, and the largest score;
// join_parts puts them together. All query heads of a group share each load of keys and values: their scores are one
// product of the tensor cores, queries times keys. A product's inner index may be counted in any order, so a lane's
// 16-byte loads are its operands as they come: of the keys, and of the queries the same way; of the values, two slots'
// words give two operands by exchanging halves. Slots past the last are not read. Moves the slots once: 4 g E bytes each.
template <int E>
__global__ void __launch_bounds__(decode_threads)
    decode_attention(float* parts, const bf16* q, const bf16* k, const bf16* v, size_t capacity, const uint32_t* begin,
                     int ahead, int heads, float scale) {
  constexpr int warps = decode_threads / warp_size, pieces = E / 32, words = E / 16;
  const int slice = int(blockIdx.x), slices = int(gridDim.x), kv_head = int(blockIdx.y), row = int(blockIdx.z);
  const int group = heads / int(gridDim.y), lane = int(threadIdx.x) % warp_size, warp = int(threadIdx.x) / warp_size;
  const int quad = lane / 4, t = lane % 4;  // names of device.cuh: g and t
  const int slots = int(*begin) + ahead + row, steps = (slots + decode_step - 1) / decode_step;
  const int from = int(int64_t(steps) * slice / slices), to = int(int64_t(steps) * (slice + 1) / slices);
  q += (size_t(row) * heads + kv_head * group) * E;
  k += size_t(kv_head) * capacity * E, v += size_t(kv_head) * capacity * E;
  auto last = [&](int slot) { return size_t(slot < slots ? slot : slots - 1) * E; };

  uint4 query[pieces];  // lane: query head `quad`, values 32 j + 8 t and the next seven
#pragma unroll
  for (int j = 0; j < pieces; ++j)
    query[j] = quad < group ? load_16(q + size_t(quad) * E + 32 * j + 8 * t) : uint4{0, 0, 0, 0};

  // out[w]: of the dimensions of this lane's word w the even one, heads 2t and 2t + 1, then the odd one.
  float out[words][4] = {}, most = lowest, sum = 0;
  for (int step = from + warp; step < to; step += warps) {
    const int slot = step * decode_step;
    uint4 key[2][pieces];
    uint32_t value[4][words];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < pieces; ++j) key[half][j] = load_16(k + last(slot + half * 8 + quad) + 32 * j + 8 * t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // slots 2t, 2t + 1, 2t + 8, 2t + 9
      const bf16* p = v + last(slot + 2 * t + i % 2 + i / 2 * 8);
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
    float m = most;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (slot + half * 8 + 2 * t + c >= slots) score[half][c] = -INFINITY;
        m = fmaxf(m, score[half][c]);
      }
    m = fmaxf(m, shuffle_xor(m, 1));
    m = fmaxf(m, shuffle_xor(m, 2));
    const float factor = exp2_fast((most - m) * scale), shift = m * scale;
    most = m;
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

  // The block's warps, put together: shared memory [warps, 8 heads, E + 2].
  float* shared = shared_memory<float>();
  auto part = [&](int w, int head) { return shared + (w * decode_heads + head) * (E + 2); };
#pragma unroll
  for (int w = 0; w < words; ++w) {
    const int i = E >= 64 ? w / 4 * 64 + quad * 8 + w % 4 * 2 : quad * 4 + w * 2;
    part(warp, 2 * t)[i] = out[w][0], part(warp, 2 * t)[i + 1] = out[w][2];
    part(warp, 2 * t + 1)[i] = out[w][1], part(warp, 2 * t + 1)[i + 1] = out[w][3];
  }
  if (t == 0) part(warp, quad)[E] = sum, part(warp, quad)[E + 1] = most;
  sync_threads();
  for (int item = int(threadIdx.x); item < group * (E + 2); item += decode_threads) {
    const int head = item / (E + 2), i = item % (E + 2);
    float m = lowest, total = 0;
    for (int w = 0; w < warps; ++w) m = fmaxf(m, part(w, head)[E + 1]);
    for (int w = 0; w < warps; ++w) total += exp2_fast((part(w, head)[E + 1] - m) * scale) * part(w, head)[i];
    parts[((size_t(row) * heads + kv_head * group + head) * slices + slice) * (E + 2) + i] = i == E + 1 ? m : total;
  }
}

// o [n, h, e] from what the slices of decode_attention left          parts [n, h, slices, e + 2]
// Grid: h, n; a thread a value.
__global__ void join_parts(bf16* o, const float* parts, int slices, int e, float scale) {
  const size_t head = size_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const int i = int(threadIdx.x);
  parts += head * slices * (e + 2);
  float m = lowest, sum = 0, value = 0;
  for (int s = 0; s < slices; ++s) m = fmaxf(m, parts[s * (e + 2) + e + 1]);
  for (int s = 0; s < slices; ++s) {
    const float weight = exp2_fast((parts[s * (e + 2) + e + 1] - m) * scale);
    sum += weight * parts[s * (e + 2) + e];
    value += weight * parts[s * (e + 2) + i];
  }
  o[head * e + i] = round_bf16(value / sum);
}

// ---- the likeliest token ------------------------------------------------------------------------------------------

struct Best {
  float value;
  int index;  // -1: a NaN was seen
};
// The larger value, of equals the lower index; a NaN beats all. In whatever order this is applied, the result is one.
DEVICE Best better(Best a, Best b) {
  if (a.index < 0 || b.index < 0) return {0, -1};
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}
// Over the block; thread 0 has it. Shared memory: a Best a warp. Whole block.
DEVICE Best block_best(Best v) {
  Best* parts = shared_memory<Best>();
#pragma unroll
  for (int mask = warp_size / 2; mask > 0; mask /= 2)
    v = better(v, {shuffle_xor(v.value, mask), shuffle_xor(v.index, mask)});
  if (threadIdx.x % warp_size == 0) parts[threadIdx.x / warp_size] = v;
  sync_threads();
  for (unsigned w = 0; threadIdx.x == 0 && w < blockDim.x / warp_size; ++w) v = better(v, parts[w]);
  return v;
}

// Each block's best of its part of the logits [vocab].
__global__ void arg_max_parts(Best* parts, const float* logits, int vocab) {
  Best best = {-INFINITY, vocab};
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < vocab; i += int(gridDim.x * blockDim.x))
    best = better(best, {logits[i], logits[i] == logits[i] ? i : -1});
  best = block_best(best);
  if (threadIdx.x == 0) parts[blockIdx.x] = best;
}
// *id = the best of the parts, a thread each.
__global__ void arg_max_join(int* id, const Best* parts) {
  const Best best = block_best(parts[threadIdx.x]);
  if (threadIdx.x == 0) *id = best.index;
}

// ---- for timing ---------------------------------------------------------------------------------------------------

// Values about uniform in +-0.03, a function of their index alone. A thread a value.
__global__ void random_weights(bf16* w, size_t count, uint32_t seed) {
  const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  uint64_t x = (uint64_t(seed) << 40) + i + 1;  // SplitMix64 (Steele, Lea & Flood, 2014)
  x *= 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  x ^= x >> 31;
  w[i].bits = uint16_t((x >> 63) << 15 | (0x3C00 + (x & 0xFF)));
}

// Reads count times 16 bytes, to measure how fast that can be; writes only where their sum is one it cannot be.
__global__ void read_all(uint32_t* never, const uint4* p, size_t count) {
  constexpr int deep = 8;
  const size_t stride = size_t(gridDim.x) * blockDim.x;
  uint32_t sum = 0;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += deep * stride) {
    uint4 v[deep];
#pragma unroll
    for (int u = 0; u < deep; ++u) v[u] = i + u * stride < count ? load_16(p + i + u * stride) : uint4{0, 0, 0, 0};
#pragma unroll
    for (int u = 0; u < deep; ++u) sum |= v[u].x | v[u].y | v[u].z | v[u].w;
  }
  if (sum == 0xFFFFFFFF) *never = sum;
}

}  // namespace kernel

// ---- the backend --------------------------------------------------------------------------------------------------

// The first visible GPU. Everything it is asked for is done in the order asked, later; what brings values to the host
// waits for it. Lives as long as the engines that use it.
class Gpu {
 public:
  using Residual = float;
  using Activation = bf16;
  using CacheValue = bf16;
  static constexpr const char* name = "cuda";
  static constexpr size_t default_chunk = 8192;  // rows of a prompt that go through a layer together

  // Device memory for n values; what it holds at first is anything.
  template <class T>
  class Buffer {
   public:
    size_t size = 0;
    Buffer() = default;
    explicit Buffer(size_t n) : size(n), data_(static_cast<T*>(device_allocate(std::max<size_t>(n, 1) * sizeof(T)))) {
      taken_ += size * sizeof(T);
      most_taken_ = std::max(most_taken_, taken_);
    }
    Buffer(Buffer&& o) noexcept : size(std::exchange(o.size, 0)), data_(std::exchange(o.data_, nullptr)) {}
    Buffer& operator=(Buffer&& o) noexcept {
      std::swap(size, o.size), std::swap(data_, o.data_);
      return *this;
    }
    ~Buffer() {
      if (data_) device_free(data_);
      taken_ -= size * sizeof(T);
    }
    T* get() const { return data_; }

   private:
    T* data_ = nullptr;
  };

  Counters counters;
  std::function<void(double)> on_load;  // told, while weights are brought, what share of them is there

  Gpu() : device_(open_device()), blas_(stream_), best_parts_(arg_max_blocks) {}

  const Device& device() const { return device_; }
  const Stream& stream() const { return stream_; }
  Blas& blas() { return blas_; }
  static uint64_t peak_bytes() { return most_taken_; }  // of Buffers, at any time

  // ---- memory ----

  // Refuses a shape that no kernel here is made for.
  static void check(const Shape& s) {
    const std::string use = "use --device cpu";
    if (s.head_dim != 32 && s.head_dim != 64 && s.head_dim != 128)
      throw Error(2, "--device cuda", "head size " + std::to_string(s.head_dim) + ", the GPU has 32, 64 and 128", use);
    if (s.n_heads / s.n_kv_heads > kernel::decode_heads)
      throw Error(2, "--device cuda",
                  std::to_string(s.n_heads / s.n_kv_heads) + " query heads share a key head, on the GPU at most 8 do",
                  use);
    if (s.hidden % 8 || s.mlp % 8)
      throw Error(
          2, "--device cuda",
          "widths " + std::to_string(s.hidden) + " and " + std::to_string(s.mlp) + ", on the GPU multiples of 8", use);
  }

  // What load() will take, in bytes: weights, and room for the parts of attention's sums.
  uint64_t bytes_to_load(const Model& model) const {
    uint64_t count = 0;
    if (model.id() != loaded_) {
      Weights w = model.weights;
      each_weight(model.config, w, [&](const bf16*& tensor, uint64_t n) {
        if (tensor || !model.has_file()) count += padded(n);
      });
    }
    const uint64_t parts = part_values(model.config.shape);
    return count * sizeof(bf16) + (parts > parts_.size ? parts * sizeof(float) : 0);
  }

  // The model's weights in device memory; they stay until those of another are asked for. A model without a file gets
  // random ones.
  const Weights& load(const Model& model) {
    if (const uint64_t parts = part_values(model.config.shape); parts > parts_.size) {
      parts_ = {};
      parts_ = Buffer<float>(parts);
    }
    if (model.id() == loaded_) return weights_;
    const bool made = !model.has_file() && !model.weights.embedding;
    loaded_ = 0;
    weights_ = model.weights;
    memory_ = {};
    uint64_t count = 0, at = 0;
    auto each = [&](auto visit) {
      each_weight(model.config, weights_, [&](const bf16*& tensor, uint64_t n) {
        if (tensor || made) visit(tensor, n);
      });
    };
    each([&](const bf16*&, uint64_t n) { count += padded(n); });
    memory_ = Buffer<bf16>(count);
    each([&](const bf16*& tensor, uint64_t n) {
      bf16* to = memory_.get() + at;
      if (made) go(kernel::random_weights, blocks(n, 256), 256, 0, to, n, uint32_t(at >> 3));
      else copy_to_device(to, tensor, n * sizeof(bf16), stream_);
      tensor = to;
      at += padded(n);
      if (on_load) wait(), on_load(double(at) / double(count));
    });
    if (model.config.shape.tied) weights_.head = weights_.embedding;
    wait();
    loaded_ = model.id();
    return weights_;
  }

  uint64_t available_memory() const { return open_device().free_bytes; }

  template <class T>
  void upload(T* to, const T* from, size_t n) {
    copy_to_device(to, from, n * sizeof(T), stream_);
    wait();
  }
  template <class T>
  void download(T* to, const T* from, size_t n) {
    copy_to_host(to, from, n * sizeof(T), stream_);
    wait();
  }
  // Where the host can read n values until the next call.
  const float* on_host(const float* p, size_t n) {
    host_.resize(n);
    download(host_.data(), p, n);
    return host_.data();
  }
  void wait() { synchronize(stream_); }

  // ---- one generated token ----

  // Its work, asked for by `work`, which must ask for the same each time and wait for nothing. The first time it runs as
  // it comes, which loads the kernels; the second time it is recorded; from then on the record runs, and `work` is only
  // called so that it counts what it does.
  struct Step {
    bool begun = false;
    Graph graph;
  };
  template <class Work>
  void replay(Step& step, Work work) {
    if (!step.begun) {
      step.begun = true;
      return work();
    }
    if (!step.graph) {
      step.graph = Graph(stream_, work);
    } else {
      struct Only {
        bool& flag;
        explicit Only(bool& f) : flag(f) { flag = true; }
        ~Only() { flag = false; }
      } only(only_count_);
      work();
    }
    step.graph.run(stream_);
  }

  // ---- operations, as Cpu has them ----

  void embed(float* x, const bf16* table, const int* ids, size_t n, size_t d) {
    go(kernel::embed, n, row_threads(d), 0, x, table, ids, int(d));
  }

  void rmsnorm(bf16* y, const float* x, const bf16* w, size_t n, size_t d, float eps) {
    counters.weight_bytes += d * sizeof(bf16);
    go(kernel::rmsnorm, n, row_threads(d), 32 * sizeof(float), y, x, w, int(d), eps);
  }

  // y = x w^T, or, where y is fp32, y += x w^T          x [n, in]; w [out, in]; y [n, out]
  template <class T>
  void matmul(T* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, bool add = false) {
    count_product(n, in, out);
    if (n == 1) return matvec((out + 1) / 2, x, in, kernel::Product<T>{y, w, int(in), int(out), add});
    product(y, x, w, n, in, out, add);
  }

  void queries(bf16* q, const bf16* a, const bf16* wq, const float* cos, const float* sin, size_t n, size_t d,
               size_t n_heads, size_t head_dim) {
    const size_t width = n_heads * head_dim;
    count_product(n, d, width);
    if (n == 1) return matvec(width / 2, a, d, kernel::Queries{q, wq, cos, sin, int(d), int(n_heads), int(head_dim)});
    product(q, a, wq, n, d, width, false);
    go(kernel::rope, blocks(n * width / 16, 256), 256, 0, q, cos, sin, int(n), int(n_heads), int(head_dim));
  }

  void keys_values(LayerCache<bf16>& cache, bf16* k, bf16* v, const bf16* a, const bf16* wk, const bf16* wv,
                   const float* cos, const float* sin, size_t n, size_t d, size_t n_kv_heads, size_t head_dim) {
    const size_t width = n_kv_heads * head_dim;
    count_product(n, d, 2 * width);
    if (n == 1) {
      matvec(
          width, a, d,
          kernel::KeysValues{cache.k, cache.v, cache.capacity, cache.device_begin, uint32_t(cache.used - cache.begin),
                             wk, wv, cos, sin, int(d), int(n_kv_heads), int(head_dim)});
    } else {
      product(k, a, wk, n, d, width, false);
      product(v, a, wv, n, d, width, false);
      put(cache, k, v, cos, sin, n, n_kv_heads, head_dim);
    }
    cache.used += n;
  }

  void append(LayerCache<bf16>& cache, const bf16* k, const bf16* v, size_t n, size_t n_kv_heads, size_t head_dim) {
    put(cache, k, v, nullptr, nullptr, n, n_kv_heads, head_dim);
    cache.used += n;
  }

  void rope_angles(float* cos, float* sin, const float* frequencies, const int* positions, size_t n, size_t half) {
    go(kernel::rope_angles, blocks(n * half, 256), 256, 0, cos, sin, frequencies, positions, int(n), int(half));
  }

  // A few rows share nothing but the cache, so that its slots are cut among blocks; many are taken in tiles.
  void attention(bf16* o, const bf16* q, const LayerCache<bf16>& cache, size_t n, size_t seen, size_t n_heads,
                 size_t n_kv_heads, size_t head_dim) {
    counters.flops += 4 * n_heads * head_dim * (n * seen + n * (n - 1) / 2);
    counters.kv_bytes += (seen - 1) * 2 * n_kv_heads * head_dim * sizeof(bf16);
    if (head_dim == 32) attend<32>(o, q, cache, n, seen, n_heads, n_kv_heads);
    else if (head_dim == 64) attend<64>(o, q, cache, n, seen, n_heads, n_kv_heads);
    else attend<128>(o, q, cache, n, seen, n_heads, n_kv_heads);
  }

  void gated(bf16* gate, bf16* up, const bf16* a, const bf16* wg, const bf16* wu, size_t n, size_t d, size_t f) {
    count_product(n, d, 2 * f);
    if (n == 1) return matvec(f, a, d, kernel::Gated{gate, wg, wu, int(d), int(f)});
    product(gate, a, wg, n, d, f, false);
    product(up, a, wu, n, d, f, false);
    go(kernel::swiglu, blocks(n * f / 8, 256), 256, 0, gate, up, n * f);
  }

  // *best = the id of the largest of logits [vocab], the first of equals; -1 where one is NaN
  void arg_max(int* best, const float* logits, size_t vocab) {
    constexpr size_t shared = 32 * sizeof(kernel::Best);
    go(kernel::arg_max_parts, arg_max_blocks, 256, shared, best_parts_.get(), logits, int(vocab));
    go(kernel::arg_max_join, 1, arg_max_blocks, shared, best, best_parts_.get());
  }

 private:
  static constexpr size_t few_rows = 16, arg_max_blocks = 64;

  static uint64_t padded(uint64_t n) { return (n + 127) / 128 * 128; }  // 256 bytes
  static unsigned blocks(size_t items, size_t each) { return unsigned((items + each - 1) / each); }
  static unsigned row_threads(size_t d) { return unsigned(std::min<size_t>((d / 8 + 31) / 32 * 32, 1024)); }

  // Slices of a cache, so that those of all key heads together are a block for each multiprocessor.
  size_t slices(size_t n_kv_heads) const {
    return std::clamp<size_t>(size_t(device_.multiprocessors) / n_kv_heads, 1, 64);
  }
  uint64_t part_values(const Shape& s) const { return few_rows * s.n_heads * slices(s.n_kv_heads) * (s.head_dim + 2); }

  template <class... P, class... A>
  void go(void (*k)(P...), dim3 grid, size_t threads, size_t shared, A... args) {
    if (!only_count_) launch(k, grid, dim3(unsigned(threads)), shared, stream_, args...);
  }

  void count_product(size_t n, size_t in, size_t out) {
    counters.flops += 2 * n * in * out;
    counters.weight_bytes += n ? in * out * sizeof(bf16) : 0;
  }

  template <class T>
  void product(T* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, bool add) {
    if (!only_count_) blas_.gemm(y, x, w, n, in, out, add ? 1.0f : 0.0f);
  }

  template <class Rows>
  void matvec(size_t pairs, const bf16* x, size_t in, Rows rows) {
    go(kernel::matvec<Rows>, blocks(pairs, kernel::matvec_threads / kernel::warp_size), kernel::matvec_threads, 0, x,
       int(in), rows);
  }

  void put(LayerCache<bf16>& cache, const bf16* k, const bf16* v, const float* cos, const float* sin, size_t n,
           size_t n_kv_heads, size_t head_dim) {
    go(kernel::append, blocks(n * n_kv_heads * head_dim / 16, 256), 256, 0, cache.k, cache.v, cache.capacity,
       cache.used, k, v, cos, sin, int(n), int(n_kv_heads), int(head_dim));
  }

  template <int E>
  void attend(bf16* o, const bf16* q, const LayerCache<bf16>& cache, size_t n, size_t seen, size_t n_heads,
              size_t n_kv_heads) {
    const float scale = 1.44269504f / std::sqrt(float(E));
    const unsigned h = unsigned(n_heads), g = unsigned(n_kv_heads), s = unsigned(slices(n_kv_heads));
    if (n <= few_rows) {
      go(kernel::decode_attention<E>, dim3(s, g, unsigned(n)), kernel::decode_threads, kernel::decode_shared_bytes<E>,
         parts_.get(), q, cache.k, cache.v, cache.capacity, cache.device_begin, int(seen - cache.begin), int(n_heads),
         scale);
      go(kernel::join_parts, dim3(h, unsigned(n)), E, 0, o, parts_.get(), int(s), E, scale);
    } else {
      go(kernel::prefill_attention<E>, dim3(h, blocks(n, kernel::prefill_rows)), kernel::prefill_threads,
         kernel::prefill_shared_bytes<E>, o, q, cache.k, cache.v, cache.capacity, int(n), int(seen), int(n_kv_heads),
         scale);
    }
  }

  static inline uint64_t taken_ = 0, most_taken_ = 0;  // bytes

  Device device_;
  Stream stream_;
  Blas blas_;
  Buffer<bf16> memory_;              // all weights
  Weights weights_;                  // where in it
  uint64_t loaded_ = 0;              // whose: Model::id
  Buffer<float> parts_;              // [few_rows, heads, slices, head_dim + 2], of attention
  Buffer<kernel::Best> best_parts_;  // [arg_max_blocks]
  std::vector<float> host_;
  bool only_count_ = false;
};

}  // namespace speed
