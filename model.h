// model.h - what is in a model file, and the table of policies it can run under.
//
//   Shape          sizes of a Llama model
//   policies       names of the five policies, and what each takes
//   Config         everything else the file says: RoPE, special ids, what the weights were trained for
//   Weights        where the tensors are
//   LayerCache     one layer's KV cache, which a run fills
//   Model          the loader
//
// A model is one .safetensors file written by export_weights.py. It is mapped, not read: a weight is fetched from disk
// when it is first used. A file is data from a stranger, so every size, offset, dtype, shape, id and number in it is
// checked when it is loaded, before anything computes; a message says what was expected and what was found.
#pragma once

#include <cmath>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/bf16.h"
#include "base/files.h"
#include "base/json.h"
#include "base/memory.h"
#include "base/safetensors.h"
#include "tokenizer.h"

namespace speed {

// ---- shapes -------------------------------------------------------------------------------------------------------

struct Shape {
  std::string name;
  int n_layers = 0;    // L
  int hidden = 0;      // d, width of the residual stream
  int n_heads = 0;     // h query heads
  int n_kv_heads = 0;  // g key/value heads; query head i reads key head i / (h/g)
  int head_dim = 0;    // e
  int mlp = 0;         // f, width of the MLP
  int vocab = 0;       // V
  bool tied = false;   // the embedding table is also the output head

  uint64_t q_width() const { return uint64_t(n_heads) * head_dim; }
  uint64_t kv_width() const { return uint64_t(n_kv_heads) * head_dim; }
};

inline std::vector<Shape> known_shapes() {
  return {{"llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256, true},
          {"llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128256, true},
          {"llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256, false},
          {"llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256, false}};
}

// ---- the table of policies ----------------------------------------------------------------------------------------
// The one list of them: flags, help, --compare, bench, the loader and the tests read it. What each policy does with a
// prompt token is in `Policy`, speed.cu.

enum class Method { full, speed, pop, swiftkv, share };

struct PolicyInfo {
  Method method;
  const char* name;     // as --policy and model files spell it
  bool takes_k;         // --k K: prompt tokens visit layers 0..K-1 only
  bool takes_bos;       // --bos, --no-bos: do upper layers see the BoS anchor?
  bool takes_group;     // --group: layers per cache above K
  bool takes_kept;      // --keep, --every: the layers that keep a cache
  bool needs_training;  // the program warns if the weights were not trained for it
  const char* does;     // for help
};

// clang-format off
inline constexpr PolicyInfo policy_table[] = {
    // method, name, takes:      k      bos    group  kept   needs training
    {Method::full, "full",       false, false, false, false, false, "every prompt token visits all layers"},
    {Method::speed, "speed",     true,  true,  false, false, true,  "upper layers see only the BoS anchor and the answer"},
    {Method::pop, "pop",         true,  false, false, false, false, "upper keys and values are made from layer K's input"},
    {Method::swiftkv, "swiftkv", true,  false, true,  false, false, "the same, with projections trained for it"},
    {Method::share, "share",     false, false, false, true,  true,  "a layer without a cache reads the one kept below it"},
};
// clang-format on

constexpr const PolicyInfo& info(Method m) { return policy_table[size_t(m)]; }
constexpr const char* name(Method m) { return info(m).name; }

static_assert(
    [] {
      size_t i = 0;
      for (const PolicyInfo& p : policy_table)
        if (p.method != Method(i++)) return false;
      return i == size_t(Method::share) + 1;
    }(),
    "the table has one row for each Method, in their order");

inline std::optional<Method> find_policy(const std::string& name) {
  for (const PolicyInfo& p : policy_table)
    if (name == p.name) return p.method;
  return std::nullopt;
}

// ---- configuration ------------------------------------------------------------------------------------------------

struct RopeScaling {  // Llama-3's: frequencies of long wavelengths are divided by `factor`, see rope_frequencies()
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
  std::optional<Adaptation> tuned;  // what `tune --write` chose
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

// Calls visit(tensor, values) for every bf16 tensor that a model of this configuration may have, except the head of a tied
// model, which is the embedding. A tensor that is not in the file is null.
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

// ---- the KV cache -------------------------------------------------------------------------------------------------
// Keys and values of one layer, T float on a CPU, bf16 on a GPU. A slot is an index in this cache, a position is the
// token's index in the conversation. Slots are filled in order and causality compares slots; keys carry their token's
// position by RoPE. So slot and position need not agree, and above K under SPEED they do not.

template <class T>
struct LayerCache {
  T* k = nullptr;                          // [n_kv_heads, capacity, head_dim]
  T* v = nullptr;                          // [n_kv_heads, capacity, head_dim]
  size_t capacity = 0;                     // slots
  size_t used = 0;                         // slots
  size_t begin = 0;                        // slots used before the present chunk
  const uint32_t* device_begin = nullptr;  // `begin` in device memory, for recorded decode steps
};

// ---- reading a file -----------------------------------------------------------------------------------------------

class Model {
 public:
  Config config;
  Weights weights;
  std::unique_ptr<Tokenizer> tokenizer;
  std::optional<ChatTemplate> chat;
  std::string sha256;        // of all weights, as the exporter computed it; empty where the file does not say
  std::string chat_refused;  // why the checkpoint's chat template is not in the file, if it has one
  uint64_t parameters = 0;   // all of the file's, whether a policy uses them or not

  explicit Model(const std::string& path)
      : path_(path), file_(std::make_unique<MappedFile>(path)), container_(std::make_unique<SafeTensors>(*file_)) {
    if (container_->metadata("format") != "speed 1")
      fail("format \"" + container_->metadata("format") + "\", expected \"speed 1\"");
    read_config(parse_json(container_->metadata("config"), path + ": config", hint_));
    if (container_->has_metadata("sha256")) sha256 = container_->metadata("sha256");
    if (container_->has_metadata("tuned"))
      read_tuned(parse_json(container_->metadata("tuned"), path + ": tuned", hint_));
    const uint64_t V = config.shape.vocab;
    read_tokenizer(V);
    if (!config.tokenizer_only) read_weights();
  }

  // A model of this shape without file and tokenizer, for timing. Its weights are random: made here, or else later by
  // make_weights(), or by a GPU in its own memory.
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

  // No two weights share memory, as in a file.
  void make_weights() {
    const uint64_t bytes = parameters * sizeof(bf16);
    if (bytes > available_memory())
      throw Error(2, config.shape.name,
                  std::to_string(bytes >> 20) + " MiB of random weights, " + std::to_string(available_memory() >> 20) +
                      " MiB are available",
                  "choose a smaller --shape");
    random_ = std::make_unique_for_overwrite<bf16[]>(parameters);
    uint64_t state = 1;
    for (uint64_t i = 0; i < parameters; ++i) {  // magnitude 0.008 to 0.031, by a linear congruential generator
      state = state * 6364136223846793005u + 1442695040888963407u;
      random_[i].bits = uint16_t((state >> 63) << 15 | (0x3C00 + (state >> 40 & 0xFF)));
    }
    const bf16* next = random_.get();
    each_weight(config, weights, [&](const bf16*& w, uint64_t n) { w = std::exchange(next, next + n); });
    if (config.shape.tied) weights.head = weights.embedding;
  }

  bool has_file() const { return file_ != nullptr; }

  // Writes the file anew with this entry in its metadata, all else the same. This model goes on with the old file.
  void write_metadata(const std::string& key, const std::string& value) const {
    if (destination_of(path_).in_place)
      throw Error(2, path_, "stands for an open file, which cannot be written while it is read",
                  "name the file itself");
    json header = container_->header();
    header["__metadata__"][key] = value;
    OutputFile out(path_);
    out.write(safetensors_begin(header));
    out.write(container_->data().data(), container_->data().size());
    out.finish();
  }
  // Unique in this process, unlike an address, which a later model may reuse.
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

  Adaptation read_adaptation(const json& a, const std::string& what) const {
    if (!a.is_object() || !a.contains("policy") || !a["policy"].is_string() || !a.contains("k"))
      fail(what + ": " + a.dump());
    const std::optional<Method> m = find_policy(a["policy"]);
    if (!m) fail(what + ": unknown policy " + a["policy"].dump());
    return {*m, a["k"].is_null() ? 0 : int(whole(a, "k", 1, config.shape.n_layers)), flag(a, "bos")};
  }

  void read_tuned(const json& j) {
    config.tuned = read_adaptation(j, "tuned");
    const PolicyInfo& takes = info(config.tuned->method);
    if (!takes.takes_k || takes.takes_group || !config.tuned->k) fail("tuned: no policy at a K, " + j.dump());
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
    for (auto& a : j["adapted"]) config.adapted.push_back(read_adaptation(a, "config adapted"));
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
    if (const std::string& c = container_->metadata("chat"); c != "null") {
      const json j = json::parse(c, nullptr, false);
      if (j.is_object() && j.contains("refused") && j["refused"].is_string()) chat_refused = j["refused"];
      else chat.emplace(c, *tokenizer);
    }
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
