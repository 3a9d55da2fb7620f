// The program as a user meets it: every mode and error rule, by running ./speed (or $SPEED) on tiny models.
#include <sys/wait.h>

#include "helpers.h"
#include "../cli/report.h"

using namespace test;

namespace {

struct Ran {
  std::string out, err;
  int code = -1;
};

const std::string program = std::getenv("SPEED") ? std::getenv("SPEED") : "./speed";
const std::string on_tied = " -m tests/golden/tied.safetensors ", on_scaled = " -m tests/golden/scaled.safetensors ",
                  on_swiftkv = " -m tests/golden/swiftkv.safetensors ";

// Runs a shell command in which SPEED stands for the program.
Ran shell(std::string command) {
  Scratch scratch;
  for (size_t at; (at = command.find("SPEED")) != std::string::npos;) command.replace(at, 5, program);
  const int status =
      std::system(("( " + command + " ) </dev/null >" + (scratch / "out") + " 2>" + (scratch / "err")).c_str());
  return {read_file(scratch / "out"), read_file(scratch / "err"),
          WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status)};
}

Ran speed_(const std::string& args) { return shell("SPEED " + args); }

// An error: the exit code, nothing on stdout, one line "speed: what: why; what to do" that holds these words.
void refused(const std::string& args, int code, const std::string& words) {
  const Ran r = speed_(args);
  INFO("speed " << args << "\n" << r.err);
  CHECK(r.code == code);
  CHECK(r.out.empty());
  const std::string& line = r.err;
  CHECK(line.rfind("speed: ", 0) == 0);
  CHECK(std::count(line.begin(), line.end(), '\n') == 1);
  CHECK(line.find("; ") != std::string::npos);
  CHECK(line.find(words) != std::string::npos);
}

std::vector<int> ids_of(const std::string& line) {
  std::istringstream in(line);
  return {std::istream_iterator<int>(in), {}};
}

std::string joined(const std::vector<int>& ids) {
  std::ostringstream s;
  for (size_t i = 0; i < ids.size(); ++i) s << (i ? "," : "") << ids[i];
  return s.str();
}

}  // namespace

TEST_CASE("help and version", "[cli]") {
  const Ran none = speed_("");
  CHECK(none.code == 2);
  CHECK(none.out.empty());
  CHECK(none.err.find("Usage: speed") != std::string::npos);
  CHECK(speed_("--version").out.rfind("speed ", 0) == 0);
  const Ran help = speed_("--help");
  CHECK(help.code == 0);
  for (const char* mode : {"generate", "chat", "logits", "perplexity", "trace", "bench", "plan", "tokenize", "info"}) {
    CHECK(help.out.find(mode) != std::string::npos);
    const Ran r = speed_(std::string(mode) + " --help");
    CHECK(r.code == 0);
    CHECK(r.err.empty());
    CHECK(r.out.find("Usage: speed " + std::string(mode)) != std::string::npos);
    std::istringstream lines(r.out);
    int count = 0;
    for (std::string line; std::getline(lines, line); ++count) CHECK(line.size() <= 80);
    CHECK(count <= 50);
  }
  for (const PolicyInfo& p : policy_table) CHECK(help.out.find(std::string("  ") + p.name + " ") != std::string::npos);
}

TEST_CASE("every policy of the table runs by its name, alone and beside full depth", "[cli]") {
  for (const PolicyInfo& p : policy_table) {
    if (p.takes_group) continue;  // the bundled model has no SwiftKV projections
    INFO(p.name);
    const std::string with = p.takes_kept ? " --every 2" : p.takes_k ? " --k 3" : "";
    const Ran r =
        speed_("-m models/small.safetensors -p 'The code word is' -n 3 --policy " + std::string(p.name) + with);
    CHECK(r.code == 0);
    CHECK(r.err.find(p.name) != std::string::npos);
    const std::string list = p.name + std::string(p.takes_kept ? ":2" : p.takes_k ? ":3" : "");
    const Ran c =
        speed_("-m models/small.safetensors -p 'The code word is' -n 3 --compare speed:8," + list + " -o json");
    CHECK(c.code == 0);
    CHECK(c.out.find("\"policy\": \"" + std::string(p.name) + "\"") != std::string::npos);
  }
}

TEST_CASE("flags that are wrong", "[cli]") {
  refused("--polici speed", 2, "did you mean --policy?");
  refused("generate --promt hi", 2, "did you mean --prompt?");
  refused("generat -p hi", 2, "did you mean generate?");
  refused("-p hi there", 2, "there: a word that belongs to no flag");
  refused(on_tied + "-p hi -n 0", 2, "from 1 to");
  refused(on_tied + "-p hi -n ten", 2, "got ten");
  refused(on_tied + "-p hi -n 99999999999999999999", 2, "whole number");
  refused(on_tied + "-p hi --temp nan", 2, "--temp");
  refused(on_tied + "-p hi --temp -1", 2, "--temp");
  refused(on_tied + "-p hi -n", 2, "-n");
  refused(on_tied + "-p hi -f tests/main.cpp", 2, "more than one text");
  refused(on_tied, 2, "none given");
  refused(on_tied + "-p ''", 2, "empty");
  refused(on_tied + "-p hi --device cuda", 2, "use --device cpu");
  refused(on_tied + "-p hi --system x", 2, "add --chat");
  refused(on_tied + "-p hi -o xml", 2, "text|md|csv|json");
}

TEST_CASE("each flag with what it does not take", "[cli]") {
  for (auto& [flag, words] : std::vector<std::pair<std::string, std::string>>{{"-n 1.5", "from 1 to 1048576"},
                                                                              {"-n ''", "from 1 to"},
                                                                              {"-c 0", "from 1 to"},
                                                                              {"--split -1", "from 0 to"},
                                                                              {"--keep ''", "layer 0 is missing"},
                                                                              {"--keep -1", "\"-1\""},
                                                                              {"--every 0", "from 1 to"},
                                                                              {"--k abc", "got abc"},
                                                                              {"--temp 1e999", "from 0 to 100"},
                                                                              {"--top-k -1", "from 0"},
                                                                              {"--top-p 1.1", "from 0 to 1"},
                                                                              {"--min-p -0.1", "from 0 to 1"},
                                                                              {"-s -1", "from 0"},
                                                                              {"-s 18446744073709551615", "from 0"},
                                                                              {"--device gpu", "auto|cpu|cuda"},
                                                                              {"-t 0", "from 1 to 1024"},
                                                                              {"--chunk 0", "from 1"},
                                                                              {"--date x", "add --chat"},
                                                                              {"--answer-prefix x", "add --chat"},
                                                                              {"--chat --date x", "shows none"},
                                                                              {"--compare ,", "no policy"},
                                                                              {"--compare share", "--keep"},
                                                                              {"--keep-answers", "no such flag"},
                                                                              {"--json", "no such flag"},
                                                                              {"-f x -", "more than one text"}})
    refused(on_tied + "-p hi " + flag, 2, words);
  refused(on_tied + "-p", 2, "missing");
  refused("''", 2, "is no mode");
  refused("-- hi", 2, "no such flag");
  refused("chat" + on_tied + "-f x", 2, "no such flag of speed chat");
  refused("info" + on_tied + "more", 2, "belongs to no flag");
  refused(on_tied + "-f /nonexistent", 1, "cannot be read");
  refused(on_tied + "-f tests", 1, "cannot be read");
  refused(on_tied + "- < tests", 1, "standard input");
  refused(on_tied + "- <&-", 1, "standard input");
  refused(on_tied + "- </dev/null", 2, "empty");
  refused("logits" + on_tied + "--tokens 99999999999 --out x", 2, "no token id");
  refused("logits" + on_tied + "--tokens 269,1 -p hi --out x", 2, "more than one way");
  refused("logits" + on_tied + "--tokens-file /nonexistent --out x", 1, "cannot be read");
  refused("tokenize" + on_tied + "--decode -p -1", 2, "\"-1\"");
  refused("plan --shape llama-3.2-1b --ctx 0", 2, "from 1");
  refused("plan --shape llama-3.2-1b --tail 0", 2, "from 1");
  refused("plan --shape llama-3.2-1b --group 2", 2, "no meaning under policy full");
  refused("plan --shape llama-3.2-1b --weight-bytes 1", 2, "2|4");
  refused("bench" + on_tied + "-r 0", 2, "from 1");
  refused("bench" + on_tied + "--policy speed --k 0", 2, "1 or more");
  refused("bench" + on_tied + "--policy ''", 2, "empty");
  refused("bench" + on_tied + "-p '' -n 0", 2, "nothing to time");
  refused("bench" + on_tied + "-p 0", 2, "one token or more");
  refused("bench" + on_tied + "--depth x", 2, "\"x\"");
  CHECK(speed_(on_tied + "-p one -p two -n 1").out == speed_(on_tied + "-p two -n 1").out);  // the last one counts
  CHECK(speed_("tokenize" + on_tied + "-f tests/main.cpp").out ==
        shell("SPEED tokenize" + on_tied + "- < tests/main.cpp").out);  // byte for byte, the last newline too
}

TEST_CASE("a file that cannot be written is refused before the run, and nothing is left behind", "[cli]") {
  Scratch scratch;
  for (const std::string path : {"/nonexistent/x", "tests", "/proc/x"}) {
    refused(on_tied + "-p hi -n 3 --record " + path, 1, path + ": cannot be written");
    refused("trace" + on_tied + "-p hi --dump " + path, 1, path + ": cannot be written");
    refused("logits" + on_tied + "--tokens 269,1 --out " + path, 1, path + ": cannot be written");
  }
  refused("plan --shape llama-3.2-1b --record " + scratch.path.string(), 1, "Is a directory");
  // Tried, and then refused for another reason: what was there is as it was.
  std::ofstream(scratch / "old") << "old";
  refused(on_tied + "-p '' --record " + (scratch / "old"), 2, "empty");
  refused(on_tied + "-p '' --record " + (scratch / "new"), 2, "empty");
  CHECK(read_file(scratch / "old") == "old");
  CHECK(std::distance(std::filesystem::directory_iterator(scratch.path), {}) == 1);
}

TEST_CASE("too little address space is one line, whatever the limit", "[cli]") {
  if (program.find("sanitize") != std::string::npos) return;  // AddressSanitizer itself needs terabytes of it
  for (const std::string& mode : {std::string("-m models/small.safetensors -p 'hello there' -n 3 -t 2"),
                                  "bench" + on_tied + "-p 8 -n 2 -r 1 -t 2"})
    for (int mib : {64, 96, 160, 320, 560, 620, 640, 660, 680, 700, 750, 800, 900, 1000}) {
      // -t: seconds of processor time, so that waiting for memory for ever ends too
      const Ran r = shell("ulimit -v " + std::to_string(mib << 10) + "; ulimit -t 20; SPEED " + mode);
      INFO(mode << " in " << mib << " MiB: " << r.code << "\n" << r.err);
      CHECK((r.code == 0 || r.code == 2));
      if (r.code == 0) continue;
      const std::string last = r.err.substr(r.err.rfind("speed: "));
      CHECK(last.find("memory") != std::string::npos);
      CHECK(std::count(last.begin(), last.end(), '\n') == 1);
    }
}

TEST_CASE("policies that cannot be", "[cli]") {
  refused(on_tied + "-p hi --k 4", 2, "3 layers");
  refused(on_tied + "-p hi --k 0", 2, "from 1");
  refused(on_tied + "-p hi --policy full --k 2", 2, "has no K");
  refused(on_tied + "-p hi --policy share --k 2 --keep 0", 2, "has no K");
  refused(on_tied + "-p hi --policy share", 2, "--keep");
  refused(on_tied + "-p hi --policy share --keep 1,2", 2, "layer 0 is missing");
  refused(on_tied + "-p hi --policy share --keep 0,3", 2, "layer 3");
  refused(on_tied + "-p hi --policy share --keep 0,x", 2, "\"x\"");
  refused(on_tied + "-p hi --policy share --keep 0 --every 2", 2, "both");
  refused(on_tied + "-p hi --policy pop --keep 0", 2, "--keep");
  refused(on_tied + "-p hi --policy pop --no-bos", 2, "--no-bos");
  refused(on_tied + "-p hi --policy swiftkv", 2, "no SwiftKV weights");
  refused(on_swiftkv + "-p hi --policy swiftkv --k 3", 2, "begin at layer 2");
  refused(on_tied + "-p hi --split 3", 2, "the prompt has 3 tokens");
  refused(on_tied + "-p hi --policy speeed", 2, "speeed");
}

TEST_CASE("default policies", "[cli]") {
  auto first_word = [](const std::string& args) {
    const std::string err = speed_(args).err;
    const size_t at = err.rfind(
        "\n", err.find(": ", err.find("prompt tokens") == std::string::npos ? 0 : err.find("prompt tokens") - 6));
    return err.substr(at == std::string::npos ? 0 : at + 1, 20);
  };
  CHECK(first_word(on_tied + "-n 1 -p hi").rfind("full:", 0) == 0);
  CHECK(first_word(on_tied + "-n 1 -p hi --k 2").rfind("speed K=2:", 0) == 0);
  CHECK(first_word(on_tied + "-n 1 -p hi --policy speed").rfind("speed K=3:", 0) == 0);    // ceil(4 * 3 / 5)
  CHECK(first_word(on_scaled + "-n 1 -p hi --policy speed").rfind("speed K=4:", 0) == 0);  // ceil(4 * 4 / 5)
  CHECK(first_word(on_tied + "-n 1 -p hi --policy pop").rfind("pop K=2:", 0) == 0);        // 3 - floor(3 / 3)
  CHECK(first_word(on_tied + "-n 1 -p hi --keep 2,0,2").rfind("share 2/3:", 0) == 0);
  CHECK(first_word(on_swiftkv + "-n 1 -p hi").rfind("swiftkv K=2:", 0) == 0);  // what the file was adapted to
  CHECK(first_word(on_swiftkv + "-n 1 -p hi --policy full").rfind("full:", 0) == 0);
}

TEST_CASE("a note, once, where weights were not trained for a policy", "[cli]") {
  auto notes = [](const std::string& args) {
    const std::string err = speed_(args).err;
    size_t count = 0;
    for (size_t at = 0; (at = err.find("not trained for", at)) != std::string::npos; ++at) ++count;
    return count;
  };
  CHECK(notes(on_tied + "-n 5 -p hi --k 2") == 1);
  CHECK(notes(on_tied + "-n 5 -p hi --every 2") == 1);
  CHECK(notes(on_tied + "-n 5 -p hi --k 3") == 0);
  CHECK(notes(on_tied + "-n 5 -p hi --policy pop") == 0);
  CHECK(notes(on_tied + "-n 5 -p hi") == 0);
}

TEST_CASE("generate equals Hugging Face's greedy ids", "[cli][golden]") {
  Scratch scratch;
  size_t compared = 0;
  for (const json& j : json::parse(read_file(golden("greedy.json")))) {
    Model m(golden(j["model"]));
    const std::vector<int> ids = j["tokens"], expected = j["new"];
    std::string flags = " --policy " + j["policy"].get<std::string>();
    if (j["policy"] == "speed" || j["policy"] == "pop") flags += " --k " + j["k"].dump();
    if (!j["bos"].get<bool>()) flags += " --no-bos";
    if (!j["keep"].is_null()) flags += " --keep " + joined(j["keep"]);
    // generate takes text, so the ids go in one by one through logits, each step the likeliest.
    std::vector<int> text = ids;
    for (int next : expected) {
      const Ran r = speed_("logits -m " + golden(j["model"]) + flags + " --split " + j["split"].dump() + " --tokens " +
                           joined(text) + " --out " + (scratch / "x.npy"));
      REQUIRE(r.code == 0);
      const auto x = read_npy(scratch / "x.npy");
      const size_t V = m.config.shape.vocab;
      CHECK(arg_max(x.data() + x.size() - V, V) == next);
      text.push_back(next);
      ++compared;
    }
  }
  CHECK(compared > 50);
}

TEST_CASE("generate: text, streams, stops", "[cli]") {
  const Ran a = speed_(on_scaled + "-p 'The quick brown fox' -n 12");
  CHECK(a.code == 0);
  CHECK(a.out.size() > 1);
  CHECK(a.out.back() == '\n');
  CHECK(first_invalid_utf8(a.out) == std::string::npos);
  CHECK(a.err.find("12 new tokens") != std::string::npos);
  CHECK(speed_(on_scaled + "-p 'The quick brown fox' -n 12 -t 1").out == a.out);
  CHECK(shell("printf 'The quick brown fox' | SPEED" + on_scaled + "- -n 12").out == a.out);
  CHECK(speed_(on_scaled + "-p 'The quick brown fox' -n 12 --temp 1 -s 3").out ==
        speed_(on_scaled + "-p 'The quick brown fox' -n 12 --temp 1 -s 3").out);
  CHECK(speed_(on_scaled + "-p 'The quick brown fox' -n 12 --temp 1 -s 3").out !=
        speed_(on_scaled + "-p 'The quick brown fox' -n 12 --temp 1 -s 4").out);
  const std::string text = a.out.substr(0, a.out.size() - 1), stop = text.substr(text.size() / 2, 1);
  if ((stop[0] & 0x80) == 0 && stop != "'") {
    const Ran s = speed_(on_scaled + "-p 'The quick brown fox' -n 12 --stop '" + stop + "'");
    CHECK(s.out == text.substr(0, text.find(stop)) + "\n");
  }
}

TEST_CASE("context", "[cli]") {
  refused(on_tied + "-p 'a rather long prompt' -c 3", 2, "the prompt has");
  refused(on_tied + "-p hi -n 1000", 2, "-c 1003");
  const Ran forced = speed_(on_tied + "-p hi -n 600 -c 603");
  CHECK(forced.code == 0);
  CHECK(forced.err.find("longer than the 512 tokens") != std::string::npos);
  CHECK(speed_(on_tied + "-p hi -n 50 -c 10").code == 0);
}

TEST_CASE("compare", "[cli]") {
  const Ran r = speed_(on_scaled + "-p 'The quick brown fox' -n 8 --k 2 --compare -o json");
  REQUIRE(r.code == 0);
  const json rows = json::parse(r.out)["rows"];
  REQUIRE(rows.size() == 2);
  CHECK(rows[0]["policy"] == "full");
  CHECK(rows[0]["same_top1"] == 1.0);
  CHECK(rows[0]["texts_part_at"].is_null());
  CHECK(rows[1]["k"] == 2);
  CHECK(rows[1]["prefill_flops"] < rows[0]["prefill_flops"]);
  CHECK(rows[1]["kv_bytes"] < rows[0]["kv_bytes"]);
  const Ran list = speed_(on_scaled + "--chat -p hi -n 4 --compare speed:2:no-bos,pop:3,share:2,speed:4 -o csv");
  CHECK(std::count(list.out.begin(), list.out.end(), '\n') == 6);
  CHECK(list.out.find("share 2/4") != std::string::npos);
  const Ran same = speed_(on_scaled + "-p hi -n 8 --compare speed:4 -o json");
  CHECK(json::parse(same.out)["rows"][1]["same_top1"] == 1.0);
  // At a temperature too the same token is full depth's likeliest one, not the one drawn.
  const Ran drawn = speed_(on_scaled + "-p hi -n 12 --temp 1 -s 5 --compare speed:4,speed:1 -o json");
  CHECK(json::parse(drawn.out)["rows"][0]["same_top1"] == 1.0);
  CHECK(json::parse(drawn.out)["rows"][1]["same_top1"] == 1.0);
  CHECK(json::parse(drawn.out)["rows"][2]["same_top1"] < 1.0);
  CHECK(speed_(on_scaled + "-p hi -n 2 --compare ' speed:2 , pop:3' -o csv").code == 0);
  refused(on_scaled + "-p hi --compare sped:2", 2, "\"sped:2\"");
  refused(on_scaled + "-p hi --compare speed:9", 2, "4 layers");
  refused(on_scaled + "-p hi --compare", 2, "full depth itself");
  refused(on_scaled + "-p hi --compare ''", 2, "empty");
  for (const char* flag : {"--k 2", "--policy pop", "--no-bos", "--every 2", "--keep 0"})
    refused(on_scaled + "-p hi --compare speed:2 " + flag, 2, "the list of --compare names its policies");
}

TEST_CASE("a model whose logits are not numbers is refused by every mode that computes", "[cli]") {
  Scratch scratch;
  std::string bytes = read_file(golden("tied.safetensors"));
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  const json entry = json::parse(bytes.substr(8, header))["model.norm.weight"];
  const uint16_t nan = 0x7FC0;
  std::memcpy(bytes.data() + 8 + header + entry["data_offsets"][0].get<size_t>(), &nan, 2);
  std::ofstream(scratch / "nan.safetensors", std::ios::binary) << bytes;
  const std::string model = " -m " + (scratch / "nan.safetensors");
  refused("logits" + model + " --tokens 269,1,2,3 --out " + (scratch / "x.npy"), 1, "not a number");
  CHECK_FALSE(std::filesystem::exists(scratch / "x.npy"));
  refused("perplexity" + model + " --tokens 269,1,2,3", 1, "not a number");
  CHECK(speed_("generate" + model + " -p hi -n 2").code == 1);
}

TEST_CASE("logits", "[cli]") {
  Scratch scratch;
  const std::string out = " --out " + (scratch / "x.npy");
  for (const json& j : json::parse(read_file(golden("cases.json")))) {
    if (j["policy"] != "speed" || j["split"] != 37) continue;
    const Ran r = speed_("logits -m " + golden(j["model"]) + " --tokens " + joined(j["tokens"]) +
                         " --split 37 --policy speed --k " + j["k"].dump() + (j["bos"] ? "" : " --no-bos") + out);
    CHECK(r.code == 0);
    CHECK(r.out.empty());
    const auto x = read_npy(scratch / "x.npy"), ref = read_npy(golden(j["file"]));
    CHECK(worst_row(x, ref, x.size() / 3) < 2e-5);
  }
  CHECK(shell("printf '269,1 2\\n3' >" + (scratch / "ids") + "; SPEED logits" + on_tied + "--tokens-file " +
              (scratch / "ids") + out)
            .code == 0);
  CHECK(speed_("logits" + on_tied + "-p hi" + out).code == 0);
  std::filesystem::remove(scratch / "x.npy");
  refused("logits" + on_tied + "--tokens 269,5", 2, "--out");
  refused("logits" + on_tied + out, 2, "none given");
  refused("logits" + on_tied + "--tokens 269" + out, 2, "2 or more");
  refused("logits" + on_tied + "--tokens 269,1,2 --split 3" + out, 2, "1 to 2");
  refused("logits" + on_tied + "--tokens 269,1,2 --split 0" + out, 2, "1 to 2");
  refused("logits" + on_tied + "--tokens 269,999" + out, 2, "token 999");
  refused("logits" + on_tied + "--tokens 269,-1" + out, 2, "\"-1\"");
  refused("logits" + on_tied + "--tokens 269,269,1" + out, 2, "two BoS");
  refused("logits" + on_tied + "--tokens 1,2,3 --k 2" + out, 2, "expected BoS");
  CHECK_FALSE(std::filesystem::exists(scratch / "x.npy"));
  CHECK(speed_("logits" + on_tied + "--tokens 1,2,3 --k 2 --no-bos" + out).code == 0);
  CHECK(speed_("logits" + on_tied + "--tokens 269,1,2 --out /nonexistent/x.npy").code == 1);
}

TEST_CASE("perplexity", "[cli][perplexity]") {
  Scratch scratch;
  const std::string words = "'" + [] {
    std::string s;
    for (int i = 0; i < 40; ++i) s += "Feta has a clock. Pale lives in the chapel. ";
    return s;
  }() + "'";
  const std::string on_small = " -m models/small.safetensors ", cut = " --prompt-tokens 40 --answer-tokens 20 ";
  auto rows = [](const std::string& args) {
    const Ran r = speed_("perplexity" + args + " -o json");
    INFO(r.err);
    REQUIRE(r.code == 0);
    return json::parse(r.out)["rows"];
  };
  const json two = rows(on_small + "-p " + words + cut + "--k 2 --record " + (scratch / "r.json"));
  REQUIRE(two.size() == 2);
  for (const char* key :
       {"policy", "k", "bos", "name", "tokens", "ppl", "ppl_stderr", "kl_mean", "kl_p99", "same_top1"})
    CHECK(two[1].contains(key));
  CHECK(two[0]["policy"] == "full");
  CHECK(two[0]["kl_mean"] == 0);
  CHECK(two[1]["k"] == 2);
  CHECK(two[1]["kl_mean"] > 0);
  CHECK(two[1]["kl_p99"] > two[1]["kl_mean"]);
  CHECK(two[0]["tokens"] == two[1]["tokens"]);
  CHECK(json::parse(read_file(scratch / "r.json"))["results"] == two);
  const json list = rows(on_small + "-p " + words + cut + "--compare speed:8,speed:2,speed:2:no-bos,pop:3");
  REQUIRE(list.size() == 5);
  CHECK(list[1]["ppl"] == list[0]["ppl"]);  // K = L
  CHECK(list[1]["same_top1"] == 1.0);
  CHECK(list[2] == two[1]);
  CHECK(list[3]["bos"] == false);
  CHECK(rows(on_small + "-p " + words + cut + "-t 1 --k 2") == two);
  CHECK(rows(on_small + "-p " + words + cut + "--policy full").size() == 1);

  // One piece, given as ids: the same as the text that it is.
  std::string ids = speed_("tokenize" + on_small + "-p " + words).out;
  std::istringstream in(ids);
  std::vector<int> piece = {Model("models/small.safetensors").config.bos};
  for (int id; piece.size() < 60 && in >> id;) piece.push_back(id);
  const std::string given = on_small + "--k 2 --tokens " + joined(piece);
  std::ofstream(scratch / "text")
      << speed_("tokenize" + on_small + "--decode -p '" + joined({piece.begin() + 1, piece.end()}) + "'").out;
  const json whole = rows(on_small + cut + "--k 2 -f " + (scratch / "text"));
  CHECK(whole[1]["tokens"] == 20);
  CHECK(rows(given + " --answer-tokens 20") == whole);
  CHECK(rows(given + " --split 39") == whole);
  CHECK(rows(given + " --split 39 --answer-tokens 20") == whole);
  CHECK(rows(given + " --split 30 --answer-tokens 20")[1]["tokens"] == 20);
  CHECK(rows(given + " --split 30 --answer-tokens 20") != whole);
  CHECK(rows(given)[1]["tokens"] == 1);
  CHECK(rows(given)[1]["ppl_stderr"].is_null());

  const Ran text = speed_("perplexity" + on_small + "-p " + words + cut + "--k 2");
  CHECK(text.out.find(" pieces of 40 prompt and 20 answer tokens") != std::string::npos);
  std::istringstream lines(text.out);
  for (std::string line; std::getline(lines, line);) CHECK(line.size() <= 120);
  CHECK(speed_("perplexity" + on_small + "-p " + words + cut + "--k 2 -o md").out.rfind("| policy", 0) == 0);
  CHECK(speed_("perplexity" + on_small + "--prompt-tokens 50 --answer-tokens 5 --k 2 -f " + (scratch / "text"))
            .err.find("5 tokens at the end are left out") != std::string::npos);
  // What one piece holds: the text has more than one.
  CHECK(two[0]["kv_bytes"] == 8 * 60 * 2 * 64 * 4 - 8 * 2 * 64 * 4);
  refused("perplexity" + on_small, 2, "none given");
  refused("perplexity" + given + " -p hi", 2, "more than one way");
  refused("perplexity" + given + " --tokens-file x", 2, "more than one way");
  refused("perplexity" + given + " --prompt-tokens 9", 2, "not cut");
  refused("perplexity" + given + " --split 59", 2, "1 to 58");
  refused("perplexity" + given + " --split 40 --answer-tokens 20", 2, "1 to 39");
  refused("perplexity" + given + " --split 0", 2, "1 to 58");
  refused("perplexity" + given + " --answer-tokens 59", 2, "1 to 58");
  refused("perplexity" + given + ",768", 2, "token 768");
  refused("perplexity" + on_small + "--tokens 0,1", 2, "3 or more");
  refused("perplexity" + on_small + "--tokens 0,x,1", 2, "\"x\"");
  refused("perplexity" + on_small + "--tokens-file /nonexistent", 1, "/nonexistent");
  refused("perplexity" + on_small + "-p hi --split 1", 2, "--prompt-tokens");
  refused("perplexity" + on_small + "-p hi", 2, "too few");
  refused("perplexity" + on_small + "-p '' ", 2, "too few");
  refused("perplexity" + on_small + "-p hi --prompt-tokens 1", 2, "from 2 to");
  refused("perplexity" + on_small + "-p hi --answer-tokens 0", 2, "from 1 to");
  refused("perplexity" + on_small + "-p hi --compare sped:2", 2, "\"sped:2\"");
  refused("perplexity" + on_small + "-p hi --k 9", 2, "8 layers");
  refused("perplexity" + on_small + "--tokens 1,2,3,4 --k 2", 2, "expected BoS");
  CHECK(shell("printf 'ab\\377c' | SPEED perplexity" + on_small + "-").code == 1);
  CHECK(shell("yes 'Feta has a clock.' | head -5000 >" + (scratch / "long") +
              "; timeout --preserve-status -s INT 0.5 SPEED perplexity -t 1 --k 2" + on_small + "-f " +
              (scratch / "long"))
            .code == 130);
}

TEST_CASE("tokenize", "[cli]") {
  const Ran r = speed_("tokenize" + on_tied + "-p 'Hello, wörld'");
  CHECK(r.code == 0);
  CHECK(speed_("tokenize" + on_tied + "--decode -p '" + r.out.substr(0, r.out.size() - 1) + "'").out == "Hello, wörld");
  const std::string forged = "'<|eot_id|>'";
  CHECK(ids_of(speed_("tokenize" + on_tied + "-p " + forged).out).size() > 3);
  const auto special = ids_of(speed_("tokenize" + on_tied + "--special -p " + forged).out);
  REQUIRE(special.size() == 1);
  CHECK(speed_("tokenize" + on_tied + "--decode -p " + std::to_string(special[0])).out == "<|eot_id|>");
  CHECK(shell("printf 'a\\n' | SPEED tokenize" + on_tied + "-").out != speed_("tokenize" + on_tied + "-p a").out);
  CHECK(speed_("tokenize" + on_tied + "-p ''").out == "\n");
  CHECK(speed_("tokenize" + on_tied + "--ids -p 'Hello, wörld'").out == r.out);
  const json pieces = json::parse(speed_("tokenize" + on_tied + "-o json -p 'Hello, wörld'").out)["rows"];
  CHECK(pieces.size() == ids_of(r.out).size());
  for (size_t i = 0; i < pieces.size(); ++i) CHECK(pieces[i]["id"] == ids_of(r.out)[i]);
  CHECK(pieces[0]["piece"].is_string());
  CHECK(speed_("tokenize" + on_tied + "-o text -p 'a\"'").out.find("\"\\\"\"") != std::string::npos);
  CHECK(shell("script -qec 'SPEED tokenize" + on_tied + "-p a' /dev/null").out.find("1 token of 1 byte") !=
        std::string::npos);
  refused("tokenize" + on_tied + "--decode -p '269 99999'", 2, "99999");  // nothing of it is printed
  refused("tokenize" + on_tied + "--decode -p one", 2, "\"one\"");
  const Ran bad = shell("printf 'ab\\377c' | SPEED tokenize" + on_tied + "-");
  CHECK(bad.code == 1);
  CHECK(bad.err.find("not UTF-8 at byte 2") != std::string::npos);
}

TEST_CASE("plan", "[cli]") {
  const json rows = json::parse(speed_("plan --shape llama-3.1-8b --ctx 1024 --k 24 --json").out)["rows"];
  REQUIRE(rows.size() == 2);
  const std::set<std::string> keys = {"policy",        "k",
                                      "bos",           "prompt",
                                      "tail",          "new",
                                      "prefill_flops", "decode_flops",
                                      "kv_bytes",      "decode_read_bytes",
                                      "weight_bytes"};
  for (auto& key : keys) CHECK(rows[1].contains(key));
  CHECK(rows[0]["prefill_flops"] == 14132189331456);
  CHECK(rows[0]["bos"].is_null());
  CHECK(rows[1]["prefill_flops"] == 10493479878656);
  CHECK(rows[1]["bos"] == true);
  CHECK(json::parse(speed_("plan --shape llama-3.1-8b --policy full --json").out)["rows"].size() == 1);
  for (const char* p : {"speed", "pop", "swiftkv --group 2", "share --every 2"})
    CHECK(speed_(std::string("plan --shape llama-3.2-1b --policy ") + p).code == 0);
  CHECK(speed_("plan" + on_tied + "--k 2").code == 0);
  const json many = json::parse(
      speed_("plan --shape llama-3.1-8b --ctx 2048,131072 --policy 'speed:24, speed:24:no-bos,pop:20' --json")
          .out)["rows"];
  REQUIRE(many.size() == 8);
  CHECK(many[0]["policy"] == "full");
  CHECK(many[4]["prompt"] == 131072);
  CHECK(many[6]["bos"] == false);
  // The paper's setting, one request and as many as give its 22 % (30.0 = 14.0 of weights + 16.0 of cache, in GiB).
  CHECK(std::abs(many[5]["first_token_ratio"].get<double>() - 1.35) < 0.005);
  CHECK(std::abs(many[5]["later_token_ratio"].get<double>() - 1.154) < 0.0005);
  const json three = json::parse(speed_("plan --shape llama-3.1-8b --ctx 131072 --k 24 --batch 3 --json").out)["rows"];
  CHECK(three[0]["kv_bytes"] == 3 * many[4]["kv_bytes"].get<uint64_t>());
  CHECK(three[0]["prefill_flops"] == 3 * many[4]["prefill_flops"].get<uint64_t>());
  CHECK(three[0]["decode_read_bytes"].get<uint64_t>() - three[0]["weight_bytes"].get<uint64_t>() ==
        3 * (many[4]["decode_read_bytes"].get<uint64_t>() - many[4]["weight_bytes"].get<uint64_t>()));
  CHECK(speed_("plan --shape llama-3.1-8b --ctx 100 --k 24").out.find("gain nothing") != std::string::npos);
  CHECK(speed_("plan --shape llama-3.1-8b --ctx 131072 --k 24").out.find("gain nothing") == std::string::npos);
  // POP keeps the whole cache: no length changes that, and it is not said.
  const std::string pop = speed_("plan --shape llama-3.1-8b --ctx 131072 --policy pop").out;
  CHECK(pop.find("gain nothing: they read every slot") != std::string::npos);
  CHECK(pop.find("Longer prompts") == std::string::npos);
  CHECK(speed_("plan --shape llama-3.1-8b --policy speed:32").out.find("-0.0 %") == std::string::npos);
  refused("plan --shape llama-3.2-1b --policy pop --no-bos", 2, "--no-bos");
  refused("plan --shape llama-3.2-1b --policy full --k 3", 2, "--k");
  refused("plan --shape llama-3.2-1b --policy speed:x", 2, "speed:x");
  refused("plan --shape llama-3.2-1b --ctx ''", 2, "empty");
  refused("plan --shape llama-3.1-70b --ctx 1048576 --batch 65536", 2, "64 bits");
  refused("plan --shape llama-3.2-1b --ctx 10,,20", 2, "comma");
  refused("plan", 2, "neither given");
  refused("plan --shape llama-9", 2, "llama-9");
  refused("plan --shape llama-3.2-1b" + on_tied, 2, "both given");
  refused("plan --shape llama-3.2-1b --kv-bytes 3", 2, "2|4");
  refused("plan --shape llama-3.2-1b --ctx 10 --tail 11", 2, "--tail");
  refused("plan --shape llama-3.2-1b --k 17", 2, "16 layers");
}

TEST_CASE("bench", "[cli]") {
  const Ran r = speed_("bench" + on_scaled + "-p 8,20 -n 3 --depth 0,10 --policy full,speed,pop --k 2,3 -r 2 -o json");
  REQUIRE(r.code == 0);
  const json tests = json::parse(r.out);
  REQUIRE(tests.size() == 5 * 4);  // full once, speed and pop at two K; two prompts, two depths
  for (auto& t : tests) {
    for (const char* key :
         {"n_prompt",       "n_gen",        "n_depth",  "avg_ns",     "stddev_ns", "avg_ts",  "stddev_ts", "samples_ns",
          "samples_ts",     "policy",       "k",        "bos",        "device",    "threads", "gflops",    "gbps",
          "ceiling_gflops", "ceiling_gbps", "floor_ns", "peak_bytes", "commit"})
      CHECK(t.contains(key));
    CHECK(t["samples_ns"].size() == 2);
    CHECK(t["avg_ts"] > 0);
    CHECK(t["ceiling_gbps"] > 0);
  }
  CHECK(speed_("bench" + on_tied + "-p 8 -n 0 -r 1 -o md").out.rfind("| test", 0) == 0);
  refused("bench" + on_tied + "-p 600", 2, "exceeds the model's 512");
  refused("bench" + on_tied + "--policy fast", 2, "\"fast\"");
  refused("bench" + on_tied + "--policy speed --k 9", 2, "3 layers");
  refused("bench" + on_tied + "-p x", 2, "\"x\"");
}

TEST_CASE("trace", "[cli]") {
  Scratch scratch;
  const Ran r =
      speed_("trace" + on_scaled + "-p 'The quick brown fox' --k 2 -o json --dump " + (scratch / "h.safetensors"));
  REQUIRE(r.code == 0);
  const json rows = json::parse(r.out)["rows"];
  REQUIRE(rows.size() == 6);  // four layers, the head, all
  for (auto& row : rows) CHECK(row["flops"] == row["predicted_flops"]);
  CHECK(rows[0]["prompt_rows"] == rows[0]["kv_rows"].get<int>() - 1);
  CHECK(rows[1]["prompt_rows"] == 0);
  CHECK(rows[2]["kv_rows"] == 1);
  CHECK(rows[2]["slots"] == 2);
  const std::string h = read_file(scratch / "h.safetensors");
  CHECK(h.find("layer.3") != std::string::npos);
  std::istringstream text(speed_("trace" + on_scaled + "-p 'The quick brown fox' --k 2").out);
  for (std::string line; std::getline(text, line);) CHECK(columns(line) <= 80);
}

TEST_CASE("trace as text: equal layers folded, slots named, all within 80 columns", "[cli]") {
  const std::string story = "trace -m models/small.safetensors --chat -f tests/page/story.txt ";
  auto has = [](const std::string& out, const std::string& words) {
    INFO(out << "\nshould hold: " << words);
    CHECK(out.find(words) != std::string::npos);
  };
  for (const std::string flags : {"", "--k 5", "--k 5 --no-bos", "--policy pop --k 3", "--policy share --every 3",
                                  "--k 5 --compare pop:5", "--k 3 --compare", "--split 0 --k 2"}) {
    const Ran r = speed_(story + flags);
    REQUIRE(r.code == 0);
    has(r.out, "Every count is what the formula predicts.");
    std::istringstream text(r.out);
    for (std::string line; std::getline(text, line);) CHECK(columns(line) <= 80);
  }
  const std::string five = speed_(story + "--k 5").out;
  has(five, "\n5-6         0    4  BoS + 4    1,580,032    4.2 %     2,560");
  has(five, "\n4           0   91       91    4,606,976   12.1 %    46,592");
  has(five, "\n0-3        87   91       91   37,925,888  100.0 %    46,592");
  has(five, "161,247,232   59.7 %   240,640");
  has(five, "Layer 4, K-1, makes only keys and values of a prompt token");
  has(five, "From layer 5 up the prompt has no slot; slot 0 is the anchor.\n");
  has(five, "The last token, \"\\n\\n\", has position 90 and slot 4 there; below, slot 90.\n");
  has(five, "prompt        0-86  \"<|begin_of_text|>\"");
  has(five, "decode-phase  87-90");
  has(speed_(story + "--k 5 --no-bos").out, "position 90 and slot 3");
  const std::string two = speed_(story + "--k 5 --compare pop:5").out;
  has(two, "left: speed K=5; right: pop K=5");
  has(two, "\n5-6         0    4  BoS + 4    4.2 %  |       0   91    91    8.9 %");
  has(two, "pop K=5    199,992,832   74.0 %   372,736  100.0 %");
  refused(story + "--k 5 --compare pop:5,pop:4", 2, "one policy");
  refused(story + "--k 5 --compare fast", 2, "no policy");
}

TEST_CASE("trace as a page and as data", "[cli]") {
  Scratch scratch;
  const std::string story = "trace -m models/small.safetensors --chat -f tests/page/story.txt ";
  const Ran once = speed_(story + "--k 5 -o json --html " + (scratch / "a.html"));
  const Ran twice = speed_(story + "--k 5 -o json -t 1 --chunk 700 --html " + (scratch / "b.html"));
  REQUIRE(once.code == 0);
  CHECK(once.out == twice.out);
  CHECK(read_file(scratch / "a.html") == read_file(scratch / "b.html"));
  CHECK(shell("SPEED trace -m models/small.safetensors --chat - -o json --k 5 < tests/page/story.txt").out == once.out);
  const json d = json::parse(once.out);
  CHECK(d["schema"] == "speed-trace/1");
  CHECK(d["runs"].size() == 3 * 7);
  CHECK(d["full"]["text"] == "A camera.");
  for (const json& run : d["runs"]) {
    CHECK(run["counts"] == run["predicted"]);
    CHECK(run["lower_equal"] == true);
    if (run["policy"] == "speed" && run["bos"] == true) {
      const int k = run["k"];
      CHECK(run["text"] == (k >= 5 ? "A camera." : k == 4 ? "A ring." : "A pencil."));
    }
  }
  for (const json& row : d["rows"]) CHECK(!row.contains("seconds"));
  CHECK(json::parse(speed_(story + "-o json --ks 2,5").out)["runs"].size() == 3 * 2);
  CHECK(speed_(story + "--html " + (scratch / "c.html")).out.rfind("full, 8 layers: 91 tokens", 0) == 0);
  refused(story + "--ks 9 -o json", 2, "no K of this model");
  refused(story + "--ks x -o json", 2, "\"x\"");
  refused(story + "--html /nonexistent/x", 1, "cannot be written");
  refused("trace" + on_tied + "-p '" + std::string(1200, 'x') + "' -o json", 2, "the page and its data take 1000");
  refused("trace" + on_tied + "-p '" + std::string(505, 'x') + "' -o json", 2, "exceed the model's 512");
}

TEST_CASE("info and tables", "[cli]") {
  CHECK(speed_("info" + on_tied).out.find("chat template") != std::string::npos);
  const json about = json::parse(speed_("info" + on_tied + "-o json").out);
  CHECK(about["name"] == "tied");
  CHECK(about["layers"] == 3);
  CHECK(about["bos_id"].is_number());
  CHECK(speed_("info" + on_tied + "-o md").out.rfind("| what", 0) == 0);
  CHECK(speed_("info" + on_tied + "-o csv").out.rfind("what,value\n", 0) == 0);
  refused("info -m /nonexistent", 1, "/nonexistent");
  refused("info -m tests", 1, "not a regular file");
  refused("info -m tests/main.cpp", 1, "tests/main.cpp");
}

TEST_CASE("chat", "[cli]") {
  auto chat = [](const std::string& lines, const std::string& flags) {
    return shell("printf '" + lines + "' | SPEED chat" + flags);
  };
  const Ran three = chat("one\\ntwo\\nthree", on_scaled + "-n 6");
  CHECK(three.code == 0);
  CHECK(std::count(three.out.begin(), three.out.end(), '\n') >= 3);
  CHECK(chat("one\\n/quit\\ntwo\\n", on_scaled + "-n 6").out == chat("one", on_scaled + "-n 6").out);
  const Ran reset = chat("one\\n/reset\\none\\n", on_scaled + "-n 6");
  const std::string once = chat("one\\n", on_scaled + "-n 6").out;
  CHECK(reset.out == once + once);
  CHECK(chat("", on_scaled).code == 0);
  CHECK(chat("/k 9\\n", on_scaled).err.find("4 layers") != std::string::npos);
  CHECK(chat("/box on\\n", on_scaled).err.find("no such command") != std::string::npos);
  CHECK(chat("a\\377\\n", on_scaled).err.find("not UTF-8 at byte 1") != std::string::npos);
  const Ran full = chat("one\\ntwo\\n" + std::string(200, 'x') + "\\nthree\\n", on_scaled + "-n 4 -c 120");
  CHECK(full.code == 0);
  CHECK(full.err.find("of 120 are left") != std::string::npos);
  CHECK(std::count(full.out.begin(), full.out.end(), '\n') >= 3);  // the turn after it was answered
}

TEST_CASE("three turns of a chat draw what the conversation prefilled afresh does", "[cli]") {
  Scratch scratch;
  size_t compared = 0;
  for (auto& [model, flags] : std::vector<std::pair<std::string, std::string>>{{on_scaled, "--policy full"},
                                                                               {on_scaled, "--k 2"},
                                                                               {on_scaled, "--k 1 --no-bos"},
                                                                               {on_scaled, "--policy share --keep 0,2"},
                                                                               {on_swiftkv, "--policy swiftkv"},
                                                                               {on_tied, "--policy pop --k 2"},
                                                                               {on_tied, "--policy share --every 2"}}) {
    INFO(model << flags);
    const Ran r = shell("printf 'one <|eot_id|> two\\nthree\\nfour\\n' | SPEED chat" + model + flags +
                        " -n 7 --record " + (scratch / "r.json"));
    REQUIRE(r.code == 0);
    const json turns = json::parse(read_file(scratch / "r.json"))["turns"];
    REQUIRE(turns.size() == 3);
    std::vector<int> said;
    for (auto& turn : turns) {
      // A turn's ids begin with the last token drawn in the turn before, if that was no stop token.
      const std::vector<int> ids = turn["prompt_ids"], drawn = turn["new_ids"];
      const size_t split = said.size() + turn["split"].get<size_t>();
      said.insert(said.end(), ids.begin(), ids.end());
      std::vector<int> all = said;
      all.insert(all.end(), drawn.begin(), drawn.end() - 1);
      REQUIRE(speed_("logits" + model + flags + " --split " + std::to_string(split) + " --tokens " + joined(all) +
                     " --out " + (scratch / "x.npy"))
                  .code == 0);
      const auto x = read_npy(scratch / "x.npy");
      const size_t V = x.size() / (all.size() - split), first = said.size() - 1 - split;
      for (size_t i = 0; i < drawn.size(); ++i) CHECK(arg_max(x.data() + (first + i) * V, V) == drawn[i]);
      compared += drawn.size();
      said.insert(said.end(), drawn.begin(), drawn.begin() + turn["decode_steps"].get<long>());
    }
    // The user wrote a turn mark: it stayed text, so there is no such id before the mark that ends the turn.
    const std::vector<int> first = turns[0]["prompt_ids"];
    const int eot = ids_of(speed_("tokenize" + model + "--special -p '<|eot_id|>'").out).at(0);
    CHECK(std::count(first.begin(), first.end(), eot) == 1);
  }
  CHECK(compared > 100);
}

TEST_CASE("Ctrl-C ends a run with its summary", "[cli]") {
  Scratch scratch;
  const std::string endless = "--chat" + on_tied + "-p hello -n 1000000 -c 1000100 -t 1", out = scratch / "out";
  // One signal, once there is text, 10 s at most. (Not by timeout, which sends two: to the program, then to its group.)
  auto interrupt = [&](const std::string& command) {
    return shell("rm -f " + out + "; " + command + " >" + out + " & for i in $(seq 1000); do [ -s " + out +
                 " ] && break; sleep 0.01; done; kill -INT $!; wait $!");
  };
  const Ran r = interrupt("SPEED " + endless);
  CHECK(r.code == 130);
  CHECK(r.err.find("; interrupted") != std::string::npos);
  CHECK(interrupt("(echo hello; sleep 10) | SPEED chat" + on_tied + "-n 5").code == 0);
  // A closed pipe ends it without a word.
  const Ran closed = shell("SPEED " + endless + " | head -c 5");
  CHECK(closed.out.size() == 5);
  CHECK(closed.err.find("speed: note") != std::string::npos);
  CHECK(std::count(closed.err.begin(), closed.err.end(), '\n') == 2);  // the note on the context, the line on memory
}

TEST_CASE("run record", "[cli]") {
  Scratch scratch;
  CHECK(speed_(on_scaled + "-p hi -n 3 --record " + (scratch / "r.json")).code == 0);
  const json r = json::parse(read_file(scratch / "r.json"));
  for (const char* key : {"program", "command", "device", "seed", "peak_bytes", "result"}) CHECK(r.contains(key));
  CHECK(r["result"]["new_tokens"] == 3);
  // A device or pipe is written to, not replaced by a file.
  CHECK(shell("mkfifo " + (scratch / "pipe") + "; (cat " + (scratch / "pipe") + " & SPEED" + on_scaled +
              "-p hi -n 3 --record " + (scratch / "pipe") + " >&2; wait)")
            .out.find("\"new_tokens\": 3") != std::string::npos);
  CHECK(std::filesystem::is_fifo(scratch / "pipe"));
}

TEST_CASE("what a link points to is written, and the link stays", "[cli]") {
  Scratch scratch;
  namespace fs = std::filesystem;
  std::ofstream(scratch / "real") << "old";
  fs::create_symlink("real", scratch / "link");  // relative, one of another
  fs::create_symlink(scratch / "link", scratch / "two");
  fs::create_symlink("new", scratch / "dangling");
  const std::string run = on_tied + "-p hi -n 3 --record ";
  for (const char* link : {"link", "two", "dangling"}) {
    CHECK(speed_(run + (scratch / link)).code == 0);
    CHECK(fs::is_symlink(scratch / link));
  }
  CHECK(read_file(scratch / "real").find("\"new_tokens\": 3") != std::string::npos);
  CHECK(read_file(scratch / "new").find("\"new_tokens\": 3") != std::string::npos);
  CHECK(speed_("logits" + on_tied + "--tokens 269,1 --out " + (scratch / "two")).code == 0);
  CHECK(read_file(scratch / "real").find("NUMPY") == 1);
  CHECK(speed_("trace" + on_tied + "-p hi --dump " + (scratch / "two")).code == 0);
  CHECK(read_file(scratch / "real").find("layer.0") != std::string::npos);
  // The program's own output, by any of its names: behind what is there already, which must not be cut off.
  for (const char* name : {"/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "-"}) {
    const Ran r = shell("(echo first; SPEED" + run + name + ") >" + (scratch / "all") + "; cat " + (scratch / "all"));
    INFO(name);
    CHECK(r.out.rfind("first\n", 0) == 0);
    CHECK(r.out.find("\"new_tokens\": 3") != std::string::npos);
    CHECK(r.out.find(speed_(on_tied + "-p hi -n 3").out) == 6);
  }
  CHECK(fs::is_symlink("/dev/stdout"));
  CHECK(shell("SPEED logits" + on_tied + "--tokens 269,1 --out - | head -c 6").out == "\x93NUMPY");
  CHECK(std::distance(fs::directory_iterator(scratch.path), {}) == 6);  // nothing unfinished is left
  // What a run reads it does not write over, nor one output over another.
  fs::copy("tests/golden/tied.safetensors", scratch / "m");
  std::ofstream(scratch / "text") << "hi";
  const std::string copied = "-m " + (scratch / "m") + " -f " + (scratch / "text") + " -n 1 --record ";
  refused(copied + (scratch / "m"), 2, "is read by this run");
  refused(copied + (scratch / "text"), 2, "is read by this run");
  refused("logits" + on_tied + "--tokens 269,1 --out " + (scratch / "x") + " --record " + (scratch / "x"), 2,
          "written twice");
  fs::permissions(scratch / "real", fs::perms::owner_read | fs::perms::owner_write);
  CHECK(speed_(run + (scratch / "real")).code == 0);
  CHECK(fs::status(scratch / "real").permissions() == (fs::perms::owner_read | fs::perms::owner_write));
  fs::create_symlink("round", scratch / "round");
  refused(run + (scratch / "round"), 1, "cannot be written");
}

TEST_CASE("text that is piped in", "[cli]") {
  const std::string run = "SPEED" + on_tied + "-n 6 ";
  const std::string said = speed_(on_tied + "-n 6 -p hi").out;
  CHECK(shell("printf hi | " + run).out == said);
  CHECK(shell("echo hi | " + run).out == said);  // one newline at the end is left out
  CHECK(shell("echo hi | " + run + "-").out == said);
  CHECK(shell("echo hi | " + run + "-f -").out == said);
  CHECK(shell("printf 'hi\n\n' | " + run).out == speed_(on_tied + "-n 6 -p 'hi\n'").out);
  const std::string both = speed_(on_tied + "-n 6 -p 'say\nhi'").out;
  CHECK(shell("echo hi | " + run + "-p say").out == both);
  CHECK(shell("echo hi | " + run + "-p say -").out == both);
  CHECK(shell("echo hi | " + run + "-p say").err.find("2 bytes of standard input follow -p") != std::string::npos);
  CHECK(shell("sleep 9 | (" + run + "-p hi; kill $(jobs -p) 2>/dev/null)").out == said);  // a pipe with nothing in it
  CHECK(shell("echo 269 1 | SPEED logits" + on_tied + "--tokens-file - --out -").out ==
        shell("SPEED logits" + on_tied + "--tokens 269,1 --out -").out);
  CHECK(shell("printf 'a\n' | SPEED trace" + on_tied + "-o csv | wc -l").out ==
        speed_("trace" + on_tied + "-p a -o csv | wc -l").out);
}

TEST_CASE("tune finds the smallest K that keeps a bound, and --k auto uses it", "[cli]") {
  Scratch scratch;
  const std::string copy = scratch / "copy.safetensors";
  std::filesystem::copy("models/small.safetensors", copy);
  std::ofstream text(scratch / "text");
  const std::array<const char*, 5> facts = {"Feta has a clock.", "Pale lives in the chapel.", "Kara is a driver.",
                                            "Nomi has a ring.", "Feta is a barber."};
  for (int i = 0; i < 60; ++i) text << facts[size_t(i * i + i / 3) % 5] << (i % 7 ? " " : "\n");
  text.close();
  const std::string on = " -m " + copy + " -f " + (scratch / "text") + " --prompt-tokens 60 --answer-tokens 30 ";
  const json rows = json::parse(speed_("tune" + on + "-o json").out)["rows"];
  REQUIRE(rows.size() >= 2);
  // From L-1 down, each as perplexity has it, until one does not keep the bound.
  for (size_t i = 0; i < rows.size(); ++i) {
    CHECK(rows[i]["k"] == 7 - int(i));
    CHECK(rows[i]["keeps"] == (i + 1 < rows.size() || rows[i]["k"] == 1));
    CHECK(rows[i]["kl_low"] <= rows[i]["kl"]);
    CHECK(rows[i]["kl"] <= rows[i]["kl_high"]);
    if (rows[i]["keeps"] == false) continue;
    const json p =
        json::parse(speed_("perplexity" + on + "--compare speed:" + rows[i]["k"].dump() + " -o json").out)["rows"][1];
    CHECK(std::abs(p["kl_mean"].get<double>() - rows[i]["kl"].get<double>()) < 1e-12);  // sums in another order
    CHECK(std::abs(p["same_top1"].get<double>() - rows[i]["same_top1"].get<double>()) < 1e-12);
  }
  // A bound between two of them parts them; so does one on the share of equal tokens.
  const double between = (rows[0]["kl"].get<double>() + rows[1]["kl"].get<double>()) / 2;
  const Ran one =
      speed_("tune" + on + "--max-kl " + std::to_string(between) + " --write --svg " + (scratch / "plot.svg"));
  CHECK(one.out.find("Use: --policy speed --k 7\n") != std::string::npos);
  CHECK(read_file(scratch / "plot.svg").rfind("<svg", 0) == 0);
  CHECK(speed_("tune" + on + "--min-same 100 --max-kl 100").out.find("speed K=") != std::string::npos);
  CHECK(speed_("tune" + on + "--max-kl 0").out.find("No K below 8 keeps it") != std::string::npos);
  CHECK(speed_("-m " + copy + " -p hi -n 4 --k auto").out == speed_("-m " + copy + " -p hi -n 4 --k 7").out);
  CHECK(speed_("-m " + copy + " -p hi -n 4 --k auto").err.find("speed K=7") != std::string::npos);
  const json both = json::parse(speed_("tune" + on + "--policy speed,pop --no-bos -o json").out)["rows"];
  CHECK(both[0]["bos"] == false);
  CHECK(both[both.size() - 1]["policy"] == "pop");
  const Ran none = speed_("tune" + on + "--max-kl 0 --write");
  CHECK(none.code == 1);
  CHECK(none.err.find("no K keeps") != std::string::npos);
  refused("tune" + on + "--policy full", 2, "no K to choose");
  refused("-m models/small.safetensors -p hi --k auto", 2, "no K was chosen");
  refused("-m " + copy + " -p hi --k auto --no-bos", 2, "brings its own policy");
  refused("bench" + on_tied + "--k auto", 2, "takes numbers");
  refused("tune" + on + "--policy speed:3", 2, "leave the number out");
  CHECK(speed_("info -m " + copy).out.find("speed K=7") != std::string::npos);
  CHECK(speed_("tune" + on + "--max-kl 0 --svg " + (scratch / "zero.svg")).code == 0);  // a logarithm has no 0
  CHECK(read_file(scratch / "zero.svg").size() < 20000);
  const Ran changed = shell("printf 'hi\\n/k 3\\n/policy pop:5\\n' | SPEED chat -n 2 --k auto -m " + copy);
  CHECK(changed.err.find("speed K=3") != std::string::npos);
  CHECK(changed.err.find("pop K=5") != std::string::npos);
}

TEST_CASE("completion knows the modes and their flags", "[cli]") {
  auto complete = [](const std::string& words, int at) {
    return shell("bash -c 'eval \"$(SPEED completion)\"; COMP_WORDS=(speed " + words +
                 "); COMP_CWORD=" + std::to_string(at) + "; _speed; echo ${COMPREPLY[*]}'")
        .out;
  };
  CHECK(complete("tr", 1) == "trace\n");
  CHECK(complete("plan --ba", 2) == "--batch\n");
  CHECK(complete("-p x --no-b", 3) == "--no-bos\n");
  CHECK(complete("info --ba", 2) == "\n");
  CHECK(complete("info -m models/small", 3) == "models/small.safetensors\n");
}

TEST_CASE("why an answer ended", "[cli]") {
  const std::string small = "-m models/small.safetensors -p 'The code word is' ";
  auto ended = [](const std::string& args) {
    const json j = json::parse(speed_(args + " -o json").out);
    CHECK(j["model"]["name"].is_string());
    CHECK(j["date"].get<std::string>().size() == 20);
    CHECK(j["text"].is_string());
    return j["ended"].get<std::string>();
  };
  CHECK(ended(small) == "stop token");
  CHECK(ended(small + "-n 1") == "-n reached");
  CHECK(ended(small + "--stop a") == "stop text");
  CHECK(ended(small + "-c 6") == "context full");
  CHECK(speed_(small + "-n 1").err.find("; -n reached") != std::string::npos);
  CHECK(speed_(small + "-n 1").err.find("1 new token;") != std::string::npos);
  CHECK(json::parse(speed_(small + " -o json").out)["text"].get<std::string>() + "\n" == speed_(small).out);
  refused(small + "-o md", 2, "no table");
}

TEST_CASE("flags that change nothing are noted; a note never stands before an error", "[cli]") {
  for (const char* flag : {"--top-k 3", "--top-p 0.5", "--min-p 0.1", "-s 4"}) {
    CHECK(speed_(on_tied + "-p hi -n 1 " + flag).err.find("changes nothing at temperature 0") != std::string::npos);
    CHECK(speed_(on_tied + "-p hi -n 1 --temp 1 " + flag).err.find("changes nothing") == std::string::npos);
  }
  const Ran r = speed_(on_tied + "-p hi --top-k 3 --split 900");
  CHECK(r.code == 2);
  CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
  if (program.find("sanitize") == std::string::npos)  // that one has no model beside it
    CHECK(speed_("-p hi -n 1").err.rfind("small (bundled; -m names another model): ", 0) == 0);
  CHECK(speed_(on_tied + "-p hi -n 1").err.rfind("tied: ", 0) == 0);
}

TEST_CASE("other names for modes and flags", "[cli]") {
  CHECK(speed_("help").out == speed_("--help").out);
  CHECK(speed_("help plan").out == speed_("plan --help").out);
  CHECK(speed_("generate --help").out.find("{false}") == std::string::npos);
  refused("run -p hi", 2, "did you mean speed generate?");
  refused("-v", 2, "did you mean speed --version?");
  refused("serve", 2, "did you mean speed chat?");
  const std::string said = speed_(on_tied + "-p hi -n 3 --temp 1 -s 2").out;
  CHECK(speed_(on_tied + "-p hi --predict 3 --temperature 1 -s 2").out == said);
  CHECK(speed_(on_tied + "-p hi --predict=3 --temperature=1 -s 2").out == said);
  for (const char* flag : {"-m", "--record", "-f"}) refused(on_tied + "-p hi " + flag + " ''", 2, "empty");
}

TEST_CASE("what the system does to a run ends it in one line and leaves no half-written file", "[cli]") {
  Scratch scratch;
  auto one_line = [](const Ran& r, int code, const std::string& words) {
    INFO(r.err);
    CHECK(r.code == code);
    CHECK(r.err.find(words) != std::string::npos);
  };
  for (const std::string& mode :
       {"tokenize" + on_tied + "-p hi", on_tied + "-p hi -n 3", "info" + on_tied, std::string("--help")})
    one_line(shell("SPEED " + mode + " >/dev/full"), 1, "standard output: cannot be written");
  std::string ids = "269";
  for (int i = 0; i < 3000; ++i) ids += "," + std::to_string(i % 200);
  // Waits until the output has begun, 5 s at most.
  const std::string begun =
      "for i in $(seq 500); do ls " + (scratch / "x.npy") + ".part.* && break; sleep 0.01; done; ";
  const std::string long_run = "logits -t 1 --chunk 4 --split 1 --tokens " + ids + " --out " + (scratch / "x.npy");
  one_line(shell("ulimit -f 8; SPEED " + long_run + on_tied), 1, "cannot be written: File too large");
  CHECK(shell("SPEED " + long_run + " -m models/small.safetensors & " + begun + "kill $!; wait $!").code == 143);
  one_line(shell("cp models/small.safetensors " + (scratch / "m") + "; SPEED " + long_run + " -m " + (scratch / "m") +
                 " & " + begun + "truncate -s 70000 " + (scratch / "m") + "; wait $!"),
           1, "model file: it was cut short");
  std::filesystem::remove(scratch / "m");
  CHECK(std::filesystem::is_empty(scratch.path));
  CHECK(shell("sleep 2 | timeout --preserve-status -s INT 0.5 SPEED tokenize" + on_tied + "-").code == 130);
  refused("logits" + on_tied + "--tokens-file tests --out " + (scratch / "x.npy"), 1, "tests: cannot be read");
  refused(on_tied + "-p hi --stop ''", 2, "--stop");
  refused(on_tied + "-p hi --k '1\n2'", 2, "1?2");
}
