// The loader against files that are not what they should be: each is refused in words, none crashes.
#include "helpers.h"

using namespace test;

namespace {

// A model file taken apart, so that one thing in it can be spoilt.
struct File {
  json header;
  std::string data;

  explicit File(const std::string& path) {
    const std::string s = read_file(path);
    uint64_t n = 0;
    std::memcpy(&n, s.data(), 8);
    header = json::parse(s.substr(8, n));
    data = s.substr(8 + n);
  }

  json config() const { return json::parse(header["__metadata__"]["config"].get<std::string>()); }
  void config(const json& c) { header["__metadata__"]["config"] = c.dump(); }

  void write(const std::string& path) const { write(path, header.dump()); }
  void write(const std::string& path, std::string text) const {
    while ((8 + text.size()) % 64) text += ' ';
    const uint64_t n = text.size();
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&n), 8);
    out << text << data;
  }
};

// Loads it; the message of the refusal, or "" if it was accepted.
std::string refusal(const std::string& path) {
  try {
    Model m(path);
    return "";
  } catch (const Error& e) {
    CHECK(e.code == 1);
    CHECK(std::string(e.what()).find('\n') == std::string::npos);
    return e.what();
  }
}

using Catch::Matchers::Contains;
const std::string tied = golden("tied.safetensors");

}  // namespace

TEST_CASE("a file put together again is accepted", "[model]") {
  Scratch scratch;
  File(tied).write(scratch / "m");
  CHECK(refusal(scratch / "m").empty());
}

TEST_CASE("a file cut short anywhere is refused", "[model]") {
  Scratch scratch;
  const std::string all = read_file(tied);
  std::vector<size_t> cuts = {0, 1, 7, 8, 9, all.size() - 1};
  for (size_t at = 10; at < all.size(); at += all.size() / 150) cuts.push_back(at);
  for (size_t cut : cuts) {
    std::ofstream(scratch / "m", std::ios::binary) << all.substr(0, cut);
    INFO("cut at " << cut);
    CHECK_FALSE(refusal(scratch / "m").empty());
  }
  std::ofstream(scratch / "m", std::ios::binary) << all << "x";
  CHECK_THAT(refusal(scratch / "m"), Contains("tensors end at"));
}

TEST_CASE("a damaged header is refused", "[model]") {
  Scratch scratch;
  const File good(tied);
  const std::string text = good.header.dump();
  auto with = [&](const std::string& t) {
    good.write(scratch / "m", t);
    return refusal(scratch / "m");
  };
  CHECK_THAT(with("[]"), Contains("not a JSON object"));
  CHECK_THAT(with("{\"a\": 1"), Contains("not valid JSON"));
  CHECK_THAT(with("{\"a\": 1, \"a\": 2}"), Contains("key \"a\" twice"));
  CHECK_THAT(with(std::string(100000, '[')), Contains("nested"));
  CHECK_THAT(with("{}"), Contains("tensors end at 0"));
  std::ofstream(scratch / "m", std::ios::binary) << std::string(8, '\xff') << text;
  CHECK_THAT(refusal(scratch / "m"), Contains("header of 18446744073709551615 bytes"));
  for (const char* key : {"format", "config", "tokenizer", "chat"}) {
    File f(tied);
    f.header["__metadata__"].erase(key);
    f.write(scratch / "m");
    CHECK_THAT(refusal(scratch / "m"), Contains(std::string("metadata \"") + key + "\" is missing"));
    f.header["__metadata__"][key] = 7;
    f.write(scratch / "m");
    CHECK_THAT(refusal(scratch / "m"), Contains("is not a string"));
    f.header["__metadata__"][key] = "{\"x\": ";
    f.write(scratch / "m");
    CHECK_FALSE(refusal(scratch / "m").empty());
  }
}

TEST_CASE("tensors that are not what the config says are refused by name", "[model]") {
  Scratch scratch;
  const json header = File(tied).header;
  auto spoil = [&](auto change) {
    File f(tied);
    change(f.header);
    f.write(scratch / "m");
    return refusal(scratch / "m");
  };
  for (auto& [name, t] : header.items()) {
    if (name == "__metadata__") continue;
    INFO(name);
    CHECK_THAT(spoil([&](json& h) { h[name]["dtype"] = t["dtype"] == "U8" ? "I8" : "F16"; }), Contains(name));
    CHECK_THAT(spoil([&](json& h) { h[name]["shape"][0] = t["shape"][0].get<int>() + 1; }),
               Contains(name) && Contains("bytes"));
    CHECK_THAT(spoil([&](json& h) { h[name]["shape"] = json::array({-1}); }), Contains(name));
    CHECK_THAT(spoil([&](json& h) { h[name]["shape"] = json::array({1ull << 62, 1ull << 62}); }), Contains(name));
    CHECK_THAT(spoil([&](json& h) { h[name]["data_offsets"][1] = 1ull << 60; }), Contains(name));
    CHECK_THAT(spoil([&](json& h) { h[name]["data_offsets"] = json::array({5, 2}); }), Contains(name));
    CHECK_THAT(spoil([&](json& h) { h[name].erase("shape"); }), Contains(name));
    CHECK_FALSE(spoil([&](json& h) { h["more." + name] = t; }).empty());  // two tensors over one piece of data
    CHECK_FALSE(spoil([&](json& h) { h.erase(name); }).empty());          // a gap, and a tensor missing
    CHECK_THAT(spoil([&](json& h) {
                 h["other"] = t;
                 h.erase(name);
               }),
               Contains(name) && Contains("missing"));
  }
  // The same number of bytes in another shape: expected and got are both said.
  CHECK_THAT(spoil([&](json& h) {
               auto& s = h["model.layers.0.mlp.up_proj.weight"]["shape"];
               std::swap(s[0], s[1]);
             }),
             Contains("expected BF16 [") && Contains("got BF16 ["));
}

TEST_CASE("numbers in the config that cannot be are refused by name", "[model]") {
  Scratch scratch;
  const json config = File(tied).config();
  const std::vector<json> bad = {0, -1, 1ull << 40, 1e300, "7", nullptr, json::array(), true, 2.5};
  auto with = [&](const std::string& key, const json& value) {
    File f(tied);
    json c = config;
    c[key] = value;
    f.config(c);
    f.write(scratch / "m");
    return refusal(scratch / "m");
  };
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "num_key_value_heads", "head_dim", "max_position_embeddings"})
    for (const json& value : bad) {
      INFO(key << " " << value);
      CHECK_THAT(with(key, value), Contains(key) || Contains("model.layers"));
    }
  for (const char* key : {"rms_norm_eps", "rope_theta"})
    for (const json& value : {json(-1), json(1e300), json("7"), json()}) CHECK_THAT(with(key, value), Contains(key));
  CHECK_THAT(with("num_hidden_layers", 1000000000000), Contains("num_hidden_layers"));
  CHECK_THAT(with("num_hidden_layers", 4), Contains("model.layers.3."));
  CHECK_THAT(with("num_hidden_layers", 2), Contains("model.layers.2.") && Contains("not part"));
  CHECK_THAT(with("bos_token_id", 100000), Contains("bos_token_id"));
  CHECK_THAT(with("eos_token_id", json::array({100000})), Contains("eos_token_id"));
  CHECK_THAT(with("eos_token_id", 3), Contains("eos_token_id"));
  CHECK_THAT(with("num_key_value_heads", 3), Contains("num_key_value_heads") || Contains("shared evenly"));
  CHECK_THAT(with("rope_scaling", {{"factor", 0}}), Contains("factor"));
  CHECK_THAT(with("rope_scaling", "linear"), Contains("rope_scaling"));
  CHECK_THAT(with("swiftkv", {{"num_key_value_layers", 9}}), Contains("num_key_value_layers"));
  CHECK_THAT(with("adapted", json::array({{{"policy", "dream"}, {"k", 1}, {"bos", true}}})), Contains("dream"));
  for (auto& [key, value] : config.items()) {
    File f(tied);
    json c = config;
    c.erase(key);
    f.config(c);
    f.write(scratch / "m");
    INFO(key);
    CHECK_FALSE(refusal(scratch / "m").empty());
  }
}

TEST_CASE("random damage never crashes", "[model]") {
  Scratch scratch;
  const std::string good = read_file(tied);
  uint64_t header = 0;
  std::memcpy(&header, good.data(), 8);
  std::mt19937_64 random(1);
  size_t refused = 0;
  for (int i = 0; i < 400; ++i) {
    std::string bad = good;
    for (int j = 0; j < 3; ++j) bad[random() % (8 + header)] = char(random());
    std::ofstream(scratch / "m", std::ios::binary) << bad;
    refused += !refusal(scratch / "m").empty();
  }
  CHECK(refused > 350);  // a byte of a name, of padding or of a number that may be anything can go unnoticed
}

TEST_CASE("a tokenizer alone is no model", "[model]") {
  Scratch scratch;
  File f(tied);
  json c = {{"name", "t"},
            {"vocab_size", f.config()["vocab_size"]},
            {"bos_token_id", nullptr},
            {"eos_token_id", json::array()},
            {"tokenizer_only", true}};
  f.config(c);
  f.write(scratch / "m");
  Model m(scratch / "m");
  CHECK(m.config.tokenizer_only);
  CHECK_THROWS_AS(m.need_weights(), Error);
}

TEST_CASE("memory that control groups leave: of both versions, nested, as in a container", "[model]") {
  Scratch scratch;
  auto group = [&](const std::string& path, const std::string& limit_file, const std::string& limit,
                   const std::string& used_file, uint64_t used, const std::string& stat) {
    std::filesystem::create_directories(scratch.path / path);
    std::ofstream(scratch.path / path / limit_file) << limit << "\n";
    std::ofstream(scratch.path / path / used_file) << used << "\n";
    std::ofstream(scratch.path / path / "memory.stat") << "anon 7\n" << stat << "\n";
  };
  auto left = [&](const std::string& membership) {
    std::istringstream in(membership);
    return control_groups_leave(in, scratch.path.string());
  };
  const uint64_t none = std::numeric_limits<uint64_t>::max();
  CHECK(left("0::/\n") == none);
  CHECK(left("") == none);
  group("a/b", "memory.max", "max", "memory.current", 100, "inactive_file 0");
  group("a", "memory.max", "5000", "memory.current", 1200, "inactive_file 200");
  CHECK(left("0::/a/b\n") == 4000);  // the outer limit binds; 200 of the 1200 are pages of files
  CHECK(left("0::/\n") == none);
  group("a/b", "memory.max", "300", "memory.current", 100, "inactive_file 0");
  CHECK(left("0::/a/b\n") == 200);
  CHECK(left("0::/a/b/not/there\n") == 200);
  group(".", "memory.max", "150", "memory.current", 100, "inactive_file 0");  // a container's own group is the root
  CHECK(left("0::/a/b\n") == 50);
  CHECK(left("0::/\n") == 50);
  group(".", "memory.max", "90", "memory.current", 100, "inactive_file 0");
  CHECK(left("0::/\n") == 0);
  CHECK(left("3:cpuset:/\n") == none);
  group("memory/docker/x", "memory.limit_in_bytes", "800", "memory.usage_in_bytes", 700, "total_inactive_file 300");
  CHECK(left("9:memory:/docker/x\n") == 400);
  CHECK(left("4:cpu,memory:/docker/x\n3:cpuset:/\n") == 400);
  CHECK(left("4:cpu,memory:/docker\n") == none);
  group("memory", "memory.limit_in_bytes", "350", "memory.usage_in_bytes", 10, "total_inactive_file 0");
  CHECK(left("9:memory:/docker/x\n") == 340);
}
