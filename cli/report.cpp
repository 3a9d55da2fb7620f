// report.cpp - see report.h.
#include "report.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <iostream>

namespace speed {

#ifndef SPEED_COMMIT
#define SPEED_COMMIT "unknown"
#endif
const char* const version = "speed 0.1 (" SPEED_COMMIT ")";
const char* const commit = SPEED_COMMIT;

std::string fixed(double x, int digits) {
  char s[64];
  std::snprintf(s, sizeof s, "%.*f", digits, x);
  return s;
}

// With the unit that leaves the number below `step`.
static std::string scaled(double x, double step, const std::vector<std::string>& units) {
  size_t i = 0;
  while (x >= step * 0.9995 && i + 1 < units.size()) x /= step, ++i;
  return fixed(x, i == 0 ? 0 : x < 10 ? 2 : x < 100 ? 1 : 0) + " " + units[i];
}
std::string flops_text(double x) { return scaled(x, 1000, {"FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"}); }
std::string bytes_text(double x) { return scaled(x, 1024, {"B", "KiB", "MiB", "GiB", "TiB"}); }
std::string seconds_text(double s) { return s < 1 ? fixed(s * 1000, s < 0.01 ? 2 : 0) + " ms" : fixed(s, 2) + " s"; }

std::string now() {
  const std::time_t t = std::time(nullptr);
  char s[32];
  std::strftime(s, sizeof s, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&t));
  return s;
}

std::string grouped(uint64_t n) {
  const std::string digits = std::to_string(n);
  std::string s;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) s += ',';
    s += digits[i];
  }
  return s;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

static std::vector<std::string> held;
static bool holding = true;
void note(const std::string& text) {
  if (holding) held.push_back(text);
  else std::cerr << "speed: note: " << text << "\n";
}
void release_notes() {
  holding = false;
  for (const std::string& text : held) note(text);
  held.clear();
}

std::string counted(size_t n, const std::string& thing) {
  return std::to_string(n) + " " + thing + (n == 1 ? "" : "s");
}
std::string indented(const json& value) { return value.dump(2, ' ', false, json::error_handler_t::replace); }
std::string percent(double share) {
  std::string s = fixed(100 * share, 1);
  if (s == "-0.0") s.erase(0, 1);
  return s + " %";
}

// ---- tables -------------------------------------------------------------------------------------------------------

size_t columns(const std::string& s) {
  return size_t(std::count_if(s.begin(), s.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

static std::string csv_quoted(const std::string& s) {
  if (s.find_first_of(",\"\n") == std::string::npos) return s;
  std::string q = "\"";
  for (char c : s) q += c == '"' ? "\"\"" : std::string(1, c);
  return q + "\"";
}

json Table::rows_as_json() const {
  json rows = json::array();
  for (auto& r : rows_) {
    json row;
    for (size_t i = 0; i < r.size(); ++i) row[columns_[i].key] = r[i].value;
    rows.push_back(row);
  }
  return rows;
}

void Table::print(std::ostream& out, const std::string& format) const {
  if (format == "json") {
    out << json{{"rows", rows_as_json()}}.dump(2) << "\n";
  } else if (format == "csv") {
    for (size_t i = 0; i < columns_.size(); ++i) out << (i ? "," : "") << columns_[i].key;
    out << "\n";
    for (auto& r : rows_) {
      for (size_t i = 0; i < r.size(); ++i)
        out << (i ? "," : "")
            << (r[i].value.is_string() ? csv_quoted(r[i].value)
                : r[i].value.is_null() ? ""
                                       : r[i].value.dump());
      out << "\n";
    }
  } else {
    print_aligned(out, format == "md");
  }
}

void Table::print_aligned(std::ostream& out, bool md) const {
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
    for (size_t j = 0; j < shown.size(); ++j) out << " " << std::string(width[j] - (j > 0), '-') << (j ? ": |" : " |");
    out << "\n";
  }
  for (auto& r : rows_) line([&](size_t i) { return r[i].text; });
}

// ---- progress -----------------------------------------------------------------------------------------------------

Progress::Progress(std::string what) : what_(std::move(what)), on_(::isatty(2)) {}

void Progress::update(double share) {
  const auto now = std::chrono::steady_clock::now();
  if (!on_ || now - start_ < std::chrono::milliseconds(500) || (shown_ && now - last_ < std::chrono::milliseconds(100)))
    return;
  last_ = now;
  shown_ = true;
  constexpr int width = 20;
  const int full = int(share * width);
  std::string bar;
  for (int i = 0; i < width; ++i) bar += i < full ? "█" : "░";
  std::cerr << "\r" << what_ << " " << bar << " " << int(share * 100) << " % " << std::flush;
}
void Progress::clear() {
  if (shown_) std::cerr << "\r\033[K" << std::flush;
  shown_ = false;
}

}  // namespace speed
