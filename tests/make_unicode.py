"""Writes text/unicode.h: the code points that \\p{L}, \\p{N} and \\s match in the tokenizer libraries.

Usage: make_unicode.py [--check]   (from any folder; needs tokenizers 0.23.3 and tiktoken 0.14.0)

Every code point is tried in Hugging Face's `tokenizers`, and `tiktoken` must agree. With --check nothing is written,
and the exit code says whether the committed unicode.h is up to date.
"""

import pathlib
import sys

import tiktoken
import tokenizers
from tokenizers import Regex, pre_tokenizers

OUT = pathlib.Path(__file__).resolve().parent.parent / "text" / "unicode.h"
CLASSES = [("letters", r"\p{L}"), ("numbers", r"\p{N}"), ("white_space", r"\s")]
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]


def of_tokenizers(pattern):
    remove = pre_tokenizers.Split(Regex(pattern), "removed")
    return [c for c in CODE_POINTS if not remove.pre_tokenize_str(chr(c))]


def of_tiktoken(pattern):
    # tiktoken drops text that the pattern does not match.
    byte_ranks = {bytes([b]): b for b in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=byte_ranks, special_tokens={})
    return [c for c in CODE_POINTS if encoding.encode_ordinary(chr(c))]


def ranges(code_points):
    out = []
    for c in code_points:
        # The surrogates between U+D7FF and U+E000 are not characters, so no range may contain them.
        if out and out[-1][1] + 1 == c:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def header():
    lines = [
        "// unicode.h - the code points of \\p{L}, \\p{N} and \\s, "
        "as Hugging Face's and OpenAI's tokenizers know them.",
        "//",
        f"// Written by tests/make_unicode.py from tokenizers {tokenizers.__version__}, code point by code point; "
        f"tiktoken {tiktoken.__version__} agrees.",
        "// The regular expression library of this engine knows an older Unicode, and another \\s.",
        "#pragma once",
        "",
        "namespace speed {",
        "",
        "// First and last code point of a range; ranges ascend.",
        "struct CodePoints {",
        "  char32_t first, last;",
        "};",
    ]
    for name, pattern in CLASSES:
        members = of_tokenizers(pattern)
        if members != of_tiktoken(pattern):
            sys.exit(f"make_unicode.py: {pattern}: tokenizers and tiktoken disagree; one table cannot serve both")
        lines += ["", f"// {pattern}: {len(members)} code points", f"inline constexpr CodePoints {name}[] = {{"]
        line = " "
        for first, last in ranges(members):
            item = f" {{0x{first:X}, 0x{last:X}}},"
            if len(line) + len(item) > 120:
                lines.append(line)
                line = " "
            line += item
        lines += [line, "};"]
    return "\n".join([*lines, "", "}  // namespace speed", ""])


if __name__ == "__main__":
    text = header()
    if "--check" in sys.argv[1:]:
        same = OUT.read_text() == text
        sys.exit(0 if same else "make_unicode.py: unicode.h: not what these libraries say; run tests/make_unicode.py")
    OUT.write_text(text)
