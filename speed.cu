// speed.cu - the program: what each mode does, and main. The forward pass is in forward.h.
#include <sys/resource.h>

#include <atomic>
#include <csignal>

#include "bench.h"
#include "forward.h"
#include "options.h"
#include "report.h"

#ifndef SPEED_COMMIT
#define SPEED_COMMIT "unknown"
#endif

namespace speed {

constexpr const char* version = "speed 0.1 (" SPEED_COMMIT ")";

// ---- signals ------------------------------------------------------------------------------------------------------
// The first Ctrl-C asks the run to stop at the next layer, so that it can still say what it did; a second one kills.
// Whatever signal kills, no half-written file is left; a model file cut short while it was mapped (SIGBUS) is named.

inline std::atomic<bool> interrupted = false;
struct Interrupted {};

inline void die(int signal) {
  if (unfinished[0]) ::unlink(unfinished);
  if (signal == SIGBUS) {
    constexpr std::string_view line =
        "speed: model file: it was cut short or became unreadable while in use; start again with a whole file\n";
    [[maybe_unused]] const ssize_t written = ::write(2, line.data(), line.size());
    ::_exit(1);
  }
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

inline void watch_signals() {
  for (int signal : {SIGBUS, SIGHUP, SIGPIPE, SIGTERM})
    if (struct sigaction now {}; sigaction(signal, nullptr, &now) == 0 && now.sa_handler == SIG_DFL)
      ::signal(signal, die);
  ::signal(SIGXFSZ, SIG_IGN);  // a file-size limit is then an error of write, as a full disk is
  struct sigaction action {};  // without SA_RESTART: a read that waits for input ends
  action.sa_handler = [](int) { interrupted = true, ::signal(SIGINT, die); };
  sigaction(SIGINT, &action, nullptr);
}

// ---- a request ----------------------------------------------------------------------------------------------------

struct Request {
  std::vector<int> ids;
  size_t split = 0;
};

inline std::string read_all(std::istream& in) {
  std::string text{std::istreambuf_iterator<char>(in), {}};
  if (interrupted) throw Interrupted{};  // half a text is none
  return text;
}

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in || std::filesystem::is_directory(path)) throw Error(1, path, "cannot be read", "check the path");
  return read_all(in);
}

// The text the user gave, byte for byte.
inline std::string read_text(const Options& o) {
  std::string text, from = "-p";
  if (o.from_stdin) {
    text = read_all(std::cin), from = "standard input";
  } else if (!o.file.empty()) {
    text = read_file(o.file), from = o.file;
  } else if (o.has_prompt) {
    text = o.prompt;
  } else {
    throw Error(2, "text", "none given", "use -p TEXT, -f FILE, or - for standard input");
  }
  if (const size_t bad = first_invalid_utf8(text); bad != std::string::npos)
    throw Error(1, from, "not UTF-8 at byte " + std::to_string(bad), "convert it to UTF-8");
  return text;
}

inline std::vector<int> plain_ids(const Model& model, const std::string& text) {
  std::vector<int> ids;
  if (model.config.bos >= 0) ids.push_back(model.config.bos);
  const std::vector<int> more = model.tokenizer->encode(text, false);
  ids.insert(ids.end(), more.begin(), more.end());
  return ids;
}

inline const ChatTemplate& chat_template(const Model& model) {
  if (!model.chat)
    throw Error(2, "--chat", "this model's chat template is none that is known", "leave it out: plain text works");
  return *model.chat;
}

// Text to ids, and where the prompt ends: in a chat before the assistant header, in plain text before the last token.
inline Request make_request(const Options& o, const Model& model) {
  const std::string text = read_text(o);
  if (text.empty()) throw Error(2, "prompt", "it is empty", "give some text");
  Request r;
  if (o.chat) {
    const ChatTemplate& chat = chat_template(model);
    r.ids = chat.first(o.system, text, o.date);
    r.split = r.ids.size();
    const std::vector<int> header = chat.answer(o.answer_prefix);
    r.ids.insert(r.ids.end(), header.begin(), header.end());
  } else {
    if (o.system || o.date || !o.answer_prefix.empty())
      throw Error(2,
                  o.system ? "--system"
                  : o.date ? "--date"
                           : "--answer-prefix",
                  "has no meaning for plain text", "add --chat");
    r.ids = plain_ids(model, text);
    r.split = r.ids.size() - 1;
  }
  if (o.split && size_t(*o.split) >= r.ids.size())
    throw Error(2, "--split " + std::to_string(*o.split), "the prompt has " + std::to_string(r.ids.size()) + " tokens",
                "use 0 to " + std::to_string(r.ids.size() - 1));
  return r;
}

inline size_t split_under(const Policy& p, const Options& o, const Request& r) {
  if (o.split) return size_t(*o.split);
  return p.tail_is_one_token() ? r.ids.size() - 1 : r.split;
}

inline void note(const std::string& text) { std::cerr << "speed: note: " << text << "\n"; }

inline void note_if_not_adapted(const std::vector<Policy>& policies, const Config& c) {
  std::string list;
  for (const Policy& p : policies)
    if (!adapted(p, c)) list += (list.empty() ? "" : ", ") + describe(p);
  if (!list.empty()) note("these weights were not trained for " + list + "; expect worse answers than at full depth");
}

// The model named by -m, else by the environment (run.sh does so), else the one that comes with the program.
inline std::string model_path(const Options& o) {
  if (!o.model.empty()) return o.model;
  if (const char* path = std::getenv("SPEED_MODEL"); path && *path) return path;
  const auto bundled = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "models" / "small.safetensors";
  if (!std::filesystem::exists(bundled))
    throw Error(2, "-m", "no model given, and none is bundled with this program", "add -m FILE");
  return bundled.string();
}

inline Model load(const Options& o) { return Model(model_path(o)); }

// Context in tokens for a request of N and n new ones.
inline size_t context_for(const Options& o, const Config& c, size_t N, size_t n) {
  if (o.context && size_t(o.context) < N)
    throw Error(2, "-c " + std::to_string(o.context), "the prompt has " + std::to_string(N) + " tokens",
                "use a larger -c or a shorter prompt");
  const size_t need = o.context ? size_t(o.context) : N + n;
  if (need > size_t(c.context)) {
    if (!o.context)
      throw Error(2, "context",
                  std::to_string(N) + " prompt tokens and " + std::to_string(n) + " new ones exceed the model's " +
                      std::to_string(c.context),
                  "shorten them, or force it with -c " + std::to_string(need));
    note("-c " + std::to_string(need) + " is longer than the " + std::to_string(c.context) +
         " tokens the model was made for");
  }
  return need;
}

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
      id = sampler(engine.decode(id), c.shape.vocab);
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

template <class B>
Engine<B> make_engine(const Model& model, const Policy& p, size_t context, size_t decode, const Options& o,
                      B& backend) {
  return Engine<B>(model, p, {context, decode, size_t(o.chunk)}, backend);
}

// One line before a run: what runs how, and the memory it takes.
template <class B>
void print_banner(const Model& model, const Engine<B>& engine) {
  const Cost cost{model.config.shape, engine.policy()};
  std::cerr << model.config.shape.name << ": " << describe(engine.policy()) << ", " << B::name << ", "
            << omp_get_max_threads() << " threads; memory: " << bytes_text(double(cost.weight_bytes(sizeof(bf16))))
            << " of weights, " << bytes_text(double(engine.bytes_needed())) << " for this run, of it "
            << bytes_text(double(engine.kv_bytes_allocated())) << " KV cache\n";
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
  std::vector<Policy> policies = {full_depth(c.shape.n_layers)};
  if (o.compare->empty()) {
    policies.push_back(make_policy(o, c));
  } else {
    std::istringstream list(*o.compare);
    for (std::string spec; std::getline(list, spec, ',');)
      if (spec != "full") policies.push_back(make_policy(variant(o, spec), c));
  }
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

inline std::string processor() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

// ---- modes --------------------------------------------------------------------------------------------------------

inline int run_generate(const Options& o, json& record) {
  Model model = load(o);
  const Config& c = model.config;
  model.need_weights();
  Cpu backend(o.threads);
  const Policy policy = make_policy(o, c);
  const Request r = make_request(o, model);
  if (o.compare) return compare(o, model, r, backend, record);
  const size_t N = r.ids.size(), context = context_for(o, c, N, size_t(o.n)), split = split_under(policy, o, r);
  const size_t n = std::min(size_t(o.n), context - N + 1);
  note_if_not_adapted({policy}, c);
  Engine<Cpu> engine = make_engine(model, policy, context, std::min(context, N - split + n), o, backend);
  print_banner(model, engine);
  const Answer a = generate(engine, model, r, split, n, o, [](const std::string& s) { std::cout << s << std::flush; });
  std::cout << std::endl;
  print_summary(policy, r, split, a);
  record["result"] = answer_record(policy, N, split, a);
  record["prompt_ids"] = r.ids;
  record["new_ids"] = a.ids;
  return a.interrupted ? 130 : 0;
}

// ---- chat ---------------------------------------------------------------------------------------------------------

// A conversation. The caches stay between turns; what was said is also kept as ids, so that another K can take it over.
class Conversation {
 public:
  Conversation(const Options& o, const Model& model)
      : o_(o), model_(model), chat_(chat_template(model)), backend_(o.threads), policy_(make_policy(o, model.config)) {
    context_ = context_for(o, model.config, 0, std::min<size_t>(4096, size_t(model.config.context)));
    note_if_not_adapted({policy_}, model.config);
    restart();
  }

  // Reads turns until the input ends, or Ctrl-C ends it. Returns what each turn took in and drew.
  json run() {
    const bool terminal = ::isatty(0) && ::isatty(2);
    print_banner(model_, *engine_);
    if (terminal) std::cerr << context_ << " tokens of context; " << commands << "\n";
    for (std::string line; !interrupted;) {
      if (terminal) std::cerr << "> " << std::flush;
      if (!std::getline(std::cin, line)) break;
      try {
        if (line == "/quit") break;
        if (!line.empty() && line[0] == '/') command(line);
        else if (!line.empty()) turn(line);
      } catch (const Error& e) {  // what this turn asked for cannot be; the conversation goes on
        if (e.code != 2) throw;
        std::cerr << "speed: " << e.what() << "\n";
      }
    }
    if (terminal) std::cerr << "\n";
    return turns_;
  }

 private:
  static constexpr const char* commands = "/k N, /bos on|off, /reset, /quit";

  void turn(const std::string& text) {
    if (const size_t bad = first_invalid_utf8(text); bad != std::string::npos)
      throw Error(2, "this line", "not UTF-8 at byte " + std::to_string(bad), "say it again; nothing was taken in");
    Request r{said_, 0};
    const std::vector<int> user = started_ ? chat_.next(text) : chat_.first(o_.system, text, o_.date);
    r.ids.insert(r.ids.end(), user.begin(), user.end());
    r.split = r.ids.size();
    const std::vector<int> header = chat_.answer("");
    r.ids.insert(r.ids.end(), header.begin(), header.end());
    const size_t used = engine_->position();
    if (used + r.ids.size() >= context_)
      throw Error(2, "context",
                  "this turn needs " + std::to_string(r.ids.size() + 1) + " tokens or more, " +
                      std::to_string(context_ - used) + " of " + std::to_string(context_) + " are left",
                  "say it shorter, /reset, or start again with a larger -c");
    engine_->end_turn(o_.keep_answers);
    const size_t split = policy_.tail_is_one_token() ? r.ids.size() - 1 : r.split;
    const size_t room = context_ - used - r.ids.size() + 1;
    const Answer a = generate(*engine_, model_, r, split, std::min<size_t>(size_t(o_.n), room), o_,
                              [](const std::string& s) { std::cout << s << std::flush; });
    std::cout << std::endl;
    turns_.push_back(answer_record(policy_, r.ids.size(), split, a));
    turns_.back()["prompt_ids"] = r.ids;
    turns_.back()["new_ids"] = a.ids;
    if (a.interrupted) return;
    started_ = true;
    history_.insert(history_.end(), r.ids.begin(), r.ids.end());
    history_.insert(history_.end(), a.ids.begin(), a.ids.begin() + long(a.fed));
    // The last token drawn was not fed back. A stop token is the template's to write; any other is still to be taken
    // in.
    said_.clear();
    const auto& stops = model_.config.eos;
    if (std::find(stops.begin(), stops.end(), a.ids.back()) == stops.end()) said_ = {a.ids.back()};
    if (a.ids.size() == room)
      note("the context of " + std::to_string(context_) + " tokens is full; /reset starts anew");
    if (::isatty(2)) print_summary(policy_, r, split, a);
  }

  void command(const std::string& line) {
    std::istringstream in(line);
    std::string word, value, more;
    in >> word >> value >> more;
    Options changed = o_;
    int k = 0;
    if (word == "/reset" && value.empty()) {
      history_.clear(), said_.clear();
      started_ = false;
      return restart();
    } else if (word == "/k" && more.empty() &&
               std::from_chars(value.data(), value.data() + value.size(), k).ptr == value.data() + value.size() &&
               k > 0) {
      changed.k = k;
    } else if (word == "/bos" && more.empty() && (value == "on" || value == "off")) {
      changed.bos = value == "on";
    } else {
      throw Error(2, line, "no such command", "use " + std::string(commands));
    }
    policy_ = make_policy(changed, model_.config);
    o_ = changed;
    std::cerr << describe(policy_) << "\n";
    said_.insert(said_.begin(), history_.begin(),
                 history_.end());  // taken in again with the next turn, under the new policy
    history_.clear();
    restart();
  }

  // Under SPEED an upper layer holds one turn's answer, or with --keep-answers all of them.
  void restart() {
    engine_.reset();
    const size_t decode =
        o_.keep_answers ? context_ : std::min<size_t>(context_, chat_.answer("").size() + size_t(o_.n));
    engine_ = std::make_unique<Engine<Cpu>>(model_, policy_, Limits{context_, decode, size_t(o_.chunk)}, backend_);
  }

  Options o_;
  const Model& model_;
  const ChatTemplate& chat_;
  Cpu backend_;
  Policy policy_;
  size_t context_ = 0;
  std::unique_ptr<Engine<Cpu>> engine_;
  bool started_ = false;
  std::vector<int> history_;  // ids in the caches
  std::vector<int> said_;     // ids that belong to the conversation but are not in the caches yet
  json turns_ = json::array();
};

inline int run_chat(const Options& o, json& record) {
  const Model model = load(o);
  model.need_weights();
  record["turns"] = Conversation(o, model).run();
  return 0;
}

inline int run_logits(const Options& o, json& record) {
  if (o.out.empty()) throw Error(2, "--out", "where do the logits go?", "add --out x.npy");
  const int sources =
      int(!o.tokens.empty()) + int(!o.tokens_file.empty()) + int(o.has_prompt || !o.file.empty() || o.from_stdin);
  if (sources != 1)
    throw Error(2, "tokens", sources ? "given in more than one way" : "none given",
                "use one of --tokens, --tokens-file, -p, -f");
  Model model = load(o);
  const Config& c = model.config;
  model.need_weights();
  std::vector<int> ids;
  if (!o.tokens.empty()) {
    ids = read_ids(o.tokens, "--tokens");
  } else if (!o.tokens_file.empty()) {
    ids = read_ids(read_file(o.tokens_file), "--tokens-file");
  } else {
    ids = make_request(o, model).ids;
  }
  const size_t N = ids.size();
  if (N < 2)
    throw Error(2, "tokens", std::to_string(N) + " given", "logits takes 2 or more: a prompt and what follows it");
  const size_t S = o.split ? size_t(*o.split) : N - 1;
  if (S < 1 || S > N - 1)
    throw Error(2, "--split " + std::to_string(S), "there are " + std::to_string(N) + " tokens",
                "use 1 to " + std::to_string(N - 1));
  if (N > size_t(c.context))
    note(std::to_string(N) + " tokens are more than the " + std::to_string(c.context) + " the model was made for");
  const Policy policy = make_policy(o, c);
  note_if_not_adapted({policy}, c);
  Cpu backend(o.threads);
  Engine<Cpu> engine = make_engine(model, policy, N, N - S, o, backend);
  Progress progress("logits");
  engine.on_layer = [&](int l, size_t first, size_t rows, const float*) {
    progress.update((double(first) + double(rows) * (l + 1) / c.shape.n_layers) / double(N));
    if (interrupted) throw Interrupted{};
  };
  NpyWriter out(o.out, N - S, size_t(c.shape.vocab));
  engine.prefill(
      ids, S, [&](size_t, const float* l) { out.row(l); }, true);
  out.finish();
  record["result"] = {{"policy", describe(policy)}, {"tokens", N}, {"split", S}, {"flops", engine.counted().flops}};
  return 0;
}

inline int run_tokenize(const Options& o, json&) {
  Model model = load(o);
  const Tokenizer& t = *model.tokenizer;
  const std::string text = read_text(o);
  if (o.decode) {
    for (int id : read_ids(text, "--decode")) {
      if (id >= model.config.shape.vocab)
        throw Error(2, "token " + std::to_string(id),
                    "outside a vocabulary of " + std::to_string(model.config.shape.vocab), "use ids of this model");
      std::cout << t.decode(id);
    }
    return 0;
  }
  const char* space = "";
  for (int id : t.encode(text, o.special)) {
    std::cout << space << id;
    space = " ";
  }
  std::cout << "\n";
  return 0;
}

inline int run_info(const Options& o, json&) {
  Model model = load(o);
  const Config& c = model.config;
  const Shape& s = c.shape;
  Table table({{"what", "what"}, {"value", "value"}});
  auto line = [&](const std::string& what, const json& value, const std::string& text = "") {
    table.row({what, text.empty() ? Table::Cell(value) : Table::Cell(value, text)});
  };
  line("name", s.name);
  line("file", model.path());
  line("file bytes", model.file_bytes(), bytes_text(double(model.file_bytes())));
  line("vocabulary", s.vocab);
  line("BoS id", c.bos >= 0 ? json(c.bos) : json(), c.bos >= 0 ? std::to_string(c.bos) : "none");
  line("stop ids", c.eos);
  line("chat template", model.chat ? json(model.chat->name()) : json(),
       model.chat ? model.chat->name() : "none that is known");
  if (!c.tokenizer_only) {
    line("parameters", model.parameters, fixed(double(model.parameters) / 1e6, 2) + " M");
    line("layers", s.n_layers);
    line("hidden", s.hidden);
    line("query heads", s.n_heads);
    line("key/value heads", s.n_kv_heads);
    line("head size", s.head_dim);
    line("MLP", s.mlp);
    line("tied head", s.tied, s.tied ? "yes" : "no");
    line("context", c.context, std::to_string(c.context) + " tokens");
    line("RoPE theta", c.rope_theta, fixed(c.rope_theta, 0));
    line("RoPE scaling", c.rope_scaling ? json(c.rope_scaling->factor) : json(),
         c.rope_scaling ? "llama3, factor " + fixed(c.rope_scaling->factor, 0) + " past " +
                              std::to_string(c.rope_scaling->original_context) + " tokens"
         : model.weights.rope_divisors ? "divisors in the file"
                                       : "none");
    std::string trained;
    for (auto& a : c.adapted)
      trained += (trained.empty() ? "" : ", ") + std::string(name(a.method)) +
                 (a.k ? " K=" + std::to_string(a.k) : " at any K") + (a.bos ? "" : " no BoS");
    line("trained for", trained.empty() ? "full" : trained);
    if (c.swiftkv_k)
      line("SwiftKV", c.swiftkv_k,
           "from layer " + std::to_string(c.swiftkv_k) + ", " + std::to_string(c.swiftkv_group) + " layers a cache" +
               (c.original_projections ? "" : ", ordinary projections left out"));
    const Policy full = full_depth(s.n_layers);
    line("KV cache a token", Cost{s, full}.kv_bytes(1, 0, sizeof(Cpu::CacheValue)),
         bytes_text(double(Cost{s, full}.kv_bytes(1, 0, sizeof(Cpu::CacheValue)))));
  }
  table.print(std::cout, o.format);
  return 0;
}

inline int run_plan(const Options& o, json& record) {
  if (o.model.empty() == o.shape.empty())
    throw Error(2, "-m, --shape", o.model.empty() ? "neither given" : "both given", "use one of them");
  Config config;
  if (o.model.empty()) {
    for (auto& s : known_shapes())
      if (s.name == o.shape) config.shape = s;
  } else {
    Model model(o.model);
    model.need_weights();
    config = model.config;
  }
  if (o.tail > o.ctx || (o.tail == o.ctx && o.ctx > 1))
    throw Error(2, "--tail " + std::to_string(o.tail), "the prompt has " + std::to_string(o.ctx) + " tokens",
                "use a smaller --tail");
  const Shape& s = config.shape;
  const Policy asked = make_policy(o, config, !o.model.empty());
  std::vector<Policy> policies = {full_depth(s.n_layers)};
  if (asked.method != Method::full) policies.push_back(asked);
  Table table({{"policy", ""},
               {"k", ""},
               {"bos", ""},
               {"name", "policy"},
               {"prompt", ""},
               {"tail", ""},
               {"new", ""},
               {"prefill_flops", "prefill"},
               {"decode_flops", "one step"},
               {"kv_bytes", "KV cache"},
               {"decode_read_bytes", "read a step"},
               {"weight_bytes", "of it weights"}});
  const uint64_t N = o.ctx, T = o.tail, G = o.new_tokens;
  for (const Policy& p : policies) {
    const Cost cost{s, p};
    const uint64_t prefill = cost.prefill_flops(N, T), step = cost.decode_flops(N, T),
                   kv = cost.kv_bytes(N - T, T + G, o.kv_bytes),
                   read = cost.decode_read_bytes(N, T, o.kv_bytes, o.weight_bytes),
                   weights = cost.weight_bytes(o.weight_bytes);
    table.row({name(p.method),
               p.k,
               p.method == Method::speed ? json(p.bos) : json(),
               describe(p),
               N,
               T,
               G,
               {prefill, flops_text(double(prefill))},
               {step, flops_text(double(step))},
               {kv, bytes_text(double(kv))},
               {read, bytes_text(double(read))},
               {weights, bytes_text(double(weights))}});
  }
  if (o.format == "text")
    std::cout << s.name << ": " << N << " prompt tokens, the last " << T << " decode-phase, and " << G
              << " new; weights of " << o.weight_bytes << " bytes, cache of " << o.kv_bytes << "\n\n";
  table.print(std::cout, o.format);
  if (o.format == "text" && policies.size() > 1) {
    const Cost full{s, policies[0]}, cost{s, policies[1]};
    auto less = [](uint64_t a, uint64_t b) { return fixed(100 * (1 - double(b) / double(a)), 1) + " %"; };
    std::cout << "\nsaved: " << less(full.prefill_flops(N, T), cost.prefill_flops(N, T)) << " of the prefill, "
              << less(full.kv_bytes(N - T, T + G, 2), cost.kv_bytes(N - T, T + G, 2)) << " of the cache, "
              << less(full.decode_read_bytes(N, T, o.kv_bytes, o.weight_bytes),
                      cost.decode_read_bytes(N, T, o.kv_bytes, o.weight_bytes))
              << " of what a step reads\n";
  }
  record["results"] = table.rows_as_json();
  return 0;
}

inline int run_bench(const Options& o, json& record) {
  if (!o.model.empty() && !o.shape.empty()) throw Error(2, "-m, --shape", "both given", "use one of them");
  std::optional<Model> model;
  if (o.shape.empty()) {
    model.emplace(model_path(o));
  } else {
    for (auto& s : known_shapes())
      if (s.name == o.shape) model.emplace(s);
  }
  model->need_weights();
  Cpu backend(o.threads);
  const Config& c = model->config;
  std::vector<BenchTest> tests;
  const auto prompts = read_numbers(o.prompts, "-p"), depths = read_numbers(o.depths, "--depth");
  for (const Policy& p : bench_policies(o, c, o.shape.empty())) {
    for (int n : prompts) tests.push_back({p, size_t(n), 0, 0, {}, {}});
    if (o.n > 0)
      for (int depth : depths) tests.push_back({p, 0, size_t(o.n), size_t(depth), {}, {}});
  }
  for (const BenchTest& t : tests)
    if (t.prompt + t.depth + t.gen > size_t(c.context))
      throw Error(2, "bench",
                  "a test of " + std::to_string(t.prompt + t.depth + t.gen) + " tokens exceeds the model's " +
                      std::to_string(c.context),
                  "shorten it");
  Ceilings ceilings = measure_ceilings();
  Progress progress("bench");
  for (int round = -1; round < o.repetitions; ++round)  // round -1 is not counted: it brings the weights into memory
    for (size_t i = 0; i < tests.size(); ++i) {
      if (interrupted) throw Interrupted{};
      run_bench_test(tests[i], *model, size_t(o.chunk), backend);
      if (round < 0) tests[i].seconds.clear();
      progress.update((double(round + 1) + double(i + 1) / double(tests.size())) / (o.repetitions + 1));
    }
  progress.clear();
  // Again, because a shared machine changes: a ceiling is the best seen.
  const Ceilings after = measure_ceilings();
  ceilings = {std::max(ceilings.gflops, after.gflops), std::max(ceilings.gbps, after.gbps)};
  const Table table = bench_table(tests, ceilings, SPEED_COMMIT);
  if (o.format == "json") {
    std::cout << table.rows_as_json().dump(2) << "\n";
  } else {
    if (o.format == "text")
      std::cout << c.shape.name << ", " << omp_get_max_threads() << " threads of " << processor() << ", OpenBLAS "
                << openblas_get_corename() << "\nceilings here: " << fixed(ceilings.gflops, 0)
                << " GFLOP/s fp32 products, " << fixed(ceilings.gbps, 1) << " GB/s read; each test " << o.repetitions
                << " times, in turn\n\n";
    table.print(std::cout, o.format);
  }
  record["results"] = table.rows_as_json();
  return 0;
}

// The hidden states as each layer left them. A row that the policy stopped keeps the state it was stopped with.
inline void write_hidden_states(const std::string& path, const std::vector<std::vector<float>>& states, size_t rows,
                                size_t d) {
  json header;
  uint64_t at = 0;
  for (size_t l = 0; l < states.size(); ++l) {
    const uint64_t bytes = rows * d * sizeof(float);
    header["layer." + std::to_string(l)] = {{"dtype", "F32"}, {"shape", {rows, d}}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  std::string text = header.dump();
  text.resize((8 + text.size() + 63) / 64 * 64 - 8, ' ');
  OutputFile out(path);
  const uint64_t length = text.size();
  out.write(&length, 8);
  out.write(text);
  for (auto& s : states) out.write(s.data(), s.size() * sizeof(float));
  out.finish();
}

inline int run_trace(const Options& o, json& record) {
  Model model = load(o);
  const Config& c = model.config;
  const Shape& s = c.shape;
  model.need_weights();
  Cpu backend(o.threads);
  const Policy policy = make_policy(o, c);
  const Request r = make_request(o, model);
  const size_t N = r.ids.size(), split = split_under(policy, o, r), T = N - split;
  note_if_not_adapted({policy}, c);
  Engine<Cpu> engine = make_engine(model, policy, N, T, o, backend);
  std::vector<std::vector<float>> states(o.dump.empty() ? 0 : s.n_layers);
  engine.on_layer = [&](int l, size_t, size_t rows, const float* x) {
    if (!o.dump.empty()) states[l].insert(states[l].end(), x, x + rows * s.hidden);
    if (interrupted) throw Interrupted{};
  };
  engine.prefill(r.ids, split, [](size_t, const float*) {});
  const Cost cost{s, policy};
  Table table({{"layer", "layer"},
               {"prompt_rows", "prompt"},
               {"kv_rows", "K,V"},
               {"tail_rows", "tail"},
               {"cache", "reads"},
               {"slots", "slots"},
               {"flops", "counted"},
               {"predicted_flops", "predicted"},
               {"kv_bytes", "cache"},
               {"seconds", "time"}});
  auto add = [&](const json& layer, const LayerStats& l, const json& cache, const json& slots, uint64_t predicted,
                 uint64_t kv) {
    auto rows = [&](uint64_t n) { return layer.is_string() ? Table::Cell(nullptr) : Table::Cell(n); };
    table.row({layer,
               rows(l.prompt_rows),
               rows(l.kv_rows),
               rows(l.tail_rows),
               cache,
               slots,
               {l.counted.flops, flops_text(double(l.counted.flops))},
               {predicted, l.counted.flops == predicted ? "=" : flops_text(double(predicted))},
               {kv, bytes_text(double(kv))},
               {l.seconds, seconds_text(l.seconds)}});
  };
  LayerStats all;
  for (int l = 0; l < s.n_layers; ++l) {
    const LayerStats& layer = engine.layers()[l];
    const uint64_t kv = policy.has_cache(l) ? engine.cache(l).used * cost.slot_bytes(sizeof(Cpu::CacheValue)) : 0;
    add(l, layer, policy.cache_of(l), engine.cache(l).used, cost.prefill_layer_flops(l, N, T), kv);
    all.counted += layer.counted;
    all.seconds += layer.seconds;
  }
  add("head", engine.head_stats(), nullptr, nullptr, cost.head_flops(), 0);
  all.counted += engine.head_stats().counted;
  all.seconds += engine.head_stats().seconds;
  add("all", all, nullptr, nullptr, cost.prefill_flops(N, T), kv_bytes_used(engine, s));
  if (o.format == "text")
    std::cout << describe(policy) << ": " << N << " tokens, " << split << " prompt and " << T << " decode-phase\n"
              << "prompt: rows that pass the layer; K,V: rows that leave keys and values there\n"
              << "reads: whose cache, of so many slots; predicted: = where the count agrees\n\n";
  table.print(std::cout, o.format);
  if (!o.dump.empty()) write_hidden_states(o.dump, states, N, size_t(s.hidden));
  record["result"] = table.rows_as_json();
  return 0;
}

// ---- main ---------------------------------------------------------------------------------------------------------

inline void write_record(const Options& o, int argc, char** argv, json record) {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  json line = json::array();
  for (int i = 0; i < argc; ++i) line.push_back(argv[i]);
  record["program"] = version;
  record["command"] = line;
  record["mode"] = o.mode;
  record["device"] = {{"kind", "cpu"},
                      {"name", processor()},
                      {"threads", omp_get_max_threads()},
                      {"openblas", openblas_get_config()},
                      {"openblas_core", openblas_get_corename()},
                      {"compiler", __VERSION__}};
  record["seed"] = o.seed;
  record["peak_bytes"] = uint64_t(usage.ru_maxrss) * 1024;
  OutputFile out(o.record);
  out.write(record.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
  out.finish();
}

// Libraries that read their settings when they are loaded can only be told by starting again, once.
// OpenBLAS: Debian's is older than many processors and may take kernels for a lesser one; one thread, because OpenMP
// makes the threads here. OpenMP: a thread that waits for the next loop spins for some microseconds, then sleeps; the
// default, milliseconds, is a hundred times slower as soon as another program wants the core.
inline void set_up_libraries(char** argv) {
  if (std::getenv("OPENBLAS_NUM_THREADS")) return;
  setenv("OPENBLAS_NUM_THREADS", "1", 1);
  setenv("GOMP_SPINCOUNT", "1000", 0);
  const std::string core = openblas_get_corename();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      (core == "Haswell" || core == "Zen"))
    setenv("OPENBLAS_CORETYPE", "SkylakeX", 0);
  execv("/proc/self/exe", argv);
}

inline int run(int argc, char** argv) {
  const std::optional<Options> options = read_options(argc, argv, version);
  if (!options) return 0;
  const Options& o = *options;
  json record;
  int code = 0;
  if (o.mode == "generate") code = run_generate(o, record);
  if (o.mode == "chat") code = run_chat(o, record);
  if (o.mode == "logits") code = run_logits(o, record);
  if (o.mode == "tokenize") code = run_tokenize(o, record);
  if (o.mode == "info") code = run_info(o, record);
  if (o.mode == "plan") code = run_plan(o, record);
  if (o.mode == "bench") code = run_bench(o, record);
  if (o.mode == "trace") code = run_trace(o, record);
  if (!o.record.empty()) write_record(o, argc, argv, record);
  return code;
}

}  // namespace speed

int main(int argc, char** argv) {
  speed::set_up_libraries(argv);
  speed::watch_signals();
  std::cout.exceptions(std::ios::badbit | std::ios::failbit);
  auto failed = [](const std::string& why, int code) {
    std::cout.exceptions(std::ios::goodbit);  // for std::cerr flushes it
    std::cerr << "speed: " << why << "\n";
    return code;
  };
  try {
    const int code = speed::run(argc, argv);
    std::cout.flush();
    return code;
  } catch (const speed::Error& e) {
    return failed(e.what(), e.code);
  } catch (const speed::Interrupted&) {
    return 130;
  } catch (const std::ios::failure&) {
    return failed(std::string("standard output: cannot be written: ") + std::strerror(errno) + "; check where it goes",
                  1);
  } catch (const std::bad_alloc&) {
    return failed("memory: there is not enough; use a smaller -c, -n or --chunk", 1);
  }
}
