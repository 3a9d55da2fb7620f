// options.h - the values of a command line, filled in by options.cpp.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace speed {

struct Options {
  std::string mode;
  // what to run on
  std::string model, prompt, file, tokens, tokens_file, shape;  // file "-": standard input
  bool has_prompt = false;
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
  bool auto_k = false;  // --k auto: what `tune --write` put into the file
  std::optional<bool> bos;
  std::optional<std::string> keep;
  std::optional<std::string> compare;  // "" compares with the policy flags, else a list
  // sampling
  float temperature = 0, top_p = 1, min_p = 0;
  int top_k = 0;
  uint64_t seed = 0;
  // plan
  std::string ctx = "1024";
  int tail = 1, new_tokens = 128, batch = 1, kv_bytes = 2, weight_bytes = 2;
  // bench, plan: K of every policy that has one
  std::string ks;
  // bench
  std::string prompts = "512", depths = "0";
  int repetitions = 5;
  // perplexity
  std::optional<int> prompt_tokens, answer_tokens;
  // tune
  std::optional<double> max_kl, min_same;
  // output
  std::string format = "text", record, out, dump, html, svg, device = "auto";
  bool json = false, special = false, decode = false, ids = false, write = false;
};

// Reads the command line. Prints help or the version and returns nothing where that was asked for.
// Throws Error 2, with the nearest flag or mode as a hint.
std::optional<Options> read_options(int argc, char** argv);

}  // namespace speed
