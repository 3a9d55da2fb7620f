// stream.h - text that comes a token at a time, until a stop text.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "utf8.h"

namespace speed {

// Turns tokens into text a piece at a time: never part of a character, and nothing that may turn out to be a stop text.
class TextStream {
 public:
  explicit TextStream(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // New text that is safe to show; sets stopped() once a stop text is complete.
  std::string push(std::string_view bytes) {
    held_ += utf8_.push(bytes);
    size_t end = held_.size();
    for (auto& stop : stops_)
      if (const size_t at = held_.find(stop); at != std::string::npos && at < end) end = at, stopped_ = true;
    if (!stopped_)
      for (auto& stop : stops_)
        for (size_t n = std::min(stop.size() - 1, held_.size()); n > 0; --n)
          if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) {
            end = std::min(end, held_.size() - n);
            break;
          }
    std::string shown = held_.substr(0, end);
    held_.erase(0, end);
    return shown;
  }
  std::string finish() { return stopped_ ? "" : held_ + utf8_.flush(); }
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  Utf8Stream utf8_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace speed
