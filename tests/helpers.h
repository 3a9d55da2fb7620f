// helpers.h - what several tests need: comparisons that NaN cannot pass, random numbers, files, models.
#pragma once

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>
#include <random>

#define SPEED_METHOD_ONLY  // no command line: that is the whole program
#include "../speed.cu"

namespace test {

using namespace speed;

// ||x - ref|| / ||ref||; infinite if either holds a NaN, so that NaN fails every comparison written as `error < bound`.
inline double relative_error(std::span<const float> x, std::span<const float> ref) {
  double difference = 0, norm = 0;
  if (x.size() != ref.size()) return INFINITY;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += (double(x[i]) - ref[i]) * (double(x[i]) - ref[i]);
    norm += double(ref[i]) * ref[i];
  }
  const double e = std::sqrt(difference / norm);
  return std::isfinite(e) ? e : INFINITY;
}

inline double worst_row(std::span<const float> x, std::span<const float> ref, size_t width) {
  double worst = x.size() == ref.size() && !ref.empty() ? 0 : INFINITY;
  for (size_t i = 0; i + width <= std::min(x.size(), ref.size()); i += width)
    worst = std::max(worst, relative_error(x.subspan(i, width), ref.subspan(i, width)));
  return worst;
}

inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0 &&
         std::none_of(a.begin(), a.end(), [](float x) { return std::isnan(x); });
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  std::vector<float> normal(size_t n) {
    std::normal_distribution<float> d;
    std::vector<float> v(n);
    for (float& x : v) x = d(engine_);
    return v;
  }
  std::vector<bf16> weights(size_t n, float scale) {
    std::vector<bf16> w(n);
    std::normal_distribution<float> d(0, scale);
    for (bf16& x : w) x.bits = uint16_t(std::bit_cast<uint32_t>(d(engine_)) >> 16);
    return w;
  }
  std::vector<int> ids(size_t n, int bos, int vocab) {
    std::vector<int> v(n, bos);
    for (size_t i = 1; i < n; ++i) v[i] = int(engine_() % uint64_t(std::min(vocab, 256)));
    return v;
  }

 private:
  std::mt19937_64 engine_;
};

inline std::string golden(const std::string& name) { return "tests/golden/" + name; }

// A Policy with its fields filled in for L layers.
inline Policy policy(Method m, int L, int k = 0, bool bos = true, std::vector<int> keep = {}, int group = 1) {
  Policy p = full_depth(L);
  p.method = m;
  if (k) p.k = k;
  p.bos = bos;
  p.group = group;
  if (m == Method::share) p.kept.assign(L, false);
  for (int l : keep) p.kept[l] = true;
  return p;
}

// Every policy that a model can run, at every K; K = L and all layers kept among them.
inline std::vector<Policy> all_policies(const Config& c) {
  const int L = c.shape.n_layers;
  std::vector<int> every(L);
  for (int l = 0; l < L; ++l) every[l] = l;
  std::vector<Policy> all;
  for (const PolicyInfo& takes : policy_table) {
    if (takes.takes_group) {
      if (c.swiftkv_k) all.push_back(policy(takes.method, L, c.swiftkv_k, true, {}, c.swiftkv_group));
    } else if (takes.takes_kept) {
      for (const std::vector<int>& keep : {std::vector<int>{0}, {0, 2}, {0, 1}, every})
        all.push_back(policy(takes.method, L, 0, true, keep));
    } else {
      for (int k = takes.takes_k ? 1 : L; k <= L; ++k)
        for (bool bos : {true, false})
          if (bos || takes.takes_bos) all.push_back(policy(takes.method, L, k, bos));
    }
  }
  return all;
}

}  // namespace test

namespace speed {

// What only tests do to an engine.
struct EngineTest {
  // Overwrites all that no later token may read: activations of the last chunk, and slots not filled.
  template <class B>
  static void poison(Engine<B>& engine, float value) {
    auto put = [&](auto* p, size_t n) {
      using T = std::remove_pointer_t<decltype(p)>;
      T v;
      if constexpr (std::is_same_v<T, bf16>) v.bits = uint16_t(std::bit_cast<uint32_t>(value) >> 16);
      else v = value;
      engine.b_.upload(p, std::vector<T>(n, v).data(), n);
    };
    auto fill = [&](auto&... buffers) { (put(buffers.get(), buffers.size), ...); };
    fill(engine.x_, engine.a_, engine.q_, engine.o_, engine.kv_, engine.gate_up_);
    const Shape& s = engine.s_;
    for (auto& c : engine.caches_)
      for (size_t h = 0; h < size_t(c.k ? s.n_kv_heads : 0); ++h) {
        const size_t from = (h * c.capacity + c.used) * s.head_dim, n = (c.capacity - c.used) * s.head_dim;
        put(c.k + from, n);
        put(c.v + from, n);
      }
  }
};

}  // namespace speed

namespace test {

// Logits of all decode-phase tokens, [N - split, vocab].
inline std::vector<float> logits(Engine<Cpu>& engine, std::span<const int> ids, size_t split, size_t vocab) {
  std::vector<float> all;
  engine.prefill(
      ids, split, [&](size_t, const float* l) { all.insert(all.end(), l, l + vocab); }, true);
  return all;
}

inline std::vector<float> logits(const Model& m, const Policy& p, std::span<const int> ids, size_t split,
                                 size_t chunk = 512) {
  Cpu cpu;
  Engine<Cpu> engine(m, p, {ids.size(), ids.size() - split, chunk}, cpu);
  return logits(engine, ids, split, m.config.shape.vocab);
}

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  REQUIRE(in);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline std::vector<float> read_npy(const std::string& path) {
  const std::string s = read_file(path);
  const size_t header = 10 + uint8_t(s[8]) + 256 * uint8_t(s[9]);
  REQUIRE(s.substr(0, 6) == "\x93NUMPY");
  REQUIRE(s.find("<f4") < header);
  std::vector<float> v((s.size() - header) / sizeof(float));
  std::memcpy(v.data(), s.data() + header, v.size() * sizeof(float));
  return v;
}

// A folder that is gone when the test ends.
struct Scratch {
  std::filesystem::path path;
  Scratch() {
    static int count = 0;
    path = std::filesystem::temp_directory_path() /
           ("speed-test-" + std::to_string(::getpid()) + "-" + std::to_string(count++));
    std::filesystem::create_directories(path);
  }
  ~Scratch() { std::filesystem::remove_all(path); }
  std::string operator/(const std::string& name) const { return (path / name).string(); }
};

}  // namespace test
