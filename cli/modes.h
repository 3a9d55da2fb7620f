// modes.h - the table of modes. Each mode is a file of its own beside this one.
//
// The files of cli/ use the method without including it: they are compiled behind speed.cu, which has them at its end,
// or file by file with speed.cu as a precompiled header (Makefile).
#pragma once

#include "../base/json.h"
#include "options.h"

namespace speed {

// A mode reads its options, prints its result, adds to the run record, and returns the exit code.
int run_generate(const Options&, json& record);
int run_chat(const Options&, json& record);
int run_logits(const Options&, json& record);
int run_perplexity(const Options&, json& record);
int run_trace(const Options&, json& record);
int run_bench(const Options&, json& record);
int run_plan(const Options&, json& record);
int run_tokenize(const Options&, json& record);
int run_info(const Options&, json& record);
int run_tune(const Options&, json& record);

struct Mode {
  const char* name;
  const char* does;
  int (*run)(const Options&, json& record);
};

inline constexpr Mode modes[] = {
    {"generate", "complete a text, or with --chat answer a question", run_generate},
    {"chat", "hold a conversation; /help in it lists its commands", run_chat},
    {"logits", "write the logits of given tokens to a NumPy file", run_logits},
    {"perplexity", "how well a text is predicted under a policy, beside full depth", run_perplexity},
    {"trace", "show one prompt layer by layer, as text or as a page (--html)", run_trace},
    {"bench", "time prompts and generation beside this machine's ceilings", run_bench},
    {"plan", "predict FLOPs and bytes by formula, with no weights at hand", run_plan},
    {"tokenize", "text to token ids, or back with --decode", run_tokenize},
    {"info", "show what is in a model file", run_info},
    {"tune", "find the smallest K that keeps a bound on a text of yours", run_tune},
};

}  // namespace speed
