// options.h - the command line: which flags each mode takes, and one clear line for each way to get them wrong.
#pragma once

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <iostream>
#include <iterator>

#include "model.h"

namespace speed {

struct Options {
  std::string mode;
  // what to run on
  std::string model, prompt, file, tokens, tokens_file, shape;
  bool has_prompt = false, from_stdin = false;
  // how much
  int n = 128, context = 0, chunk = 0, threads = 0;
  // chat
  bool chat = false, keep_answers = false;
  std::optional<std::string> system, date;
  std::string answer_prefix;
  std::vector<std::string> stop;
  // policy
  std::optional<std::string> policy;
  std::optional<int> k, split, every, group;
  std::optional<bool> bos;
  std::optional<std::string> keep;
  std::optional<std::string> compare;  // "" compares with the policy flags, else a list
  // sampling
  float temperature = 0, top_p = 1, min_p = 0;
  int top_k = 0;
  uint64_t seed = 0;
  // plan
  int ctx = 1024, tail = 1, new_tokens = 128, kv_bytes = 2, weight_bytes = 2;
  // bench
  std::string prompts = "512", depths = "0", ks;
  int repetitions = 5;
  // perplexity
  std::optional<int> prompt_tokens, answer_tokens;
  // output
  std::string format = "text", record, out, dump, device = "auto";
  bool json = false, special = false, decode = false;
};

struct Mode {
  const char* name;
  const char* does;
};

inline const std::vector<Mode>& modes() {
  static const std::vector<Mode> all = {
      {"generate", "complete a text, or with --chat answer a question"},
      {"chat", "hold a conversation"},
      {"logits", "write the logits of given tokens to a NumPy file"},
      {"perplexity", "how well a text is predicted under a policy, beside full depth"},
      {"trace", "show one prompt layer by layer: rows, slots, FLOPs, bytes, time"},
      {"bench", "time prompts and generation beside this machine's ceilings"},
      {"plan", "predict FLOPs and bytes by formula, with no weights at hand"},
      {"tokenize", "text to token ids, or back with --decode"},
      {"info", "show what is in a model file"},
  };
  return all;
}

// ---- checks on single values --------------------------------------------------------------------------------------

inline CLI::Validator whole_number(int64_t least, int64_t most) {
  return CLI::Validator(
      [=](std::string& s) -> std::string {
        int64_t v = 0;
        const char* end = s.data() + s.size();
        auto [p, e] = std::from_chars(s.data(), end, v);
        if (e == std::errc() && p == end && v >= least && v <= most) return "";
        return "expected a whole number from " + std::to_string(least) + " to " + std::to_string(most) + ", got " + s;
      },
      "", "");
}

inline CLI::Validator real_number(double least, double most) {
  return CLI::Validator(
      [=](std::string& s) -> std::string {
        char* end = nullptr;
        const double v = std::strtod(s.c_str(), &end);
        if (!s.empty() && *end == 0 && v >= least && v <= most) return "";
        std::ostringstream range;
        range << "expected a number from " << least << " to " << most << ", got " << s;
        return range.str();
      },
      "", "");
}

inline CLI::Validator one_of(const std::vector<std::string>& words) {
  std::string list;
  for (auto& w : words) list += (list.empty() ? "" : "|") + w;
  return CLI::Validator(
      [=](std::string& s) -> std::string {
        if (std::find(words.begin(), words.end(), s) != words.end()) return "";
        return "expected " + list + ", got " + s;
      },
      "", "");
}

// Letters to insert, delete or replace to get from a to b (Levenshtein).
inline size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

inline std::string nearest(const std::string& word, const std::vector<std::string>& candidates) {
  std::string best;
  for (auto& c : candidates)
    if (best.empty() || edit_distance(word, c) < edit_distance(word, best)) best = c;
  return best;
}

// ---- flags of each mode -------------------------------------------------------------------------------------------

// One screen a mode: flags in groups, each with one line of help.
inline void add_flags(CLI::App& app, Options& o) {
  auto in = [&](std::initializer_list<const char*> names) {
    return std::any_of(names.begin(), names.end(), [&](const char* n) { return o.mode == n; });
  };
  const bool runs = in({"generate", "chat", "logits", "perplexity", "trace", "bench"}),
             writes = in({"generate", "chat"});
  std::string group;
  auto option = [&](const char* flags, auto& value, const char* type, const char* help) {
    return app.add_option(flags, value, help)->type_name(type)->group(group)->take_last();
  };
  auto flag = [&](const char* flags, bool& value, const char* help) { app.add_flag(flags, value, help)->group(group); };

  group = "Input";
  if (runs || in({"tokenize", "info", "plan"}))
    option("-m,--model", o.model, "FILE", "model (default: $SPEED_MODEL, or the bundled one)");
  if (in({"generate", "logits", "perplexity", "trace", "tokenize"})) {
    option("-p,--prompt", o.prompt, "TEXT", "text");
    option("-f,--file", o.file, "FILE", "text from a file; a lone - reads standard input");
  }
  if (in({"logits", "perplexity"})) {
    option("--tokens", o.tokens, "IDS", "token ids, as 1,2,3; nothing is added");
    option("--tokens-file", o.tokens_file, "FILE", "token ids from a file");
  }
  if (in({"perplexity"})) {
    option("--prompt-tokens", o.prompt_tokens, "N",
           "the text is cut into pieces of N prompt tokens, BoS\nincluded (256),")
        ->check(whole_number(2, 1 << 20));
    option("--answer-tokens", o.answer_tokens, "M", "and M that are scored (256); of ids: the last M")
        ->check(whole_number(1, 1 << 20));
  }
  if (in({"logits"})) {
    option("--out", o.out, "FILE", "NumPy file to write: float32 [N - split, vocab]");
  }
  if (in({"tokenize"})) {
    flag("--special", o.special, "read spellings of special tokens as these tokens");
    flag("--decode", o.decode, "token ids to text");
  }
  if (in({"generate", "trace"})) flag("--chat", o.chat, "wrap the text as a user turn of the chat template");
  if (in({"generate", "chat", "trace"})) {
    option("--system", o.system, "TEXT", "system text of the chat");
    option("--date", o.date, "TEXT", "date, for templates that show one");
  }
  if (in({"generate", "trace"})) option("--answer-prefix", o.answer_prefix, "TEXT", "begin the answer with this");
  if (in({"plan", "bench"})) {
    std::vector<std::string> names;
    for (auto& s : known_shapes()) names.push_back(s.name);
    option("--shape", o.shape, "NAME", "llama-3.2-1b, llama-3.2-3b, llama-3.1-8b or -70b")->check(one_of(names));
  }
  if (in({"bench"})) {
    o.n = 64;
    option("-p,--prompt", o.prompts, "LIST", "prompt lengths in tokens (512)");
    option("-n,--n-gen", o.n, "N", "steps to generate (64; 0: none)")->check(whole_number(0, 1 << 20));
    option("--depth", o.depths, "LIST", "tokens already in the cache before these (0)");
    option("-r,--repetitions", o.repetitions, "N", "how often, after one time uncounted (5)")
        ->check(whole_number(1, 1000));
  }
  if (in({"plan"})) {
    option("--ctx", o.ctx, "N", "prompt tokens (1024)")->check(whole_number(1, 1 << 20));
    option("--tail", o.tail, "N", "of them, at the end, decode-phase (1)")->check(whole_number(1, 1 << 20));
    option("-n,--new", o.new_tokens, "N", "tokens generated (128)")->check(whole_number(0, 1 << 20));
    option("--group", o.group, "N", "swiftkv: layers per cache (1, or the model's)")->check(whole_number(1, 4096));
    option("--kv-bytes", o.kv_bytes, "2|4", "bytes per cached value (2)")->check(one_of({"2", "4"}));
    option("--weight-bytes", o.weight_bytes, "2|4", "bytes per weight (2)")->check(one_of({"2", "4"}));
  }

  group = "Policy";
  if (in({"bench"})) {
    option("--policy", o.policy, "LIST", "policies, as full,speed (full)");
    option("--k", o.ks, "LIST", "K of those that have one, as 24,16");
    app.add_flag_function(
           "--bos,!--no-bos", [&o](int64_t count) { o.bos = count > 0; }, "speed: upper layers see the BoS anchor (on)")
        ->group(group);
    option("--every", o.every, "G", "share: every G-th layer keeps a cache")->check(whole_number(1, 4096));
  } else if (runs || in({"plan"})) {
    option("--policy", o.policy, "NAME", "full, speed, pop, swiftkv or share")
        ->check(one_of({"full", "speed", "pop", "swiftkv", "share"}));
    option("--k", o.k, "K", "prompt tokens visit layers 0..K-1 only")->check(whole_number(1, 4096));
    app.add_flag_function(
           "--bos,!--no-bos", [&o](int64_t count) { o.bos = count > 0; }, "speed: upper layers see the BoS anchor (on)")
        ->group(group);
    option("--keep", o.keep, "LIST", "share: layers that keep a cache, as 0,4,8");
    option("--every", o.every, "G", "share: every G-th layer keeps a cache")->check(whole_number(1, 4096));
    if (in({"generate", "logits", "perplexity", "trace"}))
      option("--split", o.split, "N", "the first N tokens are prompt, the rest decode-phase")
          ->check(whole_number(0, 1 << 20));
    if (in({"chat"})) flag("--keep-answers", o.keep_answers, "speed: upper layers keep earlier answers");
    if (in({"generate", "perplexity"}))
      option("--compare", o.compare, "[LIST]",
             "full depth beside the policy, or beside several:\nspeed:24,speed:24:no-bos,pop:20,share:2")
          ->expected(0, 1);
  }

  group = "Generation";
  if (writes) {
    option("-n,--n-predict", o.n, "N", "new tokens at most (128)")->check(whole_number(1, 1 << 20));
    option("-c,--ctx-size", o.context, "N",
           in({"chat"}) ? "context in tokens (4096, or the model's)" : "context in tokens (what prompt and -n need)")
        ->check(whole_number(1, 1 << 20));
    option("--stop", o.stop, "TEXT", "stop before this text; may be repeated")
        ->take_all()
        ->allow_extra_args(false)
        ->check(CLI::Validator([](std::string& s) { return s.empty() ? "expected a text, got an empty one" : ""; }, "",
                               ""));
    option("--temp", o.temperature, "X", "temperature; 0 is greedy (0)")->check(real_number(0, 100));
    option("--top-k", o.top_k, "N", "draw from the N likeliest (0: off)")->check(whole_number(0, 1 << 24));
    option("--top-p", o.top_p, "X", "draw from the fewest that reach X (1: off)")->check(real_number(0, 1));
    option("--min-p", o.min_p, "X", "draw from those X times as likely as the best (0)")->check(real_number(0, 1));
    option("-s,--seed", o.seed, "N", "seed of the draws (0)")->check(whole_number(0, INT64_MAX));
  }

  group = "Running";
  if (runs) {
    option("--device", o.device, "NAME", "auto (a GPU where one answers), cpu or cuda")
        ->check(one_of({"auto", "cpu", "cuda"}));
    option("-t,--threads", o.threads, "N", "threads (all cores); changes no bit of a result")
        ->check(whole_number(1, 1024));
    option("--chunk", o.chunk, "N", "rows that go through a layer together (512; GPU: 8192)")
        ->check(whole_number(1, 1 << 16));
  }
  if (in({"trace"})) option("--dump", o.dump, "FILE", "write the hidden states, .safetensors");
  if (in({"plan", "trace", "info", "generate", "perplexity", "bench"}))
    option("-o,--output", o.format, "NAME", "tables as text, md, csv or json")
        ->check(one_of({"text", "md", "csv", "json"}));
  if (in({"plan"})) flag("--json", o.json, "short for -o json");
  option("--record", o.record, "FILE", "write a run record: machine, flags, counts, timings");
}

// ---- the whole line -----------------------------------------------------------------------------------------------

inline std::string overview() {
  std::string s =
      "speed - run a Llama model with less work on its prompt\n\n"
      "Usage: speed [MODE] [FLAGS]\n\nModes\n";
  for (auto& m : modes()) s += "  " + std::string(m.name) + std::string(12 - std::strlen(m.name), ' ') + m.does + "\n";
  return s +
         "\nspeed MODE --help lists the flags of a mode; speed --version prints the version.\n\n"
         "Examples\n"
         "  speed --chat -p \"What is the capital of France?\"\n"
         "  speed --chat -p \"What is the capital of France?\" --k 24 --compare\n"
         "  speed trace -p \"The quick brown fox\" --k 20 --no-bos\n"
         "  speed plan --shape llama-3.1-8b --ctx 131072 --k 24\n";
}

// Reads the command line. Prints help and returns nothing where that was asked for.
inline std::optional<Options> read_options(int argc, char** argv, const std::string& version) {
  std::vector<std::string> args(argv + 1, argv + argc);
  if (args.empty()) {
    std::cerr << overview();
    throw Error(2, "no arguments", "there is nothing to do", "give a text with -p");
  }
  Options o;
  o.mode = "generate";
  std::vector<std::string> names;
  for (auto& m : modes()) names.push_back(m.name);
  if (std::find(names.begin(), names.end(), args[0]) != names.end()) {
    o.mode = args[0];
    args.erase(args.begin());
  } else if (args[0] == "--help" || args[0] == "-h") {
    std::cout << overview();
    return std::nullopt;
  } else if (args[0] == "--version") {
    std::cout << version << "\n";
    return std::nullopt;
  } else if (args[0][0] != '-') {
    throw Error(2, args[0], "is no mode", "did you mean " + nearest(args[0], names) + "? A text goes after -p");
  }

  CLI::App app;
  for (auto& m : modes())
    if (o.mode == m.name) app.description("speed " + o.mode + ": " + m.does);
  app.name("speed " + o.mode);
  app.allow_extras();
  app.get_formatter()->column_width(26);
  add_flags(app, o);

  const std::string help = "see speed " + o.mode + " --help";
  try {
    app.parse(std::vector<std::string>(args.rbegin(), args.rend()));
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    return std::nullopt;
  } catch (const CLI::ParseError& e) {
    std::string what = e.what();
    const size_t colon = what.find(": ");
    if (colon == std::string::npos) throw Error(2, "command line", what, help);
    throw Error(2, what.substr(0, colon), what.substr(colon + 2), help);
  }
  std::vector<std::string> flags;
  for (const CLI::Option* f : app.get_options()) {
    for (auto& s : f->get_snames()) flags.push_back("-" + s);
    for (auto& l : f->get_lnames()) flags.push_back("--" + l);
  }
  for (auto& rest : app.remaining()) {
    if (rest == "-") {
      o.from_stdin = true;
    } else if (rest[0] == '-') {
      throw Error(2, rest, "no such flag of speed " + o.mode, "did you mean " + nearest(rest, flags) + "?");
    } else {
      throw Error(2, rest, "a word that belongs to no flag", "put a text in quotes after -p");
    }
  }
  o.has_prompt = o.mode != "bench" && app.get_option_no_throw("--prompt") && app["--prompt"]->count() > 0;
  if (o.json) o.format = "json";
  if (int(o.has_prompt) + int(!o.file.empty()) + int(o.from_stdin) > 1)
    throw Error(2, "-p, -f, -", "more than one text", "give one of them");
#ifndef SPEED_CUDA
  if (o.device == "cuda")
    throw Error(2, "--device cuda", "this program was built for the CPU alone",
                "use --device cpu, or build it with nvcc: make");
#endif
  return o;
}

// ---- from flags to a policy ---------------------------------------------------------------------------------------

inline std::vector<int> read_ids(std::string text, const std::string& flag) {
  std::vector<int> ids;
  for (char& c : text)
    if (c == ',' || c == '\n' || c == '\t' || c == '\r') c = ' ';
  std::istringstream in(text);
  for (std::string word; in >> word;) {
    int id = 0;
    auto [p, e] = std::from_chars(word.data(), word.data() + word.size(), id);
    if (e != std::errc() || p != word.data() + word.size() || id < 0)
      throw Error(2, flag, "\"" + word + "\" is no token id or layer", "give whole numbers, split by commas or spaces");
    ids.push_back(id);
  }
  return ids;
}

// What the flags say about the policy, for a model of this configuration. `has_weights` is false for a bare shape,
// under which every policy can be planned.
inline Policy make_policy(const Options& o, const Config& c, bool has_weights = true) {
  const int L = c.shape.n_layers;
  std::optional<Method> method;
  for (Method m : {Method::full, Method::speed, Method::pop, Method::swiftkv, Method::share})
    if (o.policy && *o.policy == name(m)) method = m;

  Policy p = full_depth(L);
  std::optional<Method> trained;  // the one method the weights were trained for
  for (auto& a : c.adapted) trained = a.method == c.adapted[0].method ? std::optional(a.method) : std::nullopt;
  const Adaptation* one = c.adapted.size() == 1 && c.adapted[0].k ? &c.adapted[0] : nullptr;
  if (!method && o.k) method = trained && *trained != Method::share ? *trained : Method::speed;
  if (!method && (o.keep || o.every)) method = Method::share;
  if (!method && one && one->method != Method::share) method = one->method;
  p.method = method.value_or(Method::full);
  if (one && one->method == p.method) p.bos = one->bos;

  if (o.bos && p.method != Method::speed)
    throw Error(2, *o.bos ? "--bos" : "--no-bos", std::string("has no meaning under policy ") + name(p.method),
                "add --policy speed or --k K");
  if (o.k && (p.method == Method::full || p.method == Method::share))
    throw Error(2, "--k", std::string("policy ") + name(p.method) + " has no K",
                "leave it out, or choose --policy speed");
  if ((o.keep || o.every) && p.method != Method::share)
    throw Error(2, o.keep ? "--keep" : "--every", std::string("has no meaning under policy ") + name(p.method),
                "add --policy share");
  if (o.group && p.method != Method::swiftkv)
    throw Error(2, "--group", std::string("has no meaning under policy ") + name(p.method), "add --policy swiftkv");
  if (o.k && *o.k > L)
    throw Error(2, "--k " + std::to_string(*o.k), "this model has " + std::to_string(L) + " layers",
                "use 1 to " + std::to_string(L));
  p.bos = o.bos.value_or(p.bos);

  switch (p.method) {
    case Method::full:
      break;
    case Method::speed:
      p.k = o.k.value_or(one && one->method == Method::speed ? one->k : std::max(1, 3 * L / 4));
      break;
    case Method::pop:
      p.k = o.k.value_or(L - L / 3);
      break;
    case Method::swiftkv:
      p.k = o.k.value_or(c.swiftkv_k ? c.swiftkv_k : std::max(1, 3 * L / 4));
      p.group = o.group.value_or(c.swiftkv_group);
      if (has_weights && p.k < L && !c.swiftkv_k)
        throw Error(2, "--policy swiftkv", "this model has no SwiftKV weights", "use --policy pop, which needs none");
      if (has_weights && p.k < L && p.k != c.swiftkv_k)
        throw Error(2, "--k " + std::to_string(p.k),
                    "this model's SwiftKV weights begin at layer " + std::to_string(c.swiftkv_k),
                    "use --k " + std::to_string(c.swiftkv_k));
      if (has_weights && o.group && *o.group != c.swiftkv_group)
        throw Error(2, "--group", "this model's is " + std::to_string(c.swiftkv_group), "leave it out");
      break;
    case Method::share: {
      if (!o.keep && !o.every)
        throw Error(2, "--policy share", "which layers keep a cache?", "add --keep 0,4,8 or --every 4");
      if (o.keep && o.every) throw Error(2, "--keep, --every", "both given", "use one of them");
      p.kept.assign(L, false);
      if (o.every)
        for (int l = 0; l < L; l += *o.every) p.kept[l] = true;
      else
        for (int l : read_ids(*o.keep, "--keep")) {
          if (l >= L)
            throw Error(2, "--keep", "layer " + std::to_string(l) + " of " + std::to_string(L),
                        "use 0 to " + std::to_string(L - 1));
          p.kept[l] = true;
        }
      if (!p.kept[0]) throw Error(2, "--keep", "layer 0 is missing", "every layer reads a cache below it, so keep 0");
      break;
    }
  }
  if (has_weights && !c.original_projections && !(p.method == Method::swiftkv && p.k == c.swiftkv_k))
    throw Error(2, std::string("--policy ") + name(p.method),
                "this file has SwiftKV projections only above layer " + std::to_string(c.swiftkv_k),
                "use --policy swiftkv");
  return p;
}

inline std::vector<int> read_numbers(const std::string& text, const std::string& flag) {
  const std::vector<int> numbers = read_ids(text, flag);
  for (int n : numbers)
    if (n > 1 << 20) throw Error(2, flag, std::to_string(n) + " is too large", "use at most 1048576");
  return numbers;
}

// Every policy in the list with every K, where it has one.
inline std::vector<Policy> bench_policies(const Options& o, const Config& c, bool has_weights) {
  std::vector<Policy> all;
  std::istringstream list(o.policy.value_or(o.ks.empty() ? "full" : "full,speed"));
  for (std::string word; std::getline(list, word, ',');) {
    Options one = o;
    if (!one_of({"full", "speed", "pop", "swiftkv", "share"})(word).empty())
      throw Error(2, "--policy", "\"" + word + "\" is no policy", "use full, speed, pop, swiftkv or share");
    one.policy = word;
    if (word != "speed") one.bos = std::nullopt;
    if (word != "share") one.every = std::nullopt;
    std::vector<int> ks = read_numbers(o.ks, "--k");
    if (ks.empty() || word == "full" || word == "share") {
      all.push_back(make_policy(one, c, has_weights));
    } else {
      for (int k : ks) {
        if (k < 1) throw Error(2, "--k", "K is 1 or more", "use 1 to " + std::to_string(c.shape.n_layers));
        one.k = k;
        all.push_back(make_policy(one, c, has_weights));
      }
    }
  }
  return all;
}

// A policy in words, as tables show it.
inline std::string describe(const Policy& p) {
  std::string s = name(p.method);
  if (p.method == Method::share) {
    const auto kept = std::count(p.kept.begin(), p.kept.end(), true);
    return s + " " + std::to_string(kept) + "/" + std::to_string(p.n_layers);
  }
  if (p.method != Method::full) s += " K=" + std::to_string(p.k);
  if (p.method == Method::speed && !p.bos) s += " no BoS";
  return s;
}

// Were the weights trained for this policy? Only speed and share need it.
inline bool adapted(const Policy& p, const Config& c) {
  if (p.is_full() || (p.method != Method::speed && p.method != Method::share)) return true;
  if (p.method == Method::share && std::count(p.kept.begin(), p.kept.end(), false) == 0) return true;
  for (auto& a : c.adapted)
    if (a.method == p.method && (a.k == 0 || a.k == p.k) && (p.method == Method::share || a.bos == p.bos)) return true;
  return false;
}

}  // namespace speed
