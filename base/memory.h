// memory.h - how much memory this process may still take.
#pragma once

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>

namespace speed {

// Bytes of address space this process may still take (ulimit -v).
inline uint64_t address_space_left() {
  rlimit limit{};
  uint64_t pages = 0;
  if (::getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return RLIM_INFINITY;
  std::ifstream("/proc/self/statm") >> pages;
  const uint64_t taken = pages * uint64_t(::sysconf(_SC_PAGESIZE));
  return limit.rlim_cur > taken ? limit.rlim_cur - taken : 0;
}

// Bytes that the control groups of this process leave it, whichever of them leaves least; the largest number where there
// are none. A limit of an outer group binds too. Pages of files count as free: the system gives them up first.
//   membership   the text of /proc/self/cgroup: "0::/a/b" (version 2), "9:memory:/a/b" (version 1)
//   root         where the groups are mounted: /sys/fs/cgroup
// Linux: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst
inline uint64_t control_groups_leave(std::istream& membership, const std::string& root) {
  uint64_t least = std::numeric_limits<uint64_t>::max();
  auto look = [&](const std::string& folder, const char* limit_file, const char* used_file, const char* files_key) {
    uint64_t limit = 0, used = 0, files = 0, value = 0;
    if (!(std::ifstream(folder + limit_file) >> limit) || !(std::ifstream(folder + used_file) >> used)) return;
    std::ifstream stat(folder + "/memory.stat");
    for (std::string key; stat >> key >> value;)
      if (key == files_key) files += value;
    used -= std::min(used, files);
    least = std::min(least, limit > used ? limit - used : 0);
  };
  for (std::string line; std::getline(membership, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers = ",";
    controllers.append(line, first + 1, second - first - 1).append(",");
    const bool one = controllers.find(",memory,") != std::string::npos;
    if (!one && controllers != ",,") continue;
    // A container sees its own group as the root, whatever the line says; so every outer folder is tried, the root last.
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      if (path == "/") path.clear();
      if (one) look(root + "/memory" + path, "/memory.limit_in_bytes", "/memory.usage_in_bytes", "total_inactive_file");
      else look(root + path, "/memory.max", "/memory.current", "inactive_file");
      if (path.rfind('/') == std::string::npos) break;
    }
  }
  return least;
}

// Bytes of memory this process may still take: the machine's, or what its control groups or its address space leave,
// where that is less.
inline uint64_t available_memory() {
  uint64_t available = std::numeric_limits<uint64_t>::max();
  std::string key;
  std::ifstream info("/proc/meminfo");
  for (uint64_t kib; info >> key;) {
    if (key == "MemAvailable:" && info >> kib) available = kib * 1024;
    info.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  std::ifstream membership("/proc/self/cgroup");
  return std::min({available, control_groups_leave(membership, "/sys/fs/cgroup"), address_space_left()});
}

}  // namespace speed
