// options.cpp - the command line: one table of flags, and one error line for each mistake.
#include "options.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstring>
#include <iostream>
#include <sstream>
#include <variant>

#include "modes.h"
#include "policies.h"
#include "report.h"

namespace speed {

namespace {

// ---- checks on single values --------------------------------------------------------------------------------------

CLI::Validator check(std::function<std::string(const std::string&)> what_is_wrong) {
  return CLI::Validator([=](std::string& s) { return what_is_wrong(s); }, "", "");
}

CLI::Validator whole_number(int64_t least, int64_t most) {
  return check([=](const std::string& s) -> std::string {
    int64_t v = 0;
    const char* end = s.data() + s.size();
    auto [p, e] = std::from_chars(s.data(), end, v);
    if (e == std::errc() && p == end && v >= least && v <= most) return "";
    return "expected a whole number from " + std::to_string(least) + " to " + std::to_string(most) + ", got " + s;
  });
}

CLI::Validator real_number(double least, double most) {
  return check([=](const std::string& s) -> std::string {
    char* end = nullptr;
    const double v = std::strtod(s.c_str(), &end);
    if (!s.empty() && *end == 0 && v >= least && v <= most) return "";
    std::ostringstream range;
    range << "expected a number from " << least << " to " << most << ", got " << s;
    return range.str();
  });
}

CLI::Validator one_of(std::vector<std::string> words) {
  return check([=](const std::string& s) -> std::string {
    if (std::find(words.begin(), words.end(), s) != words.end()) return "";
    std::string list;
    for (auto& w : words) list += (list.empty() ? "" : "|") + w;
    return "expected " + list + ", got " + s;
  });
}

CLI::Validator anything() {
  return check([](const std::string&) { return ""; });
}
CLI::Validator not_empty() {
  return check([](const std::string& s) { return s.empty() ? "it is empty" : ""; });
}

std::vector<std::string> shape_names() {
  std::vector<std::string> names;
  for (auto& s : known_shapes()) names.push_back(s.name);
  return names;
}

// ---- the table of flags -------------------------------------------------------------------------------------------

// The modes that take a flag, a bit each.
constexpr unsigned mode_bit(std::string_view name) {
  for (size_t i = 0; i < std::size(modes); ++i)
    if (name == modes[i].name) return 1u << i;
  throw "no such mode";  // at compile time: does not compile
}
constexpr unsigned GENERATE = mode_bit("generate"), CHAT = mode_bit("chat"), LOGITS = mode_bit("logits"),
                   PERPLEXITY = mode_bit("perplexity"), TRACE = mode_bit("trace"), BENCH = mode_bit("bench"),
                   PLAN = mode_bit("plan"), TOKENIZE = mode_bit("tokenize"), INFO = mode_bit("info"),
                   TUNE = mode_bit("tune");
constexpr unsigned WRITE = GENERATE | CHAT, RUN = WRITE | LOGITS | PERPLEXITY | TRACE | BENCH | TUNE,
                   ONE_POLICY = RUN & ~(BENCH | TUNE), POLICY_LIST = BENCH | PLAN, ALL = RUN | PLAN | TOKENIZE | INFO;

// The member that gets the value. A bool is a flag without a value, an optional<bool> a pair --x, --no-x.
using Target =
    std::variant<bool Options::*, std::optional<bool> Options::*, int Options::*, float Options::*, uint64_t Options::*,
                 std::optional<int> Options::*, std::string Options::*, std::optional<std::string> Options::*,
                 std::vector<std::string> Options::*, std::optional<double> Options::*>;
struct Flag {
  const char* group;  // heading in the help
  unsigned modes;
  const char* names;
  Target target;
  const char* type;  // of the value, for the help; in brackets where it may be left out
  std::string help;
  CLI::Validator check = anything();
};

std::vector<Flag> flags() {
  using O = Options;
  const int many = 1 << 20;
  return {
      {"Input", PLAN, "-m,--model", &O::model, "FILE", "model whose shape to take, instead of --shape", not_empty()},
      {"Input", RUN | TOKENIZE | INFO, "-m,--model", &O::model, "FILE",
       "model (default: $SPEED_MODEL, or the bundled one)", not_empty()},
      {"Input", GENERATE | LOGITS | PERPLEXITY | TRACE | TOKENIZE | TUNE, "-p,--prompt", &O::prompt, "TEXT",
       "text; what is piped in is added after it"},
      {"Input", CHAT, "-p,--prompt", &O::prompt, "TEXT", "the first turn; later ones are read, line by line"},
      {"Input", GENERATE | LOGITS | PERPLEXITY | TRACE | TOKENIZE | TUNE, "-f,--file", &O::file, "FILE",
       "text from a file; - is standard input", not_empty()},
      {"Input", LOGITS | PERPLEXITY, "--tokens", &O::tokens, "IDS", "token ids, as 1,2,3; nothing is added"},
      {"Input", LOGITS | PERPLEXITY, "--tokens-file", &O::tokens_file, "FILE", "token ids from a file, or -",
       not_empty()},
      {"Input", PERPLEXITY | TUNE, "--prompt-tokens", &O::prompt_tokens, "N",
       "the text is cut into pieces of N prompt tokens, BoS\nincluded (256),", whole_number(2, many)},
      {"Input", PERPLEXITY | TUNE, "--answer-tokens", &O::answer_tokens, "M",
       "and M that are scored (256); of ids: the last M", whole_number(1, many)},
      {"Input", LOGITS, "--out", &O::out, "FILE", "NumPy file to write: float32 [N - split, vocab]", not_empty()},
      {"Input", TOKENIZE | GENERATE | TRACE, "--special", &O::special, "",
       "read spellings of special tokens as these tokens"},
      {"Input", TOKENIZE, "--decode", &O::decode, "", "token ids to text"},
      {"Input", TOKENIZE, "--ids", &O::ids, "", "ids alone, on one line, on a terminal too"},
      {"Input", GENERATE | TRACE, "--chat", &O::chat, "", "wrap the text as a user turn of the chat template"},
      {"Input", GENERATE | CHAT | TRACE, "--system", &O::system, "TEXT", "system text of the chat"},
      {"Input", GENERATE | CHAT | TRACE, "--date", &O::date, "TEXT", "date, for templates that show one"},
      {"Input", GENERATE | TRACE, "--answer-prefix", &O::answer_prefix, "TEXT", "begin the answer with this"},
      {"Input", PLAN | BENCH, "--shape", &O::shape, "NAME", "llama-3.2-1b, llama-3.2-3b, llama-3.1-8b or -70b",
       one_of(shape_names())},
      {"Input", BENCH, "-p,--prompt", &O::prompts, "LIST", "prompt lengths in tokens (512)"},
      {"Input", BENCH, "-n,--n-gen", &O::n, "N", "steps to generate (64; 0: none)", whole_number(0, many)},
      {"Input", BENCH, "--depth", &O::depths, "LIST", "tokens already in the cache before these (0)"},
      {"Input", BENCH, "-r,--repetitions", &O::repetitions, "N", "how often, after one time uncounted (5)",
       whole_number(1, 1000)},
      {"Input", PLAN, "--ctx", &O::ctx, "LIST", "prompt lengths in tokens (1024)"},
      {"Input", PLAN, "--tail", &O::tail, "N", "of them, at the end, decode-phase (1)", whole_number(1, many)},
      {"Input", PLAN, "-n,--new", &O::new_tokens, "N", "tokens generated (128)", whole_number(0, many)},
      {"Input", PLAN, "--batch", &O::batch, "N", "requests at once, which share the weights (1)",
       whole_number(1, many)},
      {"Input", PLAN, "--group", &O::group, "N", "swiftkv: layers per cache (1, or the model's)",
       whole_number(1, 4096)},
      {"Input", PLAN, "--kv-bytes", &O::kv_bytes, "2|4", "bytes per cached value (2)", one_of({"2", "4"})},
      {"Input", PLAN, "--weight-bytes", &O::weight_bytes, "2|4", "bytes per weight (2)", one_of({"2", "4"})},

      {"Policy", POLICY_LIST, "--policy", &O::policy, "LIST", "policies, as full,speed:24,speed:24:no-bos,share:2",
       not_empty()},
      {"Policy", TUNE, "--policy", &O::policy, "LIST", "speed, pop, or both as speed,pop (speed)", not_empty()},
      {"Policy", TUNE, "--max-kl", &O::max_kl, "X", "KL from full depth at most, nats a token (0.05)",
       real_number(0, 100)},
      {"Policy", TUNE, "--min-same", &O::min_same, "PERCENT", "same top-1 as full depth at least", real_number(0, 100)},
      {"Policy", POLICY_LIST, "--k", &O::ks, "LIST", "K of those that name none, as 24,16", not_empty()},
      {"Policy", ONE_POLICY, "--policy", &O::policy, "NAME", listed(policy_names(), "or"), one_of(policy_names())},
      {"Policy", ONE_POLICY, "--k", &O::k, "K",
       "prompt tokens visit layers 0..K-1 only (what the\nweights were trained for; else 4/5 of all, pop 2/3);\nauto: "
       "what `tune --write` chose",
       whole_number(1, 4096)},
      {"Policy", RUN | PLAN, "--bos,!--no-bos", &O::bos, "", "speed: upper layers see the BoS anchor (on)"},
      {"Policy", ONE_POLICY | PLAN, "--keep", &O::keep, "LIST", "share: layers that keep a cache, as 0,4,8"},
      {"Policy", (RUN | PLAN) & ~TUNE, "--every", &O::every, "G", "share: every G-th layer keeps a cache",
       whole_number(1, 4096)},
      {"Policy", GENERATE | LOGITS | PERPLEXITY | TRACE, "--split", &O::split, "N",
       "the first N tokens are prompt, the rest decode-phase", whole_number(0, many)},
      {"Policy", TRACE, "--compare", &O::compare, "[POLICY]",
       "a second policy beside it, as pop:20, share:2 or\nspeed:24:no-bos (full)"},
      {"Policy", TRACE, "--ks", &O::ks, "LIST", "K of the page, as 8,16,24 (all)"},
      {"Policy", CHAT, "--keep-answers", &O::keep_answers, "", "speed: upper layers keep earlier answers"},
      {"Policy", GENERATE | PERPLEXITY, "--compare", &O::compare, "[LIST]",
       "full depth beside the policy, or beside several:\nspeed:24,speed:24:no-bos,pop:20,share:2"},

      {"Generation", WRITE, "-n,--n-predict", &O::n, "N", "new tokens at most (128)", whole_number(1, many)},
      {"Generation", TRACE, "-n,--n-predict", &O::n, "N", "tokens of the page's answer at most (16)",
       whole_number(1, 1000)},
      {"Generation", GENERATE, "-c,--ctx-size", &O::context, "N", "context in tokens (what prompt and -n need)",
       whole_number(1, many)},
      {"Generation", CHAT, "-c,--ctx-size", &O::context, "N", "context in tokens (4096, or the model's)",
       whole_number(1, many)},
      {"Generation", WRITE, "--stop", &O::stop, "TEXT", "stop before this text; may be repeated", not_empty()},
      {"Generation", WRITE, "--temp", &O::temperature, "X", "temperature; 0 is greedy (0)", real_number(0, 100)},
      {"Generation", WRITE, "--top-k", &O::top_k, "N", "draw from the N likeliest (0: off)", whole_number(0, 1 << 24)},
      {"Generation", WRITE, "--top-p", &O::top_p, "X", "draw from the fewest that reach X (1: off)", real_number(0, 1)},
      {"Generation", WRITE, "--min-p", &O::min_p, "X", "draw from those X times as likely as the best (0)",
       real_number(0, 1)},
      {"Generation", WRITE, "-s,--seed", &O::seed, "N", "seed of the draws (0)", whole_number(0, INT64_MAX)},

      {"Running", RUN, "--device", &O::device, "NAME", "auto (a GPU where one answers), cpu or cuda",
       one_of({"auto", "cpu", "cuda"})},
      {"Running", RUN, "-t,--threads", &O::threads, "N", "threads (all cores); changes no bit of a result",
       whole_number(1, 1024)},
      {"Running", RUN, "--chunk", &O::chunk, "N", "rows that go through a layer together (512; GPU: 8192)",
       whole_number(1, 1 << 16)},
      {"Running", TRACE, "--html", &O::html, "FILE", "write a page: this prompt under every K, to look into",
       not_empty()},
      {"Running", TRACE, "--dump", &O::dump, "FILE", "write the hidden states, .safetensors", not_empty()},
      {"Running", TRACE, "-o,--output", &O::format, "NAME", "text; md or csv: the table; json: the page's data",
       one_of({"text", "md", "csv", "json"})},
      {"Running", TUNE, "--svg", &O::svg, "FILE", "write a picture: KL by K", not_empty()},
      {"Running", TUNE, "--write", &O::write, "", "put the K found into the model file, for --k auto"},
      {"Running", PLAN | INFO | PERPLEXITY | BENCH | TOKENIZE | TUNE, "-o,--output", &O::format, "NAME",
       "tables as text, md, csv or json", one_of({"text", "md", "csv", "json"})},
      {"Running", GENERATE, "-o,--output", &O::format, "NAME", "text or json; with --compare the table also as md, csv",
       one_of({"text", "md", "csv", "json"})},
      {"Running", PLAN, "--json", &O::json, "", "short for -o json"},
      {"Running", ALL, "--record", &O::record, "FILE", "write a run record: machine, flags, counts, timings",
       not_empty()},
  };
}

// Tells CLI11 of one flag. A value given twice counts the last time, except in a list.
void add_flag(CLI::App& app, const Flag& f, Options& o) {
  std::visit(
      [&](auto member) {
        auto& value = o.*member;
        using T = std::remove_reference_t<decltype(value)>;
        if constexpr (std::is_same_v<T, bool>) {
          app.add_flag(f.names, value, f.help)->group(f.group);
        } else if constexpr (std::is_same_v<T, std::optional<bool>>) {
          app.add_flag_function(
                 f.names, [&value](int64_t count) { value = count > 0; }, f.help)
              ->group(f.group);
        } else {
          CLI::Option* option =
              app.add_option(f.names, value, f.help)->type_name(f.type)->group(f.group)->check(f.check);
          if constexpr (std::is_same_v<T, std::vector<std::string>>) option->take_all()->allow_extra_args(false);
          else option->take_last();
          if (f.type[0] == '[') option->expected(0, 1);
        }
      },
      f.target);
}

// ---- hints --------------------------------------------------------------------------------------------------------

// Letters to insert, delete or replace to get from a to b (Levenshtein).
size_t edit_distance(const std::string& a, const std::string& b) {
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

std::string nearest(const std::string& word, const std::vector<std::string>& candidates) {
  std::string best;
  for (auto& c : candidates)
    if (best.empty() || edit_distance(word, c) < edit_distance(word, best)) best = c;
  return best;
}

// Other programs' names of our flags, most of them llama.cpp's.
constexpr std::pair<const char*, const char*> aliases[] = {
    {"--temperature", "--temp"},
    {"--predict", "--n-predict"},
    {"--max-tokens", "--n-predict"},
    {"-sys", "--system"},
    {"--system-prompt", "--system"},
    {"--reverse-prompt", "--stop"},
    {"-ub", "--chunk"},
    {"--ubatch-size", "--chunk"},
    {"--layers", "--k"},
    {"--output-format", "--output"},
};

// What people type where a mode belongs, and what they mean.
constexpr std::pair<const char*, const char*> meant[] = {
    {"run", "generate"},    {"complete", "generate"},        {"ask", "generate --chat"}, {"serve", "chat"},
    {"server", "chat"},     {"ppl", "perplexity"},           {"eval", "perplexity"},     {"show", "info"},
    {"encode", "tokenize"}, {"decode", "tokenize --decode"}, {"benchmark", "bench"},     {"-v", "--version"},
    {"-V", "--version"},    {"version", "--version"},
};

// CLI11's help without its own word for a switch that turns something off.
struct Formatter : CLI::Formatter {
  std::string make_option_name(const CLI::Option* option, bool positional) const override {
    std::string name = CLI::Formatter::make_option_name(option, positional);
    if (const size_t at = name.find("{false}"); at != std::string::npos) name.erase(at, 7);
    return name;
  }
};

// A completion script for bash, from the table of flags: modes first, then the flags of the mode, file names for the rest.
std::string completion() {
  std::ostringstream names, cases, all;
  for (size_t m = 0; m < std::size(modes); ++m) {
    names << (m ? " " : "") << modes[m].name;
    cases << "    " << modes[m].name << ") flags=\"--help";
    for (const Flag& f : flags()) {
      std::istringstream in(f.modes >> m & 1 ? f.names : "");
      for (std::string one; std::getline(in, one, ',');) cases << " " << one.substr(one[0] == '!');
    }
    cases << "\" ;;\n";
  }
  all << "# bash completion of speed; made by `speed completion`\n"
         "_speed() {\n"
         "  local word=${COMP_WORDS[COMP_CWORD]} mode=${COMP_WORDS[1]} flags\n"
         "  if [ \"$COMP_CWORD\" = 1 ] && [[ $word != -* ]]; then\n"
         "    COMPREPLY=($(compgen -W \""
      << names.str()
      << "\" -- \"$word\"))\n"
         "    return\n"
         "  fi\n"
         "  [[ $mode == -* ]] && mode="
      << modes[0].name
      << "\n"
         "  case $mode in\n"
      << cases.str()
      << "  esac\n"
         "  if [[ $word == -* ]]; then\n"
         "    COMPREPLY=($(compgen -W \"$flags\" -- \"$word\"))\n"
         "  else\n"
         "    COMPREPLY=($(compgen -f -- \"$word\"))\n"
         "  fi\n"
         "}\n"
         "complete -o filenames -F _speed speed\n";
  return all.str();
}

std::string overview() {
  std::string s =
      "speed - run a Llama model with less work on its prompt\n\n"
      "Usage: speed [MODE] [FLAGS]\n\nModes\n";
  auto line = [&](std::string name, const char* does) { s += "  " + name.append(12 - name.size(), ' ') + does + "\n"; };
  for (auto& m : modes) line(m.name, m.does);
  s += "\nPolicies: which layers a prompt token visits, and what later tokens see of it\n";
  for (auto& p : policy_table) line(p.name, p.does);
  return s +
         "\nspeed MODE --help lists the flags of a mode; speed --version prints the version.\n\n"
         "Examples\n"
         "  speed --chat -p \"What is the capital of France?\"\n"
         "  speed --chat -p \"What is the capital of France?\" --k 24 --compare\n"
         "  speed trace -p \"The quick brown fox\" --k 20 --no-bos\n"
         "  speed plan --shape llama-3.1-8b --ctx 131072 --k 24\n";
}

}  // namespace

// ---- the whole line -----------------------------------------------------------------------------------------------

std::optional<Options> read_options(int argc, char** argv) {
  std::vector<std::string> args(argv + 1, argv + argc);
  if (args.empty()) {
    std::cerr << overview();
    throw Error(2, "no arguments", "there is nothing to do", "give a text with -p");
  }
  Options o;
  std::vector<std::string> names;
  for (auto& m : modes) names.push_back(m.name);
  o.mode = names[0];
  if (args[0] == "help") {  // as git has it
    args.erase(args.begin());
    args.push_back("--help");
  }
  for (auto [word, meaning] : meant)
    if (args[0] == word) throw Error(2, args[0], "is no mode", "did you mean speed " + std::string(meaning) + "?");
  if (std::find(names.begin(), names.end(), args[0]) != names.end()) {
    o.mode = args[0];
    args.erase(args.begin());
  } else if (args[0] == "--help" || args[0] == "-h") {
    std::cout << overview();
    return std::nullopt;
  } else if (args[0] == "--version") {
    std::cout << version << "\n";
    return std::nullopt;
  } else if (args[0] == "completion") {
    std::cout << completion();
    return std::nullopt;
  } else if (args[0][0] != '-') {
    throw Error(2, args[0], "is no mode", "did you mean " + nearest(args[0], names) + "? A text goes after -p");
  }
  const size_t mode = size_t(std::find(names.begin(), names.end(), o.mode) - names.begin());
  if (o.mode == "bench") o.n = 64;
  if (o.mode == "trace") o.n = 16;

  CLI::App app("speed " + o.mode + ": " + modes[mode].does, "speed " + o.mode);
  app.allow_extras();
  app.formatter(std::make_shared<Formatter>());
  app.get_formatter()->column_width(26);
  for (const Flag& f : flags())
    if (f.modes >> mode & 1) add_flag(app, f, o);

  for (size_t i = 0; i < args.size(); ++i) {
    for (auto [other, ours] : aliases)
      if ((args[i] == other || args[i].rfind(std::string(other) + "=", 0) == 0) && app.get_option_no_throw(ours))
        args[i].replace(0, std::strlen(other), ours);
    if (args[i] == "--k=auto" || (args[i] == "--k" && i + 1 < args.size() && args[i + 1] == "auto")) {
      if (!app.get_option_no_throw("--k") || o.mode == "bench" || o.mode == "plan")
        throw Error(2, "--k auto", "speed " + o.mode + " takes numbers", "leave it out");
      o.auto_k = true;
      args.erase(args.begin() + long(i), args.begin() + long(i) + (args[i] == "--k" ? 2 : 1));
      --i;
      continue;
    }
    if (args[i] == "--compare" && i + 1 < args.size() && args[i + 1].empty())  // CLI11 takes it for no list
      throw Error(2, "--compare", "it is empty", "leave the list out, or write one as speed:24,pop:20");
  }
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
  std::vector<std::string> known;
  for (const CLI::Option* f : app.get_options()) {
    for (auto& s : f->get_snames()) known.push_back("-" + s);
    for (auto& l : f->get_lnames()) known.push_back("--" + l);
  }
  bool lone_dash = false;
  for (auto& rest : app.remaining()) {
    if (rest == "-" && app.get_option_no_throw("--file")) {
      lone_dash = true;
    } else if (rest[0] == '-') {
      throw Error(2, rest, "no such flag of speed " + o.mode, "did you mean " + nearest(rest, known) + "?");
    } else {
      throw Error(2, rest, "a word that belongs to no flag", "put a text in quotes after -p");
    }
  }
  auto given = [&](const char* flag) {
    const CLI::Option* option = app.get_option_no_throw(flag);
    return option && option->count() > 0;
  };
  o.has_prompt = o.mode != "bench" && given("--prompt");
  if (o.json) o.format = "json";
  if (!given("--output") && !::isatty(1)) o.ids = true;  // tokenize: in a pipe ids alone, as any program wants them
  if (lone_dash && !o.file.empty() && o.file != "-") throw Error(2, "-f, -", "more than one text", "give one of them");
  if (lone_dash) o.file = "-";
  if (o.has_prompt && !o.file.empty() && o.file != "-")
    throw Error(2, "-p, -f", "more than one text", "give one of them");
  if (o.auto_k)
    for (const char* flag : {"--k", "--policy", "--bos", "--keep", "--every", "--compare"})
      if (given(flag) && !(o.compare && o.compare->empty()))
        throw Error(2, flag, "--k auto brings its own policy", "leave one of them out");
  // trace shows the policy of the flags, and beside it the one of --compare.
  if (o.mode != "trace" && o.compare && !o.compare->empty())
    for (const char* flag : {"--policy", "--k", "--bos", "--keep", "--every"})
      if (given(flag))
        throw Error(2, flag, "the list of --compare names its policies",
                    "write it there, as speed:24:no-bos, or leave the list out");
  if (o.mode == "generate" && !o.compare && (o.format == "md" || o.format == "csv"))
    throw Error(2, "-o " + o.format, "an answer is no table", "use -o json, or add --compare");
  if (o.temperature == 0)
    for (const char* flag : {"--top-k", "--top-p", "--min-p", "--seed"})
      if (given(flag)) note(std::string(flag) + " changes nothing at temperature 0; add --temp");
#ifndef __CUDACC__
  if (o.device == "cuda")
    throw Error(2, "--device cuda", "this program was built for the CPU alone",
                "use --device cpu, or build it with nvcc: make");
#endif
  return o;
}

}  // namespace speed
