// files.h - a file mapped into memory, and a file written whole or not at all.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>

#include "error.h"

namespace speed {

// A file as memory: a page is read from disk when it is first used.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) : path_(path) {
    int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0)
      throw Error(1, path, std::strerror(errno), "check the path, or make a model file with export_weights.py");
    struct stat st {};
    if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode)) {
      ::close(fd);
      throw Error(1, path, "not a regular file", "give a .safetensors file made by export_weights.py");
    }
    size_ = size_t(st.st_size);
    if (size_ > 0) {
      void* p = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
      if (p != MAP_FAILED) data_ = static_cast<const uint8_t*>(p);
      // Pages of 2 MiB, where the system can bring a file in so, are read 1.5 times as fast as pages of 4 KiB.
      if (data_) ::madvise(p, size_, MADV_HUGEPAGE);
    }
    ::close(fd);
    if (size_ > 0 && !data_)
      throw Error(1, path, std::string("cannot be mapped: ") + std::strerror(errno), "free some memory");
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() {
    if (data_) ::munmap(const_cast<uint8_t*>(data_), size_);
  }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Path of the temporary file of OutputFile while there is one, for a signal handler, which may not read a std::string.
inline char unfinished[4096] = "";

// Where output named by a path goes.
struct Destination {
  std::string path;       // with links followed: what a link points to is written, the link stays
  int descriptor = -1;    // of an open file that the path stands for: "-" (standard output), /dev/stdout, /dev/fd/3
  bool in_place = false;  // a descriptor, pipe or device: written as it is, never replaced
};

inline Destination destination_of(const std::string& path) {
  namespace fs = std::filesystem;
  if (path == "-") return {path, 1, true};
  std::error_code none;
  fs::path at = path;
  for (int links = 0; links < 40; ++links) {
    const std::string folder = at.parent_path().string(), name = at.filename().string();
    // One of this process's own open files. Opened by its path again it would be cut to length 0.
    if ((folder == "/proc/self/fd" || folder == "/dev/fd" || folder == "/proc/" + std::to_string(::getpid()) + "/fd") &&
        !name.empty() && name.size() < 9 && name.find_first_not_of("0123456789") == std::string::npos)
      return {path, std::stoi(name), true};
    if (!fs::is_symlink(fs::symlink_status(at, none))) break;
    const fs::path to = fs::read_symlink(at, none);
    at = to.is_absolute() ? to : at.parent_path() / to;
  }
  const auto there = fs::status(at, none);
  return {at.string(), -1, fs::exists(there) && !fs::is_regular_file(there) && !fs::is_directory(there)};
}

// Writes a file under a temporary name beside it and renames it when it is complete, so half a file is never seen.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path) : path_(path), to_(destination_of(path)), temporary_(to_.path) {
    if (to_.in_place) {
      const int fd = to_.descriptor >= 0 ? ::dup(to_.descriptor) : ::open(to_.path.c_str(), O_WRONLY | O_CLOEXEC);
      file_ = fd >= 0 ? ::fdopen(fd, "wb") : nullptr;
    } else {
      temporary_ += ".part." + std::to_string(::getpid());
      if (temporary_.size() < sizeof unfinished) temporary_.copy(unfinished, temporary_.size());
      std::error_code none;
      if (std::filesystem::is_directory(to_.path, none)) errno = EISDIR;
      else if (none == std::errc::too_many_symbolic_link_levels) errno = none.value();
      else file_ = std::fopen(temporary_.c_str(), "wb");
      struct stat there {};  // who may read it stays as it was
      if (file_ && ::stat(to_.path.c_str(), &there) == 0) ::fchmod(::fileno(file_), there.st_mode & 0777);
    }
    if (!file_) {
      forget();
      fail();
    }
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile() {
    if (file_) std::fclose(file_);
    if (!done_ && !to_.in_place) ::unlink(temporary_.c_str());
    forget();
  }
  void write(const void* data, size_t bytes) {
    if (std::fwrite(data, 1, bytes, file_) != bytes) fail();
  }
  void write(const std::string& s) { write(s.data(), s.size()); }
  void finish() {
    const bool closed = std::fclose(file_) == 0;
    file_ = nullptr;
    if (!closed || (!to_.in_place && std::rename(temporary_.c_str(), to_.path.c_str()) != 0)) fail();
    done_ = true;
  }

 private:
  static void forget() { std::fill(std::begin(unfinished), std::end(unfinished), '\0'); }
  [[noreturn]] void fail() const {
    throw Error(1, path_, std::string("cannot be written: ") + std::strerror(errno),
                "check the folder and the space left");
  }
  std::string path_;
  Destination to_;
  std::string temporary_;
  std::FILE* file_ = nullptr;
  bool done_ = false;  // nothing temporary is left
};

// Throws at once, not after a long run, if `path` cannot be written. Leaves nothing behind.
inline void require_writable(const std::string& path) {
  const Destination to = destination_of(path);
  if (!to.in_place) OutputFile{path};
  else if (to.descriptor >= 0 ? ::fcntl(to.descriptor, F_GETFL) < 0  // not opened: a pipe's reader would notice
                              : ::access(to.path.c_str(), W_OK) != 0)
    throw Error(1, path, std::string("cannot be written: ") + std::strerror(errno), "check who may write it");
}

}  // namespace speed
