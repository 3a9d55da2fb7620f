// Every CUDA kernel against its definition in cpu/reference.h, and whole models through `Gpu` against `Cpu`.
//
// g++ compiles this file with the emulator (emulator.h), and `make test` runs it on a CPU; nvcc compiles the same file,
// and `make gpu-check` runs it on a GPU. The emulator finds wrong arithmetic, layouts, bounds, barriers and waits. It
// cannot find
//   - a missing memory fence, or anything else that needs two threads at the same moment: its threads take turns;
//   - hazards of registers and asynchronous instructions that ptxas must resolve (wgmma.fence among them), and spills;
//   - how the tensor cores order and round their sums: here one after another, in fp32;
//   - launches, copies and tensor maps that a real driver refuses, more memory than it has, how kernels share a GPU;
//   - speed.
//
// Tolerances. u = 2^-8 bounds the relative error of rounding to bf16, e = 2^-24 that of rounding to fp32; a sum of n
// terms in fp32, in whatever order, is wrong by at most n e times the sum of their magnitudes. Each test forms the
// bound for every single value from these two, and an error is given as a share of its bound: below 1 is right. Inputs
// are bf16 to begin with, so the definition starts from the same numbers.
#include "../gpu/gpu.cuh"
#include "on_device.h"

using namespace test;

namespace {

constexpr double u = 0x1p-8, e = 0x1p-24;

// The largest |x - ref| as a share of its bound; infinite if there is a NaN.
template <class Bound>
double error(const std::vector<float>& x, const std::vector<float>& ref, Bound bound) {
  double worst = x.size() == ref.size() && !ref.empty() ? 0 : INFINITY;
  for (size_t i = 0; i < std::min(x.size(), ref.size()); ++i) {
    const double share = std::abs(double(x[i]) - ref[i]) / (bound(i) + 1e-37);
    worst = std::max(worst, std::isnan(share) ? INFINITY : share);
  }
  return worst;
}

// Do the values from `from` on still hold OnDevice's fill, so that nothing was written there?
template <class T>
bool unwritten(const std::vector<T>& v, size_t from) {
  const auto* p = reinterpret_cast<const unsigned char*>(v.data());
  return std::all_of(p + from * sizeof(T), p + v.size() * sizeof(T), [](unsigned char c) { return c == 0xFF; });
}
template <class T>
std::vector<T> first(std::vector<T> v, size_t n) {
  v.resize(n);
  return v;
}
std::vector<float> magnitudes(std::vector<float> v) {
  for (float& x : v) x = std::abs(x);
  return v;
}

std::vector<float> rounded(const std::vector<float>& v) { return wide(narrow(v)); }

// Cosines and sines of arbitrary angles, [n, half].
struct Angles {
  std::vector<float> cos, sin;
  Angles(Random& random, size_t n) : cos(random.normal(n)), sin(n) {
    for (size_t i = 0; i < n; ++i) sin[i] = std::sin(cos[i]), cos[i] = std::cos(cos[i]);
  }
};

unsigned blocks(size_t work, size_t threads) { return unsigned((work + threads - 1) / threads); }

}  // namespace

TEST_CASE("embedding", "[gpu]") {
  Random random(fresh(1));
  Stream s;
  for (size_t d : {8, 72, 2064})
    for (size_t n : {1, 63, 65}) {
      const size_t vocab = 50;
      const auto table = random.weights(vocab * d, 1);
      std::vector<int> ids(n);
      for (size_t i = 0; i < n; ++i) ids[i] = int((i * 7 + 49) % vocab);
      OnDevice<bf16> dt(s, table);
      OnDevice<int> di(s, ids);
      OnDevice<float> x(s, (n + 1) * d);
      launch(kernel::embed, unsigned(n), 128, 0, s, x.get(), dt.get(), di.get(), d);
      const auto got = x.read();
      std::vector<float> ref;
      for (int id : ids)
        for (size_t i = 0; i < d; ++i) ref.push_back(to_float(table[id * d + i]));
      CHECK(same_bits(first(got, n * d), ref));
      CHECK(unwritten(got, n * d));
    }
}

TEST_CASE("RMSNorm", "[gpu]") {
  Random random(fresh(2));
  Stream s;
  for (size_t d : {8, 72, 576, 4104})
    for (size_t n : {1, 65})
      for (unsigned threads : {32, 256})
        under_seeds(2, [&] {
          auto x = random.normal(n * d);
          for (size_t r = 0; r < n; ++r)
            for (size_t i = 0; i < d; ++i) x[r * d + i] *= float(r + 1);
          const auto w = random.weights(d, 1);
          OnDevice<float> dx(s, x);
          OnDevice<bf16> dw(s, w), y(s, (n + 1) * d);
          launch(kernel::rmsnorm, unsigned(n), threads, threads / 32 * sizeof(float), s, y.get(), dx.get(), dw.get(), d,
                 1e-5f);
          const auto got = y.read();
          std::vector<float> ref(n * d);
          reference::rmsnorm(ref.data(), x.data(), w.data(), n, d, 1e-5f);
          // The sum of squares is right to d e, its root to half of that; four roundings follow, and the last to bf16.
          auto bound = [&](size_t i) { return std::abs(ref[i]) * (u + (double(d) / 2 + 4) * e); };
          CHECK(error(wide(first(got, n * d)), ref, bound) < 1);
          CHECK(unwritten(got, n * d));
          reference::rmsnorm(ref.data(), x.data(), w.data(), n, d, 0.1f);
          CHECK(error(wide(first(got, n * d)), ref, bound) > 1);
        });
}

TEST_CASE("SwiGLU", "[gpu]") {
  Random random(fresh(3));
  Stream s;
  for (size_t n : {8, 1032, 4096}) {
    auto gate = random.normal(n), up = random.normal(n);
    for (float& x : gate) x *= 30;
    gate = rounded(gate), up = rounded(up);
    OnDevice<bf16> g(s, narrow(gate)), v(s, narrow(up));
    launch(kernel::swiglu, blocks(n / 8, 128), 128, 0, s, g.get(), v.get(), n);
    auto ref = gate;
    reference::swiglu(ref.data(), up.data(), n);
    // e^-x: its argument is rounded, and so wrong by |x| e; ex2.approx and three operations add 8 e.
    CHECK(error(wide(g.read()), ref,
                [&](size_t i) { return std::abs(ref[i]) * (u + (2 * std::abs(gate[i]) + 8) * e); }) < 1);
  }
}

TEST_CASE("RoPE and the cache", "[gpu]") {
  Random random(fresh(4));
  Stream s;
  {
    const size_t half = 64;
    std::vector<float> f(half);
    for (size_t i = 0; i < half; ++i) f[i] = std::pow(500000.0f, -float(i) / float(half));
    const std::vector<int> positions = {0, 1, 2, 100, 8191, 131071};
    const size_t n = positions.size();
    OnDevice<float> df(s, f), cos(s, n * half), sin(s, n * half);
    OnDevice<int> dp(s, positions);
    launch(kernel::rope_angles, blocks(n * half, 128), 128, 0, s, cos.get(), sin.get(), df.get(), dp.get(), n, half);
    const auto c = cos.read(), t = sin.read();
    double worst = 0;
    for (size_t i = 0; i < n * half; ++i) {
      const double angle = float(positions[i / half]) * f[i % half];
      const double here = std::max(std::abs(c[i] - std::cos(angle)), std::abs(t[i] - std::sin(angle)));
      worst = std::max(worst, std::isnan(here) ? INFINITY : here);
    }
    CHECK(worst < e);  // one rounding of a value up to 1
  }
  for (size_t n : {1, 63, 65})
    for (auto [heads, E] : {std::array<size_t, 2>{1, 32}, {3, 64}, {8, 128}}) {
      const size_t half = E / 2, capacity = n + 9, before = 4;
      const Angles angles(random, n * half);
      const auto x = random.normal(n * heads * E), values = random.normal(n * heads * E);
      OnDevice<float> cos(s, angles.cos), sin(s, angles.sin);
      OnDevice<bf16> y(s, narrow(x)), raw(s, narrow(x)), v(s, narrow(values));
      const unsigned grid = blocks(n * heads * half / 8, 128);
      launch(kernel::rope, grid, 128, 0, s, y.get(), cos.get(), sin.get(), n, heads, E);
      auto ref = rounded(x);
      reference::rope(ref.data(), angles.cos.data(), angles.sin.data(), n, heads, E);
      const auto start = rounded(x);
      auto bound = [&](size_t i) {  // two products, a sum, a rounding; |cos|, |sin| <= 1
        const size_t other = i % E < half ? i + half : i - half;
        return std::abs(ref[i]) * u + 3 * e * (std::abs(start[i]) + std::abs(start[other]));
      };
      const auto turned = y.read();
      CHECK(error(wide(turned), ref, bound) < 1);

      for (bool rotated : {true, false}) {
        OnDevice<bf16> ck(s, heads * capacity * E), cv(s, heads * capacity * E);
        launch(kernel::append, grid, 128, 0, s, ck.get(), cv.get(), capacity, before, raw.get(), v.get(),
               rotated ? cos.get() : nullptr, rotated ? sin.get() : nullptr, n, heads, E);
        const auto gk = ck.read(), gv = cv.read(), plain = narrow(x), pv = narrow(values);
        size_t wrong = 0;
        for (size_t h = 0; h < heads; ++h)
          for (size_t slot = 0; slot < capacity; ++slot)
            for (size_t i = 0; i < E; ++i) {
              const size_t at = (h * capacity + slot) * E + i, from = ((slot - before) * heads + h) * E + i;
              const bool mine = slot >= before && slot < before + n;
              wrong += gk[at].bits != (!mine ? 0xFFFF : (rotated ? turned : plain)[from].bits);
              wrong += gv[at].bits != (!mine ? 0xFFFF : pv[from].bits);
            }
        CHECK(wrong == 0);
      }
    }
}

namespace {

// A single row's product: the bound of its sums. A lane adds in / 32 products, the warp 5 more; twice that is allowed.
struct Row {
  size_t in;
  std::vector<bf16> x;
  std::vector<float> wide_x;
  Row(Random& random, size_t in) : in(in), x(narrow(random.normal(in))), wide_x(wide(x)) {}
  std::vector<float> times(const std::vector<bf16>& w) const {
    std::vector<float> y(w.size() / in);
    reference::matmul(y.data(), wide_x.data(), w.data(), 1, in, y.size(), false);
    return y;
  }
  std::vector<float> slack(const std::vector<bf16>& w) const {  // e times the sums of magnitudes, times their lengths
    std::vector<float> y(w.size() / in);
    const auto a = magnitudes(wide_x);
    const auto b = narrow(magnitudes(wide(w)));
    reference::matmul(y.data(), a.data(), b.data(), 1, in, y.size(), false);
    for (float& v : y) v *= float(2 * (double(in) / 32 + 5) * e);
    return y;
  }
};

template <class Rows>
void matvec(const Stream& s, const Rows& rows, const bf16* x, int in, size_t pairs) {
  launch(kernel::matvec<Rows>, blocks(pairs, kernel::matvec_threads / 32), kernel::matvec_threads, 0, s, x, in, rows);
}

}  // namespace

TEST_CASE("matrix-vector products", "[gpu]") {
  Random random(fresh(5));
  Stream s;
  for (size_t in : {8, 72, 264, 1032, 2824})
    for (size_t out : {1, 2, 33})
      under_seeds(2, [&] {
        INFO("in " << in << ", out " << out);
        const Row row(random, in);
        OnDevice<bf16> x(s, row.x);
        const auto w = random.weights(out * in, 1);
        OnDevice<bf16> dw(s, w), narrow_y(s, out + 1);
        const auto start = random.normal(out);
        auto ref = row.times(w);
        const auto slack = row.slack(w);
        OnDevice<float> y(s, out + 1), added(s, start);
        matvec(s, kernel::Product<float>{y.get(), dw.get(), int(in), int(out), false}, x.get(), int(in), (out + 1) / 2);
        matvec(s, kernel::Product<bf16>{narrow_y.get(), dw.get(), int(in), int(out), false}, x.get(), int(in),
               (out + 1) / 2);
        matvec(s, kernel::Product<float>{added.get(), dw.get(), int(in), int(out), true}, x.get(), int(in),
               (out + 1) / 2);
        const auto got = y.read();
        CHECK(error(first(got, out), ref, [&](size_t i) { return slack[i]; }) < 1);
        CHECK(unwritten(got, out));
        const auto gn = narrow_y.read();
        CHECK(error(wide(first(gn, out)), ref, [&](size_t i) { return slack[i] + u * std::abs(ref[i]); }) < 1);
        CHECK(unwritten(gn, out));
        for (size_t i = 0; i < out; ++i) ref[i] += start[i];
        CHECK(error(added.read(), ref, [&](size_t i) { return slack[i] + e * std::abs(ref[i]); }) < 1);
      });
}

TEST_CASE("two products in one", "[gpu]") {
  Random random(fresh(17));
  Stream s;
  Blas blas(s);
  const size_t n = 20, in = 72, out = 40, apart = 24;  // of the two matrices, and of the two results
  const auto x = narrow(random.normal(n * in));
  auto w = random.weights(2 * out * in + apart, 1);
  OnDevice<bf16> dx(s, x), dw(s, w), y(s, 2 * n * out + apart);
  const size_t w1 = out * in + apart, y1 = n * out + apart;
  blas.gemm_pair(y.get(), y.get() + y1, dx.get(), dw.get(), dw.get() + w1, n, in, out);
  const auto got = y.read(), fill = first(std::vector(got.begin() + n * out, got.end()), apart);
  CHECK(unwritten(fill, 0));
  for (size_t i : {0, 1}) {
    const bf16* matrix = w.data() + i * w1;
    std::vector<float> ref(n * out), slack(n * out);
    reference::matmul(ref.data(), wide(x).data(), matrix, n, in, out, false);
    const auto absolute = narrow(magnitudes(wide({matrix, matrix + out * in})));
    reference::matmul(slack.data(), magnitudes(wide(x)).data(), absolute.data(), n, in, out, false);
    const std::vector<bf16> result(got.begin() + i * y1, got.begin() + i * y1 + n * out);
    CHECK(error(wide(result), ref, [&](size_t j) { return u * std::abs(ref[j]) + double(in) * e * slack[j]; }) < 1);
  }
}

TEST_CASE("a single row's queries, keys, values and gate", "[gpu]") {
  Random random(fresh(6));
  Stream s;
  for (auto [in, heads, E] : {std::array<size_t, 3>{72, 1, 32}, {264, 3, 64}, {1032, 2, 128}}) {
    const size_t out = heads * E, half = E / 2, capacity = 7, slot = 5;
    const Row row(random, in);
    const Angles angles(random, half);
    const auto wk = random.weights(out * in, 0.1f), wv = random.weights(out * in, 0.1f);
    OnDevice<bf16> x(s, row.x), dk(s, wk), dv(s, wv), q(s, out + 1), ck(s, heads * capacity * E),
        cv(s, heads * capacity * E);
    OnDevice<float> cos(s, angles.cos), sin(s, angles.sin);
    OnDevice<uint32_t> begin(s, std::vector<uint32_t>{3});
    matvec(s, kernel::ProjectQ{q.get(), dk.get(), cos.get(), sin.get(), int(in), int(heads), int(E)}, x.get(), int(in),
           out / 2);
    matvec(s,
           kernel::ProjectKV{ck.get(), cv.get(), capacity, begin.get(), 2, dk.get(), dv.get(), cos.get(), sin.get(),
                             int(in), int(heads), int(E)},
           x.get(), int(in), out);
    auto ref = row.times(wk);
    const auto raw = ref, slack = row.slack(wk), ref_v = row.times(wv), slack_v = row.slack(wv);
    reference::rope(ref.data(), angles.cos.data(), angles.sin.data(), 1, heads, E);
    auto bound = [&](size_t i) {
      const size_t other = i % E < half ? i + half : i - half;
      return u * std::abs(ref[i]) + slack[i] + slack[other] + 3 * e * (std::abs(raw[i]) + std::abs(raw[other]));
    };
    const auto gq = q.read(), gk = ck.read(), gv = cv.read();
    CHECK(error(wide(first(gq, out)), ref, bound) < 1);
    CHECK(unwritten(gq, out));
    size_t wrong = 0;
    std::vector<float> k, v;
    for (size_t h = 0; h < heads; ++h)
      for (size_t i = 0; i < capacity; ++i)
        for (size_t j = 0; j < E; ++j) {
          const size_t at = (h * capacity + i) * E + j;
          if (i == slot) k.push_back(to_float(gk[at])), v.push_back(to_float(gv[at]));
          else wrong += gk[at].bits != 0xFFFF || gv[at].bits != 0xFFFF;
        }
    CHECK(wrong == 0);
    CHECK(error(k, ref, bound) < 1);
    CHECK(error(v, ref_v, [&](size_t i) { return u * std::abs(ref_v[i]) + slack_v[i]; }) < 1);

    OnDevice<bf16> y(s, out + 1);
    matvec(s, kernel::GateUp{y.get(), dk.get(), dv.get(), int(in), int(out)}, x.get(), int(in), out);
    auto gated = raw;
    reference::swiglu(gated.data(), ref_v.data(), out);
    const auto gy = y.read();
    // silu's slope is at most 1.1; its own error as in "SwiGLU".
    CHECK(error(wide(first(gy, out)), gated, [&](size_t i) {
            return (u + (2 * std::abs(raw[i]) + 8) * e) * std::abs(gated[i]) + 1.1 * slack[i] * std::abs(ref_v[i]) +
                   slack_v[i] * std::abs(raw[i]);
          }) < 1);
    CHECK(unwritten(gy, out));
  }
}

namespace {

struct AttentionCase {
  size_t n, seen, heads, kv_heads;
};

constexpr int prefill = 0, hopper = -1;  // instead of a number of slices

// One case of attention at head_dim E, by a kernel for many rows or by decode_attention and combine_slices with
// `slices`.
//
// Weights are rounded to bf16 before they meet the values, so each term p v is wrong by at most u |p v|, and the
// result, rounded once more, by u |o|. Scores are sums of E products in fp32, wrong by at most E e |q| |k| / sqrt(E),
// where here |q| |k| < 4 E, and so make p wrong twice, by itself and by the sum of all; the sums over slots add slots e
// each.
template <int E>
void attention_case(const AttentionCase& c, int slices) {
  Random random(fresh(c.n * 1000 + c.seen + E));
  Stream s;
  const size_t slots = c.seen + c.n - 1, capacity = slots + 3;
  auto q = random.normal(c.n * c.heads * E), k = random.normal(c.kv_heads * capacity * E),
       v = random.normal(c.kv_heads * capacity * E);
  for (float& x : q) x *= 3;  // sharp enough that a wrong slot shows; and the last slot a row sees weighs much
  const float last = (std::log(float(slots)) + 5) / (9 * std::sqrt(float(E)));
  for (size_t h = 0; h < c.kv_heads; ++h)
    for (size_t r = 0; r < c.n; ++r)
      for (size_t i = 0; i < E; ++i)
        k[(h * capacity + c.seen - 1 + r) * E + i] = last * q[(r * c.heads + h * (c.heads / c.kv_heads)) * E + i];
  // What lies past the last slot is never read.
  for (size_t h = 0; h < c.kv_heads; ++h)
    for (size_t i = slots * E; i < capacity * E; ++i) k[h * capacity * E + i] = v[h * capacity * E + i] = NAN;
  q = rounded(q), k = rounded(k), v = rounded(v);
  const size_t size = q.size();
  OnDevice<bf16> dq(s, narrow(q)), dk(s, narrow(k)), dv(s, narrow(v)), o(s, size + 1);
  const float scale = float(1 / (std::log(2.0) * std::sqrt(double(E))));
  INFO((slices == hopper ? "hopper "
        : slices         ? "decode "
                         : "prefill ")
       << c.n << " rows, first sees " << c.seen << ", heads " << c.heads << "/" << c.kv_heads << " x " << E
       << ", slices " << slices);
  if (slices == hopper) {
    if constexpr (E >= 64) {
      const size_t width = c.heads * E;
      launch(kernel::prefill_attention_hopper<E>, dim3(unsigned(c.heads), blocks(c.n, kernel::hopper_rows)),
             kernel::hopper_threads, kernel::hopper_shared_bytes<E>, s, tensor_map(dq.get(), c.n, c.heads, width, E, E),
             tensor_map(dk.get(), slots, c.kv_heads, E, capacity * E, E),
             tensor_map(dv.get(), slots, c.kv_heads, E, capacity * E, E), o.get(), c.n, c.seen, c.kv_heads, scale);
    }
  } else if (slices) {
    OnDevice<float> parts(s, c.n * c.heads * slices * (E + 2));
    OnDevice<uint32_t> begin(s, std::vector<uint32_t>{uint32_t(c.seen - 1)});
    launch(kernel::decode_attention<E>, dim3(slices, unsigned(c.kv_heads), unsigned(c.n)), kernel::decode_threads,
           kernel::decode_shared_bytes<E>, s, parts.get(), dq.get(), dk.get(), dv.get(), capacity, begin.get(), 1,
           c.heads, scale);
    launch(kernel::combine_slices, dim3(unsigned(c.heads), unsigned(c.n)), E, 0, s, o.get(), parts.get(), slices, E,
           scale);
    synchronize(s);
  } else {
    launch(kernel::prefill_attention<E>, dim3(unsigned(c.heads), blocks(c.n, kernel::prefill_rows)),
           kernel::prefill_threads, kernel::prefill_shared_bytes<E>, s, o.get(), dq.get(), dk.get(), dv.get(), capacity,
           c.n, c.seen, c.kv_heads, scale);
  }
  const auto got = o.read();
  LayerCache<float> cache{k.data(), v.data(), capacity, slots};
  std::vector<float> ref(size), weight(size);
  reference::attention(ref.data(), q.data(), cache, c.n, c.seen, c.heads, c.kv_heads, E);
  const auto absolute = magnitudes(v);
  cache.v = const_cast<float*>(absolute.data());
  reference::attention(weight.data(), q.data(), cache, c.n, c.seen, c.heads, c.kv_heads, E);
  cache.v = v.data();
  const double scores = 2 * (4 * E * std::sqrt(double(E)) + double(slots)) * e;
  auto bound = [&](size_t i) { return u * std::abs(ref[i]) + (u + scores) * weight[i]; };
  CHECK(error(wide(first(got, size)), ref, bound) < 1);
  CHECK(unwritten(got, size));
  if (c.seen == 1) return;
  reference::attention(ref.data(), q.data(), cache, c.n, c.seen - 1, c.heads, c.kv_heads, E);
  CHECK(error(wide(first(got, size)), ref, bound) > 1);
}

}  // namespace

TEST_CASE("attention of many rows", "[gpu]") {
  under_seeds(2, [] {
    attention_case<64>({1, 1, 1, 1}, prefill);
    attention_case<64>({63, 1, 3, 1}, prefill);
    attention_case<64>({65, 1, 2, 2}, prefill);
    attention_case<32>({64, 65, 4, 1}, prefill);
    attention_case<32>({129, 63, 2, 1}, prefill);
    attention_case<128>({65, 130, 3, 1}, prefill);
    attention_case<128>({3, 64, 8, 1}, prefill);
  });
  attention_case<64>({2, 1000, 8, 4}, prefill);
  attention_case<128>({130, 200, 2, 1}, prefill);
}

TEST_CASE("attention of many rows on Hopper", "[gpu][hopper]") {
  on_hopper([] {
    under_seeds(2, [] {
      attention_case<64>({1, 1, 1, 1}, hopper);
      attention_case<64>({65, 1, 2, 2}, hopper);     // the second warpgroup has one row
      attention_case<128>({17, 128, 4, 1}, hopper);  // the diagonal leaves the first tile
      attention_case<128>({129, 63, 2, 1},
                          hopper);  // two blocks; of the first, a warpgroup sees nothing of its last tile
      attention_case<64>({130, 320, 3, 1}, hopper);  // four tiles: each place of shared memory is used twice
    });
    attention_case<128>({3, 1021, 8, 2}, hopper);  // eight tiles, all full
    attention_case<128>({200, 500, 2, 1}, hopper);
  });
}

TEST_CASE("attention of few rows over slices of the cache", "[gpu]") {
  under_seeds(2, [] {
    for (size_t group : {1, 2, 3, 4, 8}) {
      attention_case<64>({1, 1, group, 1}, 1);
      attention_case<32>({1, 17, 2 * group, 2}, 3);
      attention_case<64>({2, 300, group, 1}, 4);
      attention_case<128>({1, 1000, 2 * group, 2}, 5);
    }
    attention_case<128>({3, 15, 3, 3}, 16);
    attention_case<32>({5, 1000, 3, 1}, 2);
    attention_case<64>({16, 33, 2, 1}, 2);
  });
}

TEST_CASE("the most likely token", "[gpu]") {
  Random random(fresh(7));
  Stream s;
  for (size_t vocab : {8, 31, 1000, 49152}) {
    auto logits = random.normal(vocab);
    OnDevice<kernel::Best> parts(s, 64);
    OnDevice<int> id(s, 1);
    auto best = [&] {
      OnDevice<float> l(s, logits);
      launch(kernel::arg_max_partial, 64, 128, 4 * sizeof(kernel::Best), s, parts.get(), l.get(), vocab);
      launch(kernel::arg_max_combine, 1, 64, 2 * sizeof(kernel::Best), s, id.get(), parts.get());
      return id.read()[0];
    };
    CHECK(best() == arg_max(logits.data(), vocab));
    logits[vocab - 1] = logits[vocab / 2] = 100;  // of equals the first
    CHECK(best() == int(vocab / 2));
    logits[0] = 100;
    CHECK(best() == 0);
    logits[vocab - 2] = NAN;
    CHECK(best() == -1);
    logits.assign(vocab, -INFINITY);
    CHECK(best() == 0);
  }
}

// ---- whole models -------------------------------------------------------------------------------------------------

namespace {

// A model with random weights, scaled so that every layer adds about its own size to the residual.
struct RandomModel {
  std::vector<std::vector<bf16>> memory;
  Model m;
  RandomModel(uint64_t seed, const Shape& shape, int swiftkv_k = 0, int swiftkv_group = 1) : m(shape) {
    Random random(fresh(seed));
    const size_t d = shape.hidden, q = shape.q_width(), kv = shape.kv_width(), f = shape.mlp;
    auto matrix = [&](size_t out, size_t in, float gain) {
      memory.push_back(random.weights(out * in, gain / std::sqrt(float(in))));
      return memory.back().data();
    };
    auto norm = [&] {
      auto w = random.normal(d);
      for (float& x : w) x = 1 + 0.2f * x;
      memory.push_back(narrow(w));
      return memory.back().data();
    };
    m.config.swiftkv_k = swiftkv_k;
    m.config.swiftkv_group = swiftkv_group;
    Weights& w = m.weights;
    w.embedding = matrix(shape.vocab, d, std::sqrt(float(d)));
    w.head = shape.tied ? w.embedding : matrix(shape.vocab, d, 1);
    w.final_norm = norm();
    if (swiftkv_k) w.swiftkv_norm = norm();
    for (LayerWeights& l : w.layers) {
      l.attention_norm = norm(), l.mlp_norm = norm();
      l.wq = matrix(q, d, 1.25f), l.wk = matrix(kv, d, 1.25f), l.wv = matrix(kv, d, 1), l.wo = matrix(d, q, 1.5f);
      l.gate = matrix(f, d, 1.5f), l.up = matrix(f, d, 1), l.down = matrix(d, f, 1.5f);
      if (swiftkv_k) {
        l.swiftkv_wq = matrix(q, d, 1.25f), l.swiftkv_wk = matrix(kv, d, 1.25f), l.swiftkv_wv = matrix(kv, d, 1);
      }
    }
  }
};

// Heads of 32, 64 and 128; 8, 2 and 3 query heads a key head; tied and not; a vocabulary and a width that fill no tile.
const std::vector<RandomModel>& models() {
  static std::vector<RandomModel> all;
  if (all.empty()) {
    all.emplace_back(1, Shape{"32", 3, 72, 8, 1, 32, 104, 277, true});
    all.emplace_back(2, Shape{"64", 4, 136, 4, 2, 64, 72, 131, false}, 2, 2);
    all.emplace_back(3, Shape{"128", 3, 64, 3, 1, 128, 200, 96, false});
  }
  return all;
}

template <class B>
std::vector<float> logits_on(B& backend, const Model& m, const Policy& p, std::span<const int> ids, size_t split,
                             size_t chunk = 512) {
  Engine<B> engine(m, p, {ids.size(), ids.size() - split, chunk}, backend);
  std::vector<float> all;
  const size_t vocab = m.config.shape.vocab;
  engine.prefill(
      ids, split, [&](size_t, const float* l) { all.insert(all.end(), l, l + vocab); }, true);
  return all;
}

// Cpu with a random relative error, uniform up to u, wherever Gpu rounds many rows to bf16. Rounding is wrong by u at
// most and by less for most values, so this errs more than Gpu may. Rounding softmax's weights is an error of the
// values they weigh.
struct Rough : Cpu {
  std::minstd_rand random;
  explicit Rough(uint64_t seed) : random(uint32_t(seed)) {}
  void roughen(float* x, size_t n, int times = 1) {
    std::uniform_real_distribution<float> wrong(-u, u);
    for (; times > 0; --times)
      for (size_t i = 0; i < n; ++i) x[i] *= 1 + wrong(random);
  }
  void rmsnorm(float* y, const float* x, const bf16* w, size_t n, size_t d, float eps) {
    Cpu::rmsnorm(y, x, w, n, d, eps);
    roughen(y, n * d);
  }
  void project_q(float* q, const float* a, const bf16* wq, const float* cos, const float* sin, size_t n, size_t d,
                 size_t n_heads, size_t head_dim) {
    Cpu::project_q(q, a, wq, cos, sin, n, d, n_heads, head_dim);
    roughen(q, n * n_heads * head_dim, 2);  // the product, and after RoPE
  }
  void project_kv(LayerCache<float>& cache, float* k, float* v, const float* a, const bf16* wk, const bf16* wv,
                  const float* cos, const float* sin, size_t n, size_t d, size_t n_kv_heads, size_t head_dim) {
    const size_t width = n_kv_heads * head_dim;
    matmul(k, a, wk, n, d, width);
    matmul(v, a, wv, n, d, width);
    rope(k, cos, sin, n, n_kv_heads, head_dim);
    roughen(k, n * width, 2);
    roughen(v, n * width, 2);
    append(cache, k, v, n, n_kv_heads, head_dim);
  }
  void attention(float* o, const float* q, const LayerCache<float>& cache, size_t n, size_t seen, size_t n_heads,
                 size_t n_kv_heads, size_t head_dim) {
    Cpu::attention(o, q, cache, n, seen, n_heads, n_kv_heads, head_dim);
    roughen(o, n * n_heads * head_dim);
  }
  void mlp_gate_up(float* gate, float* up, const float* a, const bf16* wg, const bf16* wu, size_t n, size_t d,
                   size_t f) {
    matmul(gate, a, wg, n, d, f);
    matmul(up, a, wu, n, d, f);
    roughen(gate, n * f);
    roughen(up, n * f);
    reference::swiglu(gate, up, n * f);
    roughen(gate, n * f);
  }
};

// How far from `ref` such errors may carry this model under this policy, as worst_row gives it: mean and four standard
// deviations of eight draws.
double tolerance(const Model& m, const Policy& p, std::span<const int> ids, size_t split, std::span<const float> ref) {
  constexpr int draws = 8;
  double sum = 0, squares = 0;
  for (int seed = 1; seed <= draws; ++seed) {
    Rough rough(seed);
    const double far = worst_row(logits_on(rough, m, p, ids, split), ref, m.config.shape.vocab);
    sum += far, squares += far * far;
  }
  const double mean = sum / draws;
  return mean + 4 * std::sqrt((squares - draws * mean * mean) / (draws - 1));
}

// Slots [from, from + n) of layer l's keys and values.
std::vector<float> cache_of(Gpu& gpu, const Engine<Gpu>& engine, const Shape& s, int l, size_t from, size_t n) {
  const auto& c = engine.cache(l);
  std::vector<float> all;
  for (const bf16* p : {c.k, c.v})
    for (int h = 0; h < s.n_kv_heads; ++h) {
      std::vector<bf16> slots(n * s.head_dim);
      gpu.download(slots.data(), p + (h * c.capacity + from) * s.head_dim, slots.size());
      for (bf16 x : slots) all.push_back(to_float(x));
    }
  return all;
}

}  // namespace

TEST_CASE("models on Gpu equal Cpu under every policy, and a small fault does not", "[gpu][model]") {
  Gpu gpu;
  Cpu cpu;
  double worst = 0;
  for (const RandomModel& r : models()) {
    const Model& m = r.m;
    const Shape& s = m.config.shape;
    const auto ids = Random(11).ids(70, m.config.bos, s.vocab);
    for (const Policy& p : all_policies(m.config)) {
      INFO("head " << s.name << " " << name(p.method) << " K=" << p.k << " bos " << p.bos);
      const size_t split = p.split(ids.size() - 3, ids.size());
      const auto ref = logits_on(cpu, m, p, ids, split);
      const double error = worst_row(logits_on(gpu, m, p, ids, split, p.k % 2 ? 512 : 40), ref, s.vocab);
      const double allowed = tolerance(m, p, ids, split, ref);
      worst = std::max(worst, error / allowed);
      CHECK(error < allowed);
      if (p.method == Method::speed && p.k > 1 && p.k < s.n_layers) {
        const Policy wrong = policy(p.method, s.n_layers, p.k - 1, p.bos);
        CHECK(worst_row(logits_on(gpu, m, wrong, ids, split), ref, s.vocab) > allowed);
      }
    }
  }
  CHECK(worst > 0.4);  // the tolerance is not idle
}

TEST_CASE("the small model's answers on Gpu", "[gpu][model]") {
  const Model m("models/small.safetensors");
  const int L = m.config.shape.n_layers;
  Gpu gpu;
  Cpu cpu;
  auto answer = [&](const Policy& p, const std::string& text) {
    const auto [ids, begin] = m.chat->first(std::nullopt, text, std::nullopt);
    const size_t split = p.split(begin, ids.size());
    const Limits limits{ids.size() + 12, ids.size() - split + 12, 512};
    Engine<Gpu> engine(m, p, limits, gpu);
    Engine<Cpu> other(m, p, limits, cpu);
    int id = 0, other_id = 0;
    engine.prefill(ids, split, [&](size_t, const float* l) { id = arg_max(l, m.config.shape.vocab); });
    other.prefill(ids, split, [&](size_t, const float* l) { other_id = arg_max(l, m.config.shape.vocab); });
    std::string said, other_said;
    for (int i = 0; i < 12 && std::count(m.config.eos.begin(), m.config.eos.end(), id) == 0; ++i) {
      said += m.tokenizer->decode(id);
      other_said += m.tokenizer->decode(other_id);
      id = engine.decode_greedy(id);
      other_id = other.decode_greedy(other_id);
    }
    CHECK(said == other_said);
    return said;
  };
  const std::string one_hop =
      "Listen to this. Feta has a clock. Pale lives in the chapel. Kara is a driver. Feta is a barber. Pale has a "
      "lamp. "
      "Kara has a book. Pale is a wizard. Kara lives in the palace. The code word is resane. Feta lives in the forest. "
      "What is Feta?";
  CHECK(answer(full_depth(L), one_hop) == "A barber.");
  CHECK(answer(policy(Method::speed, L, 3), one_hop) == "A barber.");
  CHECK(answer(policy(Method::speed, L, 3, false), one_hop) == "A barber.");
  CHECK(answer(policy(Method::speed, L, 2), one_hop) == "A judge.");  // one fact away is too far for K = 2
  CHECK(answer(policy(Method::pop, L, 2), one_hop) == "A barber.");
  CHECK(answer(policy(Method::share, L, 0, true, {0, 1, 2, 3, 4, 5, 6, 7}), one_hop) == "A barber.");
}

TEST_CASE("any schedule gives the same bits", "[gpu][model]") {
  for (const RandomModel& r : models()) {
    const Shape& s = r.m.config.shape;
    const auto ids = Random(12).ids(70, r.m.config.bos, s.vocab);
    std::vector<float> first;
    int runs = 0;
    under_seeds(4, [&] {
      Gpu gpu;
      Engine<Gpu> engine(r.m, policy(Method::speed, s.n_layers, 2), {90, 25, 64}, gpu);
      std::vector<float> all;
      auto keep = [&](const float* l) { all.insert(all.end(), l, l + s.vocab); };
      engine.prefill(
          ids, 65, [&](size_t, const float* l) { keep(l); }, true);
      for (int id : {5, 7, 9}) keep(engine.decode(id));  // as it comes, recorded, replayed
      if (runs++) CHECK(same_bits(all, first));
      first = all;
    });
  }
}

namespace {

// The laws of test_laws.cpp, where they say "bit for bit".
void exact_laws() {
  Gpu gpu;
  for (const RandomModel& r : models()) {
    const Model& m = r.m;
    const Shape& s = m.config.shape;
    const int L = s.n_layers;
    const auto ids = Random(13).ids(60, m.config.bos, s.vocab);
    INFO("head " << s.name);
    for (auto [split, chunk] : {std::array<size_t, 2>{55, 512}, {ids.size() - 1, 24}}) {
      auto run = [&, split = split, chunk = chunk](const Policy& p) { return logits_on(gpu, m, p, ids, split, chunk); };
      const auto full = run(full_depth(L));
      std::vector<int> every(L);
      for (int l = 0; l < L; ++l) every[l] = l;
      CHECK(same_bits(run(policy(Method::speed, L, L)), full));
      CHECK(same_bits(run(policy(Method::speed, L, L, false)), full));
      CHECK(same_bits(run(policy(Method::pop, L, L)), full));
      CHECK(same_bits(run(policy(Method::pop, L, L - 1)), full));
      CHECK(same_bits(run(policy(Method::share, L, 0, true, every)), full));
      if (m.config.swiftkv_k) CHECK(same_bits(run(policy(Method::swiftkv, L, L)), full));
      CHECK_FALSE(same_bits(run(policy(Method::speed, L, L - 1)), full));
    }

    const size_t split = ids.size() - 4;
    const Limits limits{ids.size(), 4, 24};
    Engine<Gpu> full(m, full_depth(L), limits, gpu);
    full.prefill(ids, split, [](size_t, const float*) {});
    for (const Policy& p : {policy(Method::speed, L, L - 1), policy(Method::pop, L, 1)}) {
      Engine<Gpu> engine(m, p, limits, gpu);
      engine.prefill(ids, split, [](size_t, const float*) {});
      for (int l = 0; l < p.k; ++l)
        CHECK(same_bits(cache_of(gpu, engine, s, l, 0, ids.size()), cache_of(gpu, full, s, l, 0, ids.size())));
      if (p.method == Method::pop)
        CHECK_FALSE(same_bits(cache_of(gpu, engine, s, L - 1, 0, split), cache_of(gpu, full, s, L - 1, 0, split)));
    }

    for (const Policy& p : {full_depth(L), policy(Method::speed, L, 1), policy(Method::share, L, 0, true, {0, 2})}) {
      auto run = [&](bool poisoned) {
        Engine<Gpu> engine(m, p, {70, 12, 24}, gpu);
        std::vector<float> all;
        engine.prefill(ids, ids.size() - 1, [](size_t, const float*) {});
        for (int id : {7, 9, 11}) {
          if (poisoned) EngineTest::poison(engine, NAN);
          const float* l = engine.decode(id);
          all.insert(all.end(), l, l + s.vocab);
        }
        return all;
      };
      CHECK(same_bits(run(true), run(false)));
    }
  }
}

}  // namespace

TEST_CASE("laws 1, 2 and 4 on Gpu, bit for bit", "[gpu][model]") { exact_laws(); }
#ifdef SPEED_EMULATOR  // a GPU has shown above what it is
TEST_CASE("laws 1, 2 and 4 with Hopper's attention, bit for bit", "[gpu][model][hopper]") { on_hopper(exact_laws); }
#endif

TEST_CASE("whole models with Hopper's attention", "[gpu][model][hopper]") {
  on_hopper([] {
    Gpu gpu;
    Cpu cpu;
    for (const RandomModel& r : models()) {
      const Model& m = r.m;
      const Shape& s = m.config.shape;
      if (s.head_dim < 64) continue;
      INFO("head " << s.name);
      const int L = s.n_layers;
      const auto ids = Random(fresh(16)).ids(150, m.config.bos, s.vocab);
      const size_t split = 140;
      const Policy speed = policy(Method::speed, L, L - 1);
      const auto ref = logits_on(cpu, m, speed, ids, split), got = logits_on(gpu, m, speed, ids, split, 70);
      const double allowed = tolerance(m, speed, ids, split, ref);
      CHECK(worst_row(got, ref, s.vocab) < allowed);
      const auto full = logits_on(gpu, m, full_depth(L), ids, split);
      CHECK(worst_row(full, ref, s.vocab) > allowed);
      CHECK(same_bits(logits_on(gpu, m, policy(Method::speed, L, L), ids, split), full));
      CHECK(same_bits(logits_on(gpu, m, policy(Method::pop, L, L - 1), ids, split), full));
#ifdef SPEED_EMULATOR
      emulator::options.major = 8;  // today's kernel sums in another order: the one for Hopper was really used
      CHECK_FALSE(same_bits(logits_on(*std::make_unique<Gpu>(), m, full_depth(L), ids, split), full));
      emulator::options.major = 9;
      emulator::options.seed = 2;
      CHECK(same_bits(logits_on(gpu, m, full_depth(L), ids, split), full));
      emulator::options.seed = 1;
#endif
    }
  });
}

TEST_CASE("laws 3, 5, 6 and 7 on Gpu, within bf16", "[gpu][model]") {
  Gpu gpu;
  Cpu cpu;
  for (const RandomModel& r : models()) {
    const Model& m = r.m;
    const Shape& s = m.config.shape;
    const int L = s.n_layers;
    const size_t V = s.vocab;
    const auto ids = Random(14).ids(45, m.config.bos, s.vocab);
    std::vector<Policy> policies = {full_depth(L), policy(Method::speed, L, 1), policy(Method::speed, L, 2, false),
                                    policy(Method::pop, L, 1), policy(Method::share, L, 0, true, {0, 2})};
    if (m.config.swiftkv_k) policies.push_back(policy(Method::swiftkv, L, m.config.swiftkv_k, true, {}, 2));
    for (const Policy& p : policies) {
      INFO("head " << s.name << " " << name(p.method) << " K=" << p.k << " bos " << p.bos);
      const size_t split = 41;
      const auto forced = logits_on(gpu, m, p, ids, split);
      // Two runs that are each so far from the exact one
      const double allowed = 2 * tolerance(m, p, ids, split, logits_on(cpu, m, p, ids, split));
      CHECK(worst_row(logits_on(gpu, m, p, ids, split, 17), forced, V) < allowed);

      Engine<Gpu> engine(m, p, {ids.size(), ids.size() - split, 512}, gpu);
      std::vector<float> one_by_one;
      auto keep = [&](const float* l) { one_by_one.insert(one_by_one.end(), l, l + V); };
      engine.prefill(std::span(ids).first(split + 1), split, [&](size_t, const float* l) { keep(l); });
      for (size_t i = split + 1; i < ids.size(); ++i) keep(engine.decode(ids[i]));
      CHECK(worst_row(one_by_one, forced, V) < allowed);

      if (p.method == Method::pop) continue;  // keeps what earlier answers left, at full depth
      Engine<Gpu> turns(m, p, {ids.size(), 8, 512}, gpu);
      turns.prefill(std::span(ids).first(18), 16, [](size_t, const float*) {});
      for (size_t i = 18; i < 21; ++i) turns.decode(ids[i]);
      turns.end_turn(false);
      std::vector<float> second;
      turns.prefill(
          std::span(ids).subspan(21), 21, [&](size_t, const float* l) { second.insert(second.end(), l, l + V); }, true);
      CHECK(worst_row(second, logits_on(gpu, m, p, ids, 42), V) < allowed);
    }
    const Policy speed = policy(Method::speed, L, 1);
    std::vector<float> before;
    for (uint64_t seed : {1, 2}) {
      const auto text = Random(seed).ids(30, m.config.bos, s.vocab);
      Engine<Gpu> engine(m, speed, {30, 2, 512}, gpu);
      engine.prefill(text, 28, [](size_t, const float*) {});
      const auto anchor = cache_of(gpu, engine, s, L - 1, 0, 1);
      if (seed == 2) CHECK(same_bits(anchor, before));
      before = anchor;
    }
  }
}

TEST_CASE("predicted = counted = allocated on Gpu", "[gpu][model]") {
  Gpu gpu;
  for (const RandomModel& r : models()) {
    const Model& m = r.m;
    const Shape& s = m.config.shape;
    for (const Policy& p : all_policies(m.config)) {
      INFO("head " << s.name << " " << name(p.method) << " K=" << p.k << " bos " << p.bos);
      const size_t N = 20, T = N - p.split(N - 3, N), n = 4;
      const Cost cost{s, p};
      Engine<Gpu> engine(m, p, {N + n, T + n, 512}, gpu);
      CHECK(engine.kv_bytes_allocated() == cost.kv_bytes(N - T, T + n, sizeof(bf16)));
      engine.prefill(Random(15).ids(N, m.config.bos, s.vocab), N - T, [](size_t, const float*) {});
      CHECK(engine.counted().flops == cost.prefill_flops(N, T));
      for (size_t i = 0; i < 3; ++i) {  // as it comes, recorded, replayed
        const Counters before = engine.counted();
        engine.decode(3);
        const Counters step = engine.counted() - before;
        CHECK(step.flops == cost.decode_flops(N + i, T + i));
        CHECK(step.weight_bytes + step.kv_bytes == cost.decode_read_bytes(N + i, T + i, sizeof(bf16), sizeof(bf16)));
      }
    }
  }
}

TEST_CASE("what Gpu refuses, by name", "[gpu][model]") {
  Gpu gpu;
  auto refused = [&](const Shape& shape, const std::string& why) {
    CHECK_THROWS_WITH(gpu.check(shape), Catch::Matchers::Contains(why));
  };
  CHECK_NOTHROW(gpu.check({"", 1, 64, 8, 1, 64, 72, 100, true}));
  refused({"", 1, 64, 8, 1, 48, 72, 100, true}, "head size 48");
  refused({"", 1, 64, 9, 1, 64, 72, 100, true}, "9 query heads share a key head");
  refused({"", 1, 60, 8, 1, 64, 72, 100, true}, "widths 60 and 72");
  refused({"", 1, 64, 8, 1, 64, 75, 100, true}, "widths 64 and 75");
}
