// chat.h - a conversation as token ids: the model's turn marks around what people and the model say.
#pragma once

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"
#include "tokenizer.h"

namespace speed {

// A chat template, as data. A conversation is
//   begin, system[0] text system[1], then for every turn  user[0] text user[1] assistant[0] text assistant[1]
// Marks are text in which spellings of special tokens stand for their ids, and in `system` {date} for a date. What
// stands between the marks is only text: no one can forge a turn. The text between two special ids is tokenised as one
// string, as Hugging Face's apply_chat_template does, so the ids are the same. The tokenizer must outlive it.
//
//   json  {"template": name, "trim": bool, "begin": mark, "system": [mark, mark], "system_default": text or null,
//          "user": [mark, mark], "assistant": [mark, mark], "date_default": text or null}
//         trim: texts lose white space at both ends. system_default null: without a system text there is no such turn.
class ChatTemplate {
 public:
  ChatTemplate(std::string_view json, const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {
    const auto j = nlohmann::json::parse(json, nullptr, false);
    name_ = text(j, "template");
    if (std::any_of(name_.begin(), name_.end(), [](unsigned char c) { return c < 0x20 || c == 0x7F; }))
      bad("template holds a control character");
    if (!j.contains("trim") || !j["trim"].is_boolean()) bad("trim is no boolean");
    trim_ = j["trim"];
    begin_ = text(j, "begin");
    system_ = marks(j, "system"), user_ = marks(j, "user"), assistant_ = marks(j, "assistant");
    system_default_ = text_or_null(j, "system_default"), date_default_ = text_or_null(j, "date_default");
    // Only then do turns begin at a token of their own, whatever the text before them.
    for (const std::string& mark : {system_[0], user_[0], assistant_[0], assistant_[1]})
      if (const auto s = tokenizer.find_special(mark); s.id < 0 || s.at != 0)
        bad("a turn does not begin with a special token");
    if (!begin_.empty())
      if (const auto s = tokenizer.find_special(begin_); s.id < 0 || s.size != begin_.size())
        bad("begin is no special token");
    shows_date_ = system_[0].find(date_) != std::string::npos || system_[1].find(date_) != std::string::npos;
    if (shows_date_ && !date_default_) bad("date_default is missing");
  }

  const std::string& name() const { return name_; }

  // From the start through the end of the first user turn: the prompt.
  std::vector<int> first(const std::optional<std::string>& system, std::string_view user,
                         const std::optional<std::string>& date) const {
    if (date && !shows_date_) throw Error(2, "--date", "this model's chat template shows none", "leave it out");
    Ids ids(*tokenizer_);
    ids.mark(begin_);
    if (const auto& shown = system ? system : system_default_) {
      const std::string day = date.value_or(date_default_.value_or(""));
      dated(ids, system_[0], day);
      ids.text(trimmed(*shown));
      dated(ids, system_[1], day);
    }
    turn(ids, user_, user);
    return ids.finish();
  }

  // A later user turn. Begins with what closes the assistant's turn before it, end token included.
  std::vector<int> next(std::string_view user) const {
    Ids ids(*tokenizer_);
    ids.mark(assistant_[1]);
    turn(ids, user_, user);
    return ids.finish();
  }

  // The assistant header, after which the model speaks, and the text it must begin with.
  std::vector<int> answer(std::string_view prefix) const {
    Ids ids(*tokenizer_);
    ids.mark(assistant_[0]);
    ids.text(trimmed(prefix));
    return ids.finish();
  }

 private:
  using Marks = std::array<std::string, 2>;

  // Collects marks and texts, and tokenises each stretch between two special tokens as one string.
  class Ids {
   public:
    explicit Ids(const Tokenizer& t) : tokenizer_(t) {}
    void mark(std::string_view mark) {
      for (Tokenizer::Special s; (s = tokenizer_.find_special(mark)).id >= 0; mark.remove_prefix(s.at + s.size)) {
        text(mark.substr(0, s.at));
        flush();
        ids_.push_back(s.id);
      }
      text(mark);
    }
    void text(std::string_view text) { pending_ += text; }
    std::vector<int> finish() {
      flush();
      return std::move(ids_);
    }

   private:
    void flush() {
      const std::vector<int> more = tokenizer_.encode(pending_, false);
      ids_.insert(ids_.end(), more.begin(), more.end());
      pending_.clear();
    }
    const Tokenizer& tokenizer_;
    std::string pending_;
    std::vector<int> ids_;
  };

  void turn(Ids& ids, const Marks& marks, std::string_view content) const {
    ids.mark(marks[0]);
    ids.text(trimmed(content));
    ids.mark(marks[1]);
  }

  // A mark with a date in place of every {date}; the date is text, not a mark.
  static void dated(Ids& ids, std::string_view mark, std::string_view date) {
    for (size_t at; (at = mark.find(date_)) != std::string_view::npos; mark.remove_prefix(at + date_.size())) {
      ids.mark(mark.substr(0, at));
      ids.text(date);
    }
    ids.mark(mark);
  }

  // As Python's str.strip, which templates call: Unicode's white space and the four ASCII separators U+001C to U+001F.
  std::string_view trimmed(std::string_view s) const {
    require_utf8(s);
    if (!trim_) return s;
    auto blank = [](std::string_view character) {
      char32_t c = static_cast<unsigned char>(character[0]);
      if (character.size() > 1) c &= 0x7Fu >> character.size();
      for (char byte : character.substr(1)) c = c << 6 | (byte & 0x3F);
      if (c >= 0x1C && c <= 0x1F) return true;
      return std::any_of(std::begin(white_space), std::end(white_space),
                         [c](CodePoints r) { return r.first <= c && c <= r.last; });
    };
    auto first_character = [](std::string_view s) { return s.substr(0, utf8_character(s)); };
    auto last_character = [](std::string_view s) {
      size_t at = s.size() - 1;
      while (at > 0 && (s[at] & 0xC0) == 0x80) --at;
      return s.substr(at);
    };
    while (!s.empty() && blank(first_character(s))) s.remove_prefix(first_character(s).size());
    while (!s.empty() && blank(last_character(s))) s.remove_suffix(last_character(s).size());
    return s;
  }

  [[noreturn]] static void bad(const std::string& why) {
    throw Error(1, "chat template", why, "export the checkpoint again");
  }
  static std::string text(const nlohmann::json& j, const char* key) {
    if (!j.is_object() || !j.contains(key) || !j[key].is_string()) bad(std::string(key) + " is no text");
    return checked(j[key], key);
  }
  // A mark may hold a date thousands of times, so what a template can ask for is bounded.
  static std::string checked(const std::string& s, const char* key) {
    if (s.size() > 16384) bad(std::string(key) + " is longer than 16384 bytes");
    return s;
  }
  static std::optional<std::string> text_or_null(const nlohmann::json& j, const char* key) {
    if (j.contains(key) && j[key].is_null()) return {};
    return text(j, key);
  }
  static Marks marks(const nlohmann::json& j, const char* key) {
    const std::string what = std::string(key) + " is no pair of marks";
    if (!j.contains(key) || !j[key].is_array() || j[key].size() != 2) bad(what);
    if (!j[key][0].is_string() || !j[key][1].is_string()) bad(what);
    return {checked(j[key][0], key), checked(j[key][1], key)};
  }

  static constexpr std::string_view date_ = "{date}";
  const Tokenizer* tokenizer_;
  std::string name_, begin_;
  bool trim_ = false, shows_date_ = false;
  Marks system_, user_, assistant_;
  std::optional<std::string> system_default_, date_default_;
};

}  // namespace speed
