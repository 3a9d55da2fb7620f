// tune.cpp - the mode `tune`: the smallest K that keeps a bound on the user's own text.
//
// The text is cut into pieces as `perplexity` cuts it, and every K from L-1 down is compared with full depth, which runs
// once. A K keeps the bound if it and every K above it do. It is given up, with all below it, as soon as what its first
// pieces cost is more than the bound allows for the whole text: that is exact, since no later piece can mend it.
// Intervals are 95 %, by bootstrap over pieces: the tokens of a piece are not independent.
#include <random>

#include "modes.h"
#include "perplexity.h"

namespace speed {

namespace {

struct Bound {
  std::optional<double> max_kl, min_same;  // nats a token; a share
  bool allows(double kl, double misses, double tokens) const {
    return (!max_kl || kl <= *max_kl * tokens) && (!min_same || misses <= (1 - *min_same) * tokens);
  }
  std::string text() const {
    std::string s;
    if (max_kl) s += "KL at most " + shortest(*max_kl);
    if (min_same) s += std::string(max_kl ? ", " : "") + "same top-1 at least " + percent(*min_same);
    return s;
  }
  static std::string shortest(double x) {
    std::ostringstream s;
    s << x;
    return s.str();
  }
};

double sum(const std::vector<double>& v) { return std::accumulate(v.begin(), v.end(), 0.0); }

struct Estimate {
  double mean = 0, low = 0, high = 0;
};

// One K under one policy.
struct Candidate {
  Policy policy;
  std::vector<double> kl_sums = {}, miss_sums = {}, tokens = {};  // a piece each
  bool given_up = false;
  Estimate kl = {}, miss = {};  // over tokens, once all pieces ran
};

// Mean over tokens of what the pieces sum up, and the middle 95 % of 2,000 resamples of the pieces, from a fixed seed.
Estimate estimate(const std::vector<double>& sums, const std::vector<double>& tokens) {
  const double mean = sum(sums) / sum(tokens);
  std::mt19937 random(1);
  std::vector<double> means(2000);
  for (double& m : means) {
    double drawn = 0, n = 0;
    for (size_t i = 0; i < sums.size(); ++i) {
      const size_t one = random() % sums.size();
      drawn += sums[one], n += tokens[one];
    }
    m = drawn / n;
  }
  std::sort(means.begin(), means.end());
  return {mean, means[49], means[1950]};
}

// KL by K, logarithmic, with the interval of each; the bound as a line. As --svg writes it.
std::string plot(const std::vector<Candidate>& all, const Bound& bound, int n_layers, const std::string& title) {
  const double left = 60, right = 620, top = 40, bottom = 320;
  double least = bound.max_kl.value_or(0.01), most = least;
  for (const Candidate& c : all)
    if (c.kl.mean > 0) least = std::min(least, c.kl.mean), most = std::max(most, c.kl.high);
  least = std::max(least, 1e-6);  // below it all is zero to the eye
  const double low = std::floor(std::log10(least)), high = std::max(low + 1, std::ceil(std::log10(most)));
  auto x = [&](int k) { return fixed(left + (right - left) * (k - 0.5) / n_layers, 1); };
  auto y = [&](double kl) {
    return fixed(
        bottom - (bottom - top) * (std::clamp(std::log10(std::max(kl, 1e-12)), low, high) - low) / (high - low), 1);
  };
  std::ostringstream s;
  s << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 640 370\" font-family=\"sans-serif\" font-size=\"12\" "
       "fill=\"#808080\" stroke=\"none\">\n<text x=\"60\" y=\"22\" font-size=\"14\">";
  for (char c : title) s << (c == '<' ? "&lt;" : c == '&' ? "&amp;" : std::string(1, c));
  s << "</text>\n";
  for (double e = low; e <= high; ++e)
    s << "<path d=\"M60 " << y(std::pow(10, e))
      << "H620\" stroke=\"#808080\" stroke-opacity=\".25\"/><text x=\"54\" y=\"" << y(std::pow(10, e))
      << "\" text-anchor=\"end\" dy=\"4\">" << Bound::shortest(std::pow(10, e)) << "</text>\n";
  for (int k = 1; k <= n_layers; k += n_layers > 16 ? 2 : 1)
    s << "<text x=\"" << x(k) << "\" y=\"338\" text-anchor=\"middle\">" << k << "</text>";
  s << "\n<text x=\"340\" y=\"360\" text-anchor=\"middle\">K: layers that a prompt token visits</text>\n";
  if (bound.max_kl)
    s << "<path d=\"M60 " << y(*bound.max_kl)
      << "H620\" stroke=\"#d9822b\" stroke-dasharray=\"5 4\"/><text x=\"618\" y=\"" << y(*bound.max_kl)
      << "\" dy=\"-5\" text-anchor=\"end\" fill=\"#d9822b\">KL " << Bound::shortest(*bound.max_kl) << "</text>\n";
  for (const Candidate& c : all) {
    const Estimate& kl = c.kl;
    const char* color = c.policy.method == Method::pop ? "#35a853" : "#1f8fe0";
    s << "<path d=\"M" << x(c.policy.k) << " " << y(kl.low) << "V" << y(kl.high) << "\" stroke=\"" << color
      << "\" stroke-width=\"2\" stroke-opacity=\".5\"/><circle cx=\"" << x(c.policy.k) << "\" cy=\"" << y(kl.mean)
      << "\" r=\"4\" fill=\"" << color << "\"" << (c.given_up ? " fill-opacity=\".4\"" : "") << "><title>"
      << describe(c.policy) << ": KL " << fixed(kl.mean, 4) << "</title></circle>\n";
  }
  s << "</svg>\n";
  return s.str();
}

// The policies to try, each with the K of all its candidates from L-1 down.
std::vector<std::vector<Candidate>> candidates(const Options& o, const Model& model) {
  Options each = o;
  if (!each.policy) each.policy = "speed";
  if (each.policy->find_first_of("0123456789") != std::string::npos)
    throw Error(2, "--policy " + *each.policy, "tune chooses K itself", "leave the number out");
  std::vector<std::vector<Candidate>> all;
  for (const Policy& p : listed_policies(each, model)) {
    if (p.method != Method::speed && p.method != Method::pop)
      throw Error(2, "--policy", std::string(name(p.method)) + " has no K to choose", "use speed, pop or both");
    std::vector<Candidate> some;
    for (int k = p.n_layers - 1; k >= 1; --k) {
      Policy one = p;
      one.k = k;
      some.push_back({one});
    }
    all.push_back(some);
  }
  return all;
}

template <class B>
int tune(const Options& o, json& record, Model& model, B& backend) {
  const Config& c = model.config;
  Bound bound{o.max_kl, o.min_same};
  if (bound.min_same) *bound.min_same /= 100;
  if (!bound.max_kl && !bound.min_same) bound.max_kl = 0.05;
  if (c.shape.n_layers < 2) throw Error(2, "tune", "this model has one layer", "choose a deeper one");
  auto lists = candidates(o, model);
  const std::vector<Piece> pieces = make_pieces(o, model);
  double all_tokens = 0;
  for (const Piece& p : pieces) all_tokens += double(p.answer);
  const size_t vocab = size_t(c.shape.vocab);
  Progress progress("tune");
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i];
    auto update = [&](double share) { progress.update((double(i) + share) / double(pieces.size())); };
    const AnswerLogits full =
        answer_logits(model, full_depth(c.shape.n_layers), piece, o, backend, [&](double share) { update(share / 8); });
    const int* tokens = piece.ids.data() + piece.ids.size() - piece.answer;
    for (auto& list : lists)
      for (Candidate& one : list) {
        if (one.given_up) break;  // and all below it
        const AnswerLogits own = answer_logits(model, one.policy, piece, o, backend, [](double) {});
        double kl = 0, misses = 0;
#pragma omp parallel for reduction(+ : kl, misses)
        for (size_t t = 0; t < piece.answer; ++t) {
          const TokenScore s = score(full.row(t), own.row(t), vocab, tokens[t]);
          kl += s.kl, misses += !s.same_top1;
        }
        one.kl_sums.push_back(kl), one.miss_sums.push_back(misses), one.tokens.push_back(double(piece.answer));
        one.given_up = !bound.allows(sum(one.kl_sums), sum(one.miss_sums), all_tokens);
        update(0.125 + 0.875 * double(one.policy.n_layers - one.policy.k) / one.policy.n_layers);
      }
  }
  progress.clear();

  Table table({{"policy", ""},
               {"k", ""},
               {"bos", ""},
               {"name", "policy"},
               {"kl", "KL"},
               {"kl_low", ""},
               {"kl_high", ""},
               {"kl_interval", "(95 %)"},
               {"same_top1", "same top-1"},
               {"same_low", ""},
               {"same_high", ""},
               {"same_interval", "(95 %)"},
               {"prefill_saved", "prompt saved"},
               {"kv_saved", "cache saved"},
               {"pieces", "pieces"},
               {"keeps", "keeps it"}});
  const Policy full = full_depth(c.shape.n_layers);
  const Work whole = work_of(c.shape, full, pieces, sizeof(typename B::CacheValue));
  std::vector<const Candidate*> chosen;
  std::vector<Candidate> shown;
  for (auto& list : lists) {
    const Candidate* best = nullptr;
    for (Candidate& one : list) {
      if (one.tokens.empty()) break;
      const bool keeps = !one.given_up;
      if (keeps) best = &one;
      const Estimate &kl = one.kl = estimate(one.kl_sums, one.tokens),
                     &miss = one.miss = estimate(one.miss_sums, one.tokens);
      shown.push_back(one);
      const Work w = work_of(c.shape, one.policy, pieces, sizeof(typename B::CacheValue));
      const double prefill = 1 - double(w.prefill_flops) / double(whole.prefill_flops),
                   cache = 1 - double(w.kv_bytes) / double(whole.kv_bytes);
      auto interval = [](double a, double b, int digits) { return fixed(a, digits) + " to " + fixed(b, digits); };
      table.row({name(one.policy.method),
                 one.policy.k,
                 bos_of(one.policy),
                 describe(one.policy),
                 {kl.mean, fixed(kl.mean, 4)},
                 kl.low,
                 kl.high,
                 {nullptr, interval(kl.low, kl.high, 4)},
                 {1 - miss.mean, percent(1 - miss.mean)},
                 1 - miss.high,
                 1 - miss.low,
                 {nullptr, interval(100 * (1 - miss.high), 100 * (1 - miss.low), 1)},
                 {prefill, percent(prefill)},
                 {cache, percent(cache)},
                 one.tokens.size(),
                 {keeps, keeps ? "yes" : "no"}});
      if (!keeps) break;
    }
    if (best) chosen.push_back(best);
  }
  if (o.format == "text")
    std::cout << c.shape.name << ": " << counted(size_t(all_tokens), "token") << " in "
              << counted(pieces.size(), "piece") << "; " << bound.text() << "\n\n";
  table.print(std::cout, o.format);
  record["results"] = table.rows_as_json();
  if (!o.svg.empty()) {
    OutputFile out(o.svg);
    out.write(plot(shown, bound, c.shape.n_layers, c.shape.name + ": " + bound.text()));
    out.finish();
  }
  if (chosen.empty()) {
    if (o.format == "text") std::cout << "\nNo K below " << c.shape.n_layers << " keeps it: stay at full depth.\n";
    if (!o.write) return 0;
    throw Error(1, "--write", "no K keeps " + bound.text(), "loosen the bound, or leave --write out");
  }
  // Of several policies the one that saves most of the prompt's work.
  const Candidate* best = *std::max_element(chosen.begin(), chosen.end(), [&](auto* a, auto* b) {
    return Cost{c.shape, a->policy}.prefill_flops(256, 1) > Cost{c.shape, b->policy}.prefill_flops(256, 1);
  });
  if (pieces.size() < 2) note("one piece says nothing about how sure this is; give a longer text");
  else if (!bound.allows(best->kl.high, best->miss.high, 1))
    note("the interval of " + describe(best->policy) + " reaches past the bound; a longer text would settle it");
  const std::string flags = std::string("--policy ") + name(best->policy.method) + " --k " +
                            std::to_string(best->policy.k) +
                            (info(best->policy.method).takes_bos && !best->policy.bos ? " --no-bos" : "");
  if (o.format == "text") std::cout << "\nUse: " << flags << "\n";
  record["chosen"] = {{"policy", name(best->policy.method)}, {"k", best->policy.k}, {"bos", best->policy.bos}};
  if (o.write) {
    model.write_metadata("tuned", record["chosen"].dump());
    if (o.format == "text") std::cout << "Written into " << model.path() << ": --k auto uses it.\n";
  }
  return 0;
}

}  // namespace

int run_tune(const Options& o, json& record) {
  return on_device(o, record, [&](Model& m, auto& backend) { return tune(o, record, m, backend); });
}

}  // namespace speed
