// times.cu - each kernel of the CUDA backend alone, at the sizes of Llama-3.1-8B, beside the GPU's own ceilings.
//
//   times [STEM]           prints a table; STEM.tsv is the same for programs
//
// Ceilings are measured first, by this program: how fast memory is read, and cuBLAS's product of 8192^3. A line's share
// is of the one that limits it. Every time is the median of several runs after one uncounted. Weights and caches are
// used in turn, so many that the L2 cache holds none from one run to the next. Built by `make gpu-kit`.
#include <cstdio>
#include <cstring>

#include "../../gpu/gpu.cuh"

using namespace speed;

namespace {

constexpr size_t hidden = 4096, heads = 32, kv_heads = 8, head_dim = 128, mlp = 14336, vocab = 128256;
constexpr size_t q_width = heads * head_dim, kv_width = kv_heads * head_dim;
constexpr float scale = 1.44269504f / 11.3137085f;  // log2(e) / sqrt(128)

Gpu* gpu;
FILE* record;                    // tab-separated, where a name was given
double read_rate, product_rate;  // ceilings: bytes and FLOPs a second

template <class Work>
double median_seconds(Work work, int repeats = 7) {
  std::vector<double> all;
  Event begin, end;
  for (int i = 0; i <= repeats; ++i) {
    begin.record(gpu->stream());
    work();
    end.record(gpu->stream());
    gpu->wait();
    if (i) all.push_back(end.seconds_since(begin));
  }
  std::sort(all.begin(), all.end());
  return all[all.size() / 2];
}

void line(const std::string& what, double seconds, double bytes, double flops = 0) {
  if (!bytes && !flops) {
    std::printf("%-44s %10.2f us\n", what.c_str(), seconds * 1e6);
    if (record) std::fprintf(record, "%s\t%.3f\t\t\t\n", what.c_str(), seconds * 1e6);
    return;
  }
  const double rate = flops ? flops / seconds / 1e12 : bytes / seconds / 1e9;
  const double share = flops ? flops / seconds / product_rate : bytes / seconds / read_rate;
  std::printf("%-44s %10.1f us %8.0f %-7s %5.1f %%\n", what.c_str(), seconds * 1e6, rate, flops ? "TFLOP/s" : "GB/s",
              100 * share);
  std::fflush(stdout);
  if (record) {
    std::fprintf(record, "%s\t%.3f\t%.1f\t%s\t%.4f\n", what.c_str(), seconds * 1e6, rate, flops ? "TFLOP/s" : "GB/s",
                 share);
    std::fflush(record);
  }
}

dim3 grid(size_t items, size_t each) { return dim3(unsigned((items + each - 1) / each)); }

Gpu::Buffer<bf16> random_values(size_t n, uint32_t seed = 1) {
  Gpu::Buffer<bf16> b(n);
  launch(kernel::random_weights, grid(n, 256), dim3(256), 0, gpu->stream(), b.get(), n, seed);
  return b;
}
Gpu::Buffer<float> zeros(size_t n) {
  Gpu::Buffer<float> b(n);
  fill_bytes(b.get(), 0, n * sizeof(float), gpu->stream());
  return b;
}

void ceilings() {
  {
    const auto memory = random_values(size_t(1) << 30);  // 2 GiB
    Gpu::Buffer<uint32_t> never(1);
    const size_t words = memory.size / 8;
    double best = 1e9;
    for (int per_multiprocessor : {4, 8, 16})
      best = std::min(best, median_seconds([&] {
                        launch(kernel::read_all, dim3(unsigned(gpu->device().multiprocessors * per_multiprocessor)),
                               dim3(256), 0, gpu->stream(), never.get(), reinterpret_cast<const uint4*>(memory.get()),
                               words);
                      }));
    read_rate = double(words) * 16 / best;
    line("read 2 GiB", best, double(words) * 16);
    const size_t half = memory.size;  // bytes
    line("copy 1 GiB, read and written",
         median_seconds([&] { copy_on_device(memory.get(), memory.get() + half / 2, half, gpu->stream()); }),
         2.0 * double(half));
  }
  const size_t n = 8192;
  const auto x = random_values(n * n), w = random_values(n * n, 2);
  Gpu::Buffer<bf16> y(n * n);
  const double flops = 2.0 * n * n * n,
               t = median_seconds([&] { gpu->blas().gemm(y.get(), x.get(), w.get(), n, n, n, 0); });
  product_rate = flops / t;
  line("cuBLAS 8192^3", t, 0, flops);
}

// What a kernel costs that does nothing: 300 in a graph, each after the one before.
void launch_cost() {
  auto y = random_values(256), x = random_values(256);
  launch(kernel::swiglu, dim3(1), dim3(32), 0, gpu->stream(), y.get(), x.get(), size_t(256));  // loads it
  Graph graph(gpu->stream(), [&] {
    for (int i = 0; i < 300; ++i)
      launch(kernel::swiglu, dim3(1), dim3(32), 0, gpu->stream(), y.get(), x.get(), size_t(256));
  });
  line("an all but empty kernel in a graph", median_seconds([&] { graph.run(gpu->stream()); }) / 300, 0);
}

void prompt_products() {
  const auto w = random_values(mlp * hidden * 2, 2), x = random_values(8192 * mlp);
  Gpu::Buffer<bf16> y(8192 * mlp * 2);
  const auto residual = zeros(8192 * hidden);
  struct Case {
    const char* name;
    size_t in, out;
    bool add;
  };
  const Case cases[] = {{"Q", hidden, q_width, false},
                        {"K or V", hidden, kv_width, false},
                        {"K and V in one", hidden, 2 * kv_width, false},
                        {"O, added to fp32", q_width, hidden, true},
                        {"gate or up", hidden, mlp, false},
                        {"gate and up in one", hidden, 2 * mlp, false},
                        {"down, added to fp32", mlp, hidden, true}};
  for (size_t rows : {2048, 8192})
    for (const Case& c : cases)
      line(std::string("cuBLAS ") + c.name + ", " + std::to_string(rows) + " rows", median_seconds([&] {
             if (c.add) gpu->blas().gemm(residual.get(), x.get(), w.get(), rows, c.in, c.out, 1);
             else gpu->blas().gemm(y.get(), x.get(), w.get(), rows, c.in, c.out, 0);
           }),
           0, 2.0 * double(rows) * double(c.in) * double(c.out));
}

void attention() {
  const size_t longest = 131072, chunk = 8192, each = 4 * kv_width;  // bytes of a slot
  const auto k = random_values(longest * kv_width), v = random_values(longest * kv_width, 2);
  const auto q = random_values(chunk * q_width, 3);
  Gpu::Buffer<bf16> o(chunk * q_width);
  for (size_t length : {2048, 8192, 32768, 131072}) {  // the last chunk of a prompt
    const size_t rows = std::min(chunk, length), seen = length - rows + 1;
    const double flops = 4.0 * q_width * (double(rows) * double(seen) + double(rows) * double(rows - 1) / 2);
    const int repeats = length > 32768 ? 3 : 7;
    const LayerCache<bf16> cache{k.get(), v.get(), longest, length, 0, nullptr};
    line("attention, last chunk of " + std::to_string(length),
         median_seconds([&] { gpu->attention(o.get(), q.get(), cache, rows, seen, heads, kv_heads, head_dim); },
                        repeats),
         0, flops);
    if (gpu->device().major == 9)
      line("  the same without Hopper's instructions",
           median_seconds(
               [&] {
                 launch(kernel::prefill_attention<head_dim>,
                        dim3(heads, unsigned((rows + kernel::prefill_rows - 1) / kernel::prefill_rows)),
                        dim3(kernel::prefill_threads), kernel::prefill_shared_bytes<head_dim>, gpu->stream(), o.get(),
                        q.get(), k.get(), v.get(), longest, int(rows), int(seen), int(kv_heads), scale);
               },
               repeats),
           0, flops);
  }
  gpu->load(
      Model(Shape{"", 1, int(hidden), int(heads), int(kv_heads), int(head_dim), 64, 64, true}, false));  // its scratch
  Gpu::Buffer<uint32_t> begin(1);
  for (uint32_t length : {2047u, 8191u, 32767u, 131071u}) {  // slots before the row's own
    gpu->upload(begin.get(), &length, 1);
    const size_t caches = length < 32768 ? 4 : 1, slots = longest / caches;
    line("attention of one row over " + std::to_string(length + 1),
         median_seconds([&] {
           for (size_t i = 0; i < caches; ++i)
             gpu->attention(o.get(), q.get(),
                            {k.get() + i * slots * kv_width, v.get() + i * slots * kv_width, slots, 0, 0, begin.get()},
                            1, 1, heads, kv_heads, head_dim);
         }) / double(caches),
         double(length + 1) * each);
  }
}

// A generated token: its products alone, and a layer's nine kernels in a graph.
void token() {
  const size_t layer = hidden * (2 * q_width + 2 * kv_width + 3 * mlp);
  const auto w = random_values(vocab * hidden, 5), x = random_values(mlp, 6), norm = random_values(hidden, 7);
  Gpu::Buffer<bf16> y(2 * mlp), k(2304 * kv_width), v(2304 * kv_width);
  const auto cos = zeros(head_dim), sin = zeros(head_dim), residual = zeros(vocab);
  Gpu::Buffer<uint32_t> begin(1);
  const uint32_t slot = 2048;
  gpu->upload(begin.get(), &slot, 1);
  fill_bytes(k.get(), 0, k.size * sizeof(bf16), gpu->stream());
  fill_bytes(v.get(), 0, v.size * sizeof(bf16), gpu->stream());
  auto cache = [&] { return LayerCache<bf16>{k.get(), v.get(), 2304, 2048, 2048, begin.get()}; };
  auto q_product = [&](const bf16* p) {
    gpu->project_q(y.get(), x.get(), p, cos.get(), sin.get(), 1, hidden, heads, head_dim);
  };
  auto kv_product = [&](const bf16* p) {
    auto c = cache();
    gpu->project_kv(c, nullptr, nullptr, x.get(), p, p + hidden * kv_width, cos.get(), sin.get(), 1, hidden, kv_heads,
                    head_dim);
  };
  auto o_product = [&](const bf16* p) { gpu->matmul(residual.get(), x.get(), p, 1, q_width, hidden, true); };
  auto gate_up = [&](const bf16* p) {
    gpu->mlp_gate_up(y.get(), nullptr, x.get(), p, p + hidden * mlp, 1, hidden, mlp);
  };
  auto down = [&](const bf16* p) { gpu->matmul(residual.get(), x.get(), p, 1, mlp, hidden, true); };
  auto head = [&](const bf16* p) { gpu->matmul(residual.get(), x.get(), p, 1, hidden, vocab); };
  auto matvec = [&](const char* name, size_t weights, auto work) {
    const size_t matrices = w.size / weights, turns = std::max<size_t>(1, (size_t(400) << 20) / (2 * weights));
    line(name, median_seconds([&] {
                 for (size_t i = 0; i < turns; ++i) work(w.get() + i % matrices * weights);
               }) / double(turns),
         2.0 * double(weights));
  };
  matvec("one row: Q", hidden * q_width, q_product);
  matvec("one row: K and V", 2 * hidden * kv_width, kv_product);
  matvec("one row: O", q_width * hidden, o_product);
  matvec("one row: gate and up", 2 * hidden * mlp, gate_up);
  matvec("one row: down", mlp * hidden, down);
  matvec("one row: head", vocab * hidden, head);

  gpu->rmsnorm(y.get(), residual.get(), norm.get(), 1, hidden, 1e-5f);  // loads the one kernel that has not run yet
  const size_t layers = w.size / layer;
  Graph graph(gpu->stream(), [&] {
    for (size_t i = 0; i < layers; ++i) {
      const bf16* p = w.get() + i * layer;
      gpu->rmsnorm(y.get(), residual.get(), norm.get(), 1, hidden, 1e-5f);
      q_product(p), p += hidden * q_width;
      kv_product(p), p += 2 * hidden * kv_width;
      gpu->attention(y.get(), x.get(), cache(), 1, 2049, heads, kv_heads, head_dim);
      o_product(p), p += q_width * hidden;
      gpu->rmsnorm(y.get(), residual.get(), norm.get(), 1, hidden, 1e-5f);
      gate_up(p), p += 2 * hidden * mlp;
      down(p);
    }
  });
  line("one row: a layer in a graph, 2048 slots", median_seconds([&] { graph.run(gpu->stream()); }) / double(layers),
       2.0 * double(layer) + 2048.0 * 4 * kv_width);
}

void the_rest() {
  const size_t n = 8192;
  const auto x = zeros(n * hidden), cos = zeros(n * head_dim / 2), sin = zeros(n * head_dim / 2);
  const auto a = random_values(n * mlp), b = random_values(n * mlp, 2), w = random_values(hidden, 3);
  Gpu::Buffer<bf16> k(n * kv_width), v(n * kv_width);
  for (size_t rows : {n, size_t(1)})
    line("RMSNorm, " + std::to_string(rows) + " rows",
         median_seconds([&] { gpu->rmsnorm(a.get(), x.get(), w.get(), rows, hidden, 1e-5f); }),
         double(rows) * hidden * 6);
  line("SwiGLU, 8192 rows", median_seconds([&] {
         launch(kernel::swiglu, grid(n * mlp / 8, 256), dim3(256), 0, gpu->stream(), a.get(), b.get(), n * mlp);
       }),
       double(n) * mlp * 6);
  line("RoPE of Q, 8192 rows", median_seconds([&] {
         launch(kernel::rope, grid(n * q_width / 16, 256), dim3(256), 0, gpu->stream(), a.get(), cos.get(), sin.get(),
                int(n), int(heads), int(head_dim));
       }),
       double(n) * q_width * 4);
  line("append K and V, 8192 rows", median_seconds([&] {
         LayerCache<bf16> cache{k.get(), v.get(), n, 0, 0, nullptr};
         gpu->append(cache, a.get(), b.get(), n, kv_heads, head_dim);
       }),
       double(n) * kv_width * 8);
}

}  // namespace

int main(int argc, char** argv) try {
  Gpu here;
  gpu = &here;
  if (argc > 1) record = std::fopen((std::string(argv[1]) + ".tsv").c_str(), "w");
  std::printf("%s, %d multiprocessors, L2 cache of %zu MiB; share of the ceiling in the last column\n",
              here.device().name.c_str(), here.device().multiprocessors, here.device().l2_bytes >> 20);
  ceilings();
  launch_cost();
  attention();
  token();
  prompt_products();
  the_rest();
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "times: %s\n", e.what());
  return 1;
}
