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

// Bytes of memory this process may still take: the machine's, or its control group's or address space where that is
// less.
inline uint64_t available_memory() {
  uint64_t available = std::numeric_limits<uint64_t>::max();
  std::string key;
  std::ifstream info("/proc/meminfo");
  for (uint64_t kib; info >> key;) {
    if (key == "MemAvailable:" && info >> kib) available = kib * 1024;
    info.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  uint64_t limit = 0, current = 0;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit && std::ifstream("/sys/fs/cgroup/memory.current") >> current)
    available = std::min(available, limit > current ? limit - current : 0);
  return std::min(available, address_space_left());
}

}  // namespace speed
