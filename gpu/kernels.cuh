// kernels.cuh - the operations of cpu/reference.h as CUDA kernels: all but attention, which is in attention.cuh.
//
// They run on every GPU from compute capability 8.0 on. Weights, cache and the inputs of tensor cores are bf16; sums
// and the residual stream are fp32. No sum depends on the order in which blocks run: two runs give the same bits.
//
// Names in contracts: n rows of a call, d hidden, e head_dim, h query heads, g key/value heads, f MLP width. "Moves" is
// what a kernel must at least read and write, each value once; tables of a few KiB are not counted.
#pragma once

#include "cuda.cuh"

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

// The same over the block, through warp_sums [warps] in shared memory. Whole block.
DEVICE float block_sum(float v, float* warp_sums) {
  v = warp_sum(v);
  if (threadIdx.x % warp_size == 0) warp_sums[threadIdx.x / warp_size] = v;
  sync_threads();
  float sum = 0;
  for (unsigned w = 0; w < blockDim.x / warp_size; ++w) sum += warp_sums[w];
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

// For whole rows          gate, up [count], in multiples of 8      arXiv 2002.05202
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

// Cosine and sine of an fp32 angle of any size, right to fp32: a multiple of pi/2 is subtracted in double precision,
// with pi/2 in two parts, and Taylor series are right to 1e-11 on the rest. (Those of CUDA's library use local memory.)
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
// cache_k, cache_v [g, capacity, e]; cos, sin [n, e/2], null: k is stored as it is. Threads as in `rope`; moves 8 n g e
// bytes.
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
// A generated token spends its time here: every weight is read once, so memory bandwidth is the limit.

constexpr int matvec_threads = 128;

// Dot products of x [in] with pairs of weight rows. The functor `rows` picks the two rows of a pair and consumes their
// dot products, so that RoPE or SwiGLU needs no other thread:
//   pairs(), first(p), second(p)   the number of pairs; the two rows of pair p, [in]
//   done(p, a, b)                  called by one thread with the two dot products
// A warp a pair. A lane has 12 loads of 16 bytes in flight, eight of weights and four of x: the bandwidth of an H100
// times its latency is about 32 KiB a multiprocessor. The launch bounds say one block a multiprocessor, which lets the
// compiler use the registers for that; without, it moves each load down to its use. in in multiples of 8. Moves 4 in
// bytes a pair; x comes out of L1.
template <class Rows>
__global__ void __launch_bounds__(matvec_threads, 1) matvec(const bf16* x, int in, Rows rows) {
  const int p = int(blockIdx.x) * (matvec_threads / warp_size) + int(threadIdx.x) / warp_size;
  const int lane = int(threadIdx.x) % warp_size;
  if (p >= rows.pairs()) return;
  const bf16 *first = rows.first(p), *second = rows.second(p);
  constexpr int step = warp_size * 8, unroll = 4;
  float a = 0, b = 0;
  auto add = [&](uint4 w0, uint4 w1, uint4 v) {
    float f[8], s[8], y[8];
    load_8(f, w0), load_8(s, w1), load_8(y, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) a += f[j] * y[j], b += s[j] * y[j];
  };
  int i = lane * 8;
  for (; i + (unroll - 1) * step < in; i += unroll * step) {
    uint4 w0[unroll], w1[unroll], v[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      w0[u] = load_16_once(first + i + u * step);
      w1[u] = load_16_once(second + i + u * step);
      v[u] = load_16(x + i + u * step);
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) add(w0[u], w1[u], v[u]);
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

// Queries: q [h, e] = rope(w x)          w [h e, in]; cos, sin [e/2]. A pair is what RoPE rotates.
struct ProjectQ {
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
struct ProjectKV {
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
struct GateUp {
  bf16* y;
  const bf16 *gate, *up;
  int in, f;
  DEVICE int pairs() const { return f; }
  DEVICE const bf16* first(int p) const { return gate + size_t(p) * in; }
  DEVICE const bf16* second(int p) const { return up + size_t(p) * in; }
  DEVICE void done(int p, float a, float b) const { y[p] = round_bf16(silu(a) * b); }
};

// ---- the most likely token ------------------------------------------------------------------------------------------

struct Best {
  float value;
  int index;  // -1: a NaN was seen
};
// The larger value, of equals the lower index; a NaN wins over all. The result is the same in any order.
DEVICE Best better(Best a, Best b) {
  if (a.index < 0 || b.index < 0) return {0, -1};
  return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}
// The best of the block, in thread 0. Shared memory: a Best a warp. Whole block.
DEVICE Best block_best(Best v) {
  Best* of_warp = shared_memory<Best>();
#pragma unroll
  for (int mask = warp_size / 2; mask > 0; mask /= 2)
    v = better(v, {shuffle_xor(v.value, mask), shuffle_xor(v.index, mask)});
  if (threadIdx.x % warp_size == 0) of_warp[threadIdx.x / warp_size] = v;
  sync_threads();
  for (unsigned w = 0; threadIdx.x == 0 && w < blockDim.x / warp_size; ++w) v = better(v, of_warp[w]);
  return v;
}

// Each block's best of its part of the logits [vocab].
__global__ void arg_max_partial(Best* partials, const float* logits, int vocab) {
  Best best = {-INFINITY, vocab};
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < vocab; i += int(gridDim.x * blockDim.x))
    best = better(best, {logits[i], logits[i] == logits[i] ? i : -1});
  best = block_best(best);
  if (threadIdx.x == 0) partials[blockIdx.x] = best;
}
// *id = the best of partials, a thread each.
__global__ void arg_max_combine(int* id, const Best* partials) {
  const Best best = block_best(partials[threadIdx.x]);
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

// Reads count times 16 bytes, to measure the read bandwidth. The write can never happen; it keeps the compiler from
// removing the reads.
__global__ void __launch_bounds__(256, 1) read_all(uint32_t* never, const uint4* p, size_t count) {
  constexpr int unroll = 8;
  const size_t stride = size_t(gridDim.x) * blockDim.x;
  uint32_t sum = 0;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += unroll * stride) {
    uint4 v[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) v[u] = i + u * stride < count ? load_16(p + i + u * stride) : uint4{0, 0, 0, 0};
#pragma unroll
    for (int u = 0; u < unroll; ++u) sum |= v[u].x | v[u].y | v[u].z | v[u].w;
  }
  if (sum == 0xFFFFFFFF) *never = sum;
}

}  // namespace kernel

}  // namespace speed
