// files.h - a file mapped into memory, and a file written whole or not at all.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
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

// Writes a file under a temporary name beside it and renames it when it is complete, so half a file is never seen. A
// pipe or device (/dev/null) is written directly, never replaced.
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
  bool done_ = false;  // there is no temporary file to remove
};

// Throws at once, not after a long run, if `path` cannot be written. Leaves nothing behind.
inline void require_writable(const std::string& path) {
  std::error_code none;
  const auto there = std::filesystem::status(path, none);
  const bool special = std::filesystem::exists(there) && !std::filesystem::is_regular_file(there) &&
                       !std::filesystem::is_directory(there);  // not opened: a pipe's reader would notice
  if (!special) OutputFile{path};
  else if (::access(path.c_str(), W_OK) != 0)
    throw Error(1, path, std::string("cannot be written: ") + std::strerror(errno), "check who may write it");
}

}  // namespace speed
