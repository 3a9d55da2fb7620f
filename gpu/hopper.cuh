// hopper.cuh - attention of many rows on Hopper (H100, H200, GH200): what prefill_attention of attention.cuh computes,
// with instructions that only compute capability 9.0 has.
//
// The plain kernel is limited by its warps: they issue every copy and every small product themselves, and
// FlashAttention-2, which it follows, reaches 335 TFLOP/s on an H100. Two instructions lift that limit, and
// FlashAttention-3 (Shah et al., arXiv 2407.08608) reaches 600 with them:
//   - a bulk tensor copy (TMA): one thread asks for a whole tile, and a barrier in shared memory says when it is there;
//   - a warpgroup product (wgmma): four warps multiply 64 rows by a tile that stays in shared memory. It runs in the
//     background, so that the softmax of one tile is computed during the products of another.
// This kernel is that method without its generality: bf16, causal, heads of 64 and 128, no dropout, no backward pass.
#pragma once

#include "attention.cuh"

namespace speed {

namespace kernel {

constexpr int hopper_rows = 128, hopper_slots = 128;  // of a block; of a tile of the cache
constexpr int warpgroup = 128;                        // threads
constexpr int hopper_threads = 3 * warpgroup;         // one that copies, two that compute 64 rows each

// A block's shared memory. A tile of 128 rows lies as E / 64 halves [128][64], as the copy engine writes it: the
// eight 16-byte pieces of a half's row are permuted by the row's number ("128-byte swizzle"), so that reading a column
// of pieces meets every bank once. This needs tiles that begin at multiples of 1024 bytes.
template <int E>
struct HopperShared {
  static constexpr int tile_bytes = 128 * E * int(sizeof(bf16)), half_bytes = 128 * 64 * int(sizeof(bf16));
  unsigned char q[tile_bytes], k[2][tile_bytes], v[2][tile_bytes];
  Barrier q_full, k_full[2], v_full[2], k_empty[2], v_empty[2];
};
template <int E>
constexpr size_t hopper_shared_bytes = sizeof(HopperShared<E>) + 1024;  // its start is moved to a multiple of 1024

// How a warpgroup product finds a matrix in such a tile (PTX ISA, "Matrix descriptor"): address, the distance of two
// halves, the distance of two groups of 8 rows (1024 bytes), 128-byte swizzle; in units of 16 bytes.
DEVICE uint64_t describe(const void* tile, int bytes_to_next_half) {
  return uint64_t(shared_address(tile) >> 4) | uint64_t(bytes_to_next_half >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// S [64, 128] = Q K^T: 16 values of each head a step. A step's values are 32 bytes of a half's row.
template <int E>
DEVICE void multiply_q_k(float (&score)[64], uint64_t q, uint64_t k) {
  using Shared = HopperShared<E>;
#pragma unroll
  for (int step = 0; step < E / 16; ++step) {
    const int at = (step / 4 * Shared::half_bytes + step % 4 * 32) >> 4;
    warpgroup_product<128>(score, q + at, k + at, step > 0);
  }
}

// O [64, E] += P V: 16 slots a step, which are 16 rows of 128 bytes.
template <int E>
DEVICE void multiply_p_v(float (&out)[E / 2], const uint32_t (&p)[8][4], uint64_t v) {
#pragma unroll
  for (int step = 0; step < 8; ++step) warpgroup_product<E>(out, p[step], v + (step * 16 * 128 >> 4));
}

// A thread's two rows of a tile of scores, 8 apart: [4 j + 2 half + c] is column 8 j + lane % 4 * 2 + c of row `half`.
// Columns from visible + 8 half on are masked.
DEVICE void mask(float (&score)[64], int visible) {
#pragma unroll
  for (int i = 0; i < 64; ++i)
    if (i / 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2 >= visible + i / 2 % 2 * 8) score[i] = -INFINITY;
}

// The running softmax of one more tile: scores become weights 2^((score - row_max) scale), unnormalised, and `factor`
// is what all earlier weights must be multiplied by because row_max has grown.
DEVICE void softmax(float (&score)[64], float (&row_max)[2], float (&sum)[2], float (&factor)[2], float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float m = row_max[half];
#pragma unroll
    for (int j = 0; j < 64; j += 4) m = fmaxf(m, fmaxf(score[j + 2 * half], score[j + 2 * half + 1]));
    m = fmaxf(m, shuffle_xor(m, 1));
    m = fmaxf(m, shuffle_xor(m, 2));
    factor[half] = exp2_fast((row_max[half] - m) * scale);
    row_max[half] = m;
    sum[half] *= factor[half];
    const float shift = m * scale;
#pragma unroll
    for (int j = 0; j < 64; j += 4)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& p = score[j + 2 * half + c];
        p = exp2_fast(fmaf(p, scale, -shift));
        sum[half] += p;
      }
  }
}

// Weights as the left operand of P V: the layout of a result is that of an operand, so no value changes threads.
DEVICE void pack(uint32_t (&p)[8][4], const float (&score)[64]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i / 4][i % 4] = pack_bf16(score[2 * i], score[2 * i + 1]);
}

template <int N>
DEVICE void rescale(float (&out)[N], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] *= factor[i / 2 % 2];
}

// Grouped-query attention of many rows: row r sees the first seen + r slots of the cache, seen >= 1.
// o [n, h, E]; query head i reads key head i / (h/g); scale = log2(e) / sqrt(E)
// q: tensor map of [n, h, E]; k, v: of the slots in use, seen + n - 1, of [g, capacity, E]. Maps end there, so the copy
// engine writes zeros for what lies beyond: nothing past the last slot is read, and 0 * NaN cannot arise.
//
// A block takes 128 rows of one query head and goes through the slots in tiles of 128, from the diagonal backwards.
// Grid: h, then blocks of rows, the last rows first, because they see most. One warpgroup copies: a single thread keeps
// two tiles of keys and two of values on their way. Two warpgroups compute, 64 rows each. Each starts the scores of the
// next tile and P V of this one together, and computes the softmax of those scores while P V runs. They take turns in
// starting products, so that one's softmax falls into the other's products: e^x is the second limit, at 4096 FLOPs a
// cycle of the tensor cores against 16 exponentials. Bound by the tensor cores: 4 h E FLOPs a row and slot.
template <int E>
__global__ void __launch_bounds__(hopper_threads, 1)
    prefill_attention_hopper(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                             const __grid_constant__ TensorMap v, bf16* o, int n, int seen, int kv_heads, float scale) {
#ifdef SPEED_HOPPER
  using Shared = HopperShared<E>;
  unsigned char* memory = shared_memory<unsigned char>();
  Shared& shared = *reinterpret_cast<Shared*>(memory + (0u - shared_address(memory)) % 1024);
  const int heads = int(gridDim.x), head = int(blockIdx.x), kv_head = head / (heads / kv_heads);
  const int first = int(gridDim.y - 1 - blockIdx.y) * hopper_rows;
  const int rows = n - first < hopper_rows ? n - first : hopper_rows;
  const int tiles = (seen + first + rows - 1 + hopper_slots - 1) / hopper_slots;  // that the block's last row sees
  auto tile = [&](int i) { return (tiles - 1 - i) * hopper_slots; };              // first slot of the i-th tile to come
  // Use i of a tile's place and barriers is number i / 2 of place i % 2, and the barrier's phases alternate in parity.
  auto parity = [](int i) { return i / 2 % 2; };

  if (threadIdx.x == 0) {
    barrier_init(&shared.q_full, 1);
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.k_full[i], 1), barrier_init(&shared.v_full[i], 1);    // by the copying thread
      barrier_init(&shared.k_empty[i], 8), barrier_init(&shared.v_empty[i], 8);  // by each warp that computes
    }
    barriers_ready();
  }
  sync_threads();

  if (threadIdx.x < warpgroup) {  // ---- copies ----
    registers_down<24>();
    if (threadIdx.x > 0) return;
    auto copy = [&](void* to, const TensorMap& map, Barrier* full, int row, int of_head) {
      barrier_expect(full, Shared::tile_bytes);
      copy_tile(to, map, full, row, of_head);
    };
    copy(shared.q, q, &shared.q_full, first, head);
    for (int i = 0; i <= tiles; ++i) {  // keys one tile ahead of values, as they are used
      if (i < tiles) {
        barrier_wait(&shared.k_empty[i % 2], parity(i) ^ 1);  // passes at the first use
        copy(shared.k[i % 2], k, &shared.k_full[i % 2], tile(i), kv_head);
      }
      if (const int j = i - 1; j >= 0) {
        barrier_wait(&shared.v_empty[j % 2], parity(j) ^ 1);
        copy(shared.v[j % 2], v, &shared.v_full[j % 2], tile(j), kv_head);
      }
    }
    return;
  }

  // ---- computes ----
  registers_up<240>();
  const int group = int(threadIdx.x) / warpgroup - 1, lane = int(threadIdx.x) % warp_size;
  const int warp_row = group * 64 + int(threadIdx.x) % warpgroup / warp_size * 16;
  const uint64_t q_rows = describe(shared.q + group * 64 * 128, 16);  // 64 rows of 128 bytes on, in each half
  auto k_tile = [&](int i) { return describe(shared.k, 16) + (i % 2 * Shared::tile_bytes >> 4); };
  auto v_tile = [&](int i) { return describe(shared.v, Shared::half_bytes) + (i % 2 * Shared::tile_bytes >> 4); };
  auto release = [&](Barrier* empty) {
    if (lane == 0) barrier_arrive(empty);
  };
  // Named barrier 1 + group: this group waits there for its turn, and the other passes it on.
  auto await_turn = [&] { named_barrier_wait(1 + group, 2 * warpgroup); };
  auto pass_turn = [&] { named_barrier_arrive(2 - group, 2 * warpgroup); };
  auto mask_diagonal = [&](float(&score)[64], int slot) {  // the same for all of a warpgroup; one or two tiles need it
    if (slot + hopper_slots > seen + first + group * 64) mask(score, seen + first + warp_row + lane / 4 - slot);
  };

  float score[64], out[E / 2] = {}, row_max[2] = {lowest, lowest}, sum[2] = {}, factor[2];
  uint32_t p[8][4];

  if (group == 1) pass_turn();  // the first turn is group 0's
  barrier_wait(&shared.q_full, 0);
  barrier_wait(&shared.k_full[0], 0);
  {
    Products batch;
    multiply_q_k<E>(score, q_rows, k_tile(0));
  }
  products_wait<0>();
  settled(score);
  release(&shared.k_empty[0]);
  mask_diagonal(score, tile(0));
  softmax(score, row_max, sum, factor, scale);
  pack(p, score);
  if (tiles > 1) barrier_wait(&shared.k_full[1], 0);

  for (int i = 1; i < tiles; ++i) {
    const int j = i - 1;
    await_turn();
    {
      Products batch;
      multiply_q_k<E>(score, q_rows, k_tile(i));
    }
    barrier_wait(&shared.v_full[j % 2], parity(j));
    {
      Products batch;
      multiply_p_v<E>(out, p, v_tile(j));
    }
    pass_turn();
    products_wait<1>();  // the scores are there, P V still runs
    settled(score);
    release(&shared.k_empty[i % 2]);
    mask_diagonal(score, tile(i));
    softmax(score, row_max, sum, factor, scale);
    // The next keys, waited for here and not where they are used: the branch in it keeps ptxas from moving the wait for
    // P V above the softmax, after which nothing would overlap.
    if (i + 1 < tiles) barrier_wait(&shared.k_full[(i + 1) % 2], parity(i + 1));
    products_wait<0>();
    settled(out);
    release(&shared.v_empty[j % 2]);
    rescale(out, factor);
    pack(p, score);
  }

  const int j = tiles - 1;
  barrier_wait(&shared.v_full[j % 2], parity(j));
  {
    Products batch;
    multiply_p_v<E>(out, p, v_tile(j));
  }
  products_wait<0>();
  settled(out);
  if (group == 0) await_turn();  // takes the last turn that group 1 passed

  const size_t width = size_t(heads) * E;
  o += first * width + size_t(head) * E;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float all = sum[half];
    all += shuffle_xor(all, 1);
    all += shuffle_xor(all, 2);
    const float share = 1.0f / all;
    const int row = warp_row + half * 8 + lane / 4;
    if (row >= rows) continue;
#pragma unroll
    for (int i = 0; i < E / 8; ++i)
      store_4(o + row * width + i * 8 + lane % 4 * 2,
              pack_bf16(out[4 * i + 2 * half] * share, out[4 * i + 2 * half + 1] * share));
  }
#endif
}

// *yes = 1 if the kernel above has a body here. Not so where a program built for another GPU runs on Hopper from its
// PTX.
__global__ void hopper_is_compiled(int* yes) {
#ifdef SPEED_HOPPER
  *yes = 1;
#else
  *yes = 0;
#endif
}

}  // namespace kernel

}  // namespace speed
