// The mode chat, with its input from a pipe and, as a person uses it, on a terminal.
#include <pty.h>
#include <sys/wait.h>

#include <csignal>
#include <thread>

#include "helpers.h"

using namespace test;

namespace {

const std::string program = std::getenv("SPEED") ? std::getenv("SPEED") : "./speed";
const std::string scaled = " -m tests/golden/scaled.safetensors", tied = " -m tests/golden/tied.safetensors";

bool holds(const std::string& text, const std::string& words) { return text.find(words) != std::string::npos; }
size_t count(const std::string& text, const std::string& words) {
  size_t n = 0;
  for (size_t at = 0; (at = text.find(words, at)) != std::string::npos; at += words.size()) ++n;
  return n;
}

// What a turn's tokens say, marks and all.
std::string text_of(const Model& m, const json& turn) {
  std::string s;
  for (int id : turn["prompt_ids"].get<std::vector<int>>()) s += m.tokenizer->decode(id);
  return s;
}

// A chat whose input is `typed`.
struct Piped {
  std::string out, err;
  json turns;
  int code;
  Piped(const std::string& typed, const std::string& flags) {
    Scratch scratch;
    std::ofstream(scratch / "in", std::ios::binary) << typed;
    const int status = std::system((program + " chat" + flags + " --record " + (scratch / "r") + " <" +
                                    (scratch / "in") + " >" + (scratch / "out") + " 2>" + (scratch / "err"))
                                       .c_str());
    code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    out = read_file(scratch / "out"), err = read_file(scratch / "err");
    if (std::filesystem::exists(scratch / "r")) turns = json::parse(read_file(scratch / "r"))["turns"];
  }
};

// A chat on a terminal of its own.
class Terminal {
 public:
  Terminal(const std::string& flags, const std::string& record) : record_(record) {
    winsize size{40, 200, 0, 0};
    termios settings{};
    child_ = ::forkpty(&fd_, nullptr, nullptr, &size);
    if (child_ == 0) {
      ::setenv("TERM", "xterm", 1);
      ::unsetenv("LC_ALL"), ::unsetenv("LANG"), ::unsetenv("LC_CTYPE");
      ::setenv("HOME", "/nonexistent", 1);
      ::signal(SIGINT, SIG_DFL);
      ::execl("/bin/sh", "sh", "-c", ("exec " + program + " chat" + flags + " --record " + record).c_str(), nullptr);
      ::_exit(127);
    }
    ::tcgetattr(fd_, &settings);
    before_ = settings.c_lflag;
  }
  ~Terminal() {
    if (child_ > 0) ::kill(child_, SIGKILL), ::waitpid(child_, nullptr, 0);
    ::close(fd_);
  }
  void type(const std::string& text) {
    for (size_t at = 0; at < text.size();) {  // what the terminal cannot take yet waits, as in a real one
      take(0);
      const ssize_t n = ::write(fd_, text.data() + at, std::min<size_t>(512, text.size() - at));
      if (n > 0) at += size_t(n);
    }
  }
  // Reads until `words` have been shown since the last wait; a minute at most.
  bool wait_for(const std::string& words) {
    const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (std::chrono::steady_clock::now() < give_up) {
      const size_t at = screen_.find(words, seen_);
      if (at != std::string::npos) return seen_ = at + words.size(), true;
      if (!take(10)) break;
    }
    UNSCOPED_INFO("waited for \"" << words << "\" after:\n" << screen_);
    return false;
  }
  void signal(int which) { ::kill(child_, which); }
  // Waits for the program's end, 20 s at most; its exit code, or 128 and the signal.
  int end() {
    while (take(20000)) continue;
    int status = 0;
    termios settings{};
    CHECK(::tcgetattr(fd_, &settings) == 0);
    CHECK(settings.c_lflag == before_);  // the terminal is as it was
    for (int i = 0; ::waitpid(child_, &status, WNOHANG) == 0; ++i) {
      if (i == 100) return -1;  // it goes on
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    child_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  json turns() const { return json::parse(read_file(record_))["turns"]; }
  const std::string& screen() const { return screen_; }

 private:
  // Reads what there is; false at the end, or where nothing comes for so many milliseconds, if not 10.
  bool take(int milliseconds) {
    fd_set set;
    FD_ZERO(&set);
    FD_SET(fd_, &set);
    timeval t{milliseconds / 1000, milliseconds % 1000 * 1000};
    if (::select(fd_ + 1, &set, nullptr, nullptr, &t) <= 0) return milliseconds == 10;
    char text[4096];
    const ssize_t n = ::read(fd_, text, sizeof text);
    if (n > 0) screen_.append(text, size_t(n));
    return n > 0;
  }

  std::string record_, screen_;
  size_t seen_ = 0;
  int fd_ = -1;
  pid_t child_ = -1;
  tcflag_t before_ = 0;
};

}  // namespace

TEST_CASE("a chat's counted work is each turn's own, and as predicted", "[cli][chat][cost]") {
  for (auto& [flags, k] : std::vector<std::pair<std::string, int>>{
           {" --k 2", 2}, {" --k 2 --keep-answers", 2}, {" --k 3 --no-bos", 3}, {" --policy pop --k 2", 2}, {"", 4}}) {
    const Model m(golden("scaled.safetensors"));
    const Shape& s = m.config.shape;
    const bool keep = holds(flags, "keep");
    const Piped chat("one\ntwo two\n/policy speed:1\nthree\nfour\n", scaled + flags + " -n 5");
    REQUIRE(chat.turns.size() == 4);
    Earlier earlier;
    for (size_t i = 0; i < 4; ++i) {
      INFO(flags << " turn " << i);
      const json& turn = chat.turns[i];
      Policy p = policy(*find_policy(turn["policy"].get<std::string>()), s.n_layers, turn["k"].get<int>(),
                        turn["bos"].is_null() || turn["bos"].get<bool>());
      CHECK(p.k == (i < 2 ? k : 1));
      const Cost cost{s, p};
      if (i == 2) earlier = {};  // K has changed: all of it is prefilled again
      const size_t N = turn["prompt_tokens"], tail = N - turn["split"].get<size_t>(), steps = turn["decode_steps"];
      CHECK(turn["earlier_tokens"] == earlier.tokens);
      CHECK(turn["prompt_ids"].size() == N);
      CHECK(turn["prefill_flops"] == cost.prefill_flops(N, tail, earlier));
      uint64_t flops = 0;
      for (size_t step = 0; step < steps; ++step)
        flops += cost.decode_flops(earlier.tokens + N + step, earlier.kept + tail + step);
      CHECK(turn["decode_flops"] == flops);
      const size_t n = earlier.tokens + N + steps, decode = earlier.kept + tail + steps;
      CHECK(turn["kv_bytes"] == cost.kv_bytes(n - decode, decode, sizeof(float)));
      earlier = {n, keep ? decode : 0};
    }
  }
}

TEST_CASE("lines of any length, texts of several lines, and lines that begin with /", "[cli][chat]") {
  const Model m(golden("scaled.safetensors"));
  const std::string big = std::string(9000, 'x') + "end";
  const Piped lines(big + "\n  \n\n", scaled + " -n 2 -c 20000");
  REQUIRE(lines.turns.size() == 1);
  CHECK(holds(text_of(m, lines.turns[0]), big));
  auto same = [&](const std::string& typed, const std::string& text) {
    INFO(typed);
    const Piped chat(typed, scaled + " -n 2");
    REQUIRE(chat.turns.size() == 1);
    CHECK(chat.turns[0]["prompt_ids"] == Piped("", scaled + " -n 2 -p '" + text + "'").turns.at(0)["prompt_ids"]);
  };
  same("\"\"\"\none\n\n  two\n\"\"\"\n", "one\n\n  two");
  same("\"\"\"one\ntwo\"\"\"\n", "one\ntwo");
  same("\"\"\"one\"\"\"\n", "one");
  same("\"\"\"one\r\ntwo\r\n\"\"\"\r\n", "one\ntwo");
  same("\"\"\"\n/quit\n\"\"\"\n\"\"\"\"\"\"\n", "/quit");
  same("//quit\n", "/quit");
  same("one\r\n", "one");
  same("  /k 2  \r\none\n", "one");
  const Piped open("one\n\"\"\"two\nthree\n", scaled + " -n 2");
  CHECK(open.turns.size() == 1);
  CHECK(holds(open.err, "speed: this text: the input ended"));
  CHECK(open.code == 0);
}

TEST_CASE("commands of a chat", "[cli][chat]") {
  auto says = [](const std::string& line, const std::string& words, const std::string& flags = "") {
    const Piped chat(line + "\n", scaled + " -n 3" + flags);
    INFO(line << "\n" << chat.err);
    CHECK(holds(chat.err, words));
    CHECK(chat.code == 0);
    CHECK(chat.turns.empty());
  };
  says("/help", "/compare");
  says("/k", "K is a number from 1 to 4");
  says("/k", "speed K=2", " --k 2");
  for (const char* wrong : {"/k 0", "/k 5", "/k x", "/k 2 3", "/k 99999999999", "/k -1"})
    says(wrong, std::string("speed: ") + wrong + ": K is a number from 1 to 4: this model has 4 layers; ");
  says("/k 2", "speed K=2\nspeed: note: these weights were not trained for speed K=2");
  says("/k 2", "has no K; use /policy speed:2", " --policy full");
  says("/k 2", "has no K; use /policy speed:2", " --every 2");
  says("/bos", "BoS is on", " --k 2");
  says("/bos off", "speed K=2 no BoS", " --k 2");
  says("/bos maybe", "expected on or off", " --k 2");
  says("/bos off", "no meaning under policy full");
  says("/policy", "speed K=2", " --k 2");
  says("/policy speed:3:no-bos", "speed K=3 no BoS\nspeed: note: these weights were not trained");
  says("/policy share:2", "share 2/4");
  says("/policy nonsense", "speed: /policy: \"nonsense\" is no policy");
  says("/compare", "nothing was asked yet");
  says("/exit now", "no such command; /help");
  says("/usr/bin", "begins with //");
  says("", "--keep-answers changes nothing under full", " --keep-answers");
  says("/policy full", "--keep-answers changes nothing under full", " --keep-answers --k 2");
  CHECK_FALSE(holds(Piped("", scaled + " --keep-answers --k 2").err, "changes nothing"));
  for (const char* end : {"/exit", "/quit", " /quit", "/quit\r"})
    CHECK(Piped("one\n" + std::string(end) + "\ntwo\n", scaled + " -n 3").turns.size() == 1);
  for (const char* clear : {"/clear", "/reset"}) {
    const Piped chat("one\n" + std::string(clear) + "\none\n", scaled + " -n 3");
    REQUIRE(chat.turns.size() == 2);
    CHECK(chat.turns[0]["prompt_ids"] == chat.turns[1]["prompt_ids"]);
    CHECK(chat.turns[1]["earlier_tokens"] == 0);
  }
  // A change that cannot be leaves the conversation as it is.
  const Piped kept("one\n/k 9\n/policy swiftkv\ntwo\n", scaled + " -n 3"), plain("one\ntwo\n", scaled + " -n 3");
  CHECK(kept.out == plain.out);
  CHECK(kept.turns[1]["earlier_tokens"] == plain.turns[1]["earlier_tokens"]);
}

TEST_CASE("-p is the first turn of a chat", "[cli][chat]") {
  CHECK(Piped("two\n", scaled + " -n 3 -p one").out == Piped("one\ntwo\n", scaled + " -n 3").out);
  CHECK(Piped("", scaled + " -n 3 -p /quit").turns.size() == 1);
  const Piped empty("", scaled + " -p ''");
  CHECK(empty.code == 2);
  CHECK(empty.err == "speed: -p: it is empty; give some text, or leave it out\n");
}

TEST_CASE("/compare answers the last question under other policies, and changes nothing", "[cli][chat]") {
  const std::string flags = scaled + " -n 6";
  const Piped chat("one\ntwo\n/compare speed:2, pop:3\nthree\n", flags), plain("one\ntwo\nthree\n", flags);
  CHECK(chat.turns[2]["prompt_ids"] == plain.turns[2]["prompt_ids"]);
  CHECK(chat.turns[2]["earlier_tokens"] == plain.turns[2]["earlier_tokens"]);
  CHECK(chat.turns[2]["new_ids"] == plain.turns[2]["new_ids"]);
  const std::string second = Piped("one\ntwo\n", flags).out.substr(Piped("one\n", flags).out.size());
  CHECK(holds(chat.out, "── full\n" + second + "── speed K=2\n"));  // full depth is the chat's own policy here
  CHECK(count(chat.out, "── ") == 3);
  CHECK(holds(chat.out, "── pop K=3\n"));
  CHECK(holds(Piped("one\n/compare\n", flags).err, "the policy is full depth itself"));
  CHECK(count(Piped("one\n/compare\n", flags + " --k 2").out, "── ") == 2);
}

TEST_CASE("a chat on a terminal: editing, history, a long paste", "[cli][chat]") {
  const Model m(golden("scaled.safetensors"));
  Scratch scratch;
  Terminal t(scaled + " -n 2 -c 60000", scratch / "r");
  REQUIRE(t.wait_for("/help lists the commands"));
  REQUIRE(t.wait_for("> "));
  auto answered = [&] {
    CHECK(t.wait_for("KV cache"));
    CHECK(t.wait_for("> "));
  };
  t.type(
      "ac\x1b[Db\x1b[Cd\x7f"
      "e\n");  // a c, left, b, right, d, backspace, e
  answered();
  t.type(
      "gr\xc3\xbc\xc3\x9f \xe6\x97\xa5\xe2\x9c\x82\x7f"
      "e\n");  // grüß 日✂, backspace, e
  answered();
  t.type("\x1b[A\x1b[A?\n");  // up, up: the first line again, with a question mark
  answered();
  std::string paste;
  for (int i = 0; paste.size() < 12000; ++i) paste += "word" + std::to_string(i) + " ";
  t.type("first\n" + paste + "end\n");  // most of it comes while the first line is answered
  answered();
  answered();
  std::string lines;
  for (int i = 0; lines.size() < 8000; ++i) lines += "line" + std::to_string(i) + "\n";
  t.type("\"\"\"\n" + lines + "\"\"\"\n");
  answered();
  t.type("\x04");
  CHECK(t.end() == 0);
  const json turns = t.turns();
  REQUIRE(turns.size() == 6);
  CHECK(holds(text_of(m, turns[0]), "abce"));
  CHECK(holds(text_of(m, turns[1]),
              "gr\xc3\xbc\xc3\x9f \xe6\x97\xa5"
              "e"));
  CHECK(holds(text_of(m, turns[2]), "abce?"));
  CHECK(holds(text_of(m, turns[4]), paste + "end"));
  CHECK(holds(text_of(m, turns[5]), lines.substr(0, lines.size() - 1)));
}

TEST_CASE("Ctrl-C on a terminal ends the answer; twice at the prompt, the chat", "[cli][chat]") {
  Scratch scratch;
  Terminal t(tied + " -n 1000000 -c 1000100 -t 1 -p hello", scratch / "r");
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  t.type("\x03");
  CHECK(t.wait_for("; interrupted"));
  REQUIRE(t.wait_for("> "));
  t.type("/k 2\n");
  CHECK(t.wait_for("speed K=2"));
  REQUIRE(t.wait_for("> "));
  t.type("half a li\x03");
  REQUIRE(t.wait_for("Ctrl-C again"));
  REQUIRE(t.wait_for("> "));
  t.type("\"\"\"one\n");
  REQUIRE(t.wait_for("... "));
  t.type("two\x03");  // drops the text
  REQUIRE(t.wait_for("> "));
  t.type("again\n");
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  t.type("\x03");
  CHECK(t.wait_for("; interrupted"));
  REQUIRE(t.wait_for("> "));
  t.type("\x03");
  REQUIRE(t.wait_for("Ctrl-C again"));
  REQUIRE(t.wait_for("> "));
  t.type("\x03");
  CHECK(t.end() == 0);
  const json turns = t.turns();
  REQUIRE(turns.size() == 2);
  CHECK(turns[0]["interrupted"] == true);
  // All of the first answer is in the second turn's prompt, for K has changed since.
  std::vector<int> so_far = turns[0]["prompt_ids"], ids = turns[1]["prompt_ids"];
  const std::vector<int> drawn = turns[0]["new_ids"];
  CHECK(drawn.size() > 1);
  so_far.insert(so_far.end(), drawn.begin(), drawn.end());
  REQUIRE(ids.size() > so_far.size());
  CHECK(std::equal(so_far.begin(), so_far.end(), ids.begin()));
}

TEST_CASE("a signal that kills a chat gives the terminal back", "[cli][chat]") {
  Scratch scratch;
  Terminal t(tied, scratch / "r");
  REQUIRE(t.wait_for("> "));
  t.signal(SIGTERM);
  CHECK(t.end() == 128 + SIGTERM);
}
