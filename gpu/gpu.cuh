// gpu.cuh - `Gpu`: the CUDA kernels as operations with the names that `Cpu` has, so that speed.cu runs on either.
//
// A prompt's rows go through cuBLAS and tensor cores. A generated token is one row, and its time is that of reading
// weights and cache: its products are matrix-vector kernels with the next operation (RoPE, SwiGLU, ...) fused in, and
// all its kernels are one CUDA graph. A graph repeats its arguments, so whatever changes from token to token (ids,
// positions, slots) is in device memory.
#pragma once

#include <functional>

#include "../cpu/reference.h"
#include "hopper.cuh"

namespace speed {

// The first visible GPU. Operations are queued on one stream: they run later, in the order of the calls. download,
// on_host and wait() return when they and all before them are done. Must outlive the engines that use it.
class Gpu {
 public:
  using Residual = float;
  using Activation = bf16;
  using CacheValue = bf16;
  static constexpr const char* name = "cuda";
  static constexpr size_t default_chunk = 8192;  // rows of a prompt that go through a layer together

  // Device memory for n values, uninitialized.
  template <class T>
  class Buffer {
   public:
    size_t size = 0;
    Buffer() = default;
    explicit Buffer(size_t n) : size(n), data_(static_cast<T*>(device_allocate(std::max<size_t>(n, 1) * sizeof(T)))) {
      allocated_bytes_ += size * sizeof(T);
      peak_bytes_ = std::max(peak_bytes_, allocated_bytes_);
    }
    Buffer(Buffer&& o) noexcept : size(std::exchange(o.size, 0)), data_(std::exchange(o.data_, nullptr)) {}
    Buffer& operator=(Buffer&& o) noexcept {
      std::swap(size, o.size), std::swap(data_, o.data_);
      return *this;
    }
    ~Buffer() {
      if (data_) device_free(data_);
      allocated_bytes_ -= size * sizeof(T);
    }
    T* get() const { return data_; }

   private:
    T* data_ = nullptr;
  };

  Counters counters;
  std::function<void(double)> on_load;  // called while weights are copied, with the share that is done

  Gpu() : device_(open_device()), blas_(stream_), best_partials_(arg_max_blocks) {
    if (device_.major != 9) return;
    Buffer<int> yes(1);
    launch(kernel::hopper_is_compiled, 1, 32, 0, yes.get());
    int has_hopper = 0;
    download(&has_hopper, yes.get(), 1);
    use_hopper_ = has_hopper;
  }

  const Device& device() const { return device_; }
  const Stream& stream() const { return stream_; }
  Blas& blas() { return blas_; }
  static uint64_t peak_bytes() { return peak_bytes_; }  // the most that Buffers held at any time

  // ---- memory ----

  // Error for a shape that no kernel here supports.
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

  // The bytes load() will allocate: weights, and scratch for attention's partial sums.
  uint64_t bytes_to_load(const Model& model) const {
    uint64_t count = 0;
    if (model.id() != loaded_) {
      Weights w = model.weights;
      each_weight(model.config, w, [&](const bf16*& tensor, uint64_t n) {
        if (tensor || !model.has_file()) count += padded(n);
      });
    }
    const uint64_t partials = partial_values(model.config.shape);
    return count * sizeof(bf16) + (partials > partials_.size ? partials * sizeof(float) : 0);
  }

  // The model's weights in device memory, where they stay until another model is loaded. A model without a file gets
  // random ones.
  const Weights& load(const Model& model) {
    if (const uint64_t partials = partial_values(model.config.shape); partials > partials_.size) {
      partials_ = {};
      partials_ = Buffer<float>(partials);
    }
    if (model.id() == loaded_) return weights_;
    const bool random = !model.has_file() && !model.weights.embedding;
    loaded_ = 0;
    weights_ = model.weights;
    memory_ = {};
    uint64_t count = 0, copied = 0;
    auto each = [&](auto visit) {
      each_weight(model.config, weights_, [&](const bf16*& tensor, uint64_t n) {
        if (tensor || random) visit(tensor, n);
      });
    };
    each([&](const bf16*&, uint64_t n) { count += padded(n); });
    memory_ = Buffer<bf16>(count);
    each([&](const bf16*& tensor, uint64_t n) {
      bf16* to = memory_.get() + copied;
      if (random) launch(kernel::random_weights, blocks(n, 256), 256, 0, to, n, uint32_t(copied >> 3));
      else copy_to_device(to, tensor, n * sizeof(bf16), stream_);
      tensor = to;
      copied += padded(n);
      if (on_load) wait(), on_load(double(copied) / double(count));
    });
    if (model.config.shape.tied) weights_.head = weights_.embedding;
    wait();
    loaded_ = model.id();
    return weights_;
  }

  uint64_t available_memory() const { return open_device().free_bytes; }

  // `from` may change as soon as this returns. A decode step's inputs are small: the host goes on at once.
  template <class T>
  void upload(T* to, const T* from, size_t n) {
    if (upload_waits_) wait();
    void* staged = uploaded_.need(n * sizeof(T));
    std::memcpy(staged, from, n * sizeof(T));
    copy_to_device(to, staged, n * sizeof(T), stream_);
    upload_waits_ = true;
  }
  template <class T>
  void download(T* to, const T* from, size_t n) {
    std::memcpy(to, on_host(from, n), n * sizeof(T));
  }
  // Where the host can read n values until the next call, or the next download.
  template <class T>
  const T* on_host(const T* p, size_t n) {
    void* to = downloaded_.need(n * sizeof(T));
    copy_to_host(to, p, n * sizeof(T), stream_);
    wait();
    return static_cast<const T*>(to);
  }
  void wait() {
    synchronize(stream_);
    upload_waits_ = false;
  }

  // ---- one generated token ----

  // Runs `work`, which must queue the same kernels every time and wait for nothing. The first call runs it directly,
  // which loads the kernels onto the GPU. The second captures a CUDA graph. From then on the captured graph is
  // launched, and `work` is called only to update the counters.
  struct Step {
    bool ran = false;
    Graph graph;
  };
  template <class Work>
  void replay(Step& step, Work work) {
    if (!step.ran) {
      step.ran = true;
      return work();
    }
    const bool captured = bool(step.graph);
    if (!captured) step.graph = Graph(stream_, work);
    step.graph.run(stream_);  // before the counting, which the GPU then need not wait for
    if (captured) {
      struct CountingOnly {
        bool& flag;
        explicit CountingOnly(bool& f) : flag(f) { flag = true; }
        ~CountingOnly() { flag = false; }
      } counting_only(counting_only_);
      work();
    }
  }

  // ---- operations, as Cpu has them ----

  void embed(float* x, const bf16* table, const int* ids, size_t n, size_t d) {
    launch(kernel::embed, n, row_threads(d), 0, x, table, ids, int(d));
  }

  void rmsnorm(bf16* y, const float* x, const bf16* w, size_t n, size_t d, float eps) {
    counters.weight_bytes += d * sizeof(bf16);
    launch(kernel::rmsnorm, n, row_threads(d), 32 * sizeof(float), y, x, w, int(d), eps);
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
    if (n == 1) return matvec(width / 2, a, d, kernel::ProjectQ{q, wq, cos, sin, int(d), int(n_heads), int(head_dim)});
    product(q, a, wq, n, d, width, false);
    launch(kernel::rope, blocks(n * width / 16, 256), 256, 0, q, cos, sin, int(n), int(n_heads), int(head_dim));
  }

  // k, v [n, g e] are scratch memory, v after k, as wv lies after wk.
  void project_kv(LayerCache<bf16>& cache, bf16* k, bf16* v, const bf16* a, const bf16* wk, const bf16* wv,
                  const float* cos, const float* sin, size_t n, size_t d, size_t n_kv_heads, size_t head_dim) {
    const size_t width = n_kv_heads * head_dim;
    counters.product(n, d, 2 * width);
    if (n == 1) {
      matvec(width, a, d,
             kernel::ProjectKV{cache.k, cache.v, cache.capacity, cache.device_begin, uint32_t(cache.used - cache.begin),
                               wk, wv, cos, sin, int(d), int(n_kv_heads), int(head_dim)});
    } else {
      product_pair(k, v, a, wk, wv, n, d, width);
      append_rows(cache, k, v, cos, sin, n, n_kv_heads, head_dim);
    }
    cache.used += n;
  }

  void append(LayerCache<bf16>& cache, const bf16* k, const bf16* v, size_t n, size_t n_kv_heads, size_t head_dim) {
    append_rows(cache, k, v, nullptr, nullptr, n, n_kv_heads, head_dim);
    cache.used += n;
  }

  void rope_angles(float* cos, float* sin, const float* frequencies, const int* positions, size_t n, size_t half) {
    launch(kernel::rope_angles, blocks(n * half, 256), 256, 0, cos, sin, frequencies, positions, int(n), int(half));
  }

  // With few rows the cache is split into slices, or most of the GPU would idle; with many, rows are split into tiles.
  void attention(bf16* o, const bf16* q, const LayerCache<bf16>& cache, size_t n, size_t seen, size_t n_heads,
                 size_t n_kv_heads, size_t head_dim) {
    counters.attention(n, seen, n_heads, n_kv_heads, head_dim, sizeof(bf16));
    if (head_dim == 32) attend<32>(o, q, cache, n, seen, n_heads, n_kv_heads);
    else if (head_dim == 64) attend<64>(o, q, cache, n, seen, n_heads, n_kv_heads);
    else attend<128>(o, q, cache, n, seen, n_heads, n_kv_heads);
  }

  // gate [n, f] is the result, up [n, f] scratch memory after it; wu lies after wg.
  void mlp_gate_up(bf16* gate, bf16* up, const bf16* a, const bf16* wg, const bf16* wu, size_t n, size_t d, size_t f) {
    counters.product(n, d, 2 * f);
    if (n == 1) return matvec(f, a, d, kernel::GateUp{gate, wg, wu, int(d), int(f)});
    product_pair(gate, up, a, wg, wu, n, d, f);
    launch(kernel::swiglu, blocks(n * f / 8, 256), 256, 0, gate, up, n * f);
  }

  // *best = the id of the largest of logits [vocab], the first of equals; -1 where one is NaN
  void arg_max(int* best, const float* logits, size_t vocab) {
    constexpr size_t shared = 32 * sizeof(kernel::Best);
    launch(kernel::arg_max_partial, arg_max_blocks, 256, shared, best_partials_.get(), logits, int(vocab));
    launch(kernel::arg_max_combine, 1, arg_max_blocks, shared, best, best_partials_.get());
  }

 private:
  static constexpr size_t max_decode_rows = 16, arg_max_blocks = 64;

  static uint64_t padded(uint64_t n) { return (n + 127) / 128 * 128; }  // 256 bytes
  static unsigned blocks(size_t items, size_t each) { return unsigned((items + each - 1) / each); }
  static unsigned row_threads(size_t d) { return unsigned(std::min<size_t>((d / 8 + 31) / 32 * 32, 1024)); }

  // Slices of a cache: as many as give every multiprocessor one block, counting all key heads.
  size_t slices(size_t n_kv_heads) const {
    return std::clamp<size_t>(size_t(device_.multiprocessors) / n_kv_heads, 1, 64);
  }
  uint64_t partial_values(const Shape& s) const {
    return max_decode_rows * s.n_heads * slices(s.n_kv_heads) * (s.head_dim + 2);
  }

  template <class... P, class... A>
  void launch(void (*k)(P...), dim3 grid, size_t threads, size_t shared, A... args) {
    if (!counting_only_) speed::launch(k, grid, dim3(unsigned(threads)), shared, stream_, args...);
  }

  template <class T>
  void product(T* y, const bf16* x, const bf16* w, size_t n, size_t in, size_t out, bool add) {
    if (!counting_only_) blas_.gemm(y, x, w, n, in, out, add ? 1.0f : 0.0f);
  }
  void product_pair(bf16* y0, bf16* y1, const bf16* x, const bf16* w0, const bf16* w1, size_t n, size_t in,
                    size_t out) {
    if (!counting_only_) blas_.gemm_pair(y0, y1, x, w0, w1, n, in, out);
  }

  template <class Rows>
  void matvec(size_t pairs, const bf16* x, size_t in, Rows rows) {
    launch(kernel::matvec<Rows>, blocks(pairs, kernel::matvec_threads / kernel::warp_size), kernel::matvec_threads, 0,
           x, int(in), rows);
  }

  void append_rows(LayerCache<bf16>& cache, const bf16* k, const bf16* v, const float* cos, const float* sin, size_t n,
                   size_t n_kv_heads, size_t head_dim) {
    launch(kernel::append, blocks(n * n_kv_heads * head_dim / 16, 256), 256, 0, cache.k, cache.v, cache.capacity,
           cache.used, k, v, cos, sin, int(n), int(n_kv_heads), int(head_dim));
  }

  template <int E>
  void attend(bf16* o, const bf16* q, const LayerCache<bf16>& cache, size_t n, size_t seen, size_t n_heads,
              size_t n_kv_heads) {
    const float scale = 1.44269504f / std::sqrt(float(E));
    const unsigned h = unsigned(n_heads), g = unsigned(n_kv_heads), s = unsigned(slices(n_kv_heads));
    if (n <= max_decode_rows) {
      launch(kernel::decode_attention<E>, dim3(s, g, unsigned(n)), kernel::decode_threads,
             kernel::decode_shared_bytes<E>, partials_.get(), q, cache.k, cache.v, cache.capacity, cache.device_begin,
             int(seen - cache.begin), int(n_heads), scale);
      launch(kernel::combine_slices, dim3(h, unsigned(n)), E, 0, o, partials_.get(), int(s), E, scale);
    } else if (E >= 64 && use_hopper_) {
      constexpr int e = E >= 64 ? E : 64;  // no kernel is made for 32
      const size_t slots = seen + n - 1;
      auto cache_map = [&](const bf16* p) { return tensor_map(p, slots, n_kv_heads, E, cache.capacity * E, E); };
      launch(kernel::prefill_attention_hopper<e>, dim3(h, blocks(n, kernel::hopper_rows)), kernel::hopper_threads,
             kernel::hopper_shared_bytes<e>, tensor_map(q, n, n_heads, n_heads * E, E, E), cache_map(cache.k),
             cache_map(cache.v), o, int(n), int(seen), int(n_kv_heads), scale);
    } else {
      launch(kernel::prefill_attention<E>, dim3(h, blocks(n, kernel::prefill_rows)), kernel::prefill_threads,
             kernel::prefill_shared_bytes<E>, o, q, cache.k, cache.v, cache.capacity, int(n), int(seen),
             int(n_kv_heads), scale);
    }
  }

  // Pinned memory of the host that grows to what is needed.
  class HostBuffer {
   public:
    HostBuffer() = default;
    HostBuffer(const HostBuffer&) = delete;
    HostBuffer& operator=(const HostBuffer&) = delete;
    ~HostBuffer() { host_free(data_); }
    void* need(size_t bytes) {
      if (bytes > size_) {
        host_free(std::exchange(data_, nullptr));
        size_ = 0;  // until there is memory of it
        data_ = host_allocate(bytes);
        size_ = bytes;
      }
      return data_;
    }

   private:
    void* data_ = nullptr;
    size_t size_ = 0;
  };

  static inline uint64_t allocated_bytes_ = 0, peak_bytes_ = 0;  // bytes

  Device device_;
  HostBuffer uploaded_, downloaded_;
  bool upload_waits_ = false;  // a copy from uploaded_ may not have run yet
  Stream stream_;              // its destructor waits for such a copy
  Blas blas_;
  Buffer<bf16> memory_;                 // all weights
  Weights weights_;                     // where in it
  uint64_t loaded_ = 0;                 // whose: Model::id
  Buffer<float> partials_;              // [max_decode_rows, heads, slices, head_dim + 2], of attention
  Buffer<kernel::Best> best_partials_;  // [arg_max_blocks]
  bool use_hopper_ = false;
  bool counting_only_ = false;
};

}  // namespace speed
