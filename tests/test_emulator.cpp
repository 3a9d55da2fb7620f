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
  CHECK_THAT(error_of(half_a_warp), Contains("not all lanes of a warp come to one operation"));
  CHECK_THAT(error_of(half_at_a_barrier), Contains("not all lanes of a warp come to one operation"));
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
  CHECK_THROWS_WITH(device_allocate(size_t(1) << 40), Contains("1048576 MiB asked for"));
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
