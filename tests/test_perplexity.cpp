// cli/perplexity.h against the definitions, written out in long double from the logits of another call.
#include "helpers.h"

#include "../cli/perplexity.h"

using namespace test;

namespace {

// -ln softmax(logits)[i] for every i
std::vector<long double> surprise(std::span<const float> logits) {
  long double sum = 0;
  for (float x : logits) sum += std::exp((long double)x);
  std::vector<long double> out;
  for (float x : logits) out.push_back(std::log(sum) - (long double)x);
  return out;
}

struct Expected {
  long double nll = 0, nll_squares = 0;
  std::vector<long double> kl;
  size_t same = 0;
};

// Of the tokens from `first` on, from logits of tokens [split, N) (test::logits), full depth's and the policy's.
Expected expected(const Model& m, const Policy& p, const std::vector<int>& ids, size_t split, size_t first) {
  const size_t V = size_t(m.config.shape.vocab);
  const auto full = logits(m, full_depth(m.config.shape.n_layers), ids, split), own = logits(m, p, ids, split);
  Expected e;
  for (size_t t = first; t < ids.size(); ++t) {
    const auto a = std::span(full).subspan((t - 1 - split) * V, V), b = std::span(own).subspan((t - 1 - split) * V, V);
    const auto la = surprise(a), lb = surprise(b);
    e.nll += lb[size_t(ids[t])];
    e.nll_squares += lb[size_t(ids[t])] * lb[size_t(ids[t])];
    long double kl = 0;
    for (size_t i = 0; i < V; ++i) kl += std::exp(-la[i]) * (lb[i] - la[i]);
    e.kl.push_back(kl);
    e.same += std::max_element(a.begin(), a.end()) - a.begin() == std::max_element(b.begin(), b.end()) - b.begin();
  }
  return e;
}

std::string story() {
  std::string s;
  for (const char* fact :
       {"Feta has a clock. ", "Pale lives in the chapel. ", "Kara is a driver. ", "Feta is a barber. ",
        "The code word is resane. ", "Kara has a book. ", "Pale is a wizard. "})
    s += fact;
  return s + s + s + s;
}

}  // namespace

TEST_CASE("a text is cut into pieces", "[perplexity]") {
  const std::vector<int> text = {10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20};
  auto same = [](const Piece& p, const std::vector<int>& ids, size_t split, size_t answer) {
    return p.ids == ids && p.split == split && p.answer == answer;
  };
  auto pieces = cut(text, 1, 3, 4);  // 2 + 4 tokens of text a piece; of the last, 5 are left
  REQUIRE(pieces.size() == 2);
  CHECK(same(pieces[0], {1, 10, 11, 12, 13, 14, 15}, 2, 4));
  CHECK(same(pieces[1], {1, 16, 17, 18, 19, 20}, 2, 3));
  pieces = cut(text, 1, 5, 6);  // 4 + 6; the last token is in no piece
  REQUIRE(pieces.size() == 1);
  CHECK(same(pieces[0], {1, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}, 4, 6));
  pieces = cut(text, -1, 3, 3);  // a model without BoS
  REQUIRE(pieces.size() == 2);
  CHECK(same(pieces[1], {16, 17, 18, 19, 20}, 2, 2));
  CHECK(cut(text, 1, 12, 5).empty());
  CHECK(cut(text, 1, 11, 5).size() == 1);
}

TEST_CASE("scores and their summary equal the definitions", "[perplexity]") {
  const Model m("models/small.safetensors");
  const Config& c = m.config;
  const auto text = m.tokenizer->encode(story(), false);
  auto pieces = cut(text, c.bos, 40, 24);
  REQUIRE(pieces.size() > 2);
  REQUIRE(pieces.back().answer != pieces[0].answer);
  pieces[1].split -= 5;  // as a chat's header: decode-phase, and not scored
  const std::vector<Policy> policies = {full_depth(8),
                                        policy(Method::speed, 8, 2),
                                        policy(Method::speed, 8, 2, false),
                                        policy(Method::pop, 8, 3),
                                        policy(Method::share, 8, 0, true, {0, 2, 4, 6}),
                                        policy(Method::speed, 8, 8)};
  Cpu cpu;
  Options o;
  o.chunk = 512;
  const auto scores = score_pieces(m, policies, pieces, o, cpu);
  for (size_t j = 0; j < policies.size(); ++j) {
    INFO(describe(policies[j]));
    Expected all;
    for (const Piece& p : pieces) {
      const Expected e = expected(m, policies[j], p.ids, p.split, p.ids.size() - p.answer);
      all.nll += e.nll, all.nll_squares += e.nll_squares, all.same += e.same;
      all.kl.insert(all.kl.end(), e.kl.begin(), e.kl.end());
    }
    const long double n = (long double)all.kl.size();
    REQUIRE(scores[j].size() == all.kl.size());
    const Quality q = summarize(scores[j]);
    // The engine is fed one token less than test::logits, which may choose other matrix kernels: its logits, of size
    // 10, then differ by some 2e-5 of that at most (test_laws.cpp), and so may a log-probability.
    const double bound = 4e-4;
    const double ppl = double(std::exp(all.nll / n)), mean = double(all.nll / n);
    const double deviation = double(std::sqrt((all.nll_squares - n * mean * mean) / (n - 1)));
    long double kl = 0;
    for (long double x : all.kl) kl += x / n;
    std::sort(all.kl.begin(), all.kl.end());
    size_t rank = all.kl.size();  // the smallest value that 99 % of all do not exceed
    while (rank > 1 && (rank - 1) * 100 >= all.kl.size() * 99) --rank;
    CHECK(std::abs(q.ppl / ppl - 1) < bound);
    CHECK(std::abs(q.ppl_stderr / (ppl * deviation / double(std::sqrt(n))) - 1) < bound);
    CHECK(std::abs(q.kl_mean - double(kl)) < bound);
    CHECK(std::abs(q.kl_p99 - double(all.kl[rank - 1])) < 2 * bound);
    CHECK(q.same_top1 * double(n) == Approx(double(all.same)).epsilon(1e-12));
    if (policies[j].is_full()) {
      CHECK(q.kl_mean == 0);
      CHECK(q.kl_p99 == 0);
      CHECK(q.same_top1 == 1);
      CHECK(q.ppl == summarize(scores[0]).ppl);
    } else {
      CHECK(q.kl_mean > 10 * bound);
      CHECK(q.same_top1 < 1);
    }
  }
}

TEST_CASE("the work beside the scores is what an engine counts", "[perplexity]") {
  const Model m("models/small.safetensors");
  const auto pieces = cut(m.tokenizer->encode(story(), false), m.config.bos, 40, 24);
  for (const Policy& p : {full_depth(8), policy(Method::speed, 8, 2), policy(Method::pop, 8, 3)}) {
    uint64_t flops = 0, bytes = 0;
    for (const Piece& piece : pieces) {
      Cpu cpu;
      Engine<Cpu> engine(m, p, {piece.ids.size(), piece.ids.size() - piece.split, 512}, cpu);
      const size_t prompt = piece.ids.size() - piece.answer;
      engine.prefill(std::span(piece.ids).first(prompt), piece.split, [](size_t, const float*) {});
      flops += engine.counted().flops;
      for (size_t i = prompt; i + 1 < piece.ids.size(); ++i) engine.decode(piece.ids[i]);
      bytes = std::max(bytes, engine.kv_bytes_used());  // the next piece takes its place
    }
    const Work w = work_of(m.config.shape, p, pieces, sizeof(float));
    CHECK(w.prefill_flops == flops);
    CHECK(w.kv_bytes == bytes);
  }
}

TEST_CASE("a score is right where the distributions are extreme", "[perplexity]") {
  const std::vector<float> sure = {0, -1000, 1000}, even = {0, 0, 0}, shifted = {5, 5, 5};
  const Row a{sure.data(), 2}, b{even.data(), 0}, c{shifted.data(), 0};
  CHECK(score(a, b, 3, 1).nll == Approx(std::log(3.0)));
  CHECK(score(a, b, 3, 1).kl == Approx(std::log(3.0)));
  CHECK_FALSE(score(a, b, 3, 1).same_top1);
  CHECK(score(b, a, 3, 1).nll == 2000);
  CHECK(score(b, a, 3, 1).kl == Approx(1000 - std::log(3.0)));  // (0 + 1000 + 2000) / 3 - ln 3
  CHECK(score(c, b, 3, 0).kl == 0);
  CHECK(score(c, b, 3, 0).same_top1);
}

TEST_CASE("percentile and standard error of few tokens", "[perplexity]") {
  std::vector<TokenScore> scores(201);
  for (size_t i = 0; i < scores.size(); ++i) scores[i] = {1.0 + double(i % 2), double(i), i != 0};
  const Quality q = summarize(scores);
  CHECK(q.kl_p99 == 198);  // 199 of 201 are not larger: the first rank with 99 % of them
  CHECK(q.same_top1 == 200.0 / 201);
  CHECK(std::isnan(summarize({{1, 0, true}}).ppl_stderr));
  CHECK(summarize({{1, 3, true}}).kl_p99 == 3);
}
