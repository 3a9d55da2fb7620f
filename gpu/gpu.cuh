// gpu.cuh - `Gpu`: the kernels as operations under the names that `Cpu` has, for forward.h.
//
// Many rows go through cuBLAS and tensor cores. A single row, a generated token, is bound by the reading of weights and
// cache: its products are matrix-vector kernels that take in what comes after them, and all kernels of a token are one
// CUDA graph, so whatever changes from token to token (ids, positions, slots) is in device memory.
#pragma once

#include <functional>

#include "../cpu/reference.h"
#include "hopper.cuh"

namespace speed {

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

  // Its work, asked for by `work`, which must ask for the same each time and wait for nothing. The first time it runs
  // as it comes, which loads the kernels; the second time it is recorded; from then on the record runs, and `work` is
  // only called so that it counts what it does.
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
    counters.product(n, in, out);
    if (n == 1) return matvec((out + 1) / 2, x, in, kernel::Product<T>{y, w, int(in), int(out), add});
    product(y, x, w, n, in, out, add);
  }

  void project_q(bf16* q, const bf16* a, const bf16* wq, const float* cos, const float* sin, size_t n, size_t d,
                 size_t n_heads, size_t head_dim) {
    const size_t width = n_heads * head_dim;
    counters.product(n, d, width);
    if (n == 1) return matvec(width / 2, a, d, kernel::Queries{q, wq, cos, sin, int(d), int(n_heads), int(head_dim)});
    product(q, a, wq, n, d, width, false);
    go(kernel::rope, blocks(n * width / 16, 256), 256, 0, q, cos, sin, int(n), int(n_heads), int(head_dim));
  }

  void project_kv(LayerCache<bf16>& cache, bf16* k, bf16* v, const bf16* a, const bf16* wk, const bf16* wv,
                  const float* cos, const float* sin, size_t n, size_t d, size_t n_kv_heads, size_t head_dim) {
    const size_t width = n_kv_heads * head_dim;
    counters.product(n, d, 2 * width);
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
    counters.attention(n, seen, n_heads, n_kv_heads, head_dim, sizeof(bf16));
    if (head_dim == 32) attend<32>(o, q, cache, n, seen, n_heads, n_kv_heads);
    else if (head_dim == 64) attend<64>(o, q, cache, n, seen, n_heads, n_kv_heads);
    else attend<128>(o, q, cache, n, seen, n_heads, n_kv_heads);
  }

  void mlp_gate_up(bf16* gate, bf16* up, const bf16* a, const bf16* wg, const bf16* wu, size_t n, size_t d, size_t f) {
    counters.product(n, d, 2 * f);
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
    } else if (E >= 64 && device_.major == 9) {
      constexpr int e = E >= 64 ? E : 64;  // no kernel is made for 32
      const size_t slots = seen + n - 1;
      auto cache_map = [&](const bf16* p) { return tensor_map(p, slots, n_kv_heads, E, cache.capacity * E, E); };
      go(kernel::prefill_attention_hopper<e>, dim3(h, blocks(n, kernel::hopper_rows)), kernel::hopper_threads,
         kernel::hopper_shared_bytes<e>, tensor_map(q, n, n_heads, n_heads * E, E, E), cache_map(cache.k),
         cache_map(cache.v), o, int(n), int(seen), int(n_kv_heads), scale);
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
