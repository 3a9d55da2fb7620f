// json.h - JSON, read from a file that a stranger may have written.
#pragma once

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "error.h"

namespace speed {

using json = nlohmann::json;

// Refuses duplicate keys and deep nesting. `what` names the text in messages.
inline json parse_json(std::string_view text, const std::string& what, const std::string& hint) {
  constexpr int max_depth = 8;
  std::vector<std::set<std::string>> keys;
  auto check = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > max_depth) throw Error(1, what, "JSON nested deeper than " + std::to_string(max_depth), hint);
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
      throw Error(1, what, "key \"" + value.get<std::string>() + "\" twice", hint);
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), check);
  } catch (const json::exception&) {
    throw Error(1, what, "not valid JSON", hint);
  }
}

}  // namespace speed
