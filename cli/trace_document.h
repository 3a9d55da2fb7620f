// trace_document.h - the runs of a trace as one JSON document, and as one page. docs/trace.md describes the document.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "trace.h"

namespace speed {

inline constexpr const char* trace_schema = "speed-trace/1";

// Bytes as base64 (RFC 4648).
std::string base64(std::span<const uint8_t> bytes);

// Token bytes as text: what is no UTF-8, as a part of a character is not, is spelt \xE2.
std::string readable(std::string_view bytes);

// The first layer in which a policy differs from full depth. Below it caches are full depth's, bit for bit (law 2).
int first_difference(const Policy& p);

// The tokens of a text, each as text. A character whose bytes are split over tokens belongs to the last of them.
std::vector<std::string> readable_tokens(const std::vector<std::string_view>& tokens);

class TraceDocument {
 public:
  // `full` is full depth's own answer, which every policy is fed. value_bytes: of a cached value, in this backend.
  TraceDocument(const Model& model, const Options& o, const Request& r, const Said& full, size_t value_bytes);

  // The tokens that every run is fed: the request, and the answer but for its last token, which nothing reads.
  const std::vector<int>& fed() const { return fed_; }
  int after() const { return full_said_.ids.back(); }
  size_t answer() const { return full_said_.ids.size(); }

  void add_full(Recording recording);  // first, once
  void add(const Recording& recording, const Said& said);

  // With the table of `policy`, one row a layer.
  json finish(const json& rows);

 private:
  uint16_t word(int id);
  json run(const Recording& recording, const Said& said, int from);

  const Model& model_;
  const Options& o_;
  const Request& r_;
  const Said& full_said_;
  const size_t value_bytes_;
  std::vector<int> fed_;
  Recording full_;
  json document_, runs_ = json::array();
  std::vector<std::string> words_;
  std::unordered_map<int, uint16_t> word_index_;
};

// The page: the document in one HTML file, beside the program that shows it. Nothing in the document can run there or
// end it early: every character that could is escaped.
std::string trace_page(const json& document);

}  // namespace speed
