"""Turns a chat template into marks: the texts that it puts before, between and after what people and the model say.

A template is a program by an unknown author. It runs in jinja2's sandbox, in a process of its own, with little time and
memory. The engine never sees it. Conversations with sentinels as contents are rendered, and what stands around the
sentinels are the marks. They are accepted if, for twenty conversations, they give what the template gives.
"""

import datetime
import json
import os
import re
import resource
import signal
import warnings
from pathlib import Path

from .failure import Failure, one_line
from .files import read_limited

TEMPLATE_LIMIT = 1 << 20  # bytes of a chat template, and of what it may render
TEMPLATE_SECONDS = 10  # limit of processor time
TEMPLATE_MEMORY = 1 << 30  # limit in bytes
MARK_LIMIT = 16384  # bytes, the engine's limit

SYSTEM, USER, ANSWER, LATER = "Qsystem1Q", "Quser1Q", "Qanswer1Q", "Quser2Q"
DATE = "Qdate1Q"  # what a template gets that asks for the date
DEFAULT_DAY = datetime.date(2024, 7, 26)  # of a template that shows today's date: text must not change overnight
ROLES = ("system", "user", "assistant")


def read_template(folder, settings):
    """(the checkpoint's chat template for plain conversations or None, the name of its file). A file of its own beats
    tokenizer_config.json, and additional_chat_templates/default.jinja beats both, as in transformers."""
    for name in ("additional_chat_templates/default.jinja", "chat_template.jinja"):
        if (folder / name).is_file():
            return read_limited(folder / name, TEMPLATE_LIMIT).decode("utf-8"), name
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise Failure("tokenizer_config.json: chat_template is neither a string nor a list; get the file again")
    return template, "tokenizer_config.json"


class NoMarks(Exception):
    """Why a template cannot be written as marks."""


# ---- the conversations -----------------------------------------------------------------------------------------------


def conversation(system, *turns):
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


# The marks must give what the template gives for all of these. (No question after a system text is white space alone:
# templates that trim both together lose more than white space at its two ends.)
CONVERSATIONS = [
    conversation(*texts)
    for texts in (
        (None, "Hi."),
        (None, "  a b\n\n", " c \t", "\u3000d\x1c"),
        (None, "1", "2", "3", "4", "5"),
        ("Be brief.", "Hi."),
        (" \n s t \n", "x", "y", " z"),
        ("", "Hi."),
        (None, "\n"),
        (None, "a<b>'\"\\ é", "", "c"),
        ("s", "u", "\n\n", " "),
        ("", " u", "v ", "w"),
        (" ", "x"),
        ("two\n\nlines\n", "\ta", "\tb", "\tc"),
        (None, "{date} {{ x }}", "{% y %}", "{# z #}"),
        ("{date}", "你好", "😀", "e\u0301"),
        (None, "# A\n\n- b\n", "```\ncode\n```\n", "3 * 4 = 12"),
        ("You are a pirate.", "a", "b", "c", "d", "e", "f", "g"),
        (None, "\u200bx\u00a0", "\u00a0y\u200b", "\u2028z\u2029"),
        ("user", "system", "assistant", "user"),
        (None, "a" * 300, "b " * 150, "c\n" * 100),
        (None, "x", "  two\n  lines  ", "y", "z\r\n", "\r\nw"),
    )
]
SPACES = " \n\t "


def requests():
    """(messages, add_generation_prompt, date) of everything that is rendered: name -> request."""
    system, user, answer = (SPACES + text + SPACES for text in (SYSTEM, USER, ANSWER))
    out = {
        "first": (conversation(None, USER), True, DATE),
        "first, open": (conversation(None, USER), False, DATE),
        "system": (conversation(SYSTEM, USER), True, DATE),
        "empty system": (conversation("", USER), True, DATE),
        "turns": (conversation(None, USER, ANSWER, LATER), True, DATE),
        "spaced user": (conversation(None, user), True, DATE),
        "spaced answer": (conversation(None, USER, answer, LATER), True, DATE),
        "spaced system": (conversation(system, USER), True, DATE),
        "system, spaced user": (conversation(SYSTEM, user), True, DATE),
        "first, undated": (conversation(None, USER), True, None),
        "system, undated": (conversation(SYSTEM, USER), True, None),
    }
    for i, messages in enumerate(CONVERSATIONS):
        out[i] = (messages, True, None)
        out[f"{i}, dated"] = (messages, True, "1 May {1999}")
    return out


# ---- marks -----------------------------------------------------------------------------------------------------------


def around(text, *sentinels):
    """The texts before, between and after the sentinels, which must appear once each and in this order."""
    parts = []
    for sentinel in sentinels:
        before, found, text = text.partition(sentinel)
        if not found:
            raise NoMarks("it changes or leaves out what is said")
        parts.append(before)
    if any(sentinel in part for sentinel in sentinels for part in [*parts, text]):
        raise NoMarks("it repeats what is said")
    return [*parts, text]


def trimming(plain, before, after):
    """At which side white space was lost. `plain`: the marks around the text without white space."""
    left, right = before.removeprefix(plain[0]), after.removesuffix(plain[1])
    sides = {("", ""): "both", ("", SPACES): "left", (SPACES, ""): "right", (SPACES, SPACES): "none"}
    if not before.startswith(plain[0]) or not after.endswith(plain[1]) or (left, right) not in sides:
        raise NoMarks("it changes white space in another way than by trimming")
    return sides[left, right]


def default_date(marks, undated):
    """The date that a template shows by itself. `marks` have DATE where `undated`, rendered without a date, has it."""
    pattern = re.escape(marks).replace(DATE, "(.*?)", 1).replace(DATE, r"\1")
    found = re.fullmatch(pattern, undated, re.DOTALL)
    if not found:
        raise NoMarks("it shows a date in more than one way")
    return found[1]


def header_begin(suffix, end, added):
    """Where in `end`, what follows a question, the header of the answer begins: after what also follows a question
    that nobody answers, `suffix`. An added token that they share in part belongs to the header."""
    n = 0
    while n < min(len(suffix), len(end)) and suffix[n] == end[n]:
        n += 1
    for text in added:
        at = end.find(text)
        while at >= 0 and at + len(text) <= n:
            at = end.find(text, at + 1)
        if 0 <= at < n:
            n = at
    return n


def derive_marks(rendered, added):
    """The marks that the engine reads (tokenizer.h), from what the template renders: name -> text, or None for an
    error."""
    if rendered["first"] is None:
        raise NoMarks("it fails on a plain question")
    opening, end = around(rendered["first"], USER)
    suffix = end
    if rendered["first, open"] is not None:
        _, suffix = around(rendered["first, open"], USER)
    if rendered["turns"] is None:
        raise NoMarks("it fails on a second question")
    first, *past, last = around(rendered["turns"], USER, ANSWER, LATER)
    if (first, last) != (opening, end):
        raise NoMarks("what it puts around a question depends on what follows or went before")
    suffix = end[: header_begin(suffix, end, added)]
    _, *spaced, _ = around(rendered["spaced answer"] or "", USER, ANSWER, LATER)
    trim = {
        "system": "none",
        "after_system": "none",
        "user": trimming((opening, end), *around(rendered["spaced user"] or "", USER)),
        "assistant": trimming(past, *spaced),
    }
    system = empty = None
    if rendered["system"] is not None:
        *system, after = around(rendered["system"], SYSTEM, USER)
        if after != end:
            raise NoMarks("what it puts after a question depends on the system text")
        trim["system"] = trimming(system, *around(rendered["spaced system"] or "", SYSTEM, USER)[:2])
        _, between, after = around(rendered["system, spaced user"] or "", SYSTEM, USER)
        trim["after_system"] = trimming((system[1], end), between, after)
        if rendered["empty system"] is not None:
            empty, _ = around(rendered["empty system"], USER)
            empty = None if empty == "".join(system) else empty
    date = None
    for marks, undated in (("first", "first, undated"), ("system", "system, undated")):
        if rendered[marks] is not None and DATE in rendered[marks]:
            shown = default_date(rendered[marks], rendered[undated] or "")
            if date not in (None, shown):
                raise NoMarks("it shows a date in more than one way")
            date = shown
    if any(DATE in mark for mark in (end, *past)):
        raise NoMarks("it shows a date after the first question")
    generation = [suffix, end[len(suffix) :]]
    chat = {
        "template": template_name(generation, past),
        "trim": trim,
        "open": opening,
        "system": system,
        "system_empty": empty,
        "generation": generation,
        "past": past,
        "date_default": date,
    }
    for mark in (opening, *(system or ()), empty or "", *generation, *past):
        if "{date}" in mark:
            raise NoMarks("its own text holds {date}")
        if len(mark.encode()) > MARK_LIMIT:
            raise NoMarks(f"a mark of it is longer than {MARK_LIMIT} bytes")
    return json.loads(json.dumps(chat, ensure_ascii=False).replace(DATE, "{date}"))


def template_name(generation, past):
    """How `info` calls a template: by the header of its answers."""
    return one_line(generation[1].strip() or generation[0].strip() or past[0].strip() or "no marks")[:100]


def trimmed(text, side):
    return {"none": text, "left": text.lstrip(), "right": text.rstrip(), "both": text.strip()}[side]


def put_together(chat, messages, date):
    """What the engine makes of a conversation: [(text, whether it is a mark), ...]."""
    texts, trim = {}, chat["trim"]
    for message in messages:
        texts.setdefault(message["role"], []).append(message["content"])
    shown = trimmed(texts["system"][0], trim["system"]) if "system" in texts else None
    alone = shown is None or (shown == "" and chat["system_empty"] is not None)
    texts["user"] = [
        trimmed(text, trim["user" if i or alone else "after_system"]) for i, text in enumerate(texts["user"])
    ]

    def mark(text):
        for i, part in enumerate(text.split("{date}")):
            if i:
                yield date, False
            yield part, True

    if shown is not None and chat["system"] is None:
        raise NoMarks("it takes no system text")
    if alone:
        yield from mark(chat["open"] if shown is None else chat["system_empty"])
    else:
        yield from mark(chat["system"][0])
        yield shown, False
        yield from mark(chat["system"][1])
    answers = [trimmed(text, trim["assistant"]) for text in texts.get("assistant", [])]
    for i, text in enumerate(texts["user"]):
        yield text, False
        if i < len(answers):
            yield chat["past"][0], True
            yield answers[i], False
            yield chat["past"][1], True
    for text in chat["generation"]:
        yield text, True


def same_tokens(parts, added):
    """Whether the added tokens in the whole text, as Hugging Face finds them, are those of its parts, as the engine
    finds them: special ones within a mark, others within what is left between them."""
    whole = "".join(text for text, _ in parts)
    present = sorted((text for text in added if text in whole), key=lambda text: (-len(text), text))
    if not present:
        return True
    find = re.compile("|".join(map(re.escape, present)))
    expected = [match.span() for match in find.finditer(whole)]
    found, at, begin, cuts = [], 0, 0, []
    for text, is_mark in parts:
        if is_mark:
            cuts += [(at + m.start(), at + m.end()) for m in find.finditer(text) if added[m[0]]]
        at += len(text)
    for a, b in [*cuts, (at, at)]:
        found += [(begin + m.start(), begin + m.end()) for m in find.finditer(whole[begin:a]) if not added[m[0]]]
        found += [(a, b)] if b > a else []
        begin = b
    return found == expected


def check_marks(chat, rendered, added):
    """Compares the marks with the template. `added`: spelling -> whether the token is special."""
    for i, messages in enumerate(CONVERSATIONS):
        dates = [("", chat["date_default"] or "")]
        if chat["date_default"] is not None:
            dates.append((", dated", "1 May {1999}"))
        for which, date in dates:
            text = rendered[f"{i}{which}" if which else i]
            shown = json.dumps([m["content"] for m in messages], ensure_ascii=False)[:100]
            what = f"conversation {i + 1} of {len(CONVERSATIONS)} ({shown})"
            takes = chat["system"] is not None or messages[0]["role"] != "system"
            if text is None and not takes:
                continue
            if text is None:
                raise NoMarks(f"it fails on {what}")
            if not takes:
                raise NoMarks(f"it takes the system text of {what} and not of a shorter one")
            parts = list(put_together(chat, messages, date))
            if "".join(part for part, _ in parts) != text:
                raise NoMarks(f"turn marks cannot say what it makes of {what}")
            if not same_tokens(parts, added):
                raise NoMarks(f"its marks and added tokens overlap in {what}")


def recognise_chat(tokenizer, beyond=()):
    """The `chat` metadata for the tokenizer's template: marks, or why there are none, or None without a template.
    `beyond`: spellings of tokens that the model does not have."""
    if not tokenizer.template:
        return None
    try:
        import jinja2.ext  # noqa: F401
    except ImportError:
        raise Failure("jinja2: not installed, and the chat template needs it; pip install jinja2") from None
    try:
        if len(tokenizer.template) > TEMPLATE_LIMIT:
            raise NoMarks(f"it is longer than {TEMPLATE_LIMIT >> 20} MB")
        names = list(requests())
        results = in_a_child(lambda: render_all(tokenizer.template, tokenizer.names))
        if results is None:
            raise NoMarks("it takes too long, too much memory, or renders too much")
        if isinstance(results, str):
            raise NoMarks(f"it is no template ({results})")
        rendered = dict(zip(names, results, strict=True))
        added = tokenizer.added()
        chat = derive_marks(rendered, added)
        check_marks(chat, rendered, added)
        for text in beyond:
            if text in json.dumps([chat[key] for key in ("open", "system", "generation", "past")], ensure_ascii=False):
                raise NoMarks(f"it needs {text}, for which the embedding has no row")
        return chat
    except NoMarks as why:
        return {"refused": one_line(why)}


# ---- rendering -------------------------------------------------------------------------------------------------------


def render_all(template, names):
    """What the template renders for each of requests(), in the way Hugging Face does: a text, or None for an error. Or
    why it does not compile."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the model says, for training. It changes no text."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("keep"), [], [], body).set_lineno(line)

        def keep(self, caller):
            return caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        compiled = environment.from_string(template)
    except Exception as error:  # compiling may raise anything
        return one_line(f"{type(error).__name__}: {error}")[:200]

    def render(messages, add_generation_prompt, date):
        environment.globals["strftime_now"] = lambda form: date or DEFAULT_DAY.strftime(form)
        more = {} if date is None else {"date_string": date}
        try:
            return compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**names, **more},
            )
        except Exception:  # running it, too
            return None

    results = [render(*request) for request in requests().values()]
    return results if sum(len(text or "") for text in results) <= 4 * TEMPLATE_LIMIT else None


def in_a_child(work):
    """The result of work() as JSON, from a process of its own, since a template may run for ever or take all memory.
    None if the process failed or reached a limit."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():  # Python warns that threads are not forked; the child needs none
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            memory = pages * resource.getpagesize() + TEMPLATE_MEMORY
            resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            text = json.dumps(work()).encode()
            with open(writer, "wb") as file:
                file.write(text)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        with open(reader, "rb") as file:
            text = file.read(16 * TEMPLATE_LIMIT)
        return json.loads(text)
    except ValueError:
        return None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
