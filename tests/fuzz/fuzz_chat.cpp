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

void compare(const ChatTemplate::Turn& turn, const std::vector<int>& expected, const std::string& text, bool whole) {
  std::vector<int> specials;
  std::string shown;
  for (int id : turn.ids) {
    if (is_special(id)) specials.push_back(id);
    shown += model().tokenizer->decode(id);
  }
  require(specials == expected, "special tokens are those of the marks");
  require(turn.ids.empty() || turn.split < turn.ids.size(), "one token at least is decode-phase");
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
  if (j["trim"].is_boolean())
    return accepted([&] { chat->first(part[1], part[2], {}, part[4]); }), 0;  // the older form
  using Marks = std::array<std::string, 2>;
  const bool takes_system = !j["system"].is_null();
  const Marks s = takes_system ? Marks(j["system"]) : Marks(), g = j["generation"], past = j["past"];
  const std::string open = j["open"], empty = j["system_empty"].is_null() ? "" : std::string(j["system_empty"]);
  const std::string &user = part[2], &prefix = part[4];
  bool whole = true;
  for (const char* role : {"system", "after_system", "user", "assistant"}) whole = whole && j["trim"][role] == "none";
  const bool shows_date = (open + '\0' + s[0] + '\0' + s[1] + '\0' + empty).find("{date}") != std::string::npos;
  // An empty system or date text stands for none given.
  std::optional<std::string> system, day;
  if (!part[1].empty() && takes_system && (whole || j["system_empty"].is_null())) system = part[1];
  if (!part[3].empty() && shows_date) day = part[3];
  const std::string date = day ? *day : j["date_default"].is_null() ? "" : j["date_default"].get<std::string>();
  accepted([&] {
    const ChatTemplate::Turn turn = chat->first(system, user, day, prefix);
    std::vector<int> expected;
    if (system) specials_of(s[0], expected, true), specials_of(s[1], expected, true);
    else specials_of(open, expected, true);
    const std::string text = system ? dated(s[0], date) + *system + dated(s[1], date) : dated(open, date);
    for (const std::string& mark : g) specials_of(mark, expected);
    compare(turn, expected, text + user + g[0] + g[1] + prefix, whole);
  });
  accepted([&] {
    const std::vector<std::string> turns = {user, prefix, user};
    const ChatTemplate::Turn turn = chat->whole({}, turns, day);
    std::vector<int> expected;
    specials_of(open, expected, true);
    for (const std::string& mark : {past[0], past[1], g[0], g[1]}) specials_of(mark, expected);
    compare(turn, expected, dated(open, date) + user + past[0] + prefix + past[1] + user + g[0] + g[1], whole);
  });
  accepted([&] {
    const ChatTemplate::Turn turn = chat->next(user, prefix);
    std::vector<int> expected;
    for (const std::string& mark : {past[1], g[0], g[1]}) specials_of(mark, expected);
    compare(turn, expected, past[1] + user + g[0] + g[1] + prefix, whole);
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
