// request.cpp - see request.h.
#include "request.h"

#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iostream>

#include "policies.h"
#include "report.h"

namespace speed {

std::atomic<bool> interrupted = false;

static std::string read_all(std::istream& in) {
  std::string text{std::istreambuf_iterator<char>(in), {}};
  if (interrupted) throw Interrupted{};  // an interrupted read is not used
  return text;
}

std::string read_file(const std::string& path) {
  if (path == "-") {
    if (::read(0, nullptr, 0) != 0) throw Error(1, "standard input", std::strerror(errno), "give a file or a pipe");
    return read_all(std::cin);
  }
  std::ifstream in(path, std::ios::binary);
  if (!in || std::filesystem::is_directory(path)) throw Error(1, path, "cannot be read", "check the path");
  return read_all(in);
}

// Whether standard input is a pipe or a file. With `now`, a pipe must also say something within a second: programs are
// started with pipes that nobody writes to and nobody closes.
static bool piped_in(bool now) {
  struct stat in {};
  if (::fstat(0, &in) != 0) return false;
  if (S_ISREG(in.st_mode)) return true;
  if (!S_ISFIFO(in.st_mode) && (now || !S_ISSOCK(in.st_mode))) return false;
  pollfd one{0, POLLIN, 0};
  if (!now || ::poll(&one, 1, 1000) > 0) return true;
  note("standard input is a pipe that says nothing yet; it is left out: add - to wait for it");
  return false;
}

bool has_text(const Options& o) { return o.has_prompt || !o.file.empty(); }

std::string read_text(const Options& o, bool last_newline) {
  std::string text, from = "-p";
  if (o.has_prompt) text = o.prompt;
  if (!o.file.empty() || piped_in(o.has_prompt)) {
    std::string more = read_file(o.file.empty() ? "-" : o.file);
    from = o.file.empty() || o.file == "-" ? "standard input" : o.file;
    if (!last_newline && !more.empty() && more.back() == '\n') more.pop_back();
    if (o.has_prompt && !more.empty()) {
      note(counted(more.size(), "byte") + " of standard input follow -p");
      text += "\n" + more;
    } else if (!o.has_prompt) {
      text = more;
    }
  } else if (!o.has_prompt) {
    throw Error(2, "text", "none given", "use -p TEXT, -f FILE, or pipe it in");
  }
  if (const size_t bad = first_invalid_utf8(text); bad != std::string::npos)
    throw Error(1, from, "not UTF-8 at byte " + std::to_string(bad), "convert it to UTF-8");
  return text;
}

std::vector<int> given_ids(const Options& o) {
  if (!o.tokens.empty()) return read_ids(o.tokens, "--tokens");
  return o.tokens_file.empty() ? std::vector<int>{} : read_ids(read_file(o.tokens_file), "--tokens-file");
}

static std::vector<int> plain_ids(const Model& model, const std::string& text, bool special) {
  std::vector<int> ids = model.tokenizer->encode(text, special);
  const int bos = model.config.bos;
  if (bos >= 0 && !(special && !ids.empty() && ids[0] == bos)) ids.insert(ids.begin(), bos);
  return ids;
}

std::vector<int> stop_ids(const Model& model, bool chat) {
  std::vector<int> ids = model.config.eos;
  if (chat && model.chat && model.chat->stop() >= 0) ids.push_back(model.chat->stop());
  return ids;
}

const ChatTemplate& chat_template(const Model& model) {
  if (!model.chat)
    throw Error(2, "--chat",
                model.chat_refused.empty() ? "this model has no chat template"
                                           : "this model's chat template: " + model.chat_refused,
                "leave it out: plain text works, and with generate --special it may hold turn marks");
  return *model.chat;
}

Request make_request(const Options& o, const Model& model) {
  const std::string text = read_text(o, false);
  if (text.empty()) throw Error(2, "prompt", "it is empty", "give some text");
  Request r;
  if (o.chat) {
    if (o.special) throw Error(2, "--special", "has no meaning in a chat", "leave it or --chat out");
    auto turn = chat_template(model).first(o.system, text, o.date, o.answer_prefix);
    r = {std::move(turn.ids), turn.split, text};
  } else {
    if (o.system || o.date || !o.answer_prefix.empty())
      throw Error(2,
                  o.system ? "--system"
                  : o.date ? "--date"
                           : "--answer-prefix",
                  "has no meaning for plain text", "add --chat");
    r.ids = plain_ids(model, text, o.special);
    r.split = r.ids.size() - 1;
    r.text = text;
  }
  if (o.split && size_t(*o.split) >= r.ids.size())
    throw Error(2, "--split " + std::to_string(*o.split), "the prompt has " + std::to_string(r.ids.size()) + " tokens",
                "use 0 to " + std::to_string(r.ids.size() - 1));
  return r;
}

size_t split_under(const Policy& p, const Options& o, const Request& r) {
  if (o.split) return size_t(*o.split);
  return p.split(r.split, r.ids.size());
}

static std::string model_named(const Options& o) {
  if (!o.model.empty()) return o.model;
  const char* path = std::getenv("SPEED_MODEL");
  return path ? path : "";
}

bool uses_bundled_model(const Options& o) { return o.shape.empty() && model_named(o).empty(); }

std::string model_path(const Options& o) {
  if (!uses_bundled_model(o)) return model_named(o);
  const auto bundled = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "models" / "small.safetensors";
  return std::filesystem::exists(bundled) ? bundled.string() : "";
}

Model load(const Options& o) {
  if (!o.model.empty() && !o.shape.empty()) throw Error(2, "-m, --shape", "both given", "use one of them");
  for (auto& s : known_shapes())
    if (s.name == o.shape) return Model(s, false);
  if (model_path(o).empty())
    throw Error(2, "-m", "no model given, and none is bundled with this program", "add -m FILE");
  return Model(model_path(o));
}

size_t context_for(const Options& o, const Config& c, size_t N, size_t n) {
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

}  // namespace speed
