// error.h - how the program fails: with one line that says what failed, why, and what to do.
#pragma once

#include <stdexcept>
#include <string>

namespace speed {

// main() prints "speed: " and what() on one line of stderr, and exits with code.
//   code  2: the user can fix the command line; 1: a bad file or a failed run
//   what  the thing that failed (a flag, a file, a tensor); why: expected against got; hint: what the user can do
struct Error : std::runtime_error {
  int code;
  Error(int code, const std::string& what, const std::string& why, const std::string& hint)
      : std::runtime_error(plain(what) + ": " + plain(why) + "; " + plain(hint)), code(code) {}

 private:
  // Names from files and flags may hold anything: they stay on one line, without control characters.
  static std::string plain(std::string s) {
    if (s.size() > 2000) s = s.substr(0, 1000) + "..." + s.substr(s.size() - 1000);
    for (char& c : s)
      if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
    return s;
  }
};

}  // namespace speed
