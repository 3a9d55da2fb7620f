// report.h - what people read beside the answer: numbers with units, tables in four formats, progress, notes.
#pragma once

#include <chrono>
#include <iosfwd>
#include <string>
#include <vector>

#include "../base/json.h"

namespace speed {

extern const char* const version;  // "speed 0.1 (commit)"
extern const char* const commit;

std::string fixed(double x, int digits);
std::string flops_text(double x);  // 12345678 -> "12.3 MFLOP", in steps of 1000
std::string bytes_text(double x);  // in steps of 1024
std::string grouped(uint64_t n);   // 1234567 -> "1,234,567"
std::string seconds_text(double s);
std::string now();                     // UTC, as 2026-01-31T12:00:00Z
double median(std::vector<double> v);  // of an even number, the upper one
size_t columns(const std::string& s);  // width on a terminal, for text of one column a code point

// One line on stderr. Until release_notes they are held back, so that none comes before the line of an error.
void note(const std::string& text);
void release_notes();

std::string counted(size_t n, const std::string& thing);  // "1 token", "2 tokens"
std::string indented(const json& value);                  // as text; bytes that are no UTF-8 become U+FFFD
std::string percent(double share);                        // 0.258 -> "25.8 %"; never "-0.0 %"

// A table for people (text, md) and programs (csv, json): every cell is a value and how it is shown.
class Table {
 public:
  struct Column {
    std::string key, title;  // empty: only in csv and json
  };
  struct Cell {
    json value;
    std::string text;
    template <class T>
    Cell(const T& v)
        : value(v),
          text(value.is_string() ? value.template get<std::string>()
               : value.is_null() ? ""
                                 : value.dump()) {}
    template <class T>
    Cell(const T& v, std::string t) : value(v), text(std::move(t)) {}
  };

  explicit Table(std::vector<Column> c) : columns_(std::move(c)) {}
  void row(std::vector<Cell> cells) { rows_.push_back(std::move(cells)); }
  json rows_as_json() const;
  void print(std::ostream& out, const std::string& format) const;

 private:
  void print_aligned(std::ostream& out, bool md) const;

  std::vector<Column> columns_;
  std::vector<std::vector<Cell>> rows_;
};

// A bar on stderr for work that takes more than half a second; nothing where stderr is no terminal.
class Progress {
 public:
  explicit Progress(std::string what);
  ~Progress() { clear(); }
  void update(double share);
  void clear();

 private:
  std::string what_;
  bool on_, shown_ = false;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now(), last_{};
};

}  // namespace speed
