// chat.cpp - the mode `chat`: turns that follow each other, the KV caches kept between them.
#include <unistd.h>

#include <charconv>
#include <sstream>

#include "modes.h"
#include "run.h"

namespace speed {

// A conversation. KV caches stay between turns. Its ids are kept too: when K changes, the next turn prefills all of it
// again under the new policy.
template <class B>
class Conversation {
 public:
  Conversation(const Options& o, const Model& model, B& backend)
      : o_(o), model_(model), chat_(chat_template(model)), backend_(backend), policy_(make_policy(o, model)) {
    context_ = context_for(o, model.config, 0, std::min<size_t>(4096, size_t(model.config.context)));
    note_if_not_adapted({policy_}, model.config);
    restart(true);
  }

  // Reads turns until the input ends, or Ctrl-C ends it. Returns a record of each turn.
  json run() {
    const bool terminal = ::isatty(0) && ::isatty(2);
    if (terminal) std::cerr << context_ << " tokens of context; " << commands << "\n";
    for (std::string line; !interrupted;) {
      if (terminal) std::cerr << "> " << std::flush;
      if (!std::getline(std::cin, line)) break;
      try {
        if (line == "/quit") break;
        if (!line.empty() && line[0] == '/') command(line);
        else if (!line.empty()) turn(line);
      } catch (const Error& e) {  // this turn cannot be run; the conversation goes on
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
      throw Error(2, "this line", "not UTF-8 at byte " + std::to_string(bad), "type it again; this line was ignored");
    Request r{unprocessed_, 0};
    const ChatTemplate::Turn turn = started_ ? chat_.next(text) : chat_.first(o_.system, text, o_.date);
    r.split = r.ids.size() + turn.split;
    r.ids.insert(r.ids.end(), turn.ids.begin(), turn.ids.end());
    const size_t used = engine_->position();
    if (used + r.ids.size() >= context_)
      throw Error(2, "context",
                  "this turn needs " + std::to_string(r.ids.size() + 1) + " tokens or more, " +
                      std::to_string(context_ - used) + " of " + std::to_string(context_) + " are left",
                  "say it shorter, /reset, or start again with a larger -c");
    engine_->end_turn(o_.keep_answers);
    const size_t split = policy_.split(r.split, r.ids.size());
    const size_t room = context_ - used - r.ids.size() + 1;
    const Answer a = answer(*engine_, model_, r, split, std::min<size_t>(size_t(o_.n), room), o_,
                            [](const std::string& s) { std::cout << s << std::flush; });
    std::cout << std::endl;
    turns_.push_back(answer_record(policy_, r.ids.size(), split, a, size_t(o_.n)));
    turns_.back()["prompt_ids"] = r.ids;
    turns_.back()["new_ids"] = a.ids;
    if (a.ended == Ended::interrupted) return;
    started_ = true;
    history_.insert(history_.end(), r.ids.begin(), r.ids.end());
    history_.insert(history_.end(), a.ids.begin(), a.ids.begin() + long(a.decode_steps));
    // The last generated token was not fed back. If it is a stop token, chat_.next() adds it again; if not, it goes in
    // front of the next turn.
    unprocessed_.clear();
    const std::vector<int> stops = stop_ids(model_, true);
    if (std::find(stops.begin(), stops.end(), a.ids.back()) == stops.end()) unprocessed_ = {a.ids.back()};
    if (a.ids.size() == room)
      note("the context of " + std::to_string(context_) + " tokens is full; /reset starts anew");
    if (::isatty(2)) print_summary(policy_, r, split, a, size_t(o_.n));
  }

  void command(const std::string& line) {
    std::istringstream in(line);
    std::string word, value, more;
    in >> word >> value >> more;
    Options changed = o_;
    int k = 0;
    if (word == "/reset" && value.empty()) {
      history_.clear(), unprocessed_.clear();
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
    policy_ = make_policy(changed, model_);
    o_ = changed;
    std::cerr << describe(policy_) << "\n";
    unprocessed_.insert(unprocessed_.begin(), history_.begin(), history_.end());  // the next turn prefills it again
    history_.clear();
    restart();
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
  json turns_ = json::array();
};

int run_chat(const Options& o, json& record) {
  return on_device(o, record, [&](Model& m, auto& backend) {
    record["turns"] = Conversation(o, m, backend).run();
    return 0;
  });
}

}  // namespace speed
