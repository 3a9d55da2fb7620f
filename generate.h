// generate.h - text from a request, once or under several policies side by side.
#pragma once

#include "backend.h"
#include "request.h"
#include "sampling.h"

namespace speed {

// ---- generating ---------------------------------------------------------------------------------------------------

// Turns tokens into text a piece at a time: never part of a character, and nothing that may turn out to be a stop text.
class TextStream {
 public:
  explicit TextStream(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // New text that is safe to show; sets stopped() once a stop text is complete.
  std::string push(std::string_view bytes) {
    held_ += utf8_.push(bytes);
    size_t end = held_.size();
    for (auto& stop : stops_)
      if (const size_t at = held_.find(stop); at != std::string::npos && at < end) end = at, stopped_ = true;
    if (!stopped_)
      for (auto& stop : stops_)
        for (size_t n = std::min(stop.size() - 1, held_.size()); n > 0; --n)
          if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) {
            end = std::min(end, held_.size() - n);
            break;
          }
    std::string shown = held_.substr(0, end);
    held_.erase(0, end);
    return shown;
  }
  std::string finish() { return stopped_ ? "" : held_ + utf8_.flush(); }
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  Utf8Stream utf8_;
  std::string held_;
  bool stopped_ = false;
};

struct Answer {
  std::vector<int> ids;    // generated, a closing stop token included
  size_t fed = 0;          // of these, fed back
  double first_token = 0;  // seconds from the start of the prompt to the first token
  double decode = 0;       // seconds for the `fed` steps
  Counters prompt, total;  // counted
  uint64_t kv_bytes = 0;   // in the caches at the end
  bool interrupted = false;
};

template <class B>
uint64_t kv_bytes_used(const Engine<B>& engine, const Shape& s) {
  uint64_t slots = 0;
  for (int l = 0; l < s.n_layers; ++l)
    if (engine.policy().has_cache(l)) slots += engine.cache(l).used;
  return slots * 2 * s.kv_width() * sizeof(typename B::CacheValue);
}

using Emit = std::function<void(const std::string&)>;

// Takes the request in, then draws up to n tokens; `emit` receives the text as it comes.
template <class B>
Answer generate(Engine<B>& engine, const Model& model, const Request& r, size_t split, size_t n, const Options& o,
                const Emit& emit) {
  using clock = std::chrono::steady_clock;
  const Config& c = model.config;
  Answer a;
  Sampler sampler({o.temperature, o.top_k, o.top_p, o.min_p, o.seed});
  TextStream text(o.stop);
  Progress progress("prompt");
  const size_t before = engine.position();
  engine.on_layer = [&](int l, size_t first, size_t rows, const auto*) {
    if (a.ids.empty())
      progress.update((double(first - before) + double(rows) * (l + 1) / c.shape.n_layers) / double(r.ids.size()));
    if (interrupted) throw Interrupted{};
  };
  const auto start = clock::now();
  auto took = [&](clock::time_point since) { return std::chrono::duration<double>(clock::now() - since).count(); };
  try {
    int id = 0;
    engine.prefill(r.ids, split, [&](size_t, const float* logits) { id = sampler(logits, c.shape.vocab); });
    a.prompt = engine.counted();
    a.first_token = took(start);
    progress.clear();
    const auto decoding = clock::now();
    for (;;) {
      a.ids.push_back(id);
      if (std::find(c.eos.begin(), c.eos.end(), id) != c.eos.end()) break;
      emit(text.push(model.tokenizer->decode(id)));
      if (text.stopped() || a.ids.size() == n) break;
      id = o.temperature == 0 ? engine.decode_greedy(id) : sampler(engine.decode(id), c.shape.vocab);
      ++a.fed;
      a.decode = took(decoding);
    }
  } catch (const Interrupted&) {
    a.interrupted = true;
  }
  emit(text.finish());
  a.total = engine.counted();
  a.kv_bytes = kv_bytes_used(engine, c.shape);
  engine.on_layer = nullptr;
  return a;
}

// With `banner`, one line before any memory is taken: what runs how, and the memory it takes.
template <class B>
Engine<B> make_engine(const Model& model, const Policy& p, size_t context, size_t decode, const Options& o, B& backend,
                      bool banner = false) {
  auto print = [&](const Engine<B>& engine) {
    const Cost cost{model.config.shape, p};
    if (!banner) return;
    const uint64_t load = backend.bytes_to_load(model);
    std::cerr << model.config.shape.name << ": " << describe(p) << ", " << B::name << ", " << device_name(backend)
              << "; memory: " << bytes_text(double(load ? load : cost.weight_bytes(sizeof(bf16)))) << " of weights, "
              << bytes_text(double(engine.bytes_needed())) << " for this run, of it "
              << bytes_text(double(engine.kv_bytes_needed())) << " KV cache\n";
  };
  return Engine<B>(model, p, {context, decode, size_t(o.chunk)}, backend, print);
}

inline json answer_record(const Policy& p, size_t N, size_t split, const Answer& a) {
  return {{"policy", name(p.method)},
          {"k", p.k},
          {"bos", p.method == Method::speed ? json(p.bos) : json()},
          {"prompt_tokens", N},
          {"split", split},
          {"new_tokens", a.ids.size()},
          {"first_token_s", a.first_token},
          {"decode_s", a.decode},
          {"decode_steps", a.fed},
          {"prefill_flops", a.prompt.flops},
          {"kv_bytes", a.kv_bytes},
          {"interrupted", a.interrupted}};
}

inline void print_summary(const Policy& p, const Request& r, size_t split, const Answer& a) {
  std::cerr << "\n"
            << describe(p) << ": " << r.ids.size() << " prompt tokens (" << r.ids.size() - split << " at full depth)";
  if (a.ids.empty()) {
    std::cerr << ", stopped before the first new one\n";
    return;
  }
  std::cerr << ", " << flops_text(double(a.prompt.flops)) << ", first token after " << seconds_text(a.first_token)
            << " (" << fixed(double(r.ids.size()) / a.first_token, 0) << " tokens/s)\n"
            << a.ids.size() << " new tokens";
  if (a.fed) std::cerr << ", " << fixed(double(a.fed) / a.decode, 1) << " tokens/s";
  std::cerr << "; KV cache " << bytes_text(double(a.kv_bytes)) << (a.interrupted ? "; interrupted" : "") << "\n";
}

// ---- generate --compare -------------------------------------------------------------------------------------------

// "speed:24:no-bos" -> the options that say so.
inline Options variant(const Options& o, const std::string& spec) {
  Options v = o;
  v.policy = v.keep = std::nullopt, v.k = v.every = std::nullopt, v.bos = std::nullopt;
  std::istringstream in(spec);
  for (std::string word; std::getline(in, word, ':');) {
    int number = 0;
    const bool is_number =
        std::from_chars(word.data(), word.data() + word.size(), number).ptr == word.data() + word.size() && number > 0;
    if (!v.policy) v.policy = word;
    else if (word == "no-bos") v.bos = false;
    else if (is_number && v.policy == "share") v.every = number;
    else if (is_number) v.k = number;
    else v.policy = "";
  }
  const std::vector<std::string> known = {"full", "speed", "pop", "swiftkv", "share"};
  if (std::find(known.begin(), known.end(), v.policy.value_or("")) == known.end())
    throw Error(2, "--compare", "\"" + spec + "\" is no policy",
                "write it as speed:24, speed:24:no-bos, pop:20 or share:4");
  return v;
}

// Full depth, and what --compare lists, or what the policy flags say.
inline std::vector<Policy> compared_policies(const Options& o, const Config& c) {
  std::vector<Policy> policies = {full_depth(c.shape.n_layers)};
  if (!o.compare || o.compare->empty()) {
    policies.push_back(make_policy(o, c));
  } else {
    std::istringstream list(*o.compare);
    for (std::string spec; std::getline(list, spec, ',');)
      if (spec != "full") policies.push_back(make_policy(variant(o, spec), c));
  }
  return policies;
}

struct Forced {
  double
      same_top1;  // share of the reference answer's tokens that this policy, fed with that answer, finds likeliest too
  uint64_t kv_bytes;  // in the caches at its end
};

template <class B>
Forced force(const Model& model, const Policy& p, const Request& r, size_t split, const std::vector<int>& answer,
             const Options& o, B& b) {
  std::vector<int> ids = r.ids;
  ids.insert(ids.end(), answer.begin(), answer.end() - 1);
  Engine<B> engine = make_engine(model, p, ids.size(), ids.size() - split, o, b);
  size_t same = 0, first = r.ids.size() - 1 - split;
  engine.prefill(
      ids, split,
      [&](size_t i, const float* l) {
        if (i >= first) same += arg_max(l, model.config.shape.vocab) == answer[i - first];
      },
      true);
  return {double(same) / double(answer.size()), kv_bytes_used(engine, model.config.shape)};
}

template <class B>
int compare(const Options& o, const Model& model, const Request& r, B& backend, json& record) {
  const Config& c = model.config;
  const std::vector<Policy> policies = compared_policies(o, c);
  const size_t N = r.ids.size(), n = size_t(o.n), context = context_for(o, c, N, n);
  constexpr int rounds = 3;  // a prompt is timed this often, the policies in turn; the table shows the median
  auto run = [&](const Policy& p, const Emit& emit, size_t tokens) {
    const size_t split = split_under(p, o, r);
    Engine<B> engine = make_engine(model, p, context, std::min(context, N - split + n), o, backend);
    return generate(engine, model, r, split, tokens, o, emit);
  };
  run(
      policies[0], [](const std::string&) {}, 1);  // untimed: brings the weights into memory
  std::vector<Answer> answers;
  std::vector<std::vector<double>> first(policies.size());
  const bool show = o.format != "json" && o.format != "csv";
  for (const Policy& p : policies) {
    if (show) std::cout << (answers.empty() ? "" : "\n") << "── " << describe(p) << "\n" << std::flush;
    answers.push_back(run(
        p,
        [&](const std::string& s) {
          if (show) std::cout << s << std::flush;
        },
        n));
    if (show) std::cout << "\n";
    if (answers.back().interrupted) return 130;
    first[answers.size() - 1].push_back(answers.back().first_token);
  }
  for (int i = 1; i < rounds; ++i)
    for (size_t j = 0; j < policies.size(); ++j) {
      first[j].push_back(run(
                             policies[j], [](const std::string&) {}, 1)
                             .first_token);
      if (interrupted) return 130;
    }
  Table table({{"policy", ""},
               {"k", ""},
               {"bos", ""},
               {"name", "policy"},
               {"same_top1", "same token"},
               {"texts_part_at", "texts part at"},
               {"prefill_flops", "prompt work"},
               {"kv_bytes", "KV cache"},
               {"first_token_s", "first token"},
               {"decode_tokens_per_s", "tokens/s"}});
  for (size_t j = 0; j < policies.size(); ++j) {
    const Policy& p = policies[j];
    const Answer& a = answers[j];
    const auto& reference = answers[0].ids;
    const size_t part =
        size_t(std::mismatch(a.ids.begin(), a.ids.end(), reference.begin(), reference.end()).first - a.ids.begin());
    const bool parts = a.ids != reference;
    const Forced forced = force(model, p, r, split_under(p, o, r), reference, o, backend);
    const double rate = a.fed ? double(a.fed) / a.decode : 0;
    table.row({name(p.method),
               p.k,
               p.method == Method::speed ? json(p.bos) : json(),
               describe(p),
               {forced.same_top1, fixed(100 * forced.same_top1, 1) + " %"},
               {parts ? json(part + 1) : json(), parts ? "token " + std::to_string(part + 1) : "-"},
               {a.prompt.flops, flops_text(double(a.prompt.flops))},
               {forced.kv_bytes, bytes_text(double(forced.kv_bytes))},
               {median(first[j]), seconds_text(median(first[j]))},
               {rate, fixed(rate, 1)}});
  }
  if (show) std::cout << "\n";
  table.print(std::cout, o.format);
  record["results"] = table.rows_as_json();
  note_if_not_adapted(policies, c);
  return 0;
}

template <class B>
int run_generate(const Options& o, json& record, const Model& model, B& backend) {
  const Config& c = model.config;
  const Policy policy = make_policy(o, c);
  const Request r = make_request(o, model);
  if (o.compare) return compare(o, model, r, backend, record);
  const size_t N = r.ids.size(), context = context_for(o, c, N, size_t(o.n)), split = split_under(policy, o, r);
  const size_t n = std::min(size_t(o.n), context - N + 1);
  note_if_not_adapted({policy}, c);
  Engine<B> engine = make_engine(model, policy, context, std::min(context, N - split + n), o, backend, true);
  const Answer a = generate(engine, model, r, split, n, o, [](const std::string& s) { std::cout << s << std::flush; });
  std::cout << std::endl;
  print_summary(policy, r, split, a);
  record["result"] = answer_record(policy, N, split, a);
  record["prompt_ids"] = r.ids;
  record["new_ids"] = a.ids;
  return a.interrupted ? 130 : 0;
}

}  // namespace speed
