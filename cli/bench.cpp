// bench.cpp - the mode `bench`: how fast, beside how fast this machine could be.
//
// Two ceilings are measured before and after every repetition of every test, because a shared machine changes from
// minute to minute: the rate at which all threads together read memory, and the rate of their best matrix products.
// With the engine's counts they give the least time possible just then, max(FLOPs / ceiling, bytes / ceiling). The
// share shown is this least time divided by the time measured.
#include <array>
#include <iostream>
#include <numeric>

#include "backend.h"
#include "modes.h"
#include "policies.h"

namespace speed {

struct Ceilings {
  double gflops = 0, gbps = 0;
};

template <class Work>
double seconds_of(Work work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Ceilings measure_ceilings(Cpu& cpu, const Shape&) {
  Ceilings best;
  const size_t words = size_t(64) << 20, block = 1 << 10, line = 16;  // 256 MiB, well beyond any cache
  if (const uint64_t have = cpu.available_memory(); have < words * sizeof(uint32_t))
    throw Error(2, "memory",
                "the ceilings need " + std::to_string(words * sizeof(uint32_t) >> 20) + " MiB, " +
                    std::to_string(have >> 20) + " MiB are available",
                "free some, or use a smaller -t");
  {
    Cpu::Buffer<uint32_t> memory(words);
    const uint32_t* p = memory.get();
    std::fill_n(memory.get(), words, 1);
    for (int i = 0; i < 12; ++i) {
      uint32_t total = 0;
      // Without and with asking ahead, into the first and the second cache: what is fastest depends on the processor.
      const auto [near, far] = std::array<std::pair<size_t, size_t>, 3>{{{0, 0}, {512, 0}, {128, 1024}}}[i % 3];
      const double t = seconds_of([&] {
#pragma omp parallel for reduction(+ : total)
        for (size_t j = 0; j < words; j += block) {
          uint32_t sum[line] = {};
          for (size_t k = j; k < j + block; k += line) {
            if (far) __builtin_prefetch(p + k + far, 0, 2);
            if (near) __builtin_prefetch(p + k + near);
            for (size_t l = 0; l < line; ++l) sum[l] += p[k + l];
          }
          total += std::accumulate(sum, sum + line, 0u);
        }
      });
      if (total == words)
        best.gbps = std::max(best.gbps, double(words) * 4 / t / 1e9);  // the sum is used, so it is made
    }
  }
  {
    const int m = 512, n = 1024, k = 2048, threads = omp_get_max_threads();
    std::vector<Cpu::Buffer<float>> memory(threads);
    for (auto& b : memory)
      b = Cpu::Buffer<float>(size_t(m) * k + size_t(n) * k + size_t(m) * n), std::fill_n(b.get(), b.size, 0.5f);
    for (int i = 0; i < 5; ++i) {
      const double t = seconds_of([&] {
#pragma omp parallel for
        for (int j = 0; j < threads; ++j) {
          float *a = memory[j].get(), *b = a + size_t(m) * k, *c = b + size_t(n) * k;
          cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1, a, k, b, k, 0, c, n);
        }
      });
      best.gflops = std::max(best.gflops, 2.0 * m * n * k * threads / t / 1e9);
    }
  }
  return best;
}

// Empties the caches of the device, so that no repetition finds weights or KV cache there. On a CPU measure_ceilings
// does, by reading 256 MiB.
void flush(Cpu&) {}

#ifdef __CUDACC__
// Read-only bandwidth over memory far larger than the L2 cache; and cuBLAS on the products of one layer of this shape,
// with a full chunk of rows of random values (zeros are faster).
Ceilings measure_ceilings(Gpu& gpu, const Shape& s) {
  Ceilings best;
  Event begin, end;
  auto best_of = [&](int times, auto work) {
    double least = INFINITY;
    for (int i = 0; i <= times; ++i) {  // the first is not counted
      begin.record(gpu.stream());
      work();
      end.record(gpu.stream());
      gpu.wait();
      if (i) least = std::min(least, end.seconds_since(begin));
    }
    return least;
  };
  const size_t free = size_t(gpu.available_memory() / 4);
  auto random = [&](bf16* p, size_t n) {
    launch(kernel::random_weights, dim3(unsigned((n + 255) / 256)), dim3(256), 0, gpu.stream(), p, n, 1u);
  };
  {
    const size_t words = std::min<size_t>(std::max<size_t>(32 * gpu.device().l2_bytes, 1 << 20), free) / 16;
    Gpu::Buffer<uint4> memory(words);
    Gpu::Buffer<uint32_t> never(1);
    random(reinterpret_cast<bf16*>(memory.get()), words * 8);
    double t = INFINITY;
    for (int blocks : {4, 8, 16})  // on a multiprocessor: which is fastest changes with where the memory lies
      t = std::min(t, best_of(5, [&] {
                     launch(kernel::read_all, dim3(unsigned(gpu.device().multiprocessors * blocks)), dim3(256), 0,
                            gpu.stream(), never.get(), memory.get(), words);
                   }));
    best.gbps = double(words) * 16 / t / 1e9;
  }
  {
    struct Product {
      size_t in, out;
    };
    const size_t d = s.hidden, q = s.q_width(), kv = s.kv_width(), f = s.mlp;
    const std::vector<Product> layer = {{d, q}, {d, kv}, {d, kv}, {q, d}, {d, f}, {d, f}, {f, d}};
    const size_t widest = std::max({d, q, f}), rows = std::clamp<size_t>(free / 2 / (2 * widest), 1, 8192);
    Gpu::Buffer<bf16> x(rows * widest), y(rows * widest), w(std::max({d * q, d * kv, d * f}));
    random(x.get(), x.size), random(w.get(), w.size);
    double flops = 0;
    for (const Product& p : layer) flops += 2.0 * double(rows) * double(p.in) * double(p.out);
    const double t = best_of(5, [&] {
      for (const Product& p : layer) gpu.blas().gemm(y.get(), x.get(), w.get(), rows, p.in, p.out, 0);
    });
    best.gflops = flops / t / 1e9;
  }
  return best;
}

void flush(Gpu& gpu) {
  Gpu::Buffer<uint8_t> other(2 * gpu.device().l2_bytes);
  fill_bytes(other.get(), 0, other.size, gpu.stream());
  gpu.wait();
}
#endif

// A prompt to prefill, or steps to decode after a prompt.
struct BenchTest {
  Policy policy;
  size_t prompt = 0;      // either a prompt of so many tokens,
  size_t gen = 0;         // or so many decode steps
  size_t depth = 0;       // after this many tokens
  Counters counted = {};  // of one repetition
  std::vector<double> seconds = {};
  std::vector<Ceilings> ceilings = {};  // around each

  // The least seconds possible under these ceilings. Of a prompt only FLOPs count: weights are read meanwhile.
  double least_seconds(const Ceilings& c) const {
    const double bytes = gen ? double(counted.weight_bytes + counted.kv_bytes) : 0;
    return std::max(double(counted.flops) / c.gflops, bytes / c.gbps) / 1e9;
  }
};

Ceilings median(const std::vector<Ceilings>& all) {
  std::vector<double> gflops, gbps;
  for (const Ceilings& c : all) gflops.push_back(c.gflops), gbps.push_back(c.gbps);
  return {median(gflops), median(gbps)};
}

// One repetition, with fixed token ids: what they are does not change the work.
template <class B>
void run_bench_test(BenchTest& t, const Model& model, size_t chunk, B& backend) {
  const int bos = std::max(model.config.bos, 0), other = bos == 1 ? 2 : 1;
  constexpr size_t warm = 2;  // decode steps before the timed ones: a GPU captures its graph in these
  std::vector<int> ids(std::max(t.prompt ? t.prompt : t.depth, size_t(1)), other);
  ids[0] = bos;
  Engine<B> engine(model, t.policy, {ids.size() + t.gen + warm, 1 + t.gen + warm, chunk}, backend);
  flush(backend);
  auto prefill = [&] { engine.prefill(ids, ids.size() - 1, [](size_t, const float*) {}); };
  if (t.prompt) {
    t.seconds.push_back(seconds_of(prefill));
    t.counted = engine.counted();
  } else {
    prefill();
    for (size_t i = 0; i < warm; ++i) engine.decode_greedy(other);
    const Counters before = engine.counted();
    t.seconds.push_back(seconds_of([&] {
      for (size_t i = 0; i < t.gen; ++i) engine.decode_greedy(other);
    }));
    t.counted = engine.counted() - before;
  }
}

template <class B>
Table bench_table(const std::vector<BenchTest>& tests, const B& backend) {
  Table table({{"test", "test"},
               {"policy", ""},
               {"name", "policy"},
               {"k", ""},
               {"bos", ""},
               {"n_prompt", ""},
               {"n_gen", ""},
               {"n_depth", ""},
               {"avg_ns", ""},
               {"stddev_ns", ""},
               {"samples_ns", ""},
               {"avg_ts", "tokens/s"},
               {"stddev_ts", "+-"},
               {"samples_ts", ""},
               {"gflops", "GFLOP/s"},
               {"gbps", "GB/s"},
               {"share", "of ceiling"},
               {"ceiling_gflops", ""},
               {"ceiling_gbps", ""},
               {"floor_ns", ""},
               {"device", ""},
               {"threads", ""},
               {"peak_bytes", ""},
               {"commit", ""}});
  auto mean = [](const std::vector<double>& v) { return std::accumulate(v.begin(), v.end(), 0.0) / double(v.size()); };
  auto deviation = [&](const std::vector<double>& v) {
    double sum = 0;
    for (double x : v) sum += (x - mean(v)) * (x - mean(v));
    return v.size() > 1 ? std::sqrt(sum / double(v.size() - 1)) : 0.0;
  };
  for (const BenchTest& t : tests) {
    std::vector<double> ns, rate, share;
    for (size_t i = 0; i < t.seconds.size(); ++i) {
      ns.push_back(t.seconds[i] * 1e9);
      rate.push_back(double(t.prompt + t.gen) / t.seconds[i]);
      share.push_back(t.least_seconds(t.ceilings[i]) / t.seconds[i]);
    }
    const double typical = median(t.seconds), bytes = double(t.counted.weight_bytes + t.counted.kv_bytes);
    const double gflops = double(t.counted.flops) / typical / 1e9, gbps = t.gen ? bytes / typical / 1e9 : 0;
    const Ceilings ceilings = median(t.ceilings);
    const std::string what =
        t.prompt ? "prompt " + std::to_string(t.prompt)
                 : "generate " + std::to_string(t.gen) + (t.depth ? " @ " + std::to_string(t.depth) : "");
    table.row({what,
               name(t.policy.method),
               describe(t.policy),
               t.policy.k,
               bos_of(t.policy),
               t.prompt,
               t.gen,
               t.depth,
               mean(ns),
               deviation(ns),
               ns,
               {mean(rate), fixed(mean(rate), 1)},
               {deviation(rate), fixed(deviation(rate), 1)},
               rate,
               {gflops, fixed(gflops, 0)},
               {t.gen ? json(gbps) : json(), t.gen ? fixed(gbps, 1) : "-"},
               {median(share), fixed(100 * median(share), 0) + " %"},
               ceilings.gflops,
               ceilings.gbps,
               t.least_seconds(ceilings) * 1e9,
               B::name,
               omp_get_max_threads(),
               peak_bytes(backend),
               commit});
  }
  return table;
}

template <class B>
int bench(const Options& o, json& record, Model& model, B& backend) {
  if constexpr (std::is_same_v<B, Cpu>)
    if (!model.has_file()) model.make_weights();
  const Config& c = model.config;
  std::vector<BenchTest> tests;
  const auto prompts = read_numbers(o.prompts, "-p"), depths = read_numbers(o.depths, "--depth");
  std::vector<Policy> policies = listed_policies(o, model);
  if (!o.policy) policies.insert(policies.begin(), full_depth(c.shape.n_layers));
  for (const Policy& p : policies) {
    for (int n : prompts) {
      if (n == 0) throw Error(2, "-p 0", "a prompt has one token or more", "give lengths from 1, or -p '' for none");
      tests.push_back({.policy = p, .prompt = size_t(n)});
    }
    if (o.n > 0)
      for (int depth : depths) tests.push_back({.policy = p, .gen = size_t(o.n), .depth = size_t(depth)});
  }
  if (tests.empty()) throw Error(2, "bench", "there is nothing to time", "give -p or -n a value");
  for (const BenchTest& t : tests)
    if (t.prompt + t.depth + t.gen > size_t(c.context))
      throw Error(2, "bench",
                  "a test of " + std::to_string(t.prompt + t.depth + t.gen) + " tokens exceeds the model's " +
                      std::to_string(c.context),
                  "shorten it");
  Progress progress("bench");
  Ceilings before = measure_ceilings(backend, c.shape);
  for (int round = -1; round < o.repetitions; ++round)  // round -1 is not counted: it reads the weights into memory
    for (size_t i = 0; i < tests.size(); ++i) {
      if (interrupted) throw Interrupted{};
      run_bench_test(tests[i], model, size_t(o.chunk), backend);
      const Ceilings after = measure_ceilings(backend, c.shape);
      tests[i].ceilings.push_back({(before.gflops + after.gflops) / 2, (before.gbps + after.gbps) / 2});
      before = after;
      if (round < 0) tests[i].seconds.clear(), tests[i].ceilings.clear();
      progress.update((double(round + 1) + double(i + 1) / double(tests.size())) / (o.repetitions + 1));
    }
  progress.clear();
  std::vector<Ceilings> ceilings;
  for (const BenchTest& t : tests) ceilings.insert(ceilings.end(), t.ceilings.begin(), t.ceilings.end());
  const Ceilings typical = median(ceilings);
  const Table table = bench_table(tests, backend);
  if (o.format == "json") {
    std::cout << table.rows_as_json().dump(2) << "\n";
  } else {
    if (o.format == "text")
      std::cout << c.shape.name << ", " << hardware(backend) << "\nceilings here: " << fixed(typical.gflops, 0)
                << " GFLOP/s of products, " << fixed(typical.gbps, 1) << " GB/s read; each test " << o.repetitions
                << " times, in turn\n\n";
    table.print(std::cout, o.format);
  }
  record["results"] = table.rows_as_json();
  return 0;
}

int run_bench(const Options& o, json& record) {
  return on_device(o, record, [&](Model& m, auto& backend) { return bench(o, record, m, backend); });
}

}  // namespace speed
