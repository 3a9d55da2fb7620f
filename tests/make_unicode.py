"""Writes text/unicode.h: the general categories, \\s and \\w as Hugging Face's tokenizer library knows them.

Usage: make_unicode.py [--check]   (from any folder; needs tokenizers 0.23.3 and tiktoken 0.14.0)

Every code point is tried in Hugging Face's `tokenizers`, and for \\p{L}, \\p{N} and \\s `tiktoken` must agree. With
--check nothing is written, and the exit code says whether the committed unicode.h is up to date.
"""

import pathlib
import sys

import tiktoken
import tokenizers
from tokenizers import Regex, pre_tokenizers

OUT = pathlib.Path(__file__).resolve().parent.parent / "text" / "unicode.h"
CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co Cn".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcd"  # of the categories, in the table
SURROGATES = range(0xD800, 0xE000)  # no characters: no text holds them
CODE_POINTS = [c for c in range(0x110000) if c not in SURROGATES]


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
        if out and out[-1][1] + 1 == c:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def array(comment, name, code_points):
    lines = [comment, f"inline constexpr CodePoints {name}[] = {{"]
    line = " "
    for first, last in ranges(code_points):
        item = f" {{0x{first:X}, 0x{last:X}}},"
        if len(line) + len(item) > 120:
            lines.append(line)
            line = " "
        line += item
    return [*lines, line, "};"]


def header():
    category = dict.fromkeys(SURROGATES, "Cs")
    for name in CATEGORIES:
        for c in of_tokenizers(rf"\p{{{name}}}"):
            if c in category:
                sys.exit(f"make_unicode.py: U+{c:04X} is in two categories")
            category[c] = name
    if len(category) != 0x110000:
        sys.exit("make_unicode.py: a code point is in no category")
    for group in "LMNPSZC":
        members = [c for c in CODE_POINTS if category[c][0] == group]
        if of_tokenizers(rf"\p{{{group}}}") != members:
            sys.exit(f"make_unicode.py: \\p{{{group}}} is not its categories")
    white_space, word = of_tokenizers(r"\s"), of_tokenizers(r"\w")
    for pattern in (r"\p{L}", r"\p{N}", r"\s"):
        if of_tokenizers(pattern) != of_tiktoken(pattern):
            sys.exit(f"make_unicode.py: {pattern}: tokenizers and tiktoken disagree; one table cannot serve both")
    if of_tokenizers(r"\d") != [c for c in CODE_POINTS if category[c] == "Nd"]:
        sys.exit("make_unicode.py: \\d is not \\p{Nd}")
    plain = {c for c in CODE_POINTS if category[c][0] in "LM" or category[c] in ("Nd", "Nl", "Pc")}
    if not plain <= set(word):
        sys.exit("make_unicode.py: \\w lacks a letter, mark or digit")

    table, run = "", 0
    for c in range(0x110000):
        run += 1
        if c == 0x10FFFF or category[c + 1] != category[c]:
            table += LETTERS[CATEGORIES.index(category[c])] + (str(run) if run > 1 else "")
            run = 0
    lines = [
        "// unicode.h - the general categories, \\s and \\w, as Hugging Face's tokenizers know them.",
        "//",
        f"// Written by tests/make_unicode.py from tokenizers {tokenizers.__version__}, code point by code point; "
        f"tiktoken {tiktoken.__version__} agrees",
        "// in \\p{L}, \\p{N} and \\s. The regular expression library of this engine knows an older Unicode, and "
        "another \\s.",
        "#pragma once",
        "",
        "namespace speed {",
        "",
        "// First and last code point of a range; ranges ascend.",
        "struct CodePoints {",
        "  char32_t first, last;",
        "};",
        "",
        f"// The categories, of two letters each. In the table the first is A, the {len(CATEGORIES)}th is d.",
        f'inline constexpr char category_names[] = "{"".join(CATEGORIES)}";',
        "",
        "// The category of every code point from 0 to 0x10FFFF, run by run: its letter, then the length if that is "
        "not 1.",
        "inline constexpr char category_runs[] =",
        *[f'    "{table[i : i + 110]}"' for i in range(0, len(table), 110)],
    ]
    lines[-1] += ";"
    lines += ["", *array(f"// \\s: {len(white_space)} code points", "white_space", white_space)]
    rest = sorted(set(word) - plain)
    lines += ["", *array("// What \\w has beside \\p{L}, \\p{M}, \\p{Nd}, \\p{Nl} and \\p{Pc}", "more_word", rest)]
    return "\n".join([*lines, "", "}  // namespace speed", ""])


if __name__ == "__main__":
    text = header()
    if "--check" in sys.argv[1:]:
        same = OUT.read_text() == text
        sys.exit(0 if same else "make_unicode.py: unicode.h: not what these libraries say; run tests/make_unicode.py")
    OUT.write_text(text)
