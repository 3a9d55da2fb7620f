// chat.cpp - the mode `chat`: turns that follow each other, the KV caches kept between them.
#include <unistd.h>

#include <charconv>

#include "lines.h"
#include "modes.h"
#include "run.h"

namespace speed {

// A conversation. KV caches stay between turns. Its ids are kept too: when the policy changes, the next turn prefills all
// of it again.
template <class B>
class Conversation {
 public:
  Conversation(const Options& o, const Model& model, B& backend)
      : o_(o), model_(model), chat_(chat_template(model)), backend_(backend), policy_(make_policy(o, model)) {
    if (o.auto_k) {  // from here on as if it had been named: commands change it
      o_.auto_k = false, o_.policy = name(policy_.method), o_.k = policy_.k;
      if (info(policy_.method).takes_bos) o_.bos = policy_.bos;
    }
    context_ = context_for(o, model.config, 0, std::min<size_t>(4096, size_t(model.config.context)));
    if (o.has_prompt && o.prompt.empty()) throw Error(2, "-p", "it is empty", "give some text, or leave it out");
    note_what_to_expect();
    restart(true);
  }

  // Reads turns until the input ends, or Ctrl-C or a command ends them. Returns a record of each turn.
  json run() {
    if (o_.has_prompt) turn(o_.prompt, "-p");
    release_notes();
    if (lines_.on_terminal()) std::cerr << context_ << " tokens of context; /help lists the commands\n";
    bool leaving = false;  // Ctrl-C at the prompt, once
    for (std::string line;;) {
      watch_interrupts();
      const auto got = lines_.read("> ", line);
      if (got == LineReader::Got::interrupted && lines_.on_terminal() && !leaving) {
        std::cerr << "\nCtrl-C again, or Ctrl-D, ends the chat\n";
        leaving = true;
        continue;
      }
      if (got != LineReader::Got::line) break;
      leaving = false;
      try {
        if (!take(line)) return turns_;
      } catch (const Error& e) {  // this turn cannot be run; the conversation goes on
        if (e.code != 2) throw;
        std::cerr << "speed: " << e.what() << "\n";
      } catch (const Interrupted&) {  // in the middle of a text of several lines
        std::cerr << "\n";
      }
    }
    if (lines_.on_terminal()) std::cerr << "\n";
    return turns_;
  }

 private:
  static constexpr const char* help =
      "A line is a turn. \"\"\" begins a text of several lines and \"\"\" ends it; // begins a line that begins with "
      "/.\n"
      "Ctrl-C ends an answer, and what was said of it stays in the conversation; a question that has no answer yet is\n"
      "dropped. Ctrl-C twice at the prompt, or Ctrl-D, ends the chat.\n"
      "  /k [K]            prompt tokens visit layers 0..K-1 only; alone: which K, of how many\n"
      "  /bos on|off       speed: upper layers see the BoS anchor\n"
      "  /policy [NAME]    full, speed:24, speed:24:no-bos, pop:20 or share:4\n"
      "  /compare [LIST]   the last question at full depth and under these policies; the conversation stays as it is\n"
      "  /clear, /reset    forget the conversation\n"
      "  /exit, /quit      end the chat\n";

  // ---- what the user typed ----

  // One line, and the lines it asks for. Returns false where it ends the chat.
  bool take(const std::string& line) {
    const size_t begin = line.find_first_not_of(" \t");
    if (begin == std::string::npos) return true;
    const std::string said = line.substr(begin, line.find_last_not_of(" \t") + 1 - begin);
    if (said.rfind(quotes, 0) == 0) turn(quoted(said.substr(quotes.size())), "this text");
    else if (said.rfind("//", 0) == 0) turn(said.substr(1), "this line");
    else if (said[0] == '/') return command(said);
    else turn(line, "this line");
    return true;
  }

  static constexpr std::string_view quotes = "\"\"\"";

  // A text of several lines, up to closing quotes at the end of one. `line` is what follows the opening ones.
  std::string quoted(std::string line) {
    for (std::string text;; text += "\n") {
      const size_t end = line.find_last_not_of(" \t") + 1;
      if (end >= quotes.size() && line.compare(end - quotes.size(), quotes.size(), quotes) == 0) {
        text += line.substr(0, end - quotes.size());
        const size_t first = text[0] == '\n', last = text.size() > first && text.back() == '\n';
        return text.substr(first, text.size() - first - last);  // not the line ends beside the quotes
      }
      text += line;
      const auto got = lines_.read("... ", line);
      if (got == LineReader::Got::interrupted) throw Interrupted{};
      if (got == LineReader::Got::end)
        throw Error(2, "this text", "the input ended before \"\"\" did", "close it; it was ignored");
    }
  }

  bool command(const std::string& line) {
    const size_t blank = std::min(line.find_first_of(" \t"), line.size());
    const std::string word = line.substr(0, blank);
    const size_t at = line.find_first_not_of(" \t", blank);
    const std::string value = at == std::string::npos ? "" : line.substr(at);
    const PolicyInfo& takes = info(policy_.method);
    Options changed = o_;
    if (word == "/k") {
      const int L = model_.config.shape.n_layers;
      const std::string range = "from 1 to " + std::to_string(L) + ": this model has " + std::to_string(L) + " layers";
      if (value.empty()) {
        std::cerr << describe(policy_) << "; K is a number " << range << "\n";
        return true;
      }
      int k = 0;
      const char* end = value.data() + value.size();
      if (auto [p, e] = std::from_chars(value.data(), end, k); e != std::errc() || p != end || k < 1 || k > L)
        throw Error(2, line, "K is a number " + range, "try /k " + std::to_string(default_speed_k(L)));
      // Without a K: full depth where nobody asked for it gives way, as to --k. A policy that was asked for does not.
      if (!takes.takes_k && (o_.policy || o_.keep || o_.every))
        throw Error(2, line, std::string("policy ") + takes.name + " has no K", "use /policy speed:" + value);
      changed.k = k;
    } else if (word == "/bos" && (value.empty() || value == "on" || value == "off")) {
      if (!takes.takes_bos)
        throw Error(2, line, std::string("has no meaning under policy ") + takes.name, "use /policy speed or /k first");
      if (value.empty()) {
        std::cerr << describe(policy_) << "; BoS is " << (policy_.bos ? "on" : "off") << "\n";
        return true;
      }
      changed.bos = value == "on";
    } else if (word == "/bos") {
      throw Error(2, line, "expected on or off", "use /bos on or /bos off");
    } else if (word == "/policy") {
      if (value.empty()) {
        std::cerr << describe(policy_) << "\n";
        return true;
      }
      changed = with_policy(o_, value, word);
    } else if (word == "/compare") {
      compare(value);
      return true;
    } else if (value.empty() && (word == "/clear" || word == "/reset")) {
      history_.clear(), unprocessed_.clear(), asked_ = {};
      started_ = false;
      restart();
      return true;
    } else if (value.empty() && word == "/help") {
      std::cerr << help;
      return true;
    } else if (value.empty() && (word == "/exit" || word == "/quit")) {
      return false;
    } else {
      throw Error(2, line, "no such command", "/help lists them; a text that begins with / begins with // here");
    }
    change_policy(changed);
    return true;
  }

  // ---- turns ----

  void turn(const std::string& text, const std::string& what) {
    if (text.empty()) return;
    if (const size_t bad = first_invalid_utf8(text); bad != std::string::npos)
      throw Error(2, what, "not UTF-8 at byte " + std::to_string(bad), "convert it to UTF-8; it was ignored");
    Request r{unprocessed_, 0};
    const ChatTemplate::Turn turn = started_ ? chat_.next(text) : chat_.first(o_.system, text, o_.date);
    r.split = r.ids.size() + turn.split;
    r.ids.insert(r.ids.end(), turn.ids.begin(), turn.ids.end());
    const size_t used = engine_->position();
    if (used + r.ids.size() >= context_)
      throw Error(2, "context",
                  "this turn needs " + std::to_string(r.ids.size() + 1) + " tokens or more, " +
                      std::to_string(context_ - used) + " of " + std::to_string(context_) + " are left",
                  "say it shorter, /clear, or start again with a larger -c");
    engine_->end_turn(o_.keep_answers);
    const auto before = engine_->mark();
    const size_t split = policy_.split(r.split, r.ids.size());
    const size_t room = context_ - used - r.ids.size() + 1;
    const Answer a = answer(*engine_, model_, r, split, std::min<size_t>(size_t(o_.n), room), o_,
                            [](const std::string& s) { std::cout << s << std::flush; });
    std::cout << std::endl;
    turns_.push_back(answer_record(policy_, r.ids.size(), split, a, size_t(o_.n)));
    turns_.back()["earlier_tokens"] = used;
    turns_.back()["prompt_ids"] = r.ids;
    turns_.back()["new_ids"] = a.ids;
    if (::isatty(2)) print_summary(policy_, r, split, a, size_t(o_.n));
    if (a.ids.empty()) {  // interrupted in the prefill: as if it had not been asked
      engine_->go_back(before);
      return;
    }
    started_ = true;
    asked_ = {history_, history_.size() + r.split};
    asked_.ids.insert(asked_.ids.end(), r.ids.begin(), r.ids.end());
    history_ = asked_.ids;
    history_.insert(history_.end(), a.ids.begin(), a.ids.begin() + long(a.decode_steps));
    // The last generated token was not fed back. If it is a stop token, chat_.next() adds it again; if not, it goes in
    // front of the next turn.
    unprocessed_.clear();
    const std::vector<int> stops = stop_ids(model_, true);
    if (std::find(stops.begin(), stops.end(), a.ids.back()) == stops.end()) unprocessed_ = {a.ids.back()};
    if (a.ids.size() == room)
      note("the context of " + std::to_string(context_) + " tokens is full; /clear starts anew");
  }

  // The last question once more, under each policy, by an engine that prefills the conversation up to it afresh.
  void compare(const std::string& list) {
    if (asked_.ids.empty()) throw Error(2, "/compare", "nothing was asked yet", "ask something first");
    Options with = o_;
    with.compare = list;
    const std::vector<Policy> policies = compared_policies(with, model_);
    if (list.empty() && policies[1].is_full())
      throw Error(2, "/compare", "the policy is full depth itself", "name others, as /compare speed:24,pop:20");
    note_if_not_adapted(policies, model_.config);
    const size_t N = asked_.ids.size(), n = std::min(size_t(o_.n), context_ - N + 1);
    for (const Policy& p : policies) {
      const size_t split = p.split(asked_.split, N);
      Engine<B> engine = make_engine(model_, p, N + n, N - split + n, o_, backend_);
      std::cout << "── " << describe(p) << "\n" << std::flush;
      const Answer a =
          answer(engine, model_, asked_, split, n, o_, [](const std::string& s) { std::cout << s << std::flush; });
      std::cout << std::endl;
      if (::isatty(2)) print_summary(p, asked_, split, a, size_t(o_.n));
      if (a.ended == Ended::interrupted) return;
    }
  }

  // ---- the policy ----

  void change_policy(const Options& changed) {
    const Policy before = std::exchange(policy_, make_policy(changed, model_));
    unprocessed_.insert(unprocessed_.begin(), history_.begin(), history_.end());  // the next turn prefills it again
    history_.clear();
    try {
      restart();
    } catch (const Error&) {  // no room for its caches
      policy_ = before;
      restart();
      throw;
    }
    o_ = changed;
    std::cerr << describe(policy_) << "\n";
    note_what_to_expect();
  }

  void note_what_to_expect() const {
    note_if_not_adapted({policy_}, model_.config);
    bool drops = false;
    for (int l = 0; l < policy_.n_layers; ++l) drops = drops || !policy_.caches_prompt(l);
    if (o_.keep_answers && !drops)
      note("--keep-answers changes nothing under " + describe(policy_) + ": every layer keeps them");
  }

  // Under SPEED an upper layer holds one turn's answer, or with --keep-answers all of them.
  void restart(bool banner = false) {
    engine_.reset();
    const size_t decode = o_.keep_answers ? context_ : std::min<size_t>(context_, chat_.header_size() + size_t(o_.n));
    engine_.reset(new Engine<B>(make_engine(model_, policy_, context_, decode, o_, backend_, banner)));
  }

  Options o_;
  const Model& model_;
  const ChatTemplate& chat_;
  B& backend_;
  Policy policy_;
  size_t context_ = 0;
  std::unique_ptr<Engine<B>> engine_;
  bool started_ = false;
  std::vector<int> history_;      // ids in the KV caches
  std::vector<int> unprocessed_;  // ids of the conversation that are not in the KV caches yet
  Request asked_;                 // the conversation up to the last question that got an answer
  json turns_ = json::array();
  LineReader lines_;
};

int run_chat(const Options& o, json& record) {
  return on_device(o, record, [&](Model& m, auto& backend) {
    record["turns"] = Conversation(o, m, backend).run();
    return 0;
  });
}

}  // namespace speed
