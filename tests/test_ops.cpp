// Each operation of the CPU backend against its plain definition, on awkward shapes.
//
// Tolerance. A sum of n terms in fp32 in any order has a relative error of at most n u of the sum of magnitudes, u =
// 2^-24, and about sqrt(n) u for random signs. With n up to 1,000 that is 2e-6; 1e-5 leaves a factor for the norm of a
// result that is smaller than its terms. The definitions sum in double, so all of the error is the fast version's.
#include "helpers.h"

using namespace test;

namespace {
constexpr double tolerance = 1e-5;
}

TEST_CASE("matmul", "[ops]") {
  Cpu cpu;
  Random random(1);
  for (auto [n, in, out] : {std::array<size_t, 3>{1, 1, 1},
                            {1, 577, 300},
                            {2, 64, 5},
                            {3, 33, 257},
                            {7, 100, 256},
                            {8, 321, 40},
                            {9, 321, 40},
                            {65, 129, 513},
                            {130, 1000, 70}})
    for (bool add : {false, true}) {
      INFO(n << " x " << in << " x " << out << (add ? " added" : ""));
      const auto x = random.normal(n * in), start = random.normal(n * out);
      const auto w = random.weights(out * in, 0.5f);
      auto y = start, ref = start;
      cpu.matmul(y.data(), x.data(), w.data(), n, in, out, add);
      reference::matmul(ref.data(), x.data(), w.data(), n, in, out, add);
      CHECK(worst_row(y, ref, out) < tolerance);
      auto wrong = w;
      wrong[(out - 1) * in].bits ^= 0x8000;
      cpu.matmul(y.data(), x.data(), wrong.data(), n, in, out, false);
      CHECK(worst_row(y, ref, out) > tolerance);
    }
}

TEST_CASE("rmsnorm", "[ops]") {
  Cpu cpu;
  Random random(2);
  for (auto [n, d] : {std::array<size_t, 2>{1, 1}, {1, 576}, {5, 33}, {70, 1000}}) {
    const auto x = random.normal(n * d);
    const auto w = random.weights(d, 1);
    std::vector<float> y(n * d), ref(n * d);
    cpu.rmsnorm(y.data(), x.data(), w.data(), n, d, 1e-5f);
    reference::rmsnorm(ref.data(), x.data(), w.data(), n, d, 1e-5f);
    CHECK(worst_row(y, ref, d) < tolerance);
    reference::rmsnorm(ref.data(), x.data(), w.data(), n, d, 1e-2f);
    CHECK(worst_row(y, ref, d) > tolerance);
  }
}

TEST_CASE("attention", "[ops]") {
  Cpu cpu;
  Random random(3);
  struct Case {
    size_t n, seen, heads, kv_heads, head_dim;
  };
  for (const Case& c : {Case{1, 1, 1, 1, 2},
                        {1, 1000, 9, 3, 64},
                        {1, 257, 8, 1, 32},
                        {1, 700, 20, 1, 128},
                        {1, 263, 11, 1, 20},
                        {2, 1, 2, 2, 8},
                        {63, 1, 3, 1, 16},
                        {64, 256, 4, 4, 8},
                        {65, 193, 6, 2, 64},
                        {70, 127, 5, 1, 20},
                        {130, 700, 4, 1, 128},
                        {300, 1, 2, 1, 8}}) {
    INFO(c.n << " rows, first sees " << c.seen << ", heads " << c.heads << "/" << c.kv_heads << " x " << c.head_dim);
    const size_t slots = c.seen + c.n - 1, capacity = slots + 3;
    auto q = random.normal(c.n * c.heads * c.head_dim);
    for (float& x : q) x *= 3;  // sharp enough that a wrong slot shows
    auto k = random.normal(c.kv_heads * capacity * c.head_dim), v = random.normal(c.kv_heads * capacity * c.head_dim);
    for (size_t h = 0; h < c.kv_heads; ++h)  // what lies past the last slot is never read
      for (size_t i = slots * c.head_dim; i < capacity * c.head_dim; ++i)
        k[h * capacity * c.head_dim + i] = v[h * capacity * c.head_dim + i] = NAN;
    LayerCache<float> cache{k.data(), v.data(), capacity, slots};
    std::vector<float> o(q.size()), ref(q.size());
    cpu.attention(o.data(), q.data(), cache, c.n, c.seen, c.heads, c.kv_heads, c.head_dim);
    reference::attention(ref.data(), q.data(), cache, c.n, c.seen, c.heads, c.kv_heads, c.head_dim);
    CHECK(worst_row(o, ref, c.head_dim) < tolerance);
    if (c.n >= 6) {  // in two calls, the same bits
      std::vector<float> parts(q.size());
      const size_t first = c.n / 3, at = first * c.heads * c.head_dim;
      cpu.attention(parts.data(), q.data(), cache, first, c.seen, c.heads, c.kv_heads, c.head_dim);
      cpu.attention(&parts[at], &q[at], cache, c.n - first, c.seen + first, c.heads, c.kv_heads, c.head_dim);
      CHECK(same_bits(parts, o));
    }
    if (c.seen == 1) continue;
    reference::attention(ref.data(), q.data(), cache, c.n, c.seen - 1, c.heads, c.kv_heads, c.head_dim);
    CHECK(worst_row(o, ref, c.head_dim) > tolerance);
  }
}

TEST_CASE("silu, rope and exp", "[ops]") {
  Cpu cpu;
  Random random(4);
  auto gate = random.normal(1003);
  for (float& x : gate) x *= 20;
  auto ref = gate;
  const std::vector<float> up(gate.size(), 1);
  for (float& x : gate) x = Cpu::silu(x);
  reference::swiglu(ref.data(), up.data(), ref.size());
  CHECK(relative_error(gate, ref) < 1e-6);
  for (float x = -87; x < 88; x += 0.0137f) REQUIRE(fast::exp(x) == Approx(std::exp(double(x))).epsilon(3e-7));
  CHECK(std::isnan(fast::exp(NAN)));
  CHECK(fast::exp(-INFINITY) == 0);

  // A rotation keeps the length of each pair, and turning by a + b is turning by a, then by b.
  const size_t n = 5, heads = 3, e = 16;
  auto x = random.normal(n * heads * e), twice = x;
  std::vector<float> f(e / 2), cos(n * e / 2), sin(n * e / 2);
  for (size_t i = 0; i < f.size(); ++i) f[i] = 1.0f / float(i + 1);
  auto turn = [&](std::vector<float>& y, std::vector<int> positions) {
    cpu.rope_angles(cos.data(), sin.data(), f.data(), positions.data(), n, e / 2);
    cpu.rope(y.data(), cos.data(), sin.data(), n, heads, e);
  };
  const auto before = x;
  turn(x, {0, 3, 10, 100, 7});
  turn(twice, {0, 1, 4, 60, 7});
  turn(twice, {0, 2, 6, 40, 0});
  CHECK(relative_error(x, twice) < tolerance);
  CHECK(relative_error(x, before) > 0.1);
  CHECK(same_bits(std::span(x).first(heads * e), std::span(before).first(heads * e)));
}

TEST_CASE("keys, values and the gated product, of one row and of many", "[ops]") {
  Cpu cpu;
  Random random(6);
  const size_t d = 300, heads = 3, e = 16, width = heads * e, f = 550, used = 2, capacity = 700;
  for (size_t n : {1, 2, 7, 9, 65, 600}) {
    INFO(n << " rows");
    const auto a = random.normal(n * d), cos = random.normal(n * e / 2), sin = random.normal(n * e / 2);
    const auto wk = random.weights(width * d, 0.1f), wv = random.weights(width * d, 0.1f);
    std::vector<float> k(n * width), v(n * width), ref(n * width), keys(heads * capacity * e), values(keys);
    LayerCache<float> cache{keys.data(), values.data(), capacity, used};
    cpu.project_kv(cache, k.data(), v.data(), a.data(), wk.data(), wv.data(), cos.data(), sin.data(), n, d, heads, e);
    CHECK(cache.used == used + n);
    // The appended slots, as rows again
    auto rows_of = [&](const std::vector<float>& slots) {
      std::vector<float> rows(n * width);
      for (size_t r = 0; r < n; ++r)
        for (size_t h = 0; h < heads; ++h)
          std::copy_n(&slots[(h * capacity + used + r) * e], e, &rows[(r * heads + h) * e]);
      return rows;
    };
    reference::matmul(ref.data(), a.data(), wv.data(), n, d, width, false);
    CHECK(worst_row(rows_of(values), ref, width) < tolerance);
    CHECK(worst_row(rows_of(keys), ref, width) > tolerance);
    reference::matmul(ref.data(), a.data(), wk.data(), n, d, width, false);
    reference::rope(ref.data(), cos.data(), sin.data(), n, heads, e);
    CHECK(worst_row(rows_of(keys), ref, width) < tolerance);

    const auto wg = random.weights(f * d, 0.1f), wu = random.weights(f * d, 0.1f);
    std::vector<float> gate(n * f), up(n * f), gate_ref(n * f), up_ref(n * f);
    const uint64_t before = cpu.counters.flops;
    cpu.mlp_gate_up(gate.data(), up.data(), a.data(), wg.data(), wu.data(), n, d, f);
    CHECK(cpu.counters.flops - before == 2 * n * d * 2 * f);
    reference::matmul(gate_ref.data(), a.data(), wg.data(), n, d, f, false);
    reference::matmul(up_ref.data(), a.data(), wu.data(), n, d, f, false);
    auto exchanged = up_ref;
    reference::swiglu(exchanged.data(), gate_ref.data(), n * f);
    reference::swiglu(gate_ref.data(), up_ref.data(), n * f);
    CHECK(worst_row(gate, gate_ref, f) < tolerance);
    CHECK(worst_row(gate, exchanged, f) > tolerance);
  }
}

TEST_CASE("a row gives the same bits alone and among a few", "[ops]") {
  Cpu cpu;
  Random random(7);
  const size_t n = Cpu::gemv_rows, d = 333, heads = 2, e = 18, width = heads * e, f = 70;
  const auto a = random.normal(n * d), cos = random.normal(n * e / 2), sin = random.normal(n * e / 2);
  const auto w1 = random.weights(f * d, 0.1f), w2 = random.weights(f * d, 0.1f);
  struct Results {
    std::vector<float> product, gated, keys, values;
  };
  auto run = [&](size_t first, size_t rows) {
    Results r{std::vector<float>(rows * f), std::vector<float>(rows * f), std::vector<float>(rows * width),
              std::vector<float>(rows * width)};
    std::vector<float> up(rows * f), k(rows * width), v(rows * width);
    LayerCache<float> cache{r.keys.data(), r.values.data(), rows};
    const float *x = &a[first * d], *c = &cos[first * e / 2], *s = &sin[first * e / 2];
    cpu.matmul(r.product.data(), x, w1.data(), rows, d, f);
    cpu.mlp_gate_up(r.gated.data(), up.data(), x, w1.data(), w2.data(), rows, d, f);
    cpu.project_kv(cache, k.data(), v.data(), x, w1.data(), w2.data(), c, s, rows, d, heads, e);
    return r;
  };
  auto row = [](const std::vector<float>& all, size_t r, size_t size) {
    return std::span(all).subspan(r * size, size);
  };
  for (size_t many = 2; many <= n; ++many) {
    const Results together = run(0, many);
    for (size_t r = 0; r < many; ++r) {
      const Results alone = run(r, 1);
      INFO("row " << r << " of " << many);
      CHECK(same_bits(row(together.product, r, f), alone.product));
      CHECK(same_bits(row(together.gated, r, f), alone.gated));
      for (size_t h = 0; h < heads; ++h) {
        CHECK(same_bits(row(together.keys, h * many + r, e), row(alone.keys, h, e)));
        CHECK(same_bits(row(together.values, h * many + r, e), row(alone.values, h, e)));
      }
    }
  }
}

TEST_CASE("results do not depend on the number of threads", "[ops][threads]") {
  Random random(5);
  const size_t n = 70, in = 300, out = 700;
  const auto x = random.normal(n * in);
  const auto w = random.weights(out * in, 1);
  std::vector<float> one(n * out), two(n * out);
  const int before = omp_get_max_threads();
  Cpu cpu(1);
  cpu.matmul(one.data(), x.data(), w.data(), n, in, out);
  std::vector<float> up(n * out), gated_one(n * out), gated_two(n * out), one_row(out), one_row_too(out);
  cpu.mlp_gate_up(gated_one.data(), up.data(), x.data(), w.data(), w.data(), n, in, out);
  cpu.mlp_gate_up(one_row.data(), up.data(), x.data(), w.data(), w.data(), 1, in, out);
  Cpu more(3);
  more.matmul(two.data(), x.data(), w.data(), n, in, out);
  more.mlp_gate_up(gated_two.data(), up.data(), x.data(), w.data(), w.data(), n, in, out);
  more.mlp_gate_up(one_row_too.data(), up.data(), x.data(), w.data(), w.data(), 1, in, out);
  omp_set_num_threads(before);
  CHECK(same_bits(one, two));
  CHECK(same_bits(gated_one, gated_two));
  CHECK(same_bits(one_row, one_row_too));
}

TEST_CASE("sampling", "[ops]") {
  const std::vector<float> logits = {1, 5, 3, 5, -2, 4};
  auto draws = [&](Sampling s) {
    Sampler sampler(s);
    std::vector<int> count(logits.size());
    for (int i = 0; i < 20000; ++i) ++count[sampler(logits.data(), logits.size())];
    return count;
  };
  CHECK(draws({})[1] == 20000);  // greedy, the first of equals
  const auto free = draws({.temperature = 1, .seed = 7});
  double all = 0;
  for (float l : logits) all += std::exp(double(l));
  for (size_t i = 0; i < logits.size(); ++i) {
    const double p = std::exp(double(logits[i])) / all;
    CHECK(std::abs(free[i] - 20000 * p) <= 5 * std::sqrt(20000 * p * (1 - p)) + 1);  // five standard deviations
  }
  CHECK(draws({.temperature = 1, .seed = 7}) == free);
  CHECK(draws({.temperature = 1, .seed = 8}) != free);
  auto only = [](const std::vector<int>& c, std::vector<int> ids) {
    for (size_t i = 0; i < c.size(); ++i)
      if ((c[i] > 0) != (std::find(ids.begin(), ids.end(), int(i)) != ids.end())) return false;
    return true;
  };
  CHECK(only(draws({.temperature = 1, .top_k = 3}), {1, 3, 5}));
  CHECK(only(draws({.temperature = 5, .top_p = 0.7f}), {1, 3}));  // by the probabilities at temperature 1
  CHECK(only(draws({.temperature = 5, .min_p = 0.2f}), {1, 3, 5}));
  auto bad = logits;
  bad[4] = NAN;
  CHECK_THROWS_AS(arg_max(bad.data(), bad.size()), Error);
}
