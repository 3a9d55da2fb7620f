// The emulator itself, on tiny kernels: right ones give the right answer under every seed, and each planted fault is
// caught: by an error that names it, or by a wrong answer under one of a few seeds.
#include "on_device.h"

using namespace test;

namespace tiny {

using namespace speed;

constexpr int threads = 128, n_warps = threads / 32;

// What a seed is for: some interleaving in which the fault shows.
constexpr uint64_t seeds = 8;

// Runs `work` under every seed; how often its result was not `right`.
template <class T, class Work>
int wrong_answers(const std::vector<T>& right, Work work) {
  int wrong = 0;
  for (emulator::options.seed = 1; emulator::options.seed <= seeds; ++emulator::options.seed) {
    const std::vector<T> got = work();
    wrong += got.size() != right.size() || std::memcmp(got.data(), right.data(), right.size() * sizeof(T)) != 0;
  }
  emulator::options.seed = 1;
  return wrong;
}

template <class T, class... P, class... A>
std::vector<T> run(void (*kernel)(T*, P...), size_t n, dim3 grid, size_t shared, A... args) {
  Stream s;
  OnDevice<T> y(s, n);
  launch(kernel, grid, threads, shared, s, y.get(), args...);
  return y.read();
}

// The same, where a fault may also end in an error: then no answer.
template <class T, class... P, class... A>
std::vector<T> run_or_nothing(void (*kernel)(T*, P...), size_t n, size_t shared, A... args) {
  try {
    return run(kernel, n, 1, shared, args...);
  } catch (const Error&) {
    return {};
  }
}

std::string error_of(void (*kernel)(float*), dim3 block = threads, size_t shared = 4096, size_t bytes = 4096) {
  Stream s;
  OnDevice<float> y(s, bytes / sizeof(float));
  synchronize(s);
  launch(kernel, 1, block, shared, s, y.get());
  try {
    synchronize(s);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// ---- tensor cores and matrices ----

// What the PTX ISA says of mma.m16n8k16 (section "Matrix fragments"), element by element: lane, element -> row, column.
struct Place {
  int row, column;
};
Place place_a(int lane, int i) {
  return {lane / 4 + (i < 2 || (i >= 4 && i < 6) ? 0 : 8), lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
Place place_b(int lane, int i) { return {lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8), lane / 4}; }
Place place_d(int lane, int i) { return {lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + (i & 1)}; }

// d [16, 8] += a [16, 16] b [16, 8], every element put where the ISA says
__global__ void product(float* d, const bf16* a, const bf16* b) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t fa[4], fb[2];
  float fd[4];
  for (int i = 0; i < 4; ++i) {
    const Place low = place_a(lane, 2 * i), high = place_a(lane, 2 * i + 1);
    fa[i] = uint32_t(a[high.row * 16 + high.column].bits) << 16 | a[low.row * 16 + low.column].bits;
  }
  for (int i = 0; i < 2; ++i) {
    const Place low = place_b(lane, 2 * i), high = place_b(lane, 2 * i + 1);
    fb[i] = uint32_t(b[high.row * 8 + high.column].bits) << 16 | b[low.row * 8 + low.column].bits;
  }
  for (int i = 0; i < 4; ++i) fd[i] = d[place_d(lane, i).row * 8 + place_d(lane, i).column];
  mma_m16n8k16(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[place_d(lane, i).row * 8 + place_d(lane, i).column] = fd[i];
}

// The same product as a kernel would do it: through shared memory and ldmatrix.
//   a [16, 16] by rows; b [8, 16] by columns of the product, or, `across`, [16, 8] by its rows
template <bool across, bool transposed>
__global__ void product_by_ldmatrix(float* d, const bf16* a, const bf16* b) {
  bf16 *sa = shared_memory<bf16>(), *sb = sa + 256;
  const int lane = int(threadIdx.x);
  if (lane >= 32) return;
  for (int i = lane; i < 256; i += 32) sa[i] = a[i];
  for (int i = lane; i < 128; i += 32) sb[i] = b[i];
  sync_warp();
  uint32_t fa[4], four[4];
  load_matrix_x4(fa, sa + lane % 16 * 16 + lane / 16 * 8);
  // Matrices 0 and 1: k 0 to 7 and 8 to 15. The other two are not needed here.
  const bf16* row = across ? sb + lane % 16 * 8 : sb + lane % 8 * 16 + lane / 8 % 2 * 8;
  if (transposed) load_matrix_x4_transposed(four, row);
  else load_matrix_x4(four, row);
  const uint32_t fb[2] = {four[0], four[1]};
  float fd[4] = {};
  mma_m16n8k16(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[place_d(lane, i).row * 8 + place_d(lane, i).column] = fd[i];
}

// ---- order ----

// y[i] = x[i] through shared memory, copied by another thread
template <bool waits, bool barrier>
__global__ void copy_across(float* y, const float* x) {
  float* s = shared_memory<float>();
  copy_async_16(s + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
  copy_async_commit();
  if (waits) copy_async_wait<0>();
  if (barrier) sync_threads();
  const unsigned from = (threadIdx.x + 37) % threads;
  for (unsigned i = 0; i < 4; ++i) y[4 * from + i] = s[4 * from + i];
}

// Sums `steps` blocks of x through two stages: the next is copied while one is read.
template <int left, bool released>
__global__ void two_stages(float* y, const float* x, int steps) {
  float* s = shared_memory<float>();
  auto fetch = [&](int step) {
    copy_async_16(s + (step % 2 * threads + int(threadIdx.x)) * 4, x + (step * threads + int(threadIdx.x)) * 4,
                  step < steps);
    copy_async_commit();
  };
  float sum = 0;
  fetch(0);
  for (int step = 0; step < steps; ++step) {
    fetch(step + 1);
    copy_async_wait<left>();
    sync_threads();
    for (int i = 0; i < 4; ++i) sum += s[(step % 2 * threads + (int(threadIdx.x) + 37) % threads) * 4 + i];
    if (released) sync_threads();
  }
  y[threadIdx.x] = sum;
}

// y[i] = the sum of all x, by a word of shared memory a warp
template <bool first, bool second>
__global__ void block_sum(float* y, const float* x) {
  float* s = shared_memory<float>();
  for (int turn = 0; turn < 3; ++turn) {
    float v = x[turn * threads + int(threadIdx.x)];
    for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = v;
    if (first) sync_threads();
    float sum = 0;
    for (int w = 0; w < n_warps; ++w) sum += s[w];
    y[turn * threads + int(threadIdx.x)] = sum;
    if (second) sync_threads();
  }
}

template <bool sync>
__global__ void neighbour(int* y) {
  int* s = shared_memory<int>();
  s[threadIdx.x] = int(threadIdx.x);
  if (sync) sync_warp();
  y[threadIdx.x] = s[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

// The last block to come sums what all left.
__global__ void last_block(uint32_t* y, int blocks) {
  uint32_t *count = y, *parts = y + 1, *sum = y + 1 + blocks;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = blockIdx.x + 1;
    memory_fence();
    if (atomic_add(count, 1) == uint32_t(blocks) - 1) {
      *sum = 0;
      for (int i = 0; i < blocks; ++i) *sum += parts[i];
    }
  }
}
__global__ void block_zero_first(int* y) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *y = 0;
  if (blockIdx.x > 0 && threadIdx.x == 0) *y += 1;
}

__global__ void uninitialised(float* y) { y[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }

// ---- Hopper ----

constexpr int tile_values = 128 * 64;

// The start of shared memory, moved to a multiple of 1024 bytes.
template <class T>
T* aligned_shared() {
  unsigned char* p = shared_memory<unsigned char>();
  return reinterpret_cast<T*>(p + (0u - shared_address(p)) % 1024);
}
constexpr size_t hopper_bytes = 4 * tile_values * sizeof(bf16) + 64 + 1024;

template <int E>
struct Tiles {
  bf16 tile[2][128 * E];
  Barrier full, other;
};

// A tile of a tensor as it lies in shared memory
template <int E, bool waits = true, int missing = 0>
__global__ void tile_of(bf16* y, const TensorMap x, int row, int head) {
  auto& shared = *aligned_shared<Tiles<E>>();
  if (threadIdx.x == 0) {
    barrier_init(&shared.full, 1);
    barriers_ready();
  }
  sync_threads();
  if (threadIdx.x == 0) {
    barrier_expect(&shared.full, 128 * E * int(sizeof(bf16)) + missing);
    copy_tile(shared.tile[0], x, &shared.full, row, head);
  }
  if (waits) barrier_wait(&shared.full, 0);
  for (int i = int(threadIdx.x); i < 128 * E; i += threads) y[i] = shared.tile[0][i];
  if (!waits) barrier_wait(&shared.full, 0);
}

// Five rounds through one barrier: thread 0 writes what the others read, who then let it go on.
template <bool right_parity, bool released>
__global__ void five_phases(int* y) {
  struct Shared {
    int value;
    Barrier full, empty;
  };
  auto& shared = *aligned_shared<Shared>();
  if (threadIdx.x == 0) {
    barrier_init(&shared.full, 1);
    barrier_init(&shared.empty, threads - 32);
    barriers_ready();
  }
  sync_threads();
  for (int i = 0; i < 5; ++i) {
    if (threadIdx.x == 0) {
      if (released) barrier_wait(&shared.empty, i % 2 ^ 1);
      shared.value = 10 * i;
      barrier_arrive(&shared.full);
    } else if (threadIdx.x >= 32) {
      barrier_wait(&shared.full, right_parity ? i % 2 : i % 2 ^ 1);
      y[i * threads + int(threadIdx.x)] = shared.value;
      barrier_arrive(&shared.empty);
    }
  }
}

// Products of a warpgroup, every element where the ISA says it lies. d [64, N] (+)= A B, all whole numbers.
//   Shared memory: two tiles of 64 columns for A, two for B. Descriptors are the host's, less the tiles' address.
template <int N, bool registers, bool waits = true, bool batched = true>
__global__ void group_product(float* d, const bf16* memory, const bf16* a, uint64_t at_a, uint64_t at_b, bool add) {
  bf16* shared = aligned_shared<bf16>();
  for (int i = int(threadIdx.x); i < 4 * tile_values; i += threads) shared[i] = memory[i];
  sync_threads();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  float part[N / 2];
  auto place = [&](int i) { return (warp * 16 + lane / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2; };
  for (int i = 0; i < N / 2; ++i) part[i] = d[place(i)];
  uint32_t fa[4];
  for (int i = 0; i < 4; ++i) {
    const Place low = place_a(lane, 2 * i), high = place_a(lane, 2 * i + 1);
    fa[i] = uint32_t(a[(warp * 16 + high.row) * 16 + high.column].bits) << 16 |
            a[(warp * 16 + low.row) * 16 + low.column].bits;
  }
  const uint64_t start = shared_address(shared) >> 4;
  auto multiply = [&] {
    if constexpr (registers) warpgroup_product<N>(part, fa, at_b + start);
    else warpgroup_product<N>(part, at_a + start, at_b + start, add);
  };
  if constexpr (batched) {
    Products batch;
    multiply();
  } else {
    multiply();
  }
  if (waits) products_wait<0>();
  settled(part);
  for (int i = 0; i < N / 2; ++i) d[place(i)] = part[i];
  if (!waits) products_wait<0>();
}

// Two batches under way: after wait<1> the first is there, the second is not.
__global__ void two_batches(float* y) {
  bf16* shared = aligned_shared<bf16>();
  for (int i = int(threadIdx.x); i < 2 * tile_values; i += threads) shared[i] = round_bf16(1.0f);
  sync_threads();
  const uint64_t at = shared_address(shared) >> 4 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
  float first[64] = {}, second[64] = {};
  {
    Products batch;
    warpgroup_product<128>(first, at, at, false);
    warpgroup_product<128>(first, at, at, true);
  }
  {
    Products batch;
    warpgroup_product<128>(second, at, at, false);
  }
  products_wait<1>();
  y[threadIdx.x] = first[63], y[threads + threadIdx.x] = second[63];
  products_wait<0>();
  y[2 * threads + threadIdx.x] = second[63];
}

// Two warpgroups increment one word by turns; what each finds there shows the order.
template <bool turns>
__global__ void by_turns(int* y) {
  int* word = aligned_shared<int>();
  const int group = int(threadIdx.x) / 128;
  if (threadIdx.x == 0) *word = 0;
  sync_threads();
  if (turns && group == 1) named_barrier_arrive(1, 256);
  for (int i = 0; i < 4; ++i) {
    if (turns) named_barrier_wait(1 + group, 256);
    if (threadIdx.x % 128 == 0) y[group * 4 + i] = (*word)++;
    if (turns) named_barrier_arrive(2 - group, 256);
  }
  if (turns && group == 0) named_barrier_wait(1, 256);
}

__global__ void waits_for_nobody(float*) {
  auto& shared = *aligned_shared<Tiles<64>>();
  if (threadIdx.x == 0) barrier_init(&shared.full, 1), barriers_ready();
  sync_threads();
  barrier_wait(&shared.full, 0);
}
__global__ void waits_without_init(float*) { barrier_wait(&aligned_shared<Tiles<64>>()->full, 0); }
__global__ void no_fence(float*) {
  auto& shared = *aligned_shared<Tiles<64>>();
  if (threadIdx.x == 0) barrier_init(&shared.full, threads);
  sync_threads();
  barrier_arrive(&shared.full);
}
__global__ void too_many_arrive(float*) {
  auto& shared = *aligned_shared<Tiles<64>>();
  if (threadIdx.x > 0) return;
  barrier_init(&shared.full, 2), barriers_ready();
  barrier_expect(&shared.full, 64);
  for (int i = 0; i < 2; ++i) barrier_arrive(&shared.full);
}
__global__ void tile_unaligned(float* y) {
  auto& shared = *aligned_shared<Tiles<64>>();
  if (threadIdx.x > 0) return;
  barrier_init(&shared.full, 1), barriers_ready();
  copy_tile(shared.tile[0] + 64, TensorMap{reinterpret_cast<bf16*>(y), 1, 1, 64, 64, 64}, &shared.full, 0, 0);
}
__global__ void tile_past_device(float* y) {
  auto& shared = *aligned_shared<Tiles<64>>();
  if (threadIdx.x > 0) return;
  barrier_init(&shared.full, 1), barriers_ready();
  copy_tile(shared.tile[0], TensorMap{reinterpret_cast<bf16*>(y), 2049, 1, 64, 64, 64}, &shared.full, 2040, 0);
}
__global__ void tile_left_behind(float* y) {
  auto& shared = *aligned_shared<Tiles<64>>();
  if (threadIdx.x > 0) return;
  barrier_init(&shared.full, 1), barriers_ready();
  barrier_expect(&shared.full, 128 * 64 * 2);
  copy_tile(shared.tile[0], TensorMap{reinterpret_cast<bf16*>(y), 8, 1, 64, 64, 64}, &shared.full, 0, 0);
}
__global__ void product_left_behind(float*) {
  const uint64_t at = shared_address(aligned_shared<bf16>()) >> 4 | uint64_t(1) << 62;
  float d[64] = {};
  Products batch;
  warpgroup_product<128>(d, at, at, false);
}
__global__ void half_a_warpgroup(float*) {
  if (threadIdx.x < 64) products_wait<0>();
}
__global__ void different_operands(float*) {
  const uint64_t at = (shared_address(aligned_shared<bf16>()) >> 4) + threadIdx.x / 32 | uint64_t(1) << 62;
  float d[64] = {};
  Products batch;
  warpgroup_product<128>(d, at, at, false);
}
__global__ void too_many_registers(float*) {
  if (threadIdx.x < 128) registers_down<24>();
  else registers_up<248>();
}
__global__ void registers_the_wrong_way(float*) { registers_up<160>(); }
__global__ void arrival_left_over(float*) {
  if (threadIdx.x < 128) named_barrier_arrive(3, 256);
}
__global__ void barriers_disagree(float*) { named_barrier_arrive(3, threadIdx.x < 32 ? 256 : 128); }

// ---- what no GPU promises ----

__global__ void some_never_come(float*) {
  if (threadIdx.x < 64) sync_threads();
}
__global__ void two_barriers(float*) {
  if (threadIdx.x < 64) sync_threads();
  else sync_threads();
}
__global__ void half_a_warp(float* y) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = shuffle(1.0f, 0);
}
__global__ void half_at_a_barrier(float* y) {
  if (threadIdx.x % 32 < 16) sync_threads();
  y[threadIdx.x] = shuffle(1.0f, 0);
}
__global__ void two_shuffles(float* y) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = shuffle(1.0f, 0);
  else y[threadIdx.x] = shuffle(2.0f, 0);
}
__global__ void half_a_product(float* y) {
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  if (threadIdx.x != 5) mma_m16n8k16(d, a, b);
  y[threadIdx.x] = d[0];
}
__global__ void copies_past_shared(float* y) { copy_async_16(shared_memory<char>() + 4096 - 8 + 8, y, true); }
__global__ void copies_unaligned(float* y) { copy_async_16(shared_memory<char>() + 8, y, true); }
__global__ void copies_from_host(float*) {
  alignas(16) static float host[4];
  copy_async_16(shared_memory<char>(), host, true);
}
__global__ void loads_past_device(float* y) { load_16(y + 1024); }
__global__ void loads_unaligned(float* y) { load_16_once(y + 1); }
__global__ void matrix_past_shared(float*) {
  uint32_t r[4];
  load_matrix_x4(r, shared_memory<char>() + 4096 * (threadIdx.x == 31));
}
__global__ void writes_past_device(float* y) { y[1024 + threadIdx.x % 32] = 1; }
__global__ void writes_before_device(float* y) { y[-1 - int(threadIdx.x % 32)] = 1; }
__global__ void writes_past_shared(float*) { shared_memory<float>()[1024] = 1; }
__global__ void nothing(float*) {}
__global__ void good(float* y) { y[threadIdx.x] = float(threadIdx.x); }

}  // namespace tiny

using namespace tiny;
using Catch::Matchers::Contains;

TEST_CASE("the emulated tensor core and ldmatrix equal a plain product", "[emulator]") {
  // Small whole numbers: every product and sum is exact, so equal means equal in bits.
  Random random(1);
  std::vector<bf16> a(256), b(128);
  for (bf16& x : a) x = round_bf16(std::round(3 * random.normal(1)[0]));
  for (bf16& x : b) x = round_bf16(std::round(3 * random.normal(1)[0]));
  std::vector<float> start(128), right(128);
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      start[r * 8 + c] = right[r * 8 + c] = float(r - c);
      for (int k = 0; k < 16; ++k) right[r * 8 + c] += to_float(a[r * 16 + k]) * to_float(b[k * 8 + c]);
    }
  Stream s;
  OnDevice<bf16> da(s, a), db(s, b);
  OnDevice<float> d(s, start);
  launch(product, 1, 32, 0, s, d.get(), da.get(), db.get());
  CHECK(same_bits(d.read(), right));

  std::vector<bf16> columns(128);
  for (int k = 0; k < 16; ++k)
    for (int c = 0; c < 8; ++c) columns[c * 16 + k] = b[k * 8 + c];
  OnDevice<bf16> dc(s, columns);
  for (size_t i = 0; i < right.size(); ++i) right[i] -= start[i];
  auto result = [&](auto kernel, const OnDevice<bf16>& b) {
    OnDevice<float> y(s, 128);
    launch(kernel, 1, threads, 768, s, y.get(), da.get(), b.get());
    return y.read();
  };
  CHECK(same_bits(result(product_by_ldmatrix<false, false>, dc), right));
  CHECK(same_bits(result(product_by_ldmatrix<true, true>, db), right));
  CHECK_FALSE(same_bits(result(product_by_ldmatrix<false, true>, dc), right));
  CHECK_FALSE(same_bits(result(product_by_ldmatrix<true, false>, db), right));
}

TEST_CASE("late copies: a missing wait, a missing barrier, a stage taken too early", "[emulator]") {
  Random random(2);
  const std::vector<float> x = random.normal(threads * 4 * 5);
  Stream s;
  OnDevice<float> dx(s, x);
  const std::vector<float> head(x.begin(), x.begin() + threads * 4);
  auto across = [&](auto kernel) {
    return wrong_answers(head, [&] { return run(kernel, threads * 4, 1, threads * 16, (const float*)dx.get()); });
  };
  CHECK(across(copy_across<true, true>) == 0);
  CHECK(across(copy_across<false, true>) == seeds);
  CHECK(across(copy_across<true, false>) > 0);

  std::vector<float> sums(threads);
  for (int step = 0; step < 5; ++step)
    for (int t = 0; t < threads; ++t)
      for (int i = 0; i < 4; ++i) sums[t] += x[(step * threads + (t + 37) % threads) * 4 + i];
  auto stages = [&](auto kernel) {
    return wrong_answers(sums, [&] { return run(kernel, threads, 1, threads * 32, (const float*)dx.get(), 5); });
  };
  CHECK(stages(two_stages<1, true>) == 0);
  CHECK(stages(two_stages<2, true>) > 0);   // waits for one group too few
  CHECK(stages(two_stages<1, false>) > 0);  // fetches into what others still read

  // Promptly done, as by a kind machine, the missing wait is not seen: this is what the late mode is for.
  emulator::options.adversarial = false;
  CHECK(across(copy_across<false, true>) == 0);
  CHECK(stages(two_stages<2, true>) == 0);
  emulator::options.adversarial = true;
}

TEST_CASE("barriers: before others read, and before the next write", "[emulator]") {
  Random random(3);
  std::vector<float> x(3 * threads), right(3 * threads);
  for (float& v : x) v = std::round(100 * random.normal(1)[0]);
  for (int turn = 0; turn < 3; ++turn)
    for (int i = 0; i < threads; ++i)
      for (int t = 0; t < threads; ++t) right[turn * threads + t] += x[turn * threads + i];
  Stream s;
  OnDevice<float> dx(s, x);
  auto sums = [&](auto kernel) {
    return wrong_answers(right, [&] { return run(kernel, x.size(), 1, 16, (const float*)dx.get()); });
  };
  CHECK(sums(block_sum<true, true>) == 0);
  CHECK(sums(block_sum<false, true>) > 0);
  CHECK(sums(block_sum<true, false>) > 0);

  std::vector<int> next(threads);
  for (int t = 0; t < threads; ++t) next[t] = t / 32 * 32 + (t + 1) % 32;
  CHECK(wrong_answers(next, [] { return run(neighbour<true>, threads, 1, threads * 4); }) == 0);
  CHECK(wrong_answers(next, [] { return run(neighbour<false>, threads, 1, threads * 4); }) == seeds);
}

TEST_CASE("blocks come in any order, memory starts as NaN", "[emulator]") {
  const int blocks = 9;
  for (emulator::options.seed = 1; emulator::options.seed <= seeds; ++emulator::options.seed) {
    Stream s;
    OnDevice<uint32_t> y(s, blocks + 2);
    fill_bytes(y.get(), 0, 4, s);
    launch(last_block, blocks, 32, 0, s, y.get(), blocks);
    CHECK(y.read().back() == 45);
  }
  emulator::options.seed = 1;
  const std::vector<int> eight = {8};
  CHECK(wrong_answers(eight, [] { return run(block_zero_first, 1, 9, 0); }) > 0);
  for (float v : run(uninitialised, threads, 2, threads * 4)) CHECK(std::isnan(v));
  Stream s;
  for (float v : OnDevice<float>(s, 5).read()) CHECK(std::isnan(v));
}

TEST_CASE("what no GPU promises is an error that names it", "[emulator]") {
  CHECK(error_of(good) == "");
  CHECK_THAT(error_of(some_never_come), Contains("tiny::some_never_come launched at test_emulator.cpp:") &&
                                            Contains("no thread can go on: 64 threads at sync_threads") &&
                                            Contains("64 threads returned (the first is thread 64)"));
  CHECK_THAT(error_of(two_barriers), Contains("at the sync_threads of test_emulator.cpp:"));
  CHECK_THAT(error_of(half_a_warp), Contains("not all lanes of a warp reach one operation"));
  CHECK_THAT(error_of(half_at_a_barrier), Contains("not all lanes of a warp reach one operation"));
  CHECK_THAT(error_of(two_shuffles), Contains("lanes of a warp part"));
  CHECK_THAT(error_of(half_a_product), Contains("not all lanes") && Contains("31 threads at mma_m16n8k16"));
  CHECK_THAT(error_of(copies_past_shared), Contains("not within the 4096 bytes of shared memory"));
  CHECK_THAT(error_of(copies_unaligned),
             Contains("copy_async_16 at test_emulator.cpp:") && Contains("not aligned to 16"));
  CHECK_THAT(error_of(copies_from_host), Contains("not within device memory"));
  CHECK_THAT(error_of(loads_past_device), Contains("load_16 at") && Contains("not within device memory"));
  CHECK_THAT(error_of(loads_unaligned), Contains("load_16_once at") && Contains("not aligned to 16"));
  CHECK_THAT(error_of(matrix_past_shared), Contains("load_matrix_x4 at") && Contains("shared memory"));
  CHECK_THAT(error_of(writes_past_device), Contains("wrote past the end of 4096 bytes of device memory"));
  CHECK_THAT(error_of(writes_before_device), Contains("wrote before the start of 4096 bytes of device memory"));
  CHECK_THAT(error_of(writes_past_shared), Contains("wrote outside the 4096 bytes of shared memory"));
  CHECK_THAT(error_of(nothing, 48), Contains("a block of 48 threads"));
  CHECK_THAT(error_of(nothing, dim3(32, 2)), Contains("a block of 64 threads"));
  CHECK_THAT(error_of(nothing, 32, 200000), Contains("200000 bytes of shared memory"));
  CHECK(error_of(good) == "");  // and a fault leaves nothing behind
}

namespace {

// As a Hopper GPU, whose blocks may have 227 KiB of shared memory.
struct Hopper {
  Hopper() { emulator::options.major = 9; }
  ~Hopper() { emulator::options.major = 8; }
};

// The address of a value of a tile of 64 columns, as the copy engine lays it out (CUDA programming guide, "Swizzle
// modes"): 16-byte pieces of row r are exchanged by r % 8.
int swizzled_at(int row, int column) { return row * 64 + ((column / 8 ^ row % 8) * 8 + column % 8); }

template <int E>
void tile_case() {
  const int rows = 150, heads = 3;
  std::vector<bf16> x(size_t(rows + 2) * heads * E);
  for (size_t i = 0; i < x.size(); ++i) x[i].bits = uint16_t(i % 32000);
  Stream s;
  OnDevice<bf16> dx(s, x);
  // Heads inside rows, as queries lie, and rows inside heads, as the cache does
  for (bool inside : {true, false}) {
    const size_t row_pitch = inside ? heads * E : E, head_pitch = inside ? E : (rows + 2) * E;
    for (int first : {0, 22, 23, 149, 150})
      for (int head : {0, 2}) {
        std::vector<bf16> right(128 * E);
        for (int r = 0; r < 128; ++r)
          for (int c = 0; c < E; ++c)
            right[c / 64 * tile_values + swizzled_at(r, c % 64)] =
                first + r < rows ? x[(first + r) * row_pitch + head * head_pitch + c] : bf16{};
        const TensorMap map = tensor_map(dx.get(), rows, heads, row_pitch, head_pitch, E);
        CHECK(wrong_answers(right, [&] { return run(tile_of<E>, 128 * E, 1, hopper_bytes, map, first, head); }) == 0);
        if (first == 22)
          CHECK(wrong_answers(right, [&] {
                  return run(tile_of<E, false>, 128 * E, 1, hopper_bytes, map, first, head);
                }) == seeds);
      }
  }
}

}  // namespace

TEST_CASE("copies of tiles: layout, edges, and who waits", "[emulator][hopper]") {
  Hopper hopper;
  tile_case<64>();
  Stream s;
  OnDevice<bf16> x(s, 1024);
  const TensorMap map = tensor_map(x.get(), 8, 1, 64, 64, 64);
  CHECK_THROWS_WITH(run(tile_of<64, true, 16>, 1, 1, hopper_bytes, map, 0, 0),
                    Contains("no thread can go on") && Contains("at barrier_wait, test_emulator.cpp"));
  CHECK_THROWS_WITH(run(tile_of<64, true, -16>, 1, 1, hopper_bytes, map, 0, 0), Contains("no thread can go on"));
  CHECK_THROWS_WITH(tensor_map(x.get() + 1, 8, 1, 64, 64, 64), Contains("not a multiple of 16"));
  CHECK_THROWS_WITH(tensor_map(x.get(), 0, 1, 64, 64, 64), Contains("empty"));
  CHECK_THROWS_WITH(tensor_map(x.get(), 8, 1, 60, 64, 64), Contains("a pitch"));
  CHECK_THROWS_WITH(tensor_map(x.get(), 8, 1, 64, 64, 32), Contains("64 or 128"));
}

TEST_CASE("copies of tiles of 128 columns", "[emulator][hopper]") {
  Hopper hopper;
  tile_case<128>();
}

TEST_CASE("barriers in shared memory: phases, and what breaks them", "[emulator][hopper]") {
  std::vector<int> right(5 * threads, -1);
  for (int i = 0; i < 5; ++i)
    for (int t = 32; t < threads; ++t) right[i * threads + t] = 10 * i;
  CHECK(wrong_answers(right, [] { return run(five_phases<true, true>, 5 * threads, 1, 2048); }) == 0);
  CHECK(wrong_answers(right, [] { return run_or_nothing(five_phases<true, false>, 5 * threads, 2048); }) > 0);
  CHECK(wrong_answers(right, [] { return run_or_nothing(five_phases<false, true>, 5 * threads, 2048); }) > 0);
}

TEST_CASE("warpgroup products equal plain ones, late", "[emulator][hopper]") {
  Hopper hopper;
  Random random(5);
  auto whole = [&](size_t n) {
    std::vector<bf16> v(n);
    for (bf16& x : v) x = round_bf16(std::round(3 * random.normal(1)[0]));
    return v;
  };
  const auto memory = whole(4 * tile_values), a_registers = whole(64 * 16);
  Stream s;
  OnDevice<bf16> dm(s, memory), da(s, a_registers);
  // Tile `t` of the four, as a matrix [128, 64] whose value (r, c) lies where the copy engine puts it
  auto value = [&](int t, int r, int c) { return to_float(memory[t * tile_values + swizzled_at(r, c)]); };
  const uint64_t layout = uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
  auto offset = [&](int tile, int row, int column) {
    return uint64_t(tile * tile_values + row * 64 + column) * 2 >> 4;
  };
  auto check = [&](auto kernel, int n, bool registers, int step, int row, bool add) {
    std::vector<float> start(64 * n), right;
    for (float& x : start) x = std::round(9 * random.normal(1)[0]);
    right = add ? start : std::vector<float>(64 * n);
    for (int r = 0; r < 64; ++r)
      for (int c = 0; c < n; ++c)
        for (int k = 0; k < 16; ++k)
          right[r * n + c] += registers ? to_float(a_registers[r * 16 + k]) * value(2 + c / 64, step * 16 + k, c % 64)
                                        : value(0, row + r, step * 16 + k) * value(2, c, step * 16 + k);
    OnDevice<float> d(s, start);
    const uint64_t at_a = layout | offset(0, row, step * 16);
    const uint64_t at_b = registers ? layout | uint64_t(tile_values * 2 >> 4) << 16 | offset(2, step * 16, 0)
                                    : layout | offset(2, 0, step * 16);
    launch(kernel, 1, threads, hopper_bytes, s, d.get(), dm.get(), da.get(), at_a, at_b, add);
    const auto got = d.read();
    return std::pair(same_bits(got, right), std::isnan(got[0]));
  };
  for (int step = 0; step < 4; ++step)
    for (bool add : {false, true}) {
      CHECK(check(group_product<128, false>, 128, false, step, step % 2 * 64, add).first);
      CHECK(check(group_product<128, true>, 128, true, 2 * step + add, 0, true).first);
      CHECK(check(group_product<64, true>, 64, true, 2 * step + add, 0, true).first);
    }
  CHECK(check(group_product<128, false, false>, 128, false, 0, 0, true).second);  // used before the wait: NaN
  CHECK(check(group_product<64, true, false>, 64, true, 0, 0, true).second);
  CHECK_THROWS_WITH(check(group_product<128, false, true, false>, 128, false, 0, 0, true), Contains("not in a batch"));

  const auto y = run(two_batches, 3 * threads, 1, hopper_bytes);
  CHECK(y[5] == 32);
  CHECK(std::isnan(y[threads + 5]));
  CHECK(y[2 * threads + 5] == 16);
}

TEST_CASE("named barriers: two warpgroups by turns", "[emulator][hopper]") {
  auto order = [](auto kernel) {
    Stream s;
    OnDevice<int> y(s, 8);
    launch(kernel, 1, 256, 2048, s, y.get());
    return y.read();
  };
  const std::vector<int> right = {0, 2, 4, 6, 1, 3, 5, 7};
  CHECK(wrong_answers(right, [&] { return order(by_turns<true>); }) == 0);
  CHECK(wrong_answers(right, [&] { return order(by_turns<false>); }) > 0);
}

TEST_CASE("what no Hopper GPU promises is an error that names it", "[emulator][hopper]") {
  Hopper hopper;
  auto error = [](auto kernel, dim3 block = threads) { return error_of(kernel, block, hopper_bytes, 262144); };
  CHECK_THAT(error(waits_for_nobody), Contains("no thread can go on: 128 threads at barrier_wait"));
  CHECK_THAT(error(waits_without_init), Contains("barrier_wait at") && Contains("not ready"));
  CHECK_THAT(error(no_fence), Contains("barrier_arrive at") && Contains("not ready"));
  CHECK_THAT(error(too_many_arrive), Contains("more arrivals than the 2 of the phase"));
  CHECK_THAT(error(tile_unaligned), Contains("copy_tile at") && Contains("not aligned to 1024"));
  CHECK_THAT(error(tile_past_device), Contains("copy_tile at") && Contains("not within device memory"));
  CHECK_THAT(error(tile_left_behind), Contains("a copy_tile that nobody waited for"));
  CHECK_THAT(error(product_left_behind), Contains("products that nobody waited for"));
  CHECK_THAT(error(half_a_warpgroup), Contains("no thread can go on: 64 threads at products_wait"));
  CHECK_THAT(error(different_operands), Contains("threads name different operands"));
  CHECK_THAT(error(too_many_registers, 384), Contains("66560 registers wanted, of 65536"));
  CHECK_THAT(error(registers_the_wrong_way), Contains("from 512 to 160 is the other way"));
  CHECK_THAT(error(arrival_left_over, 256), Contains("arrivals at the named barrier 3"));
  CHECK_THAT(error(barriers_disagree, 256), Contains("where others said"));
  CHECK(error(good) == "");
}

TEST_CASE("streams are late, graphs repeat", "[emulator]") {
  Stream s;
  OnDevice<float> y(s, threads);
  std::vector<float> source(threads, 1.0f), result(threads, 0.0f);
  copy_to_device(y.get(), source.data(), threads * 4, s);
  copy_to_host(result.data(), y.get(), threads * 4, s);
  CHECK(std::isnan(result[0]));  // read before synchronize
  source[3] = 5;                 // changed before synchronize
  synchronize(s);
  CHECK(result[0] == 1);
  CHECK(result[3] == 5);

  Graph none;
  CHECK_FALSE(none);
  Graph graph(s, [&] {
    launch(good, 1, threads, 0, s, y.get());
    copy_to_host(result.data(), y.get(), threads * 4, s);
  });
  CHECK(graph);
  synchronize(s);
  CHECK(result[7] == 1);  // recorded, not run
  for (int i = 0; i < 2; ++i) {
    fill_bytes(y.get(), 0, threads * 4, s);
    graph.run(s);
    CHECK(std::isnan(result[7]));
    synchronize(s);
    CHECK(result[7] == 7);
    result[7] = 0;
  }
  CHECK_THROWS_WITH(Graph(s, [&] { synchronize(s); }),
                    Contains("synchronize") && Contains("while a graph is recorded"));
  CHECK_THROWS_WITH(Graph(s, [&] { device_allocate(16); }), Contains("while a graph is recorded"));
  copy_to_device(y.get() + 1, source.data(), threads * 4, s);
  CHECK_THROWS_WITH(synchronize(s), Contains("copy_to_device (test_emulator.cpp:") && Contains("not in device memory"));
  CHECK_THROWS_WITH(device_allocate(size_t(1) << 40), Contains("1048576 MiB needed"));
}

TEST_CASE("small operations of the emulator", "[emulator]") {
  CHECK(pack_bf16(1.0f, -2.0f) == 0xC0003F80);
  CHECK(round_bf16(as_float(0x3F808000)).bits == 0x3F80);  // ties go to even
  CHECK(round_bf16(as_float(0x3F818000)).bits == 0x3F82);
  CHECK(round_bf16(as_float(0x3F808001)).bits == 0x3F81);
  CHECK(round_bf16(as_float(0x7F7FFFFF)).bits == 0x7F80);
  CHECK(std::isnan(widen(round_bf16(as_float(0x7F800001)))));
  CHECK(low_bf16(0xC0003F80) == 1);
  CHECK(high_bf16(0xC0003F80) == -2);
  CHECK(permute_bytes(0x33221100, 0x77665544, 0x5410) == 0x55441100);
  CHECK(permute_bytes(0x33221100, 0x77665544, 0x7632) == 0x77663322);
  CHECK(exp2_fast(3) == 8);
  CHECK(exp2_fast(-127) == 0);
  CHECK(exp2_fast(-INFINITY) == 0);

  Random random(4);
  const size_t n = 3, in = 20, out = 7;
  std::vector<bf16> x = random.weights(n * in, 1), w = random.weights(out * in, 1);
  std::vector<float> wide(x.size()), right = random.normal(n * out);
  for (size_t i = 0; i < x.size(); ++i) wide[i] = to_float(x[i]);
  Stream s;
  Blas blas(s);
  OnDevice<bf16> dx(s, x), dw(s, w), narrow(s, n * out);
  OnDevice<float> y(s, right), fresh(s, n * out);
  blas.gemm(y.get(), dx.get(), dw.get(), n, in, out, 1);
  blas.gemm(fresh.get(), dx.get(), dw.get(), n, in, out, 0);
  blas.gemm(narrow.get(), dx.get(), dw.get(), n, in, out, 0);
  reference::matmul(right.data(), wide.data(), w.data(), n, in, out, true);
  CHECK(relative_error(y.read(), right) < 1e-6);  // fp32 sums of 20 terms
  reference::matmul(right.data(), wide.data(), w.data(), n, in, out, false);
  const auto f = fresh.read();
  CHECK(relative_error(f, right) < 1e-6);
  const auto b = narrow.read();
  for (size_t i = 0; i < f.size(); ++i) CHECK(b[i].bits == round_bf16(f[i]).bits);
}
