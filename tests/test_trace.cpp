// cli/trace.h and trace_document.h: what `trace --html` shows, against the definitions, and that its page is safe.
//
// Tolerances: the engine's attention and its definition differ by fp32 rounding, a few times sqrt(64) u of the values'
// norm (u = 6e-8), which cancellation in a head's sum may multiply by ten: 2e-5, the bound of test_laws.cpp.
#include "helpers.h"

#include "../cli/trace_document.h"

using namespace test;

namespace {

constexpr double tolerance = 2e-5;

struct Fixture {
  Model model;
  Cpu cpu;
  Options options;
  std::vector<int> ids;
  size_t split = 20;
  explicit Fixture(const std::string& file, size_t n = 30)
      : model(golden(file)), ids(Random(7).ids(n, model.config.bos, model.config.shape.vocab)) {
    options.prompt = "text", options.has_prompt = true;
  }
  Recording recorded(const Policy& p, int from, size_t answer = 4) {
    const std::span<const int> fed(ids.data(), ids.size() - 1);
    return record(model, p, fed, split, ids.back(), answer, from, options, cpu);
  }
};

// Attention weights [rows, heads, slots] of full depth in layer l, from the state that enters it and the weights alone:
// no buffer of the engine, no cache. Row i sees slots [0, i].
std::vector<double> weights_from_state(const Model& m, int l, const std::vector<float>& x, size_t n) {
  const Shape& s = m.config.shape;
  const LayerWeights& w = m.weights.layers[l];
  const size_t d = s.hidden, e = s.head_dim, half = e / 2;
  std::vector<float> a(n * d), q(n * s.q_width()), k(n * s.kv_width()), cos(n * half), sin(n * half);
  reference::rmsnorm(a.data(), x.data(), w.attention_norm, n, d, m.config.rms_norm_eps);
  reference::matmul(q.data(), a.data(), w.wq, n, d, s.q_width(), false);
  reference::matmul(k.data(), a.data(), w.wk, n, d, s.kv_width(), false);
  const auto frequencies = rope_frequencies(m.config, m.weights.rope_divisors);
  for (size_t r = 0; r < n; ++r)
    for (size_t i = 0; i < half; ++i)
      cos[r * half + i] = std::cos(float(r) * frequencies[i]), sin[r * half + i] = std::sin(float(r) * frequencies[i]);
  reference::rope(q.data(), cos.data(), sin.data(), n, s.n_heads, e);
  reference::rope(k.data(), cos.data(), sin.data(), n, s.n_kv_heads, e);
  std::vector<double> p(n * s.n_heads * n);
  for (size_t r = 0; r < n; ++r)
    for (size_t h = 0; h < size_t(s.n_heads); ++h) {
      const size_t g = h / (s.n_heads / s.n_kv_heads);
      double sum = 0;
      for (size_t j = 0; j <= r; ++j) {
        double dot = 0;
        for (size_t i = 0; i < e; ++i)
          dot += double(q[(r * s.n_heads + h) * e + i]) * k[(j * s.n_kv_heads + g) * e + i];
        sum += p[(r * s.n_heads + h) * n + j] = std::exp(dot / std::sqrt(double(e)));
      }
      for (size_t j = 0; j <= r; ++j) p[(r * s.n_heads + h) * n + j] /= sum;
    }
  return p;
}

std::vector<uint8_t> from_base64(const std::string& text) {
  const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::vector<uint8_t> bytes;
  uint32_t x = 0;
  int bits = 0;
  for (char c : text) {
    if (c == '=') break;
    x = x << 6 | uint32_t(digits.find(c)), bits += 6;
    if (bits >= 8) bytes.push_back(uint8_t(x >> (bits -= 8)));
  }
  return bytes;
}

}  // namespace

TEST_CASE("attention weights are those of the state that enters a layer", "[trace]") {
  for (const char* file : {"scaled.safetensors", "tied.safetensors"}) {
    Fixture f(file);
    const Shape& s = f.model.config.shape;
    const size_t n = f.ids.size() - 1, H = s.n_heads, L = s.n_layers;
    const Recording r = f.recorded(full_depth(int(L)), 0);
    std::vector<std::vector<float>> entering(1, std::vector<float>(n * s.hidden));
    f.cpu.embed(entering[0].data(), f.model.weights.embedding, f.ids.data(), n, s.hidden);
    Engine<Cpu> engine(f.model, full_depth(int(L)), {n, n - 1, 0}, f.cpu);
    engine.on_layer = [&](int, size_t, size_t rows, const float* x) { entering.emplace_back(x, x + rows * s.hidden); };
    engine.prefill(std::span(f.ids).first(n), 0, [](size_t, const float*) {});
    double worst = 0, worst_shifted = 0;
    for (size_t l = 0; l < L; ++l) {
      const auto p = weights_from_state(f.model, int(l), entering[l], n);
      const RecordedLayer& layer = r.layers[l];
      REQUIRE(layer.first == (l + 1 < L ? 0 : f.split));  // of a prompt token the last layer makes keys and values only
      REQUIRE(layer.rows.size() == n - layer.first);
      for (size_t i = 0; i < layer.rows.size(); ++i) {
        const size_t position = layer.first + i;
        const Glance& g = layer.rows[i];
        REQUIRE(g.weight.size() == position + 1);
        std::array<double, 3> share{};
        for (size_t j = 0; j <= position; ++j) {
          double most = 0;
          for (size_t h = 0; h < H; ++h) {
            const double w = p[(position * H + h) * n + j];
            most = std::max(most, w);
            share[j >= f.split ? 2 : j > 0 ? 1 : 0] += w / double(H);
          }
          worst = std::max(worst, std::abs(most - g.weight[j]));
          worst = std::max(worst, std::abs(most - p[(position * H + g.head[j]) * n + j]));
          if (j > 0) worst_shifted = std::max(worst_shifted, std::abs(most - g.weight[j - 1]));
        }
        for (size_t j = 0; j < 3; ++j) CHECK(std::abs(share[j] - g.share[j]) < tolerance);
      }
    }
    CHECK(worst < tolerance);
    CHECK(worst_shifted > 0.1);  // the fault: one slot off
  }
}

TEST_CASE("weights times values are the engine's attention output, under every policy", "[trace]") {
  for (const char* file : {"scaled.safetensors", "tied.safetensors", "swiftkv.safetensors"}) {
    Fixture f(file);
    const int L = f.model.config.shape.n_layers;
    for (const Policy& p : all_policies(f.model.config)) {
      INFO(file << " " << name(p.method) << " K=" << p.k << " bos " << p.bos);
      const Recording r = f.recorded(p, first_difference(p) == L ? L - 1 : first_difference(p));
      CHECK(r.attention_error < tolerance);
      CHECK(r.lens_error < tolerance);
      for (int l = 0; l < L; ++l) {
        const RecordedLayer& layer = r.layers[l];
        REQUIRE(layer.first == f.split);
        REQUIRE(layer.rows.size() == f.ids.size() - 1 - f.split);
        for (size_t i = 0; i < layer.rows.size(); ++i) {
          const Glance& g = layer.rows[i];
          CHECK(std::abs(g.share[0] + g.share[1] + g.share[2] - 1) < 1e-9);
          // The token sees itself last, whatever its slot is.
          CHECK(position_of(p, l, f.split, g.weight.size() - 1) == f.split + i);
          if (!p.caches_prompt(l)) CHECK(g.share[1] == 0);
          if (!p.caches_prompt(l)) CHECK((g.share[0] > 0) == p.bos);
        }
      }
    }
  }
  // The fault: one slot too many, or another row's query.
  Fixture f("scaled.safetensors");
  const Shape& s = f.model.config.shape;
  Engine<Cpu> engine(f.model, full_depth(s.n_layers), {29, 9, 0}, f.cpu);
  size_t calls = 0;
  engine.on_attention = [&](int l, size_t, size_t rows, const float* q, const LayerCache<float>& cache,
                            const float* o) {
    RecordedLayer layer;
    const size_t seen = cache.used - rows + 1;
    CHECK(look(layer, full_depth(s.n_layers), l, 20, 0, rows, seen, q, cache, o, s) < tolerance);
    CHECK(look(layer, full_depth(s.n_layers), l, 20, 1, rows - 1, seen, q + s.q_width(), cache, o, s) > 1e-2);
    CHECK(look(layer, full_depth(s.n_layers), l, 20, 1, rows - 1, seen - (seen > 1), q, cache, o, s) >=
          (seen > 1 ? 1e-2 : 0));
    ++calls;
  };
  engine.prefill(std::span(f.ids).first(29), 20, [](size_t, const float*) {});
  CHECK(calls == size_t(s.n_layers));
}

TEST_CASE("the last lens is the logits, and a lens names the likeliest words", "[trace]") {
  Fixture f("tied.safetensors");
  const Shape& s = f.model.config.shape;
  const Recording r = f.recorded(full_depth(s.n_layers), 0);
  const auto all = logits(f.model, full_depth(s.n_layers), std::span(f.ids).first(f.ids.size() - 1), f.split);
  CHECK(r.top.size() == all.size() / s.vocab);
  CHECK(same_bits(r.logits, std::span(all).last(4 * s.vocab)));
  double fault = 0;
  for (size_t i = 0; i < r.top.size(); ++i) {
    const std::span<const float> row = std::span(all).subspan(i * s.vocab, s.vocab);
    std::vector<int> order(s.vocab);
    for (int j = 0; j < s.vocab; ++j) order[j] = j;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
    double sum = 0;
    for (float x : row) sum += std::exp(double(x));
    const Lens direct = read_lens(row.data(), row.size(), f.ids[f.split + i + 1]);
    CHECK(std::vector<int>(direct.word.begin(), direct.word.end()) ==
          std::vector<int>(order.begin(), order.begin() + 3));
    CHECK(std::abs(direct.p[1] - std::exp(double(row[order[1]])) / sum) < 1e-6);
    CHECK(std::abs(direct.p_next - std::exp(double(row[f.ids[f.split + i + 1]])) / sum) < 1e-6);
    const Lens& lens = r.layers.back().lens[i];
    CHECK(lens.word[0] == r.top[i]);
    CHECK(std::abs(lens.p_next - direct.p_next) < 1e-5);
    for (size_t j = 0; j < 3; ++j) CHECK(std::abs(lens.p[j] - direct.p[j]) < 1e-5);
    fault = std::max(fault, double(std::abs(r.layers[0].lens[i].p[0] - direct.p[0])));  // another layer's
  }
  CHECK(fault > 1e-2);
  std::vector<float> few = {1, 2};
  CHECK(read_lens(few.data(), 2, 0).word == std::array<int, 3>{1, 0, -1});
  few[0] = NAN;
  CHECK_THROWS_AS(read_lens(few.data(), 2, 0), Error);
}

TEST_CASE("how far a layer turns a prompt token's state", "[trace]") {
  Fixture f("scaled.safetensors");
  const Shape& s = f.model.config.shape;
  for (int chunk : {0, 5}) {
    f.options.chunk = chunk;
    const Recording r = f.recorded(full_depth(s.n_layers), 0);
    std::vector<std::vector<float>> states(s.n_layers);
    Engine<Cpu> engine(f.model, full_depth(s.n_layers), {29, 9, 0}, f.cpu);
    engine.on_layer = [&](int l, size_t, size_t rows, const float* x) { states[l].assign(x, x + rows * s.hidden); };
    engine.prefill(std::span(f.ids).first(29), 20, [](size_t, const float*) {});
    CHECK(std::isnan(r.turn[0]));
    CHECK(std::isnan(r.turn.back()));
    for (int l = 1; l + 1 < s.n_layers; ++l) {
      double mean = 0;
      for (size_t i = 1; i < 20; ++i) {
        double dot = 0, a = 0, b = 0;
        for (int j = 0; j < s.hidden; ++j) {
          const double x = states[l][i * s.hidden + j], y = states[l - 1][i * s.hidden + j];
          dot += x * y, a += x * x, b += y * y;
        }
        mean += (1 - dot / std::sqrt(a * b)) / 19;
      }
      CHECK(std::abs(r.turn[l] - mean) < 1e-5);
      CHECK(mean > 1e-3);
    }
  }
}

TEST_CASE("below K every cell is full depth's", "[trace]") {
  Fixture f("scaled.safetensors");
  const int L = f.model.config.shape.n_layers;
  const Recording full = f.recorded(full_depth(L), 0);
  for (Method method : {Method::speed, Method::pop})
    for (int k = 1; k < L; ++k) {
      const Recording r = f.recorded(policy(method, L, k), k);
      auto same = [&](int l) { return r.cache[l] == full.cache[l]; };
      for (int l = 0; l < k; ++l) CHECK(same(l));
      // The first that differs. POP's layer K makes its keys and values from its own input, as full depth does.
      const int differs = method == Method::pop ? k + 1 : k;
      if (differs < L) CHECK_FALSE(same(differs));
      for (int l = 0; l < k; ++l) CHECK(r.layers[l].lens.empty());
      CHECK(r.layers[k].lens.size() == r.top.size());
    }
}

TEST_CASE("the document holds what was recorded", "[trace]") {
  for (size_t n : {30, 150}) {  // dense, and the strongest 16
    Fixture f("scaled.safetensors", n);
    const Shape& s = f.model.config.shape;
    const int L = s.n_layers;
    Request r{{f.ids.begin(), f.ids.end() - 3}, f.split, "text"};
    const Said said = say(f.model, full_depth(L), r.ids, r.split, 4, f.options, f.cpu);
    auto make = [&] {
      TraceDocument d(f.model, f.options, r, said, sizeof(float));
      auto rec = [&](const Policy& p, int from) {
        return record(f.model, p, d.fed(), r.split, d.after(), d.answer(), from, f.options, f.cpu);
      };
      d.add_full(rec(full_depth(L), 0));
      const Policy p = policy(Method::speed, L, 2);
      d.add(rec(p, 2), say(f.model, p, r.ids, r.split, 4, f.options, f.cpu));
      return d.finish(json::array());
    };
    const json d = make();
    CHECK(d.dump() == make().dump());
    CHECK(d["schema"] == "speed-trace/1");
    CHECK(d["prompt"] == "text");
    CHECK(d["tokens"].size() == r.ids.size() + said.ids.size() - 1);
    for (const json& run : {d["full"], d["runs"][0]}) {
      CHECK(run["counts"] == run["predicted"]);
      CHECK(run["lower_equal"] == true);
      CHECK(run["lower_difference"] < tolerance);
      CHECK(run["attention_error"] < tolerance);
    }
    CHECK(d["full"]["kl_mean"] == 0);
    CHECK(d["runs"][0]["kl_mean"] > 1e-4);
    // Unpack the attention again.
    const std::vector<int> fed = TraceDocument(f.model, f.options, r, said, sizeof(float)).fed();
    const Recording full = record(f.model, full_depth(L), fed, r.split, said.ids.back(), 4, 0, f.options, f.cpu);
    const auto attention = from_base64(d["full"]["attention"]), shares = from_base64(d["full"]["shares"]);
    const bool dense = d["full"]["dense"];
    CHECK(dense == (n == 30));
    size_t at = 0, share_at = 0;
    for (const RecordedLayer& layer : full.layers)
      for (const Glance& g : layer.rows) {
        float least_kept = 1, most_dropped = 0;
        std::set<size_t> kept;
        const size_t entries = dense ? g.weight.size() : std::min<size_t>(16, g.weight.size());
        for (size_t j = 0; j < entries; ++j) {
          const size_t slot = dense ? j : attention[at] + 256u * attention[at + 1];
          at += dense ? 0 : 2;
          const double root = attention[at] / 255.0;
          REQUIRE(slot < g.weight.size());
          CHECK(std::abs(root - std::sqrt(g.weight[slot])) <= 0.5 / 255 + 1e-9);
          CHECK(attention[at + 1] == g.head[slot]);
          at += 2;
          kept.insert(slot);
          least_kept = std::min(least_kept, g.weight[slot]);
        }
        for (size_t j = 0; j < g.weight.size(); ++j)
          if (!kept.count(j)) most_dropped = std::max(most_dropped, g.weight[j]);
        CHECK(kept.size() == entries);
        CHECK(most_dropped <= least_kept);
        for (double x : g.share) CHECK(std::abs(shares[share_at++] / 255.0 - x) <= 0.5 / 255 + 1e-9);
      }
    CHECK(at == attention.size());
    CHECK(share_at == shares.size());
    const auto lens = from_base64(d["runs"][0]["lens"]);
    CHECK(lens.size() == size_t(L - 2) * d["runs"][0]["top"].size() * 10);
    CHECK(from_base64(d["runs"][0]["same"]).size() == d["runs"][0]["top"].size());
  }
}

TEST_CASE("base64 and readable tokens", "[trace]") {
  auto b = [](std::string_view s) { return base64({reinterpret_cast<const uint8_t*>(s.data()), s.size()}); };
  const std::vector<std::pair<std::string, std::string>> rfc = {{"", ""},
                                                                {"f", "Zg=="},
                                                                {"fo", "Zm8="},
                                                                {"foo", "Zm9v"},
                                                                {"foob", "Zm9vYg=="},
                                                                {"fooba", "Zm9vYmE="},
                                                                {"foobar", "Zm9vYmFy"}};  // RFC 4648
  for (auto& [bytes, text] : rfc) CHECK(b(bytes) == text);
  CHECK(readable("gr\xC3\xBC\xC3\x9F") == "gr\xC3\xBC\xC3\x9F");
  CHECK(readable("\xE2\x82") == "\\xE2\\x82");
  CHECK(readable("a\xFF") == "a\\xFF");
  // A character split over tokens, an impossible byte, and a character that never ends.
  CHECK(readable_tokens({"a\xE4", "\xBD",
                         "\xA0"
                         "b",
                         "\xFF", "", "\xC3", "c", "\xF0\x9F"}) == std::vector<std::string>{"a", "",
                                                                                           "\xE4\xBD\xA0"
                                                                                           "b",
                                                                                           "\\xFF", "", "",
                                                                                           "\\xC3"
                                                                                           "c",
                                                                                           "\\xF0\\x9F"});
}

TEST_CASE("nothing in a document can end its element on the page", "[trace]") {
  const std::vector<std::string> hostile = {"</script><script>alert(1)</script>",
                                            "<!--<script>",
                                            "]]>",
                                            "\"; alert(1); \"",
                                            "'\\\"\\u003c/script>",
                                            "\xE2\x80\xA8\xE2\x80\xA9",
                                            std::string("\0\x01\x1F\x7F", 4),
                                            "\xE2\x80\xAE gnp.exe \xE2\x81\xA6",
                                            "\xFF\xC3",
                                            "/*data*/ /*page.js*/ /*page.css*/",
                                            "&lt;/script&gt;"};
  json d;
  for (size_t i = 0; i < hostile.size(); ++i)
    d[hostile[i] == "\xFF\xC3" ? "x" : hostile[i]] = hostile[i], d["list"].push_back(hostile[i]);
  const std::string empty = trace_page(json::object()), page = trace_page(d);
  const std::string open = "<script type=\"application/json\" id=\"data\">", close = "</script>";
  REQUIRE(page.find(open) != std::string::npos);
  const size_t begin = page.find(open) + open.size(), end = page.find(close, begin);
  const std::string data = page.substr(begin, end - begin);
  CHECK(data.find_first_of("<>&") == std::string::npos);
  CHECK(data.find("\xE2\x80\xA8") == std::string::npos);
  for (char c : data) CHECK(static_cast<unsigned char>(c) >= 0x20);
  CHECK(json::parse(data) == json::parse(d.dump(-1, ' ', false, json::error_handler_t::replace)));
  // All else is as without the document.
  CHECK(page.substr(0, begin) == empty.substr(0, begin));
  CHECK(page.substr(end) == empty.substr(empty.find(close, begin)));
  CHECK(page.find("default-src 'none'") < begin);  // and no request can leave
}
