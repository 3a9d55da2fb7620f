"""Which split patterns the engine accepts. It refuses the others (text/pattern.h), so they must not be exported.

The engine's regular expressions are PCRE2's, Hugging Face's are Oniguruma's. What they understand differently, or one
of them not at all, is refused by name. tests/patterns.json holds the two programs to the same list.
"""

import re

from .failure import unsupported

CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co Cn".split()
CATEGORIES += ["L", "M", "N", "P", "S", "Z", "C"]
GROUPS = "(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"


def check_pattern(pattern):
    """Refuses a pattern that the engine does not accept."""
    if not 0 < len(pattern.encode()) <= 4096:
        raise unsupported("a split pattern that is empty or longer than 4096 bytes", "tokenizer.json")
    shortest, _ = Pattern(pattern).read()
    if shortest == 0:
        raise unsupported(f"the split pattern {pattern!r}, which can match the empty text", "tokenizer.json")


class Pattern:
    """A pattern that is read from left to right. Methods return how many characters match at least and at most."""

    def __init__(self, pattern):
        self.pattern, self.at = pattern, 0

    def refuse(self, what):
        raise unsupported(f"{what} in the split pattern {self.pattern[:200]!r}", "tokenizer.json")

    def next(self, text=""):
        """Whether `text` comes next."""
        return self.at < len(self.pattern) and self.pattern.startswith(text, self.at)

    def take(self, text):
        if self.next(text):
            self.at += len(text)
            return True
        return False

    def match(self, regex):
        found = re.compile(regex, re.DOTALL).match(self.pattern, self.at)
        if found:
            self.at = found.end()
        return found

    def read(self):
        lengths = self.alternatives(False, 0)
        if self.next():
            self.refuse("a ) without its (")
        return lengths

    def alternatives(self, caseless, depth, fixed=False):
        """fixed: of a look-behind, in which each alternative must have one length."""
        if depth >= 100:
            self.refuse("more than 100 groups in each other")
        found = []
        while True:
            low, high = self.sequence(caseless, depth, fixed)
            if fixed and low != high:
                self.refuse("a look-behind of no fixed length")
            found.append((low, high))
            if not self.take("|"):
                return min(low for low, _ in found), max(high for _, high in found)

    def sequence(self, caseless, depth, fixed):
        low = high = 0
        while self.next() and not self.next("|") and not self.next(")"):
            least, most, looks = self.element(caseless, depth, fixed)
            few, many = self.repetition(looks)
            low, high = low + few * least, high + (0 if most == 0 else many * most)
        return low, high

    def repetition(self, looks):
        """How often the element before it is repeated, at least and at most."""
        if self.next("{"):
            found = self.match(r"\{([0-9]{1,3})(,([0-9]{1,3})?)?\}")
            if not found:
                self.refuse("a { that is no repetition below 1000")
            few = int(found[1])
            many = int(found[3]) if found[3] else float("inf") if found[2] else few
            if many < few:
                self.refuse("a repetition that ends before it begins")
            if self.match("[?+]"):
                self.refuse("a repetition of a repetition")
        else:
            found = self.match(r"([*+?])[?+]?")
            few, many = {None: (1, 1), "*": (0, float("inf")), "+": (1, float("inf")), "?": (0, 1)}[found and found[1]]
        if found and looks:
            self.refuse("a repeated look-around")
        if found and self.match("[*+?{]"):
            self.refuse("a repetition of a repetition")
        return few, many

    def element(self, caseless, depth, fixed):
        """Lengths of a group, class or character, and whether it is a look-around."""
        if self.next("("):
            return self.group(caseless, depth, fixed)
        if self.take("["):
            if self.take("^") and caseless:
                self.refuse("a negated class within (?i:")
            self.char_class(caseless, 0)
        elif self.next("\\"):
            if not self.set_escape(caseless):
                self.escape()
        elif self.match(r"[\^$.]"):
            self.refuse(f"the symbol {self.pattern[self.at - 1]}")
        elif self.match(r"[*+?{]"):
            self.refuse("a repetition of nothing")
        else:
            self.at += 1
        return 1, 1, False

    def group(self, caseless, depth, fixed):
        opening = next((g for g in GROUPS if self.take(g)), "")
        if not opening:
            if self.next("(*") or self.next("(?"):
                self.refuse("a group other than (?: (?i: (?> and look-around")
            self.take("(")
        behind = opening in ("(?<=", "(?<!")
        low, high = self.alternatives(caseless or opening == "(?i:", depth + 1, fixed or behind)
        if fixed and low != high:
            self.refuse("a look-behind of no fixed length")
        if not self.take(")"):
            self.refuse("a ( without its )")
        looks = behind or opening in ("(?=", "(?!")
        return (0, 0, True) if looks else (low, high, False)

    def set_escape(self, caseless):
        r"""Reads \s, \p{L} and the like, if one comes next."""
        if not self.match(r"\\[pPsSdDwW]"):
            return False
        # Oniguruma lets one of its members, the ligature U+FB06, stand for the letters "st". The engine accepts such a
        # pattern, in which it would differ.
        if caseless:
            self.refuse("a property, \\s and the like within (?i:")
        if self.pattern[self.at - 1] not in "pP":
            return True
        name = self.match(r"\{(\w*)\}")
        if not name or name[1] not in CATEGORIES:
            self.refuse("a property that is no general category")
        return True

    def escape(self):
        """Reads a backslash and what follows. Returns the character that it means."""
        found = self.match(r"\\x\{([0-9a-fA-F]{1,7})\}")
        if found:
            code = int(found[1], 16)
            if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
                self.refuse("an \\x{...} that is no character")
            return code
        found = self.match(r"\\([rnt]|[\0-\x7f])")
        if not found or (found[1] not in "rnt" and (found[1].isalnum() or found[1] == "\0")):
            self.refuse("an escape that the engine does not know")
        return ord({"r": "\r", "n": "\n", "t": "\t"}.get(found[1], found[1]))

    def character(self):
        if self.next("\\"):
            return self.escape()
        self.at += 1
        return ord(self.pattern[self.at - 1])

    def char_class(self, caseless, depth):
        """Reads a class after its [ or [^, up to and with its ]."""
        if depth > 20:
            self.refuse("more than 20 classes in each other")
        empty = True
        while not self.take("]"):
            if not self.next():
                self.refuse("a class without its end")
            if self.match(r"\[:|--|~~"):
                self.refuse("a class within a class of the form [: or -- or ~~")
            if caseless and (self.next("[") or self.next("&&")):
                self.refuse("a class within a class within (?i:")
            if self.take("&&"):
                if empty:
                    self.refuse("an empty class")
                empty = True
                continue
            if self.take("["):
                self.take("^")
                self.char_class(caseless, depth + 1)
            elif self.set_escape(caseless):
                if self.match(r"-(?!\])"):
                    self.refuse("a range that begins with a class")
            elif not empty and self.match(r"-(?!\])"):
                self.refuse("a - in the middle of a class")
            else:
                self.char_range()
            empty = False
        if empty:
            self.refuse("an empty class")

    def char_range(self):
        """Reads a-z or one character of a class."""
        first = self.character()
        if self.match(r"-(?!\])"):
            if not self.next():
                self.refuse("a class without its end")
            if self.next("[") or self.match(r"\\[pPsSdDwW]"):
                self.refuse("a range that ends with a class")
            if self.character() < first:
                self.refuse("a range that ends before it begins")
