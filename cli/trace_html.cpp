// trace_html.cpp - the page of `trace --html`: its source is cli/page, put into the program by the assembler.
#include "trace_document.h"

// A file of cli/page as bytes of the program, from page_NAME to page_NAME_end. The path is that from the repository's top
// folder, where everything is compiled. (nvcc reads this twice; only the host's half has room for it.)
#ifdef __CUDA_ARCH__
#define SPEED_EMBED(name, file)
#else
#define SPEED_EMBED(name, file)             \
  asm(".section .rodata\n"                  \
      ".global page_" #name ", page_" #name \
      "_end\n"                              \
      "page_" #name                         \
      ":\n"                                 \
      ".incbin \"cli/page/" file            \
      "\"\n"                                \
      "page_" #name                         \
      "_end:\n"                             \
      ".previous\n");
#endif

SPEED_EMBED(html, "page.html")
SPEED_EMBED(css, "page.css")
SPEED_EMBED(js, "page.js")
extern "C" const char page_html[], page_html_end[], page_css[], page_css_end[], page_js[], page_js_end[];

namespace speed {

// JSON that may stand in a <script> element. Within one, HTML ends at "</script" and changes its mind at "<!--"; both
// need a "<". U+2028 and U+2029 end a line in older JavaScript. JSON lets all of these be spelt as \uXXXX, in strings,
// which is the only place where they can stand.
static std::string safe_json(const json& document) {
  std::string safe;
  const std::string text = document.dump(-1, ' ', false, json::error_handler_t::replace);
  for (size_t i = 0; i < text.size(); ++i) {
    const std::string_view rest(text.data() + i, std::min<size_t>(3, text.size() - i));
    if (text[i] == '<') safe += "\\u003c";
    else if (text[i] == '>') safe += "\\u003e";
    else if (text[i] == '&') safe += "\\u0026";
    else if (rest == "\xE2\x80\xA8") safe += "\\u2028", i += 2;
    else if (rest == "\xE2\x80\xA9") safe += "\\u2029", i += 2;
    else safe += text[i];
  }
  return safe;
}

std::string trace_page(const json& document) {
  const std::string_view source(page_html, size_t(page_html_end - page_html));
  std::string page;
  size_t from = 0;
  auto put = [&](std::string_view mark, std::string_view text) {  // a mark is looked for in the source alone
    const size_t at = source.find(mark, from);
    page += source.substr(from, at - from);
    page += text;
    from = at + mark.size();
  };
  put("/*page.css*/", {page_css, size_t(page_css_end - page_css)});
  put("/*data*/", safe_json(document));
  put("/*page.js*/", {page_js, size_t(page_js_end - page_js)});
  page += source.substr(from);
  return page;
}

}  // namespace speed
