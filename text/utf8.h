// utf8.h - UTF-8: characters whole or not at all.
#pragma once

#include <string>
#include <string_view>

#include "../base/error.h"

namespace speed {

// The character that s, not empty, begins with, by table 3-7 of the Unicode Standard (no surrogates, no overlong form,
// nothing above U+10FFFF): its length in bytes; 0 if s ends before it does; -n if the first n bytes begin no character.
inline int utf8_character(std::string_view s) {
  auto byte = [&](size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first < 0xC2 || first > 0xF4) return -1;
  const int length = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  unsigned low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  unsigned high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  for (int i = 1; i < length; ++i) {
    if (size_t(i) == s.size()) return 0;
    if (byte(i) < low || byte(i) > high) return -i;
    low = 0x80, high = 0xBF;
  }
  return length;
}

// Offset of the first byte that belongs to no character, std::string_view::npos if there is none.
inline size_t first_invalid_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const int n = utf8_character(text.substr(at));
    if (n <= 0) return at;
    at += n;
  }
  return std::string_view::npos;
}

inline void require_utf8(std::string_view text) {
  if (const size_t bad = first_invalid_utf8(text); bad != std::string_view::npos)
    throw Error(1, "text", "not UTF-8 at byte " + std::to_string(bad), "convert it to UTF-8");
}

// Bytes of tokens in, whole characters out. A token may end within a character, which is then held back until the rest
// comes. Bytes that form no character come out as U+FFFD, one for each maximal subpart, as Python and Rust decode them.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes) {
    held_ += bytes;
    std::string out;
    size_t at = 0;
    while (at < held_.size()) {
      const int n = utf8_character(std::string_view(held_).substr(at));
      if (n == 0) break;
      if (n > 0) out.append(held_, at, n);
      else out += "\xEF\xBF\xBD";
      at += n > 0 ? n : -n;
    }
    held_.erase(0, at);
    return out;
  }
  // At the end of the text: what is held back will not be completed any more.
  std::string flush() {
    const bool partial = !held_.empty();
    held_.clear();
    return partial ? "\xEF\xBF\xBD" : "";
  }

 private:
  std::string held_;
};

}  // namespace speed
