// model.h - what is in a model file: configuration, weights, tokenizer, turn marks; and the cache a run fills.
//
// A model is one .safetensors file written by export_weights.py. It is mapped, not read: a weight is fetched from disk
// when it is first used. A file is data from a stranger, so every size, offset, dtype, shape, id and number in it is
// checked here, once, before anything computes; a message says what was expected and what was found.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "chat.h"
#include "error.h"
#include "policy.h"
#include "tokenizer.h"

namespace speed {

using json = nlohmann::json;

// bfloat16: the upper half of an IEEE float.
struct bf16 {
  uint16_t bits;
};

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// ---- configuration ------------------------------------------------------------------------------------------------

struct RopeScaling {  // Llama-3's: long wavelengths are slowed by `factor`, short ones kept, those between interpolated
  float factor, low_freq_factor, high_freq_factor;
  int original_context;
};

struct Adaptation {  // a policy that the weights were trained for
  Method method;
  int k;  // 0: any K
  bool bos;
};

struct Config {
  Shape shape;
  float rms_norm_eps = 0;
  double rope_theta = 0;
  std::optional<RopeScaling> rope_scaling;
  int context = 0;       // longest sequence the model was made for, in tokens
  int bos = -1;          // id of the BoS token; -1: the model has none
  std::vector<int> eos;  // generation stops at any of these ids
  int swiftkv_k = 0;     // 0: no SwiftKV weights
  int swiftkv_group = 1;
  bool original_projections = true;  // false: above swiftkv_k the file has SwiftKV projections only
  std::vector<Adaptation> adapted;
  bool tokenizer_only = false;
};

// ---- weights ------------------------------------------------------------------------------------------------------
// Shapes are [rows, columns], row-major; a linear layer computes y = x W^T. d hidden, q = n_heads * head_dim,
// kv = n_kv_heads * head_dim, f = mlp, V = vocab. Null: not in this file.

struct LayerWeights {
  const bf16* attention_norm = nullptr;  // [d]
  const bf16* wq = nullptr;              // [q, d]
  const bf16* wk = nullptr;              // [kv, d]
  const bf16* wv = nullptr;              // [kv, d]
  const bf16* wo = nullptr;              // [d, q]
  const bf16* mlp_norm = nullptr;        // [d]
  const bf16* gate = nullptr;            // [f, d]
  const bf16* up = nullptr;              // [f, d]
  const bf16* down = nullptr;            // [d, f]
  const bf16* swiftkv_wq = nullptr;      // [q, d]   SwiftKV, upper layers
  const bf16* swiftkv_wk = nullptr;      // [kv, d]  SwiftKV, group leaders
  const bf16* swiftkv_wv = nullptr;      // [kv, d]  SwiftKV, group leaders
};

struct Weights {
  const bf16* embedding = nullptr;       // [V, d]
  std::vector<LayerWeights> layers;      // [L]
  const bf16* swiftkv_norm = nullptr;    // [d]
  const bf16* final_norm = nullptr;      // [d]
  const bf16* head = nullptr;            // [V, d], the embedding where the model is tied
  const float* rope_divisors = nullptr;  // [head_dim / 2], divide the inverse frequencies; null: all one
};

// Calls visit(tensor, values) for every tensor that a model of this configuration may have, the head of a tied model
// left out. A file that lacks one has null there.
template <class Visit>
void each_weight(const Config& c, Weights& w, Visit visit) {
  const Shape& s = c.shape;
  const uint64_t d = s.hidden, q = s.q_width(), kv = s.kv_width(), f = s.mlp, embedding = d * s.vocab;
  visit(w.embedding, embedding), visit(w.final_norm, d);
  if (!s.tied) visit(w.head, embedding);
  if (c.swiftkv_k) visit(w.swiftkv_norm, d);
  for (LayerWeights& l : w.layers) {
    visit(l.attention_norm, d), visit(l.wq, d * q), visit(l.wk, d * kv), visit(l.wv, d * kv), visit(l.wo, d * q);
    visit(l.mlp_norm, d), visit(l.gate, d * f), visit(l.up, d * f), visit(l.down, d * f);
    if (c.swiftkv_k) visit(l.swiftkv_wq, d * q), visit(l.swiftkv_wk, d * kv), visit(l.swiftkv_wv, d * kv);
  }
}

// ---- the cache ----------------------------------------------------------------------------------------------------
// Keys and values of one layer, T float on a CPU, bf16 on a GPU. Slots are filled in order; a slot's keys carry their
// token's position by RoPE, so slot and position need not agree.

template <class T>
struct LayerCache {
  T* k = nullptr;                          // [n_kv_heads, capacity, head_dim]
  T* v = nullptr;                          // [n_kv_heads, capacity, head_dim]
  size_t capacity = 0;                     // slots
  size_t used = 0;                         // slots
  size_t begin = 0;                        // slots used before the rows now under way
  const uint32_t* device_begin = nullptr;  // the same, where a device's kernels read it
};

// ---- reading a file -----------------------------------------------------------------------------------------------

class MappedFile {
 public:
  explicit MappedFile(const std::string& path) : path_(path) {
    int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0)
      throw Error(1, path, std::strerror(errno), "check the path, or make a model file with export_weights.py");
    struct stat st {};
    if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
      ::close(fd);
      throw Error(1, path, "not a regular file", "give a .safetensors file made by export_weights.py");
    }
    size_ = size_t(st.st_size);
    if (size_ > 0) {
      void* p = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
      if (p != MAP_FAILED) data_ = static_cast<const uint8_t*>(p);
      // Pages of 2 MiB, where the system can bring a file in so, are read half as fast again as those of 4 KiB.
      if (data_) ::madvise(p, size_, MADV_HUGEPAGE);
    }
    ::close(fd);
    if (size_ > 0 && !data_)
      throw Error(1, path, std::string("cannot be mapped: ") + std::strerror(errno), "free some memory");
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() {
    if (data_) ::munmap(const_cast<uint8_t*>(data_), size_);
  }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// JSON from a stranger: no duplicate keys, no deep nesting. `what` names the text in messages.
inline json parse_json(std::string_view text, const std::string& what, const std::string& hint) {
  constexpr int max_depth = 8;
  std::vector<std::set<std::string>> keys;
  auto check = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > max_depth) throw Error(1, what, "JSON nested deeper than " + std::to_string(max_depth), hint);
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
      throw Error(1, what, "key \"" + value.get<std::string>() + "\" twice", hint);
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), check);
  } catch (const json::exception&) {
    throw Error(1, what, "not valid JSON", hint);
  }
}

// A safetensors container: 8 bytes header length, a JSON header, then the tensors one after the other.
class SafeTensors {
 public:
  struct Tensor {
    std::string dtype;
    std::vector<uint64_t> shape;
    const uint8_t* data;
    uint64_t bytes;
  };

  explicit SafeTensors(const MappedFile& f) : path_(f.path()) {
    if (f.size() < 8) fail("file of " + std::to_string(f.size()) + " bytes is too short for a model");
    uint64_t header = 0;
    for (int i = 7; i >= 0; --i) header = header << 8 | f.data()[i];
    if (header > f.size() - 8 || header > 100'000'000)
      fail("header of " + std::to_string(header) + " bytes in a file of " + std::to_string(f.size()));
    json j = parse_json({reinterpret_cast<const char*>(f.data()) + 8, header}, path_, hint_);
    if (!j.is_object()) fail("header is not a JSON object");
    const uint64_t total = f.size() - 8 - header;
    std::vector<std::pair<uint64_t, uint64_t>> ranges;
    for (auto& [key, t] : j.items()) {
      if (key == "__metadata__") {
        if (!t.is_object()) fail("__metadata__ is not an object");
        for (auto& [k, v] : t.items()) {
          if (!v.is_string()) fail("metadata " + k + " is not a string");
          metadata_[k] = v.get<std::string>();
        }
        continue;
      }
      tensors_[key] = read_entry(key, t, f.data() + 8 + header, total, ranges);
    }
    std::sort(ranges.begin(), ranges.end());
    uint64_t end = 0;
    for (auto [b, e] : ranges) {
      if (b != end)
        fail("tensor data at offset " + std::to_string(b) + ", expected " + std::to_string(end) + " (gap or overlap)");
      end = e;
    }
    if (end != total) fail("tensors end at " + std::to_string(end) + ", the file's data at " + std::to_string(total));
  }

  const std::map<std::string, Tensor>& tensors() const { return tensors_; }

  const std::string& metadata(const std::string& key) const {
    auto it = metadata_.find(key);
    if (it == metadata_.end()) fail("metadata \"" + key + "\" is missing");
    return it->second;
  }

  bool has(const std::string& name) const { return tensors_.count(name) > 0; }

  // The tensor's data, after its dtype, shape and alignment were compared with what is expected.
  template <class T>
  const T* get(const std::string& name, const std::string& dtype, const std::vector<uint64_t>& shape) const {
    auto it = tensors_.find(name);
    if (it == tensors_.end()) fail("tensor " + name + " is missing");
    const Tensor& t = it->second;
    if (t.dtype != dtype || t.shape != shape)
      fail("tensor " + name + ": expected " + describe(dtype, shape) + ", got " + describe(t.dtype, t.shape));
    if (reinterpret_cast<uintptr_t>(t.data) % alignof(T)) fail("tensor " + name + " is not aligned");
    return reinterpret_cast<const T*>(t.data);
  }

  [[noreturn]] void fail(const std::string& why) const { throw Error(1, path_, why, hint_); }

 private:
  static std::string describe(const std::string& dtype, const std::vector<uint64_t>& shape) {
    std::string s = dtype + " [";
    for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + "]";
  }

  Tensor read_entry(const std::string& key, const json& t, const uint8_t* base, uint64_t total,
                    std::vector<std::pair<uint64_t, uint64_t>>& ranges) const {
    auto whole = [](const json& v) { return v.is_number_unsigned(); };
    if (!t.is_object() || !t.contains("dtype") || !t["dtype"].is_string() || !t.contains("shape") ||
        !t["shape"].is_array() || !t.contains("data_offsets") || !t["data_offsets"].is_array() ||
        t["data_offsets"].size() != 2 || !whole(t["data_offsets"][0]) || !whole(t["data_offsets"][1]))
      fail("tensor " + key + " has no dtype, shape or data_offsets");
    static const std::map<std::string, uint64_t> width = {{"BF16", 2}, {"F32", 4}, {"U32", 4}, {"U8", 1}};
    Tensor out;
    out.dtype = t["dtype"];
    auto w = width.find(out.dtype);
    if (w == width.end()) fail("tensor " + key + " has dtype " + out.dtype + ", expected BF16, F32, U32 or U8");
    uint64_t bytes = w->second;
    for (auto& dim : t["shape"]) {
      if (!whole(dim)) fail("tensor " + key + " has a size that is no whole number");
      out.shape.push_back(dim);
      if (out.shape.back() != 0 && bytes > std::numeric_limits<uint64_t>::max() / out.shape.back())
        fail("tensor " + key + " is larger than any memory");
      bytes *= out.shape.back();
    }
    uint64_t b = t["data_offsets"][0], e = t["data_offsets"][1];
    if (b > e || e > total || e - b != bytes)
      fail("tensor " + key + ": " + describe(out.dtype, out.shape) + " needs " + std::to_string(bytes) +
           " bytes, got offsets " + std::to_string(b) + " to " + std::to_string(e) + " of " + std::to_string(total));
    ranges.emplace_back(b, e);
    out.data = base + b;
    out.bytes = bytes;
    return out;
  }

  std::string path_;
  const std::string hint_ = "export the checkpoint again with export_weights.py";
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

// Bytes of address space this process may still take (ulimit -v).
inline uint64_t address_space_left() {
  rlimit limit{};
  uint64_t pages = 0;
  if (::getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return RLIM_INFINITY;
  std::ifstream("/proc/self/statm") >> pages;
  const uint64_t taken = pages * uint64_t(::sysconf(_SC_PAGESIZE));
  return limit.rlim_cur > taken ? limit.rlim_cur - taken : 0;
}

// Bytes of memory this process may still take: the machine's, or its control group's or address space where that is
// less.
inline uint64_t available_memory() {
  uint64_t available = std::numeric_limits<uint64_t>::max();
  std::string key;
  std::ifstream info("/proc/meminfo");
  for (uint64_t kib; info >> key;) {
    if (key == "MemAvailable:" && info >> kib) available = kib * 1024;
    info.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  uint64_t limit = 0, current = 0;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit && std::ifstream("/sys/fs/cgroup/memory.current") >> current)
    available = std::min(available, limit > current ? limit - current : 0);
  return std::min(available, address_space_left());
}

// ---- the model ----------------------------------------------------------------------------------------------------

class Model {
 public:
  Config config;
  Weights weights;
  std::unique_ptr<Tokenizer> tokenizer;
  std::optional<ChatTemplate> chat;
  uint64_t parameters = 0;  // all of the file's, whether a policy uses them or not

  explicit Model(const std::string& path)
      : path_(path), file_(std::make_unique<MappedFile>(path)), container_(std::make_unique<SafeTensors>(*file_)) {
    if (container_->metadata("format") != "speed 1")
      fail("format \"" + container_->metadata("format") + "\", expected \"speed 1\"");
    read_config(parse_json(container_->metadata("config"), path + ": config", hint_));
    const uint64_t V = config.shape.vocab;
    read_tokenizer(V);
    if (!config.tokenizer_only) read_weights();
  }

  // A model of this shape without file and tokenizer, for timing. Its weights are random, made here, later by
  // make_weights(), or by a device for itself.
  explicit Model(const Shape& shape, bool with_weights = true) : path_(shape.name) {
    config.shape = shape;
    config.rms_norm_eps = 1e-5f;
    config.rope_theta = 500000;
    config.context = 1 << 17;
    config.bos = 0;
    weights.layers.resize(shape.n_layers);
    each_weight(config, weights, [&](const bf16*&, uint64_t n) { parameters += n; });
    if (with_weights) make_weights();
  }

  // Every weight is its own memory, as in a file.
  void make_weights() {
    const uint64_t bytes = parameters * sizeof(bf16);
    if (bytes > available_memory())
      throw Error(2, config.shape.name,
                  std::to_string(bytes >> 20) + " MiB of random weights, " + std::to_string(available_memory() >> 20) +
                      " MiB are available",
                  "choose a smaller --shape");
    random_ = std::make_unique_for_overwrite<bf16[]>(parameters);
    uint64_t state = 1;
    for (uint64_t i = 0; i < parameters; ++i) {  // about uniform in +-0.03, by a linear congruential generator
      state = state * 6364136223846793005u + 1442695040888963407u;
      random_[i].bits = uint16_t((state >> 63) << 15 | (0x3C00 + (state >> 40 & 0xFF)));
    }
    const bf16* next = random_.get();
    each_weight(config, weights, [&](const bf16*& w, uint64_t n) { w = std::exchange(next, next + n); });
    if (config.shape.tied) weights.head = weights.embedding;
  }

  bool has_file() const { return file_ != nullptr; }
  // One of a kind: two models at the same address, one after the other, can be told apart.
  uint64_t id() const { return id_; }
  const std::string& path() const { return path_; }
  uint64_t file_bytes() const { return file_ ? file_->size() : 0; }

  // For every mode that computes.
  void need_weights() const {
    if (config.tokenizer_only)
      throw Error(2, path(), "holds a tokenizer only, no weights",
                  "export the whole checkpoint, without --tokenizer-only");
  }

 private:
  [[noreturn]] void fail(const std::string& why) const { container_->fail(why); }

  int64_t whole(const json& j, const std::string& key, int64_t least, int64_t most) const {
    if (!j.contains(key)) fail("config has no " + key);
    const json& v = j[key];
    if (!v.is_number_integer() || (v.is_number_unsigned() && v.get<uint64_t>() > uint64_t(most)) ||
        v.get<int64_t>() < least || v.get<int64_t>() > most)
      fail("config " + key + ": expected a whole number from " + std::to_string(least) + " to " + std::to_string(most) +
           ", got " + v.dump());
    return v.get<int64_t>();
  }

  double real(const json& j, const std::string& key, double least, double most) const {
    if (!j.contains(key) || !j[key].is_number()) fail("config " + key + " is missing or no number");
    double v = j[key].get<double>();
    if (!(v >= least && v <= most)) fail("config " + key + ": " + j[key].dump() + " is out of range");
    return v;
  }

  bool flag(const json& j, const std::string& key) const {
    if (!j.contains(key) || !j[key].is_boolean()) fail("config " + key + " is missing or not true or false");
    return j[key];
  }

  void read_config(const json& j) {
    if (!j.is_object()) fail("config is not an object");
    Shape& s = config.shape;
    if (!j.contains("name") || !j["name"].is_string()) fail("config has no name");
    s.name = j["name"];
    if (std::any_of(s.name.begin(), s.name.end(), [](unsigned char c) { return c < 0x20 || c == 0x7F; }))
      fail("config name holds a control character");
    s.vocab = int(whole(j, "vocab_size", 1, 1 << 24));
    config.bos =
        j.contains("bos_token_id") && j["bos_token_id"].is_null() ? -1 : int(whole(j, "bos_token_id", 0, s.vocab - 1));
    if (!j.contains("eos_token_id") || !j["eos_token_id"].is_array()) fail("config eos_token_id is not a list");
    for (auto& id : j["eos_token_id"]) {
      if (!id.is_number_unsigned() || id.get<uint64_t>() >= uint64_t(s.vocab))
        fail("config eos_token_id: " + id.dump() + " is no id of a vocabulary of " + std::to_string(s.vocab));
      config.eos.push_back(id);
    }
    if (j.contains("tokenizer_only") && flag(j, "tokenizer_only")) {
      config.tokenizer_only = true;
      return;
    }
    s.n_layers = int(whole(j, "num_hidden_layers", 1, 4096));
    s.hidden = int(whole(j, "hidden_size", 1, 1 << 17));
    s.n_heads = int(whole(j, "num_attention_heads", 1, 4096));
    s.n_kv_heads = int(whole(j, "num_key_value_heads", 1, s.n_heads));
    if (s.n_heads % s.n_kv_heads)
      fail(std::to_string(s.n_heads) + " query heads cannot be shared evenly by " + std::to_string(s.n_kv_heads) +
           " key heads");
    s.head_dim = int(whole(j, "head_dim", 2, 1024));
    if (s.head_dim % 2) fail("config head_dim is odd: RoPE turns pairs");
    s.mlp = int(whole(j, "intermediate_size", 1, 1 << 20));
    s.tied = flag(j, "tie_word_embeddings");
    config.rms_norm_eps = float(real(j, "rms_norm_eps", 0, 1));
    config.rope_theta = real(j, "rope_theta", 1, 1e12);
    config.context = int(whole(j, "max_position_embeddings", 1, 1 << 30));
    if (!j.contains("rope_scaling")) fail("config has no rope_scaling");
    if (const json& r = j["rope_scaling"]; !r.is_null()) {
      if (!r.is_object()) fail("config rope_scaling is neither null nor an object");
      RopeScaling scaling{float(real(r, "factor", 1, 1e6)), float(real(r, "low_freq_factor", 1e-6, 1e6)),
                          float(real(r, "high_freq_factor", 1e-6, 1e6)),
                          int(whole(r, "original_max_position_embeddings", 1, 1 << 30))};
      if (!(scaling.low_freq_factor < scaling.high_freq_factor))
        fail("config rope_scaling: low_freq_factor must be below high_freq_factor");
      config.rope_scaling = scaling;
    }
    if (!j.contains("swiftkv")) fail("config has no swiftkv");
    if (const json& w = j["swiftkv"]; !w.is_null()) {
      if (!w.is_object()) fail("config swiftkv is neither null nor an object");
      config.swiftkv_k = int(whole(w, "num_key_value_layers", 1, s.n_layers - 1));
      config.swiftkv_group = int(whole(w, "key_value_group_size", 1, s.n_layers));
      config.original_projections = flag(w, "original_projections");
    }
    if (!j.contains("adapted") || !j["adapted"].is_array()) fail("config adapted is not a list");
    for (auto& a : j["adapted"]) {
      if (!a.is_object() || !a.contains("policy") || !a["policy"].is_string() || !a.contains("k"))
        fail("config adapted: " + a.dump());
      std::optional<Method> m;
      for (Method c : {Method::full, Method::speed, Method::pop, Method::swiftkv, Method::share})
        if (a["policy"] == name(c)) m = c;
      if (!m) fail("config adapted: unknown policy " + a["policy"].dump());
      config.adapted.push_back({*m, a["k"].is_null() ? 0 : int(whole(a, "k", 1, s.n_layers)), flag(a, "bos")});
    }
  }

  void read_tokenizer(uint64_t V) {
    auto length = [&](const std::string& name) -> uint64_t {
      auto it = container_->tensors().find(name);
      if (it == container_->tensors().end()) fail("tensor " + name + " is missing");
      return it->second.shape.empty() ? 0 : it->second.shape[0];
    };
    uint64_t n_bytes = length("tokenizer.bytes"), n_merges = length("tokenizer.merges");
    std::span<const uint8_t> bytes(container_->get<uint8_t>("tokenizer.bytes", "U8", {n_bytes}), n_bytes);
    std::span<const uint32_t> offsets(container_->get<uint32_t>("tokenizer.offsets", "U32", {V + 1}), V + 1);
    std::span<const uint32_t> merges(container_->get<uint32_t>("tokenizer.merges", "U32", {n_merges, 3}), n_merges * 3);
    tokenizer = std::make_unique<Tokenizer>(container_->metadata("tokenizer"), bytes, offsets, merges, V);
    if (const std::string& c = container_->metadata("chat"); c != "null") chat.emplace(c, *tokenizer);
  }

  void read_weights() {
    const Shape& s = config.shape;
    const uint64_t d = s.hidden, q = s.q_width(), kv = s.kv_width(), f = s.mlp, V = s.vocab;
    std::set<std::string> known = {"tokenizer.bytes", "tokenizer.offsets", "tokenizer.merges"};
    auto tensor = [&](const std::string& name, std::vector<uint64_t> shape) {
      known.insert(name);
      parameters += shape[0] * (shape.size() > 1 ? shape[1] : 1);
      return container_->get<bf16>(name, "BF16", shape);
    };
    weights.embedding = tensor("model.embed_tokens.weight", {V, d});
    weights.final_norm = tensor("model.norm.weight", {d});
    weights.head = s.tied ? weights.embedding : tensor("lm_head.weight", {V, d});
    if (container_->has("rope.freq_divisors")) {
      known.insert("rope.freq_divisors");
      weights.rope_divisors = container_->get<float>("rope.freq_divisors", "F32", {uint64_t(s.head_dim / 2)});
      for (int i = 0; i < s.head_dim / 2; ++i)
        if (!(weights.rope_divisors[i] > 0 && std::isfinite(weights.rope_divisors[i])))
          fail("rope.freq_divisors holds a number that is not positive");
    }
    if (config.swiftkv_k) weights.swiftkv_norm = tensor("model.norm_swiftkv.weight", {d});
    for (int l = 0; l < s.n_layers; ++l) {
      const std::string at = "model.layers." + std::to_string(l) + ".";
      const bool upper = config.swiftkv_k && l >= config.swiftkv_k;
      LayerWeights w;
      w.attention_norm = tensor(at + "input_layernorm.weight", {d});
      if (!upper || config.original_projections) {
        w.wq = tensor(at + "self_attn.q_proj.weight", {q, d});
        w.wk = tensor(at + "self_attn.k_proj.weight", {kv, d});
        w.wv = tensor(at + "self_attn.v_proj.weight", {kv, d});
      }
      if (upper) {
        w.swiftkv_wq = tensor(at + "self_attn.q_proj_swiftkv.weight", {q, d});
        if ((l - config.swiftkv_k) % config.swiftkv_group == 0) {
          w.swiftkv_wk = tensor(at + "self_attn.k_proj_swiftkv.weight", {kv, d});
          w.swiftkv_wv = tensor(at + "self_attn.v_proj_swiftkv.weight", {kv, d});
        }
      }
      w.wo = tensor(at + "self_attn.o_proj.weight", {d, q});
      w.mlp_norm = tensor(at + "post_attention_layernorm.weight", {d});
      w.gate = tensor(at + "mlp.gate_proj.weight", {f, d});
      w.up = tensor(at + "mlp.up_proj.weight", {f, d});
      w.down = tensor(at + "mlp.down_proj.weight", {d, f});
      weights.layers.push_back(w);
    }
    for (auto& [name, t] : container_->tensors())
      if (!known.count(name)) fail("tensor " + name + " is not part of a Llama model");
  }

  std::string path_;
  std::unique_ptr<MappedFile> file_;
  std::unique_ptr<SafeTensors> container_;
  std::unique_ptr<bf16[]> random_;
  const uint64_t id_ = next_id_++;
  static inline uint64_t next_id_ = 1;
  const std::string hint_ = "export the checkpoint again with export_weights.py";
};

}  // namespace speed
