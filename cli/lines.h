// lines.h - lines from standard input: on a terminal edited, with a history; elsewhere as they come, of any length.
#pragma once

#include <memory>
#include <string>

namespace speed {

// Gives the terminal back as it was; null while nothing was changed. Whatever ends the program early calls it.
extern void (*restore_terminal)();

class LineReader {
 public:
  LineReader();
  ~LineReader();

  enum class Got { line, end, interrupted };

  // Reads one line, without what ends it, "\n" or "\r\n". On a terminal it shows `prompt`.
  Got read(const std::string& prompt, std::string& line);

  bool on_terminal() const { return editor_ != nullptr; }

 private:
  struct Editor;
  std::unique_ptr<Editor> editor_;
};

}  // namespace speed
