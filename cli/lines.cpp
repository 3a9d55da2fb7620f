// lines.cpp - see lines.h. Editing is libedit's (man editline).
#include "lines.h"

#include <histedit.h>
#include <poll.h>
#include <signal.h>
#include <termios.h>
#include <unistd.h>

#include <cerrno>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <cwchar>
#include <iostream>

#include "request.h"

namespace speed {

void (*restore_terminal)() = nullptr;

struct LineReader::Editor {
  static inline termios before;  // the terminal's settings

  std::FILE* out;
  EditLine* edit;
  History* history;
  std::string prompt;
  char input[4096];
  size_t at = 0, end = 0;  // input[at, end) was read, not used

  static Editor& of(EditLine* edit) {
    void* self = nullptr;
    el_get(edit, EL_CLIENTDATA, &self);
    return *static_cast<Editor*>(self);
  }

  Editor() {
    // libedit takes the encoding from the locale. Text here is UTF-8, so a locale without an encoding gets that one.
    if (!std::setlocale(LC_CTYPE, "") || MB_CUR_MAX == 1) std::setlocale(LC_CTYPE, "C.UTF-8");
    ::tcgetattr(0, &before);
    restore_terminal = [] { ::tcsetattr(0, TCSANOW, &before); };
    out = ::fdopen(::dup(2), "w");  // buffered, and apart from the answers on standard output
    edit = el_init("speed", stdin, out, out);
    history = history_init();
    HistEvent event;
    ::history(history, &event, H_SETSIZE, 1000);
    el_set(edit, EL_CLIENTDATA, this);
    el_set(
        edit, EL_PROMPT, +[](EditLine* e) { return of(e).prompt.data(); });
    el_set(edit, EL_EDITOR, "emacs");
    el_set(edit, EL_HIST, ::history, history);
    el_set(edit, EL_GETCFN, next_character);
    // Between two lines too the terminal does not collect lines itself: it would cut them, and what is pasted while an
    // answer comes, at 4,095 bytes.
    el_set(edit, EL_SETTY, "-x", "-icanon", nullptr);
    el_source(edit, nullptr);  // the user's ~/.editrc
  }
  ~Editor() {
    el_end(edit);
    history_end(history);
    std::fclose(out);
    restore_terminal();
    restore_terminal = nullptr;
  }

  // The next character of the input: 1, or 0 at its end, or -1 on Ctrl-C.
  static int next_character(EditLine* edit, wchar_t* character) {
    Editor& e = of(edit);
    std::mbstate_t state{};
    for (bool first = true;; first = false) {
      while (e.at == e.end) {
        // Ctrl-C comes through only while this waits, or it could come right before and be seen at the next key.
        sigset_t ctrl_c, others;
        ::sigemptyset(&ctrl_c), ::sigaddset(&ctrl_c, SIGINT);
        ::pthread_sigmask(SIG_BLOCK, &ctrl_c, &others);
        pollfd terminal{0, POLLIN, 0};
        const int ready = interrupted ? -1 : ::ppoll(&terminal, 1, nullptr, &others);
        ::pthread_sigmask(SIG_SETMASK, &others, nullptr);
        if (interrupted) return -1;
        if (ready < 0 && errno == EINTR) {  // the window has another size, or the program was stopped and goes on
          el_resize(edit);
          el_set(edit, EL_PREP_TERM, 0), el_set(edit, EL_PREP_TERM, 1);
          el_set(edit, EL_REFRESH);
          continue;
        }
        const ssize_t n = ::read(0, e.input, sizeof e.input);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return int(n);
        e.at = 0, e.end = size_t(n);
      }
      const size_t got = std::mbrtowc(character, e.input + e.at++, 1, &state);
      if (got == size_t(-2)) continue;  // not whole yet
      if (got == size_t(-1)) {          // not UTF-8: what was begun becomes one mark, and this byte begins anew
        *character = 0xFFFD;
        if (!first) --e.at;
      }
      return 1;
    }
  }

  Got read(std::string& line) {
    // A signal without SA_RESTART ends the read, so that the line is drawn again.
    struct sigaction redraw {
    }, window_before{}, continue_before{};
    redraw.sa_handler = [](int) {};
    ::sigaction(SIGWINCH, &redraw, &window_before);
    ::sigaction(SIGCONT, &redraw, &continue_before);
    el_resize(edit);
    int bytes = 0;
    const char* text = el_gets(edit, &bytes);
    ::sigaction(SIGWINCH, &window_before, nullptr);
    ::sigaction(SIGCONT, &continue_before, nullptr);
    if (interrupted) {
      at = end = 0;
      return Got::interrupted;
    }
    if (!text || bytes <= 0) return Got::end;
    line.assign(text, size_t(bytes));
    if (line.back() == '\n') line.pop_back();
    HistEvent event;
    if (!line.empty()) ::history(history, &event, H_ENTER, line.c_str());
    return Got::line;
  }
};

LineReader::LineReader() {
  if (::isatty(0) && ::isatty(2)) editor_ = std::make_unique<Editor>();
}
LineReader::~LineReader() = default;

LineReader::Got LineReader::read(const std::string& prompt, std::string& line) {
  Got got;
  if (editor_) {
    editor_->prompt = prompt;
    got = editor_->read(line);
  } else {
    got = std::getline(std::cin, line) ? Got::line : Got::end;
    if (interrupted) got = Got::interrupted;  // what was read of a line is not used
  }
  if (got == Got::line && !line.empty() && line.back() == '\r') line.pop_back();
  return got;
}

}  // namespace speed
