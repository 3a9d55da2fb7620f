// Chat templates of any shape around texts of any content: the special tokens of a rendered conversation are those of
// the marks and no others, whatever the system, the user and the date say.
//
// Input: a template's JSON, then system, user, date and answer texts, split by NUL.
#include "fuzz.h"

using namespace fuzz;

namespace {

const Model& model() {
  static const Model m("tests/golden/tied.safetensors");
  return m;
}

// The golden model's last tokens, five special ones and what pads the vocabulary.
bool is_special(int id) { return id >= 269; }

// The special tokens spelt in the marks, whose {date}s are no part of any spelling.
void specials_of(std::string mark, std::vector<int>& ids, bool dated = false) {
  for (size_t at; dated && (at = mark.find("{date}")) != std::string::npos; mark.erase(0, at + 6))
    specials_of(mark.substr(0, at), ids);
  for (int id : model().tokenizer->encode(mark, true))
    if (is_special(id)) ids.push_back(id);
}

void compare(const std::vector<int>& ids, const std::vector<int>& expected, const std::string& text, bool whole) {
  std::vector<int> specials;
  std::string shown;
  for (int id : ids) {
    if (is_special(id)) specials.push_back(id);
    shown += model().tokenizer->decode(id);
  }
  require(specials == expected, "special tokens are those of the marks");
  require(!ids.empty() && is_special(ids[0]), "a turn begins with a token of its own, whatever stands before it");
  if (whole) require(shown == text, "nothing is lost, added or moved");
}

std::string dated(std::string mark, const std::string& date) {
  std::string out;
  for (size_t at; (at = mark.find("{date}")) != std::string::npos; mark.erase(0, at + 6))
    out += mark.substr(0, at) + date;
  return out + mark;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<std::string> part(1);
  for (char c : std::string_view(reinterpret_cast<const char*>(data), size))
    if (c == 0 && part.size() < 5) part.emplace_back();
    else part.back() += c;
  part.resize(5);
  std::optional<ChatTemplate> chat;
  const Limit limit(5);
  if (!accepted([&] { chat.emplace(part[0], *model().tokenizer); })) return 0;
  const json j = json::parse(part[0]);
  using Marks = std::array<std::string, 2>;
  const Marks s = j["system"], u = j["user"], a = j["assistant"];
  const std::string begin = j["begin"], &user = part[2], &prefix = part[4];
  const bool whole = !j["trim"], shows_date = (s[0] + '\0' + s[1]).find("{date}") != std::string::npos;
  // An empty system or date text stands for none given.
  std::optional<std::string> system, day;
  if (!part[1].empty()) system = part[1];
  if (!part[3].empty() && shows_date) day = part[3];
  accepted([&] {
    const std::vector<int> ids = chat->first(system, user, day);
    std::vector<int> expected;
    std::string text = begin;
    specials_of(begin, expected);
    if (system || !j["system_default"].is_null()) {
      const std::string date = day ? *day : j["date_default"].is_null() ? "" : j["date_default"].get<std::string>();
      specials_of(s[0], expected, true), specials_of(s[1], expected, true);
      text += dated(s[0], date) + (system ? *system : j["system_default"].get<std::string>()) + dated(s[1], date);
    }
    specials_of(u[0], expected), specials_of(u[1], expected);
    compare(ids, expected, text + u[0] + user + u[1], whole);
  });
  accepted([&] {
    const std::vector<int> ids = chat->next(user);
    std::vector<int> expected;
    for (const std::string& mark : {a[1], u[0], u[1]}) specials_of(mark, expected);
    compare(ids, expected, a[1] + u[0] + user + u[1], whole);
  });
  accepted([&] {
    const std::vector<int> ids = chat->answer(prefix);
    std::vector<int> expected;
    specials_of(a[0], expected);
    compare(ids, expected, a[0] + prefix, whole);
  });
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  std::mt19937 random(seed);
  const std::string all(reinterpret_cast<char*>(data), size);
  const size_t end = std::min(all.find('\0'), all.size());
  json j = json::parse(all.substr(0, end), nullptr, false);
  if (!j.is_object() || random() % 2) return LLVMFuzzerMutate(data, size, max_size);
  mutate(j, random);
  return replace(data, size, max_size, j.dump(-1, ' ', false, json::error_handler_t::replace) + all.substr(end));
}
