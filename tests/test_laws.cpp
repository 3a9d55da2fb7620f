// The laws of the policies, on tiny random models, and every policy against Hugging Face's stored logits.
//
// Tolerance between two ways to compute the same in fp32: five layers of sums of up to 45 terms. Each layer adds a
// relative error of a few u = 6e-8 to the residual stream, and sharp attention may multiply it by a few; 2e-5 is the
// bound that also holds for 30 layers of 1,536. What must be bit for bit is compared as bits.
#include "helpers.h"

using namespace test;

namespace {

constexpr double tolerance = 2e-5;
const std::vector<std::string> names = {"scaled.safetensors", "tied.safetensors", "swiftkv.safetensors"};

Policy from_json(const json& j, int L) {
  Policy p = full_depth(L);
  p.method = find_policy(j["policy"]).value();
  p.k = j["k"];
  p.bos = j["bos"];
  if (!j["group"].is_null()) p.group = j["group"];
  if (!j["keep"].is_null()) {
    p.kept.assign(L, false);
    for (int l : j["keep"]) p.kept[l] = true;
  }
  return p;
}

std::vector<float> cache_of(const Engine<Cpu>& engine, const Shape& s, int l, size_t from, size_t slots) {
  const auto& c = engine.cache(l);
  std::vector<float> all;
  for (const float* p : {c.k, c.v})
    for (int h = 0; h < s.n_kv_heads; ++h) {
      const float* first = p + (h * c.capacity + from) * s.head_dim;
      all.insert(all.end(), first, first + slots * s.head_dim);
    }
  return all;
}

}  // namespace

TEST_CASE("every policy equals Hugging Face, and a small fault does not", "[laws][golden]") {
  size_t compared = 0, faults = 0;
  std::set<std::string> seen;
  for (const json& j : json::parse(read_file(golden("cases.json")))) {
    Model m(golden(j["model"]));
    const Policy p = from_json(j, m.config.shape.n_layers);
    const std::vector<int> ids = j["tokens"];
    const size_t split = j["split"], V = m.config.shape.vocab, L = m.config.shape.n_layers;
    const auto ref = read_npy(golden(j["file"]));
    seen.insert(name(p.method));
    INFO(j["file"] << " " << j["policy"] << " K=" << p.k << " bos " << p.bos);
    for (size_t chunk : {512, 16}) {
      CHECK(worst_row(logits(m, p, ids, split, chunk), ref, V) < tolerance);
      ++compared;
    }
    auto differs = [&](const Policy& wrong, size_t wrong_split) {
      const auto x = logits(m, wrong, ids, wrong_split);
      const auto last = std::span(x).last(V), ref_last = std::span(ref).last(V);
      CHECK(worst_row(last, ref_last, V) > tolerance);
      ++faults;
    };
    if (p.method == Method::speed) {
      Policy wrong = p;
      wrong.bos = !p.bos;
      differs(wrong, split);
      wrong = p;
      wrong.k += p.k + 1 < int(L) ? 1 : -1;
      if (wrong.k >= 1) differs(wrong, split);
      differs(p, split - 1);
    }
    if (p.method == Method::pop) {
      Policy wrong = p;
      ++wrong.k;
      if (wrong.k < int(L) - 1) differs(wrong, split);
      differs(p, split - 1);
    }
    if (p.method == Method::share) differs(full_depth(int(L)), split);
    if (p.method == Method::swiftkv) differs(policy(Method::pop, int(L), p.k), split);
    m.config.rope_theta *= 1.01;
    differs(p, split);
  }
  CHECK(compared > 60);
  CHECK(faults > 60);
  for (const PolicyInfo& policy : policy_table) {
    INFO("policy " << policy.name << " has no stored logits of Hugging Face: see tests/hf/make_golden.py");
    CHECK(seen.count(policy.name));
  }
}

TEST_CASE("law 1: K = L and all kept equal full bit for bit", "[laws]") {
  for (auto& file : names) {
    const Model m(golden(file));
    const int L = m.config.shape.n_layers;
    const auto ids = Random(1).ids(50, m.config.bos, m.config.shape.vocab);
    for (size_t split : {size_t(30), ids.size() - 1})
      for (size_t chunk : {512, 16}) {
        const auto full = logits(m, full_depth(L), ids, split, chunk);
        std::vector<int> every(L);
        for (int l = 0; l < L; ++l) every[l] = l;
        for (const PolicyInfo& takes : policy_table) {
          if (takes.takes_group && !m.config.original_projections) continue;
          INFO(takes.name);
          for (bool bos : {true, false})
            CHECK(same_bits(logits(m, policy(takes.method, L, L, bos, takes.takes_kept ? every : std::vector<int>{}),
                                   ids, split, chunk),
                            full));
        }
        CHECK(same_bits(logits(m, policy(Method::pop, L, L - 1), ids, split, chunk), full));
        CHECK_FALSE(same_bits(logits(m, policy(Method::speed, L, L - 1), ids, split, chunk), full));
        CHECK_FALSE(same_bits(logits(m, policy(Method::pop, L, L - 2), ids, split, chunk), full));
      }
  }
}

TEST_CASE("law 2: caches below K are those of full bit for bit", "[laws]") {
  for (auto& file : names) {
    const Model m(golden(file));
    const Shape& s = m.config.shape;
    const int L = s.n_layers;
    const auto ids = Random(2).ids(70, m.config.bos, s.vocab);
    const size_t split = 66;
    Cpu cpu;
    for (size_t chunk : {512, 20}) {
      const Limits limits{ids.size(), ids.size() - split, chunk};
      Engine<Cpu> full(m, full_depth(L), limits, cpu);
      logits(full, ids, split, s.vocab);
      for (const Policy& p : all_policies(m.config)) {
        if (p.method == Method::share || p.is_full()) continue;
        Engine<Cpu> engine(m, p, limits, cpu);
        logits(engine, ids, split, s.vocab);
        // The tail's rows come from what it saw above K; its own lower rows do not.
        for (int l = 0; l < p.k; ++l)
          CHECK(same_bits(cache_of(engine, s, l, 0, ids.size()), cache_of(full, s, l, 0, ids.size())));
        if (p.method == Method::pop && p.k < L - 1)
          CHECK_FALSE(same_bits(cache_of(engine, s, L - 1, 0, split), cache_of(full, s, L - 1, 0, split)));
      }
    }
  }
}

TEST_CASE("law 3: the anchor's keys and values are the model's constants", "[laws]") {
  for (auto& file : names) {
    const Model m(golden(file));
    const Shape& s = m.config.shape;
    const int L = s.n_layers, K = 1;
    Cpu cpu;
    std::vector<float> first;
    for (uint64_t seed : {3, 4}) {
      const auto ids = Random(seed).ids(20, m.config.bos, s.vocab);
      Engine<Cpu> speed(m, policy(Method::speed, L, K), {20, 2, 512}, cpu), full(m, full_depth(L), {20, 2, 512}, cpu);
      logits(speed, ids, 18, s.vocab);
      logits(full, ids, 18, s.vocab);
      std::vector<float> anchor;
      for (int l = K; l < L; ++l) {
        CHECK(speed.cache(l).used == 3);
        const auto here = cache_of(speed, s, l, 0, 1);
        CHECK(relative_error(here, cache_of(full, s, l, 0, 1)) < tolerance);
        anchor.insert(anchor.end(), here.begin(), here.end());
      }
      if (!first.empty()) CHECK(same_bits(anchor, first));
      first = anchor;
    }
  }
}

TEST_CASE("law 4: a prompt leaves nothing above K but what the policy says", "[laws]") {
  for (auto& file : names) {
    const Model m(golden(file));
    const Shape& s = m.config.shape;
    const auto ids = Random(5).ids(40, m.config.bos, s.vocab);
    Cpu cpu;
    for (const Policy& p : all_policies(m.config)) {
      auto run = [&](bool poisoned) {
        Engine<Cpu> engine(m, p, {60, 20, 16}, cpu);
        std::vector<float> all;
        engine.prefill(ids, 38, [](size_t, const float*) {});
        if (poisoned) EngineTest::poison(engine, NAN);
        for (int id : {7, 9, 11}) {
          const float* l = engine.decode(id);
          all.insert(all.end(), l, l + s.vocab);
          if (poisoned) EngineTest::poison(engine, NAN);
        }
        return all;
      };
      INFO(file << " " << name(p.method) << " K=" << p.k);
      CHECK(same_bits(run(true), run(false)));
    }
  }
  // The poison is real: a cache slot in use, overwritten, is noticed.
  const Model m(golden("scaled.safetensors"));
  Cpu cpu;
  Engine<Cpu> engine(m, full_depth(m.config.shape.n_layers), {10, 5, 16}, cpu);
  engine.prefill(Random(5).ids(5, m.config.bos, m.config.shape.vocab), 4, [](size_t, const float*) {});
  engine.cache(0).k[0] = NAN;
  CHECK(std::isnan(engine.decode(3)[0]));
}

TEST_CASE("law 5: the chunk does not matter", "[laws]") {
  for (auto& file : names) {
    const Model m(golden(file));
    const size_t V = m.config.shape.vocab;
    const auto ids = Random(6).ids(90, m.config.bos, int(V));
    for (const Policy& p : all_policies(m.config))
      for (size_t split : {size_t(1), size_t(45), ids.size() - 1}) {
        const auto whole = logits(m, p, ids, split, 512);
        for (size_t chunk : {1, 7, 64}) CHECK(worst_row(logits(m, p, ids, split, chunk), whole, V) < tolerance);
      }
  }
}

TEST_CASE("law 6: a second turn equals the same conversation prefilled afresh", "[laws]") {
  for (auto& file : names) {
    const Model m(golden(file));
    const size_t V = m.config.shape.vocab;
    const auto ids = Random(7).ids(60, m.config.bos, int(V));
    Cpu cpu;
    for (const Policy& p : all_policies(m.config)) {
      // First turn: 20 prompt tokens, 3 of tail, 7 generated; second: 25 prompt tokens, 5 of tail.
      Engine<Cpu> engine(m, p, {60, 30, 512}, cpu);
      engine.prefill(std::span(ids).first(23), 20, [](size_t, const float*) {});
      for (int i = 23; i < 30; ++i) engine.decode(ids[i]);
      engine.end_turn(false);
      const auto second = logits(engine, std::span(ids).subspan(30), 25, V);
      const auto fresh = logits(m, p, ids, 55);
      INFO(file << " " << name(p.method) << " K=" << p.k << " bos " << p.bos);
      // POP keeps the full-depth keys and values of earlier answers; afresh they are prompt like the rest.
      if (p.method == Method::pop && p.k < p.n_layers - 1) CHECK(worst_row(second, fresh, V) > tolerance);
      else CHECK(worst_row(second, fresh, V) < tolerance);
      if (p.method != Method::speed || p.is_full()) continue;
      Engine<Cpu> keeping(m, p, {60, 60, 512}, cpu);
      keeping.prefill(std::span(ids).first(23), 20, [](size_t, const float*) {});
      for (int i = 23; i < 30; ++i) keeping.decode(ids[i]);
      keeping.end_turn(true);
      CHECK(worst_row(logits(keeping, std::span(ids).subspan(30), 25, V), fresh, V) > tolerance);
    }
  }
}

TEST_CASE("law 7: teacher forcing equals generating one by one", "[laws]") {
  for (auto& file : names) {
    const Model m(golden(file));
    const size_t V = m.config.shape.vocab;
    const auto ids = Random(8).ids(30, m.config.bos, int(V));
    Cpu cpu;
    for (const Policy& p : all_policies(m.config)) {
      const size_t split = 20;
      const auto forced = logits(m, p, ids, split);
      Engine<Cpu> engine(m, p, {ids.size(), ids.size() - split, 512}, cpu);
      auto one_by_one = logits(engine, std::span(ids).first(split + 1), split, V);
      for (size_t i = split + 1; i < ids.size(); ++i) {
        const float* l = engine.decode(ids[i]);
        one_by_one.insert(one_by_one.end(), l, l + V);
      }
      CHECK(worst_row(one_by_one, forced, V) < tolerance);
    }
  }
}

TEST_CASE("law 8: SwiftKV with copied weights is POP but for the norm", "[laws]") {
  Model m(golden("swiftkv.safetensors"));
  const Shape& s = m.config.shape;
  const int L = s.n_layers, K = m.config.swiftkv_k;
  m.weights.swiftkv_norm = m.weights.layers[K].attention_norm;
  for (int l = K; l < L; ++l) {
    LayerWeights& w = m.weights.layers[l];
    w.swiftkv_wq = w.wq, w.swiftkv_wk = w.wk, w.swiftkv_wv = w.wv;
  }
  const auto ids = Random(9).ids(40, m.config.bos, s.vocab);
  Cpu cpu;
  Engine<Cpu> swiftkv(m, policy(Method::swiftkv, L, K), {40, 1, 512}, cpu);
  logits(swiftkv, ids, 39, s.vocab);
  Engine<Cpu> other_norms(m, policy(Method::pop, L, K), {40, 1, 512}, cpu);
  logits(other_norms, ids, 39, s.vocab);
  CHECK(same_bits(cache_of(swiftkv, s, K, 0, 39), cache_of(other_norms, s, K, 0, 39)));
  CHECK_FALSE(same_bits(cache_of(swiftkv, s, K + 1, 0, 39), cache_of(other_norms, s, K + 1, 0, 39)));
  for (int l = K; l < L; ++l) m.weights.layers[l].attention_norm = m.weights.swiftkv_norm;
  Engine<Cpu> pop(m, policy(Method::pop, L, K), {40, 1, 512}, cpu);
  logits(pop, ids, 39, s.vocab);
  for (int l = K; l < L; ++l) {
    CHECK(same_bits(cache_of(swiftkv, s, l, 0, 39), cache_of(pop, s, l, 0, 39)));
    if (l > K)
      CHECK_FALSE(same_bits(cache_of(swiftkv, s, l, 39, 1), cache_of(pop, s, l, 39, 1)));  // the decode-phase token
  }
}

TEST_CASE("predicted = counted = allocated", "[laws][cost]") {
  for (auto& file : names) {
    const Model m(golden(file));
    const Shape& s = m.config.shape;
    Cpu cpu;
    for (const Policy& p : all_policies(m.config))
      for (auto [N, T] : {std::array<size_t, 2>{1, 1}, {2, 1}, {40, 1}, {40, 4}, {40, 39}}) {
        INFO(file << " " << name(p.method) << " K=" << p.k << " bos " << p.bos << " N=" << N << " T=" << T);
        const Cost cost{s, p};
        const size_t n = 6, split = N - T;
        const auto ids = Random(10).ids(N, m.config.bos, s.vocab);
        Engine<Cpu> engine(m, p, {N + n, T + n, 512}, cpu);
        // BoS alone is a decode-phase row; its engine still has room for an anchor.
        if (N > T) CHECK(engine.kv_bytes_allocated() == cost.kv_bytes(split, T + n, sizeof(float)));
        engine.prefill(ids, split, [](size_t, const float*) {});
        CHECK(engine.counted().flops == cost.prefill_flops(N, T));
        for (int l = 0; l < s.n_layers; ++l) {
          CHECK(engine.layers()[l].counted.flops == cost.prefill_layer_flops(l, N, T));
          CHECK(engine.cache(l).used == p.slots(l, split, T));
        }
        const Counters before = engine.counted();
        engine.decode(3);
        const Counters step = engine.counted() - before;
        CHECK(step.flops == cost.decode_flops(N, T));
        CHECK(step.weight_bytes == cost.weight_bytes(sizeof(bf16)));
        CHECK(step.weight_bytes + step.kv_bytes == cost.decode_read_bytes(N, T, sizeof(float), sizeof(bf16)));
      }
  }
}

// What a turn costs, and what it leaves: predicted, and counted by the engine.
TEST_CASE("predicted = counted in every turn of a conversation", "[laws][cost]") {
  struct Turn {
    size_t n, tail, steps;  // tokens of the request, the decode-phase ones among them, tokens generated and fed back
  };
  const std::vector<Turn> turns = {{9, 2, 3}, {30, 4, 2}, {3, 1, 0}, {2, 2, 5}, {21, 1, 1}};
  size_t total = 0, compared = 0;
  for (const Turn& t : turns) total += t.n + t.steps;
  for (auto& file : names) {
    const Model m(golden(file));
    const Shape& s = m.config.shape;
    Cpu cpu;
    const auto said = Random(11).ids(total + 1, m.config.bos, s.vocab);
    for (const Policy& p : all_policies(m.config))
      for (bool keep_answers : {false, true})
        for (size_t chunk : {512, 7})
          for (size_t before : {0, 40}) {  // tokens that an engine of another K had: the first turn prefills them again
            INFO(file << " " << name(p.method) << " K=" << p.k << " bos " << p.bos << " keep " << keep_answers
                      << " chunk " << chunk << " before " << before);
            const Cost cost{s, p};
            Engine<Cpu> engine(m, p, {total + before, total, chunk}, cpu);
            Earlier earlier;
            size_t at = 0;
            for (Turn t : turns) {
              auto ids = std::vector<int>(said.begin() + long(at), said.begin() + long(at + t.n));
              at += t.n;
              if (earlier.tokens == 0) {
                const auto again = Random(12).ids(before + 1, 7, s.vocab);
                ids.insert(ids.begin() + 1, again.begin() + 1, again.end());
                t.n += before;
              }
              const size_t split = t.n - t.tail;
              engine.end_turn(keep_answers);
              const Counters start = engine.counted();
              const std::vector<LayerStats> layers = engine.layers();
              engine.prefill(ids, split, [](size_t, const float*) {});
              CHECK((engine.counted() - start).flops == cost.prefill_flops(t.n, t.tail, earlier));
              for (int l = 0; l < s.n_layers; ++l)
                CHECK((engine.layers()[l].counted - layers[l].counted).flops ==
                      cost.prefill_layer_flops(l, t.n, t.tail, earlier));
              // The next steps: each as if the request had been the whole conversation so far.
              size_t n = earlier.tokens + t.n, tail = earlier.kept + t.tail;
              for (size_t i = 0; i < t.steps; ++i, ++n, ++tail) {
                const Counters prompt = engine.counted();
                engine.decode(said[at++]);
                const Counters step = engine.counted() - prompt;
                CHECK(step.flops == cost.decode_flops(n, tail));
                CHECK(step.weight_bytes + step.kv_bytes ==
                      cost.decode_read_bytes(n, tail, sizeof(float), sizeof(bf16)));
              }
              CHECK(engine.kv_bytes_used() == cost.kv_bytes(n - tail, tail, sizeof(float)));
              for (int l = 0; l < s.n_layers; ++l) CHECK(engine.cache(l).used == p.slots(l, n - tail, tail));
              earlier = {n, keep_answers ? tail : 0};
              ++compared;
            }
          }
  }
  CHECK(compared > 2000);
}

TEST_CASE("go_back forgets what came after the mark, by the bit", "[laws]") {
  for (auto& file : names) {
    const Model m(golden(file));
    const Shape& s = m.config.shape;
    const auto ids = Random(13).ids(60, m.config.bos, s.vocab);
    Cpu cpu;
    for (const Policy& p : all_policies(m.config))
      for (size_t layer_to_stop : {0, 1, 2}) {
        auto run = [&](bool stopped, bool go_back) {
          Engine<Cpu> engine(m, p, {100, 60, 8}, cpu);
          // In the first turn there is no anchor yet; in the second there is.
          std::vector<float> all;
          for (size_t turn : {0, 1}) {
            const auto request = std::span(ids).subspan(turn * 30, 30);
            engine.end_turn(false);
            const auto mark = engine.mark();
            engine.on_layer = [&](int l, size_t first, size_t, const float*) {
              if (stopped && first > turn * 30 && size_t(l) == layer_to_stop) throw Interrupted{};
            };
            if (stopped) CHECK_THROWS_AS(engine.prefill(request, 27, [](size_t, const float*) {}), Interrupted);
            engine.on_layer = nullptr;
            if (go_back) engine.go_back(mark);
            const auto x = logits(engine, request, 27, s.vocab);
            all.insert(all.end(), x.begin(), x.end());
          }
          return all;
        };
        INFO(file << " " << name(p.method) << " K=" << p.k << " bos " << p.bos << " layer " << layer_to_stop);
        const auto plain = run(false, false);
        CHECK(same_bits(run(true, true), plain));
        CHECK_FALSE(same_bits(run(true, false), plain));  // so there was something to forget
      }
  }
}

TEST_CASE("what a request may not be", "[laws]") {
  const Model m(golden("scaled.safetensors"));
  const int L = m.config.shape.n_layers, bos = m.config.bos;
  Cpu cpu;
  auto fails = [&](const Policy& p, std::vector<int> ids, size_t split, size_t context = 20) {
    Engine<Cpu> engine(m, p, {context, 5, 512}, cpu);
    CHECK_THROWS_AS(engine.prefill(ids, split, [](size_t, const float*) {}), Error);
  };
  fails(full_depth(L), {}, 0);
  fails(full_depth(L), {bos, bos, 5}, 2);
  fails(full_depth(L), {bos, 5}, 2);
  fails(full_depth(L), {bos, m.config.shape.vocab}, 1);
  fails(full_depth(L), {bos, -1}, 1);
  fails(full_depth(L), {bos, 1, 2, 3}, 3, 3);
  fails(policy(Method::speed, L, 2), {5, 6, 7}, 2);
  fails(policy(Method::speed, L, 2), {bos, 1, 2, 3, 4, 5, 6, 7}, 1);
  Engine<Cpu> without(m, policy(Method::speed, L, 2, false), {20, 5, 512}, cpu);
  CHECK_NOTHROW(without.prefill(std::vector<int>{5, 6, 7}, 2, [](size_t, const float*) {}));
  // More memory than any machine has is refused before it is asked for.
  CHECK_THROWS_WITH(Engine<Cpu>(m, full_depth(L), {size_t(1) << 50, 5, 512}, cpu),
                    Catch::Matchers::Contains("MiB are available"));
}
