// report.h - what people read beside the answer: tables in four formats, numbers with units, progress, run records.
#pragma once

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "error.h"

namespace speed {

using json = nlohmann::json;

#ifndef SPEED_COMMIT
#define SPEED_COMMIT "unknown"
#endif
constexpr const char* version = "speed 0.1 (" SPEED_COMMIT ")";

inline std::string fixed(double x, int digits) {
  char s[64];
  std::snprintf(s, sizeof s, "%.*f", digits, x);
  return s;
}

// 12345678 -> "12.35 M" with the given step between units: 1000 for FLOPs, 1024 for bytes.
inline std::string scaled(double x, double step, const std::vector<std::string>& units) {
  size_t i = 0;
  while (x >= step * 0.9995 && i + 1 < units.size()) x /= step, ++i;
  return fixed(x, i == 0 ? 0 : x < 10 ? 2 : x < 100 ? 1 : 0) + " " + units[i];
}
inline std::string flops_text(double x) {
  return scaled(x, 1000, {"FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"});
}
inline std::string bytes_text(double x) { return scaled(x, 1024, {"B", "KiB", "MiB", "GiB", "TiB"}); }
inline std::string seconds_text(double s) {
  return s < 1 ? fixed(s * 1000, s < 0.01 ? 2 : 0) + " ms" : fixed(s, 2) + " s";
}

inline double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// Width of a character string on a terminal, for text of one column a code point.
inline size_t columns(const std::string& s) {
  return size_t(std::count_if(s.begin(), s.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

// A table for people (text, md) and programs (csv, json): every cell is a value and how it is shown.
class Table {
 public:
  struct Column {
    std::string key, title;  // an empty title: not for people
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

  json rows_as_json() const {
    json rows = json::array();
    for (auto& r : rows_) {
      json row;
      for (size_t i = 0; i < r.size(); ++i) row[columns_[i].key] = r[i].value;
      rows.push_back(row);
    }
    return rows;
  }

  void print(std::ostream& out, const std::string& format) const {
    if (format == "json") {
      out << json{{"rows", rows_as_json()}}.dump(2) << "\n";
    } else if (format == "csv") {
      for (size_t i = 0; i < columns_.size(); ++i) out << (i ? "," : "") << columns_[i].key;
      out << "\n";
      for (auto& r : rows_) {
        for (size_t i = 0; i < r.size(); ++i)
          out << (i ? "," : "")
              << (r[i].value.is_string() ? quoted(r[i].value)
                  : r[i].value.is_null() ? ""
                                         : r[i].value.dump());
        out << "\n";
      }
    } else {
      print_aligned(out, format == "md");
    }
  }

 private:
  static std::string quoted(const std::string& s) {
    if (s.find_first_of(",\"\n") == std::string::npos) return s;
    std::string q = "\"";
    for (char c : s) q += c == '"' ? "\"\"" : std::string(1, c);
    return q + "\"";
  }

  void print_aligned(std::ostream& out, bool md) const {
    std::vector<size_t> shown, width;
    for (size_t i = 0; i < columns_.size(); ++i)
      if (!columns_[i].title.empty()) {
        shown.push_back(i);
        width.push_back(columns(columns_[i].title));
        for (auto& r : rows_) width.back() = std::max(width.back(), columns(r[i].text));
      }
    auto line = [&](auto text) {
      std::string s = md ? "|" : "";
      for (size_t j = 0; j < shown.size(); ++j) {
        const std::string cell = text(shown[j]), pad(width[j] - columns(cell), ' ');
        s += (md ? " " : j ? "  " : "") + (j == 0 ? cell + pad : pad + cell) + (md ? " |" : "");
      }
      out << s.substr(0, s.find_last_not_of(' ') + 1) << "\n";
    };
    line([&](size_t i) { return columns_[i].title; });
    if (md) {
      out << "|";
      for (size_t j = 0; j < shown.size(); ++j)
        out << (j ? " " : " ") << std::string(width[j] - (j > 0), '-') << (j ? ": |" : " |");
      out << "\n";
    }
    for (auto& r : rows_) line([&](size_t i) { return r[i].text; });
  }

  std::vector<Column> columns_;
  std::vector<std::vector<Cell>> rows_;
};

inline std::string processor() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

// A bar on stderr for work that takes more than half a second; nothing where stderr is no terminal.
class Progress {
 public:
  explicit Progress(std::string what) : what_(std::move(what)), on_(::isatty(2)) {}
  ~Progress() { clear(); }
  void update(double share) {
    const auto now = std::chrono::steady_clock::now();
    if (!on_ || now - start_ < std::chrono::milliseconds(500) ||
        (shown_ && now - last_ < std::chrono::milliseconds(100)))
      return;
    last_ = now;
    shown_ = true;
    constexpr int width = 20;
    const int full = int(share * width);
    std::string bar;
    for (int i = 0; i < width; ++i) bar += i < full ? "█" : "░";
    std::cerr << "\r" << what_ << " " << bar << " " << int(share * 100) << " % " << std::flush;
  }
  void clear() {
    if (shown_) std::cerr << "\r\033[K" << std::flush;
    shown_ = false;
  }

 private:
  std::string what_;
  bool on_, shown_ = false;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now(), last_{};
};

// Path of the temporary file below while there is one, for a signal handler, which may not read a std::string.
inline char unfinished[4096] = "";

// Writes a file under a temporary name beside it and renames it when all is written: nobody ever sees half a file.
// What is there and no regular file (a pipe, /dev/null) is written as it is, never replaced.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path) : path_(path), temporary_(path) {
    std::error_code none;
    const auto there = std::filesystem::status(path, none);
    if (!std::filesystem::exists(there) || std::filesystem::is_regular_file(there))
      temporary_ += ".part." + std::to_string(::getpid());
    else done_ = true;
    if (!done_ && temporary_.size() < sizeof unfinished) temporary_.copy(unfinished, temporary_.size());
    out_.open(temporary_, std::ios::binary | std::ios::trunc);
    if (!out_) fail();
  }
  ~OutputFile() {
    std::fill(std::begin(unfinished), std::end(unfinished), '\0');
    if (done_) return;
    out_.close();
    std::error_code ignored;
    std::filesystem::remove(temporary_, ignored);
  }
  void write(const void* data, size_t bytes) {
    out_.write(static_cast<const char*>(data), std::streamsize(bytes));
    if (!out_) fail();
  }
  void write(const std::string& s) { write(s.data(), s.size()); }
  void finish() {
    out_.close();
    if (!out_ || (temporary_ != path_ && std::rename(temporary_.c_str(), path_.c_str()) != 0)) fail();
    done_ = true;
  }

 private:
  [[noreturn]] void fail() const {
    throw Error(1, path_, std::string("cannot be written: ") + std::strerror(errno),
                "check the folder and the space left");
  }
  std::string path_, temporary_;
  std::ofstream out_;
  bool done_ = false;  // nothing to clean up
};

// Fails now, not after a long run, if `path` cannot be written; leaves nothing behind.
inline void require_writable(const std::string& path) {
  std::error_code none;
  const auto there = std::filesystem::status(path, none);
  const bool special = std::filesystem::exists(there) && !std::filesystem::is_regular_file(there) &&
                       !std::filesystem::is_directory(there);  // to open a pipe would already be a message in it
  if (!special) OutputFile{path};
  else if (::access(path.c_str(), W_OK) != 0)
    throw Error(1, path, std::string("cannot be written: ") + std::strerror(errno), "check who may write it");
}

// Writes a NumPy array of float32, row by row.          https://numpy.org/neps/nep-0001-npy-format.html
class NpyWriter {
 public:
  NpyWriter(const std::string& path, size_t rows, size_t cols) : file_(path), bytes_(cols * sizeof(float)) {
    std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", " +
                         std::to_string(cols) + "), }";
    header.resize((10 + header.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');
    header += "\n";
    file_.write(std::string("\x93NUMPY\x01\x00", 8) + char(header.size() & 255) + char(header.size() >> 8) + header);
  }
  void row(const float* x) { file_.write(x, bytes_); }
  void finish() { file_.finish(); }

 private:
  OutputFile file_;
  size_t bytes_;
};

}  // namespace speed
