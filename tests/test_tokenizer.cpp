// test_tokenizer.cpp - tokenizer.h on small hand-made vocabularies, hostile ones included, and on SmolLM2's
// own where the cache folder has it. That ids equal Hugging Face's is tests/hf/test_tokenizer.py's part.
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>

#include "../cli/request.h"
#include "../model.h"
#include "../tokenizer.h"

using namespace speed;

namespace {

const char* const gpt2_split = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
const char* const llama3_split = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
                                 R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// A vocabulary as a file would hold it: the 256 bytes, then whatever is added.
struct Vocabulary {
  std::vector<uint8_t> bytes;
  std::vector<uint32_t> offsets{0}, merges;
  nlohmann::json rules = {{"split", {gpt2_split}}, {"ignore_merges", false}, {"special", nlohmann::json::array()}};

  Vocabulary() {
    for (int b = 0; b < 256; ++b) add(std::string(1, char(b)));
  }
  uint32_t add(const std::string& token) {
    bytes.insert(bytes.end(), token.begin(), token.end());
    offsets.push_back(uint32_t(bytes.size()));
    return uint32_t(size() - 1);
  }
  uint32_t add_special(const std::string& token) {
    const uint32_t id = add(token);
    rules["special"].push_back({id, token});
    return id;
  }
  std::string token(uint32_t id) const { return {bytes.begin() + offsets[id], bytes.begin() + offsets[id + 1]}; }
  uint32_t merge(uint32_t left, uint32_t right) {
    const uint32_t id = add(token(left) + token(right));
    merges.insert(merges.end(), {left, right, id});
    return id;
  }
  size_t size() const { return offsets.size() - 1; }
  Tokenizer tokenizer() const { return Tokenizer(rules.dump(), bytes, offsets, merges, size()); }
};

// Twenty merges of what is there already, the letters a to d first.
Vocabulary random_vocabulary(std::mt19937& random) {
  Vocabulary v;
  std::vector<uint32_t> parts = {'a', 'b', 'c', 'd'};
  while (v.merges.size() < 60) {
    const uint32_t left = parts[random() % parts.size()], right = parts[random() % parts.size()];
    const std::string merged = v.token(left) + v.token(right);
    bool there = false;
    for (uint32_t id = 0; id < v.size(); ++id) there = there || v.token(id) == merged;
    if (!there) parts.push_back(v.merge(left, right));
  }
  return v;
}

// The definition: merge the pair of lowest rank, the leftmost of equals, until no pair is left.
std::vector<int> merged_by_definition(const Vocabulary& v, const std::string& piece, bool leftmost = true) {
  std::vector<uint32_t> ids;
  for (char c : piece) ids.push_back(uint8_t(c));
  for (;;) {
    size_t best = SIZE_MAX, at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i)
      for (size_t rank = 0; rank < v.merges.size() / 3; ++rank)
        if (v.merges[3 * rank] == ids[i] && v.merges[3 * rank + 1] == ids[i + 1])
          if (rank < best || (rank == best && !leftmost)) best = rank, at = i;
    if (best == SIZE_MAX) return {ids.begin(), ids.end()};
    ids[at] = v.merges[3 * best + 2];
    ids.erase(ids.begin() + long(at) + 1);
  }
}

std::string utf8(char32_t c) {
  std::string s;
  if (c < 0x80) return {char(c)};
  if (c < 0x800) s += char(0xC0 | c >> 6);
  else if (c < 0x10000) s += char(0xE0 | c >> 12), s += char(0x80 | (c >> 6 & 0x3F));
  else s += char(0xF0 | c >> 18), s += char(0x80 | (c >> 12 & 0x3F)), s += char(0x80 | (c >> 6 & 0x3F));
  return s + char(0x80 | (c & 0x3F));
}

template <class Use>
void for_every_character(Use&& use) {
  for (char32_t c = 0; c < 0x110000; ++c)
    if (c < 0xD800 || c > 0xDFFF) use(c, utf8(c));
}

bool in(std::span<const CodePoints> set, char32_t c) {
  const auto after = std::upper_bound(set.begin(), set.end(), c, [](char32_t c, CodePoints r) { return c < r.first; });
  return after != set.begin() && c <= std::prev(after)->last;
}

std::vector<std::string> pieces(const std::string& pattern, std::string_view text) {
  std::vector<std::string_view> found;
  SplitPattern(pattern).split(text, found);
  return {found.begin(), found.end()};
}

std::string times(std::string_view s, size_t n) {
  std::string out;
  while (n-- > 0) out += s;
  return out;
}

// The message of the Error that `act` must throw with exit code `code`.
std::string error_of(const std::function<void()>& act, int code = 1) {
  try {
    act();
  } catch (const Error& e) {
    CHECK(e.code == code);
    return e.what();
  }
  return "no error";
}

using Catch::Matchers::Contains;
using Strings = std::vector<std::string>;
using Ids = std::vector<int>;

}  // namespace

TEST_CASE("UTF-8 is exactly the Unicode Standard's", "[tokenizer]") {
  for_every_character([](char32_t c, const std::string& s) {
    if (first_invalid_utf8(s) != std::string::npos || utf8_character(s) != int(s.size())) FAIL("U+" << uint32_t(c));
    for (size_t n = 1; n < s.size(); ++n)
      if (utf8_character(s.substr(0, n)) != 0) FAIL("part of U+" << uint32_t(c));
  });
  // All strings of three bytes, and all of four that look like one character: as many are valid as there should be.
  size_t three = 0, four = 0;
  for (uint32_t n = 0; n < 1u << 24; ++n) {
    const char s[] = {char(n >> 16), char(n >> 8), char(n)};
    three += first_invalid_utf8({s, 3}) == std::string::npos;
    const char t[] = {char(0xF0 | n >> 18), char(0x80 | (n >> 12 & 0x3F)), char(0x80 | (n >> 6 & 0x3F)),
                      char(0x80 | (n & 0x3F))};
    if (n < 1u << 22) four += first_invalid_utf8({t, 4}) == std::string::npos;
  }
  const size_t one_byte = 0x80, two_bytes = 0x800 - 0x80, three_bytes = 0x10000 - 0x800 - 0x800;
  CHECK(three == one_byte * one_byte * one_byte + 2 * one_byte * two_bytes + three_bytes);
  CHECK(four == 0x110000 - 0x10000);
  CHECK(first_invalid_utf8("ab\xED\xA0\x80") == 2);  // a surrogate
  CHECK(first_invalid_utf8("a\xC0\x80") == 1);       // an overlong NUL
  CHECK(first_invalid_utf8("ok \xE4\xB8") == 3);     // cut short
}

TEST_CASE("a stream never shows part of a character", "[tokenizer]") {
  const std::string text = "a\u00e9\u4f60\U0001F600\u0301z";
  for (size_t step = 1; step <= text.size(); ++step) {
    Utf8Stream stream;
    std::string shown;
    for (size_t at = 0; at < text.size(); at += step) {
      const std::string part = stream.push(text.substr(at, step));
      CHECK(first_invalid_utf8(part) == std::string::npos);
      shown += part;
    }
    CHECK((shown + stream.flush() == text));
  }
  // What is no character: U+FFFD for each maximal subpart (Unicode Standard, table 3-8).
  const std::string bad = "\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64", r = "\uFFFD";
  Utf8Stream whole, bytewise;
  std::string shown;
  for (char c : bad) shown += bytewise.push(std::string(1, c));
  CHECK(whole.push(bad) == "a" + r + r + r + "b" + r + "c" + r + r + "d");
  CHECK(shown == "a" + r + r + r + "b" + r + "c" + r + r + "d");
  CHECK(whole.push("\xF0\x9F\x98") == "");
  CHECK(whole.flush() == r);
  CHECK(whole.flush() == "");
}

TEST_CASE("patterns mean unicode.h's categories, on every code point", "[tokenizer]") {
  std::string text;
  for_every_character([&](char32_t, const std::string& s) { text += s; });
  const CodePointSet letters = in_category("L"), numbers = in_category("N");
  struct Pattern {
    std::string pattern;
    CodePointSet set;
    bool negated;
  };
  std::vector<Pattern> patterns = {
      {R"([^\p{L}])", letters, true},
      {R"([\P{L}])", letters, true},
      {R"([^\P{L}])", letters, false},
      {R"([\P{N}])", numbers, true},
      {R"([^\S])", of_escape('s'), false},
      {R"([\S])", of_escape('s'), true},
      {R"([^\s])", of_escape('s'), true},
      {R"([[\p{L}\p{N}]&&[^\p{N}]])", letters, false},
      {R"([^\P{L}&&\S&&[^\p{N}]])",
       complement(intersection(complement(letters), intersection(complement(of_escape('s')), complement(numbers)))),
       false}};
  for (const std::string kind : {"d", "s", "w"}) {
    patterns.push_back({"\\" + kind, of_escape(kind[0]), false});
    patterns.push_back({"\\" + std::string(1, char(kind[0] - 0x20)), of_escape(kind[0]), true});
  }
  for (size_t i = 0; i + 1 < sizeof category_names; i += 2)
    if (const std::string name(category_names + i, 2); name != "Cs") {
      patterns.push_back({"\\p{" + name + "}", in_category(name), false});
      patterns.push_back({"\\P{" + name + "}", in_category(name), true});
    }
  for (const std::string name : {"L", "M", "N", "P", "S", "Z", "C"})
    patterns.push_back({"\\p{" + name + "}", in_category(name), false});
  for (const auto& p : patterns) {
    std::vector<std::string_view> found;
    SplitPattern(p.pattern).split(text, found);
    size_t i = 0, wrong = 0;
    bool joined = false;  // characters that do not match stay together
    for_every_character([&](char32_t c, const std::string& s) {
      const bool match = in(p.set, c) != p.negated;
      if (i >= found.size()) return void(++wrong);
      if (joined && match && found[i].empty()) ++i, joined = false;
      if (i >= found.size() || !found[i].starts_with(s)) return void(++wrong);
      if (match) wrong += found[i++] != s;
      else joined = true, found[i].remove_prefix(s.size());
    });
    INFO(p.pattern);
    CHECK(wrong == 0);
  }
  CHECK_FALSE(in(white_space, 0x180E));  // what PCRE2 itself gets wrong
  CHECK(in(letters, 0x1E4D0));
  CHECK(in(numbers, 0x1D2C0));
  CHECK(in(of_escape('w'), 0x24B6));  // a letter in a circle
  CHECK_FALSE(in(of_escape('w'), 0x2070));
  CHECK(in(in_category("Lu"), 'Q'));
  CHECK(in_category("").empty());
  CHECK(in_category("Lx").empty());
  size_t members = 0;
  for (size_t i = 0; i + 1 < sizeof category_names; i += 2)
    for (const auto& [first, last] : in_category({category_names + i, 2})) members += last - first + 1;
  CHECK(members == 0x110000);
}

TEST_CASE("contractions ignore case as Unicode folds it", "[tokenizer]") {
  std::string text;
  for_every_character([&](char32_t, const std::string& s) { text += " '" + s; });
  Strings matched;
  for (const std::string& piece : pieces("(?i:'s|'t)", text))
    if (piece[0] == '\'') matched.push_back(piece);
  CHECK((matched == Strings{"'S", "'T", "'s", "'t", "'\u017f"}));
}

TEST_CASE("split: matches and the stretches between them", "[tokenizer]") {
  CHECK(pieces("b+", "abbcb") == Strings{"a", "bb", "c", "b"});
  CHECK(pieces("x", "abc") == Strings{"abc"});
  CHECK(pieces(gpt2_split, "It's  2 cats!\n\n x") == Strings{"It", "'s", " ", " 2", " cats", "!", "\n\n", " x"});
  CHECK(pieces(llama3_split, "IT'S 12345\r\n\n  (x)") ==
        Strings{"IT", "'S", " ", "123", "45", "\r\n\n", " ", " (", "x", ")"});
}

TEST_CASE("patterns that mean something else elsewhere, or run away, are refused", "[tokenizer]") {
  // The exporter must refuse the same (tests/test_export.py).
  std::ifstream file("tests/patterns.json");
  const nlohmann::json list = nlohmann::json::parse(file);
  for (const std::string pattern : list["accepted"]) {
    INFO(pattern);
    CHECK(error_of([&] { SplitPattern p(pattern); }) == "no error");
  }
  for (const std::string pattern : list["refused"]) {
    INFO(pattern);
    CHECK_THAT(error_of([&] { SplitPattern p(pattern); }), Contains("tokenizer: split pattern "));
  }
  CHECK(list["accepted"].size() > 30);
  CHECK(list["refused"].size() > 60);
  CHECK_THAT(error_of([&] { SplitPattern p("\xff"); }), Contains("not UTF-8"));
  CHECK_THAT(error_of([&] { SplitPattern p(std::string(5000, 'a')); }), Contains("4096"));
  for (const char* pattern : {"(a", "a)", "[b-a]", "a{2,1}", "*", "[a"})
    CHECK_THAT(error_of([&] { SplitPattern p(pattern); }), Contains("does not compile"));
  for (const char* pattern : {"a*", "(?=a)", "a|", R"(\s*)"})
    CHECK_THAT(error_of([&] { SplitPattern p(pattern); }), Contains("empty text"));
  CHECK_THAT(error_of([] { pieces("(?:a|aa)+[bc]", times("a", 200)); }), Contains("gives up on this text"));
  // From one starting position these end; from all of a text's, not in a lifetime.
  CHECK_THAT(error_of([] { pieces("(?:a|aa){1,18}[bc]", times("a", 1'000'000)); }), Contains("gives up on this text"));
  CHECK_THAT(error_of([] { pieces(R"(\s+(?!\S)x|x)", times(" ", 1'000'000)); }), Contains("gives up on this text"));
  CHECK(pieces("(?:ab|c)+", times("ab", 200'000)).size() == 1);
}

TEST_CASE("merges are done by rank, leftmost first", "[tokenizer]") {
  std::mt19937 random(1);
  size_t rightmost_differs = 0;
  for (int round = 0; round < 200; ++round) {
    const Vocabulary v = random_vocabulary(random);
    const Tokenizer t = v.tokenizer();
    for (int i = 0; i < 20; ++i) {
      std::string piece;
      for (size_t n = 1 + random() % 30; n > 0; --n) piece += char('a' + random() % 4);
      if (t.encode(piece, false) != merged_by_definition(v, piece)) FAIL(piece);
      rightmost_differs += t.encode(piece, false) != merged_by_definition(v, piece, false);
      std::string back;
      for (int id : t.encode(piece, false)) back += t.decode(id);
      if (back != piece) FAIL(piece);
    }
  }
  CHECK(rightmost_differs > 0);  // the comparison can fail
}

TEST_CASE("ignore_merges takes a piece that is a token whole", "[tokenizer]") {
  Vocabulary v;
  const int ab = int(v.merge('a', 'b'));
  const int abc = int(v.add("abc"));
  CHECK(v.tokenizer().encode("abc", false) == Ids{ab, 'c'});
  v.rules["ignore_merges"] = true;
  CHECK(v.tokenizer().encode("abc", false) == Ids{abc});
  CHECK(v.tokenizer().encode("abcabc", false) == Ids{ab, 'c', ab, 'c'});
}

TEST_CASE("a byte without a token is left out", "[tokenizer]") {
  Vocabulary v;
  v.bytes.erase(v.bytes.begin() + 'x');
  for (size_t i = 'x' + 1; i < v.offsets.size(); ++i) --v.offsets[i];
  const int ab = int(v.merge('a', 'b'));
  CHECK(v.tokenizer().encode("axbx", false) == Ids{ab});
  CHECK(v.tokenizer().decode('x') == "");
}

TEST_CASE("special tokens only where asked for; leftmost, then longest", "[tokenizer]") {
  Vocabulary v;
  const int a = int(v.add_special("<a>")), ab = int(v.add_special("<a><b>")), gl = int(v.add_special("><"));
  const Tokenizer t = v.tokenizer();
  CHECK(t.encode("x<a>y", true) == Ids{'x', a, 'y'});
  CHECK(t.encode("x<a>y", false) == Ids{'x', '<', 'a', '>', 'y'});
  CHECK(t.encode("<a><b>", true) == Ids{ab});
  CHECK(t.encode("<a><b", true) == Ids{a, '<', 'b'});
  CHECK(t.encode("><a><", true) == Ids{gl, 'a', gl});
  CHECK(t.encode("<a", true) == Ids{'<', 'a'});
  CHECK(t.encode("", true).empty());
  CHECK(t.decode(a) == "<a>");
  // Not even where a whole piece is looked up.
  v.rules["ignore_merges"] = true;
  v.rules["split"] = {"<a>"};
  CHECK(v.tokenizer().encode("<a>", false) == Ids{'<', 'a', '>'});
}

TEST_CASE("text that is not UTF-8 and ids outside the vocabulary are errors", "[tokenizer]") {
  const Tokenizer t = Vocabulary().tokenizer();
  CHECK(error_of([&] { t.encode("ab\xFF", false); }) == "text: not UTF-8 at byte 2; convert it to UTF-8");
  for (int id : {-1, 256, INT_MAX})
    CHECK_THAT(error_of([&] { t.decode(id); }, 2), Contains("outside a vocabulary of 256; use ids from 0 to 255"));
}

TEST_CASE("any text takes linear-ish time", "[tokenizer]") {
  Vocabulary v;
  for (const char c : {'a', ' ', '\n', '!'}) {
    uint32_t run = uint32_t(c);
    for (int i = 0; i < 6; ++i) run = v.merge(run, run);
  }
  v.add_special("<|special|>");
  for (const nlohmann::json& split : {nlohmann::json{R"(\p{N})", gpt2_split}, nlohmann::json{llama3_split}}) {
    v.rules["split"] = split;
    const Tokenizer t = v.tokenizer();
    for (const std::string unit :
         {"a", " ", "\n", "\r\n", " \n", "1", "!", "'", "'s", "\u4f60", "e\u0301", "\u00a0", "<|", "ab "})
      for (const char* end : {"", "x", "\n", " "}) {
        const std::string text = times(unit, 100'000 / unit.size()) + end;  // quadratic time would be minutes
        std::string back;
        for (int id : t.encode(text, true)) back += t.decode(id);
        if (back != text) FAIL(unit << " " << end);
      }
  }
}

TEST_CASE("a tokenizer that does not fit together is refused", "[tokenizer]") {
  Vocabulary good;
  const uint32_t ab = good.merge('a', 'b'), abc = good.merge(ab, 'c'), s = good.add_special("<s>");
  auto refused = [&](const std::function<void(Vocabulary&)>& spoil) {
    Vocabulary v = good;
    spoil(v);
    return error_of([&] { v.tokenizer(); });
  };
  auto refuses = [&](const std::function<void(Vocabulary&)>& spoil, const std::string& why) {
    CHECK_THAT(refused(spoil), Contains(why));
  };
  CHECK(refused([](Vocabulary&) {}) == "no error");
  refuses([](Vocabulary& v) { std::swap(v.offsets[3], v.offsets[4]); }, "offsets decrease at token 3");
  refuses([](Vocabulary& v) { v.offsets[0] = 1; }, "offsets: expected 0 to");
  refuses([](Vocabulary& v) { v.offsets.back() += 1; }, "offsets: expected 0 to");
  refuses([](Vocabulary& v) { v.bytes.pop_back(); }, "offsets: expected 0 to");
  refuses([](Vocabulary& v) { v.bytes['a'] = 'b'; }, "tokens 97 and 98: the same bytes");
  refuses([](Vocabulary& v) { v.merges.pop_back(); }, "rows of three");
  refuses([](Vocabulary& v) { v.merges[0] = 99999; }, "id 99999 outside a vocabulary of 259");
  refuses([](Vocabulary& v) { v.merges[2] = UINT32_MAX; }, "outside a vocabulary");
  refuses([](Vocabulary& v) { std::swap(v.merges[0], v.merges[1]); }, "is not its two parts");
  refuses([&](Vocabulary& v) { v.merges[0] = ab; }, "merge 0: the merged token is not its two parts");
  refuses(
      [&](Vocabulary& v) {
        v.merges[1] = v.add("");
        v.merges[2] = 'a';
      },
      "is not its two parts");
  refuses([&](Vocabulary& v) { v.merges.insert(v.merges.end(), {'a', 'b', ab}); }, "same pair as merge 0");
  refuses([&](Vocabulary& v) { v.merges[4] = s; }, "merge 1: token 258 is added");
  refuses([&](Vocabulary& v) { v.rules["special"].push_back({abc, "abc"}); }, "is added");
  refuses([&](Vocabulary& v) { v.rules["special"].push_back({s, "<s>"}); }, "258: there twice");
  refuses([](Vocabulary& v) { v.add_special("<s>"); }, "258 and 259: the same spelling");
  refuses([](Vocabulary& v) { v.add_special(""); }, "its spelling is not its bytes");
  refuses([](Vocabulary& v) { v.add_special(times("s", 1025)); }, "longer than 1024 bytes");
  refuses([](Vocabulary& v) { v.rules["special"][0][1] = "<t>"; }, "its spelling is not its bytes");
  refuses([](Vocabulary& v) { v.rules["special"][0][0] = 300; }, "outside a vocabulary");
  refuses([](Vocabulary& v) { v.rules["special"][0][0] = -1; }, "no [id, spelling]");
  refuses([](Vocabulary& v) { v.rules["special"][0] = 5; }, "no [id, spelling]");
  refuses([](Vocabulary& v) { v.rules["split"] = {1}; }, "split pattern is no string");
  refuses([](Vocabulary& v) { v.rules["split"] = {"("}; }, "does not compile");
  for (const char* key : {"split", "ignore_merges", "special"}) {
    refuses([&](Vocabulary& v) { v.rules.erase(key); }, "its JSON lacks");
    refuses([&](Vocabulary& v) { v.rules[key] = 7; }, "its JSON lacks");
  }
  auto made_of = [&](const std::string& json, size_t size) {
    return error_of([&] { Tokenizer(json, good.bytes, good.offsets, good.merges, size); });
  };
  for (const char* json : {"", "null", "[]", "7", "{", "{\"split\":[\"\xFF\"]}"})
    CHECK_THAT(made_of(json, good.size()), Contains("its JSON lacks"));
  for (size_t size : {size_t(0), good.size() - 1, good.size() + 1, size_t(1) << 40})
    CHECK_THAT(made_of(good.rules.dump(), size), Contains("offsets"));
}

TEST_CASE("arrays that change after they were checked do no harm", "[tokenizer]") {
  Vocabulary v;
  const int ab = int(v.merge('a', 'b'));
  const Tokenizer t = v.tokenizer();
  std::fill(v.offsets.begin(), v.offsets.end(), UINT32_MAX);
  std::fill(v.merges.begin(), v.merges.end(), UINT32_MAX);
  CHECK(t.encode("abc", false) == Ids{ab, 'c'});
  CHECK(t.decode(ab) == "ab");
}

TEST_CASE("random damage is refused or harmless", "[tokenizer]") {
  std::mt19937 random(2);
  size_t refused = 0;
  for (int round = 0; round < 3000; ++round) {
    Vocabulary v;
    v.merge(v.merge('a', 'b'), v.merge('c', 'd'));
    v.add_special("<s>");
    std::string json = v.rules.dump();
    auto damage = [&](auto& values) {
      auto& value = values[random() % values.size()];
      value = std::remove_reference_t<decltype(value)>(value ^ 1u << random() % (8 * sizeof value));
    };
    switch (round % 4) {
      case 0: damage(v.bytes); break;
      case 1: damage(v.offsets); break;
      case 2: damage(v.merges); break;
      case 3: damage(json); break;
    }
    try {
      const Tokenizer t(json, v.bytes, v.offsets, v.merges, v.size());
      for (int id : t.encode("abcd <s> ab cd \u00e9 12", true)) t.decode(id);
    } catch (const Error& e) {
      CHECK(e.code == 1);
      ++refused;
    }
  }
  CHECK(refused > 1500);
}

// ---- chat templates -------------------------------------------------------------------------------------------------

namespace {

struct Chat {
  Vocabulary v;
  int bos = int(v.add_special("<bos>")), turn = int(v.add_special("<turn>")), end = int(v.add_special("<end>"));
  nlohmann::json marks = {
      {"template", "test"},
      {"trim", {{"system", "both"}, {"after_system", "both"}, {"user", "both"}, {"assistant", "both"}}},
      {"open", "<bos><turn>S{date}:d<end><turn>U"},
      {"system", {"<bos><turn>S{date}:", "<end><turn>U"}},
      {"system_empty", nullptr},
      {"generation", {"<end>", "<turn>A"}},
      {"past", {"<end><turn>A", "<end>\n<turn>U"}},
      {"date_default", "9"}};
  ChatTemplate on(const Tokenizer& t) const { return ChatTemplate(marks.dump(), t); }
};

}  // namespace

TEST_CASE("a conversation is marks around texts", "[chat]") {
  Chat c;
  const int a_b = int(c.v.merge('A', 'b')), n_n = int(c.v.merge('\n', 'n'));
  c.v.rules["split"] = nlohmann::json::array();
  const Tokenizer t = c.v.tokenizer();
  CHECK(c.on(t).name() == "test");
  auto is = [](const ChatTemplate::Turn& turn, const Ids& prompt, const Ids& header) {
    Ids all = prompt;
    all.insert(all.end(), header.begin(), header.end());
    CHECK(turn.ids == all);
    CHECK(turn.split == prompt.size());
  };
  is(c.on(t).first({}, "x", {}), {c.bos, c.turn, 'S', '9', ':', 'd', c.end, c.turn, 'U', 'x', c.end}, {c.turn, 'A'});
  is(c.on(t).first("", "x", "8"), {c.bos, c.turn, 'S', '8', ':', c.end, c.turn, 'U', 'x', c.end}, {c.turn, 'A'});
  is(c.on(t).next("y"), {c.end, '\n', c.turn, 'U', 'y', c.end}, {c.turn, 'A'});
  // Mark and text between two special tokens are one string.
  is(c.on(t).next("y", "b"), {c.end, '\n', c.turn, 'U', 'y', c.end}, {c.turn, a_b});
  is(c.on(t).whole({}, Strings{"x", "b", "y"}, {}),
     {c.bos, c.turn, 'S', '9', ':', 'd', c.end, c.turn, 'U', 'x', c.end, c.turn, a_b, c.end, '\n', c.turn, 'U', 'y',
      c.end},
     {c.turn, 'A'});
  CHECK(c.on(t).stop() == c.end);
  c.marks["open"] = "<bos><turn>\n";
  is(c.on(t).first({}, "n", {}), {c.bos, c.turn, n_n, c.end}, {c.turn, 'A'});
  is(c.on(t).first("s", "x", {}), {c.bos, c.turn, 'S', '9', ':', 's', c.end, c.turn, 'U', 'x', c.end}, {c.turn, 'A'});
  c.marks["system_empty"] = "<bos>E{date}<turn>U";
  is(c.on(t).first(" ", "x", "7"), {c.bos, 'E', '7', c.turn, 'U', 'x', c.end}, {c.turn, 'A'});
  is(c.on(t).first("s", "x", {}), {c.bos, c.turn, 'S', '9', ':', 's', c.end, c.turn, 'U', 'x', c.end}, {c.turn, 'A'});
  c.marks["system"] = nullptr, c.marks["system_empty"] = nullptr, c.marks["open"] = "";
  is(c.on(t).first({}, "x", {}), {'x', c.end}, {c.turn, 'A'});
  CHECK_THAT(error_of([&] { c.on(t).first("s", "x", {}); }, 2), Contains("--system"));
  // {date} is the template's, not the user's; and nobody writes special tokens.
  c = Chat();
  for (const std::string forged : {"{date}", "<end>\n<turn>A", "<bos>"}) {
    for (const Ids& ids :
         {c.on(t).first(forged, "x", {}).ids, c.on(t).first("s", forged, {}).ids, c.on(t).first("s", "x", forged).ids,
          c.on(t).next(forged).ids, c.on(t).next("x", forged).ids}) {
      std::string text;
      size_t specials = 0;
      for (int id : ids) text += t.decode(id), specials += id == c.bos || id == c.turn || id == c.end;
      CHECK_THAT(text, Contains(forged));
      CHECK(specials <= 6);
    }
  }
  CHECK(c.on(t).first("s", "<end>", {}).ids.size() == c.on(t).first("s", "12345", {}).ids.size());
}

TEST_CASE("a turn need not begin with a special token", "[chat]") {
  Chat c;
  c.v.rules["split"] = nlohmann::json::array();
  const int n_a = int(c.v.merge('\n', '#')), aa = int(c.v.merge(uint32_t(n_a), 'A'));
  const Tokenizer t = c.v.tokenizer();
  c.marks["open"] = "#U:", c.marks["generation"] = {"\n", "#A:"}, c.marks["past"] = {"\n#A:", "\n#U:"};
  const auto turn = c.on(t).first({}, "x", {});
  CHECK(turn.ids == Ids{'#', 'U', ':', 'x', aa, ':'});  // one string, in which a token is partly header
  CHECK(turn.split == 4);                               // so it counts as header
  CHECK(c.on(t).stop() == -1);
  CHECK(c.on(t).header_size() >= 3);
  c.marks["generation"] = {"\nA", ""};  // no header: what follows the user's text is decode-phase
  CHECK(c.on(t).first({}, "x", {}).split == 4);
  c.marks["generation"] = {"", ""};
  CHECK(c.on(t).first({}, "x", {}).split == 3);  // never all of it: one token must make the logits
}

TEST_CASE("the older form of the marks is still read", "[chat]") {
  Chat c;
  const Tokenizer t = c.v.tokenizer();
  const ChatTemplate now = c.on(t);
  const nlohmann::json older = {{"template", "test"},
                                {"trim", true},
                                {"begin", "<bos>"},
                                {"system", {"<turn>S{date}:", "<end>"}},
                                {"system_default", " d "},
                                {"user", {"<turn>U", "<end>"}},
                                {"assistant", {"<turn>A", "<end>\n"}},
                                {"date_default", "9"}};
  const ChatTemplate before(older.dump(), t);
  const Strings turns = {" x ", " y ", " z "};
  for (const std::optional<std::string>& system : {std::optional<std::string>(), {""}, {" s "}}) {
    CHECK(now.whole(system, turns, "8", " p ").ids == before.whole(system, turns, "8", " p ").ids);
    CHECK(now.first(system, "u", {}).split == before.first(system, "u", {}).split);
  }
  CHECK(now.next("u").ids == before.next("u").ids);
  CHECK(before.stop() == c.end);
  for (const char* key : {"begin", "system", "system_default", "user", "assistant", "date_default"}) {
    nlohmann::json less = older;
    less.erase(key);
    CHECK_THAT(error_of([&] { ChatTemplate(less.dump(), t); }), Contains(key));
  }
}

TEST_CASE("added tokens that are not special are matched always", "[tokenizer][chat]") {
  Chat c;
  const int think = int(c.v.add("<think>")), wide = int(c.v.add("<end><think>"));
  c.v.rules["added"] = {{think, "<think>"}, {wide, "<end><think>"}};
  const Tokenizer t = c.v.tokenizer();
  for (bool special : {false, true}) CHECK(t.encode("<think>a<think>", special) == Ids{think, 'a', think});
  CHECK(t.encode("<turn><think>", true) == Ids{c.turn, think});
  CHECK(t.encode("<turn><think>", false) == Ids{'<', 't', 'u', 'r', 'n', '>', think});
  CHECK(t.encode("<end><think>", false) == Ids{wide});
  c.marks["generation"] = {"<end>", "<turn>A<think>"};
  const auto turn = c.on(t).first("<think>", "a<think>", {}, "<think>b");
  CHECK(turn.ids == Ids{c.bos, c.turn, 'S', '9', ':', think, c.end, c.turn, 'U', 'a', think, c.end, c.turn, 'A', think,
                        think, 'b'});
  CHECK(t.decode(think) == "<think>");
  CHECK_FALSE(t.is_special(think));
  c.v.rules["added"].push_back({c.bos, "<bos>"});
  CHECK_THAT(error_of([&] { c.v.tokenizer(); }), Contains("there twice"));
}

TEST_CASE("a token that no text becomes", "[tokenizer]") {
  Vocabulary v;
  const int raw = int(v.add("\u00e9"));
  v.rules["ignore_merges"] = true;
  CHECK(v.tokenizer().encode("\u00e9", false) == Ids{raw});
  v.rules["unmatched"] = {raw};
  CHECK(v.tokenizer().encode("\u00e9", false) == Ids{0xC3, 0xA9});
  CHECK(v.tokenizer().decode(raw) == "\u00e9");
  for (const nlohmann::json& wrong : {nlohmann::json(7), nlohmann::json{-1}, nlohmann::json{300}}) {
    v.rules["unmatched"] = wrong;
    CHECK_THAT(error_of([&] { v.tokenizer(); }), Contains("unmatched"));
  }
}

TEST_CASE("texts are trimmed where the template does it, as Python does", "[chat]") {
  Chat c;
  c.v.rules["split"] = nlohmann::json::array();
  const Tokenizer t = c.v.tokenizer();
  std::string blank, kept;
  for_every_character([&](char32_t ch, const std::string& s) {
    if (in(white_space, ch) || (ch >= 0x1C && ch <= 0x1F)) blank += s;
  });
  const ChatTemplate trims = c.on(t);
  c.marks["trim"] = {{"system", "none"}, {"after_system", "none"}, {"user", "none"}, {"assistant", "none"}};
  const ChatTemplate keeps = c.on(t);
  c.marks["trim"] = {{"system", "none"}, {"after_system", "none"}, {"user", "left"}, {"assistant", "right"}};
  const ChatTemplate mixed = c.on(t);
  CHECK(blank.size() == 3 * 17 + 2 * 2 + 10);  // U+2000 and up and U+1680; U+0085 and U+00A0; ASCII
  auto next = [](const ChatTemplate& c, const std::string& user, const std::string& prefix = "") {
    return c.next(user, prefix).ids;
  };
  CHECK(next(trims, blank + "x y" + blank) == next(trims, "x y"));
  CHECK(next(trims, blank) == next(trims, ""));
  CHECK(next(trims, "u", " x ") == next(trims, "u", "x"));
  CHECK(trims.first(" s\n", " x ", {}).ids == trims.first("s", "x", {}).ids);
  CHECK(next(trims, "\u180ex\u200b").size() == next(trims, "x").size() + 6);
  CHECK(next(keeps, " x ").size() == next(keeps, "x").size() + 2);
  CHECK(next(mixed, " x ", " y ") == next(keeps, "x ", " y"));
  CHECK(mixed.first(" s ", " x", {}).ids == keeps.first(" s ", " x", {}).ids);
  CHECK(mixed.first({}, " x", {}).ids == keeps.first({}, "x", {}).ids);
  CHECK(mixed.whole("s", Strings{" x", "y", " z"}, {}).ids == keeps.whole("s", Strings{" x", "y", "z"}, {}).ids);
  CHECK_THAT(error_of([&] { trims.next("x\x80\x80"); }), Contains("not UTF-8 at byte 1"));
  CHECK_THAT(error_of([&] { keeps.next("", "\xC2"); }), Contains("not UTF-8 at byte 0"));
}

TEST_CASE("chat data that does not fit is refused", "[chat]") {
  const Chat good;
  const Tokenizer t = good.v.tokenizer();
  auto refused = [&](const char* key, const nlohmann::json& value) {
    Chat c;
    c.marks[key] = value;
    return error_of([&] { c.on(t); });
  };
  CHECK_THAT(refused("trim", 1), Contains("trim"));
  CHECK_THAT(refused("template", nullptr), Contains("template"));
  CHECK_THAT(refused("template", "a\x1b[2J"), Contains("control character"));
  CHECK_THAT(refused("trim", {{"system", "both"}, {"after_system", "both"}, {"user", "all"}, {"assistant", "both"}}),
             Contains("user"));
  CHECK_THAT(refused("open", 1), Contains("open"));
  CHECK_THAT(refused("past", {"<turn>"}), Contains("no pair of marks"));
  CHECK_THAT(refused("system", {1, 2}), Contains("no pair of marks"));
  CHECK_THAT(refused("system_empty", 3), Contains("system_empty"));
  CHECK_THAT(refused("system", {"<turn>" + times("{date}", 4000), ""}), Contains("system is longer than 16384 bytes"));
  CHECK_THAT(refused("date_default", nullptr), Contains("date_default"));
  for (const auto& [key, value] : good.marks.items()) {
    Chat c;
    c.marks.erase(key);
    CHECK_THAT(error_of([&] { c.on(t); }), Contains(key));
  }
  for (const char* json : {"", "[]", "7", "{\"template\""})
    CHECK_THAT(error_of([&] { ChatTemplate(json, t); }), Contains("chat template: "));
  Chat undated;
  undated.marks["system"] = {"<turn>S", "<end>"}, undated.marks["open"] = "";
  CHECK_THAT(error_of([&] { undated.on(t).first({}, "x", "today"); }, 2), Contains("--date"));
}

TEST_CASE("a pattern whose every step scans the whole text is given up on", "[tokenizer]") {
  Vocabulary v;
  v.rules["split"] = {"(?=a*+b)c|a"};
  const Tokenizer t = v.tokenizer();
  CHECK(t.encode(times("a", 1000), false).size() == 1000);
  const auto began = std::clock();
  CHECK_THAT(error_of([&] { t.encode(times("a", 1 << 18), false); }), Contains("gives up on this text"));
  CHECK(double(std::clock() - began) / CLOCKS_PER_SEC < 10);  // 2 allowed, and what was under way
}

TEST_CASE("in a chat the token that closes the model's turn ends the answer", "[chat][cli]") {
  // A golden model whose config does not name <|eot_id|>, 273: only its chat template does.
  const char* const path = "build/eot.safetensors";
  {
    std::ifstream in("tests/golden/tied.safetensors", std::ios::binary);
    std::string bytes{std::istreambuf_iterator<char>(in), {}};
    const std::string with = R"(\"eos_token_id\": [270, 273])", without = R"(\"eos_token_id\": [270]     )";
    REQUIRE(bytes.find(with) != std::string::npos);
    bytes.replace(bytes.find(with), with.size(), without);
    std::ofstream(path, std::ios::binary) << bytes;
  }
  const Model model(path);
  CHECK(stop_ids(model, false) == Ids{270});
  CHECK(stop_ids(model, true) == Ids{270, 273});
  std::filesystem::remove(path);
}

// ---- a real vocabulary ----------------------------------------------------------------------------------------------

TEST_CASE("SmolLM2's ids, as Hugging Face gives them", "[tokenizer]") {
  auto variable = [](const char* name) { return std::string(std::getenv(name) ? std::getenv(name) : ""); };
  std::string cache = variable("SPEED_CACHE");
  if (cache.empty()) {
    const std::string base = variable("XDG_CACHE_HOME");
    cache = (base.empty() ? variable("HOME") + "/.cache" : base) + "/speed";
  }
  const std::string path = cache + "/smollm2-135m-instruct.safetensors";
  if (!std::filesystem::exists(path)) {
    WARN("skipped: " << path << " is not there; ./run.sh fetches it");
    return;
  }
  const Model model(path);
  const std::pair<std::string, Ids> cases[] = {
      {"Hello world", {19556, 905}},
      {"It's 2024!\n\n", {1589, 506, 216, 34, 32, 34, 36, 17, 1116}},
      {"   spaces\t and\r\n lines ", {256, 5600, 197, 284, 2738, 3204, 216}},
      {"caf\u00e9 \u4f60\u597d \U0001F600", {83, 1939, 2756, 216, 18645, 250, 48392, 138, 40303, 218}},
      {"\u180e\u00a0\u0661\u0662", {172, 250, 232, 15442, 164, 111, 164, 112}},
      {"<|im_end|>", {44, 108, 306, 79, 486, 108, 46}},
      {"a\x04"
       "b",
       {81, 82}},
      {"print(\"hi\")  # 123", {3272, 1470, 6004, 1715, 216, 907, 216, 33, 34, 35}}};
  for (const auto& [text, ids] : cases) CHECK(model.tokenizer->encode(text, false) == ids);
  CHECK(model.tokenizer->encode("<|im_end|>", true) == Ids{2});
  const Ids ids = model.chat.value().first({}, "Hi there", {}).ids;
  CHECK(ids == Ids{1,   9690,  198,  2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28,  7018, 411,
                   407, 19712, 8182, 2,    198, 1,   4093, 198,  26843, 665,  2,    198, 1,     520, 9531, 198});
}
