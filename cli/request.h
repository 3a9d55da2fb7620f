// request.h - from the user's text to token ids: which model, where the prompt ends, how much context.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "options.h"

namespace speed {

// Set by the first Ctrl-C: the run stops at the next layer, so that it can still say what it did.
extern std::atomic<bool> interrupted;

// Makes the next Ctrl-C a first one again: a chat goes on after it. (program.cpp)
void watch_interrupts();

struct Request {
  std::vector<int> ids;
  size_t split = 0;       // ids[0, split) are prompt tokens
  std::string text = {};  // as the user gave it; empty where ids came from elsewhere
};

std::string read_file(const std::string& path);

// The text the user gave: -p, a file, what is piped in, or -p and then what is piped in. Byte for byte, or without one
// newline at its end, which a file or `echo` adds. Throws Error 1 where it is not UTF-8.
std::string read_text(const Options& o, bool last_newline = true);

// Whether there is a text at all, without reading it.
bool has_text(const Options& o);

// Token ids from --tokens or --tokens-file, nothing where neither was given.
std::vector<int> given_ids(const Options& o);

// Text to ids, and where the prompt ends: in a chat before the assistant header, in plain text before the last token.
Request make_request(const Options& o, const Model& model);

// Where the prompt ends under this policy, or where --split says.
size_t split_under(const Policy& p, const Options& o, const Request& r);

// The ids that end an answer; in a chat also the token that closes the model's turn.
std::vector<int> stop_ids(const Model& model, bool chat);

// The model's chat template. Throws Error 2 where it has none.
const ChatTemplate& chat_template(const Model& model);

// The file of the model that load() would read; empty where there is none.
std::string model_path(const Options& o);

// Whether no model was named, so that the bundled one runs.
bool uses_bundled_model(const Options& o);

// The model named by -m, else by $SPEED_MODEL (run.sh does so), else the bundled one; or, for timing, only a shape.
Model load(const Options& o);

// Context in tokens for a request of N and n new ones. Throws Error 2 where the model's own is too short.
size_t context_for(const Options& o, const Config& c, size_t N, size_t n);

}  // namespace speed
