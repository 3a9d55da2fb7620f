"""Recognises a chat template and gives its turn marks: the text before and after each turn.

A template is a program by an unknown author. It runs in jinja2's sandbox, in a process of its own, with little time and
memory, on the conversations below. The engine never sees it. If a known template renders the same text, the engine gets
the turn marks of that one, else none.
"""

import json
import os
import re
import resource
import signal
import warnings
from pathlib import Path

from .failure import Failure
from .files import read_limited

TEMPLATE_LIMIT = 1 << 20  # bytes of a chat template, and of what it may render
TEMPLATE_SECONDS = 10  # limit of processor time
TEMPLATE_MEMORY = 1 << 30  # limit in bytes


def read_template(folder, settings):
    """The checkpoint's chat template for plain conversations, or None."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_limited(path, TEMPLATE_LIMIT).decode("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise Failure("tokenizer_config.json: chat_template is neither a string nor a list; get the file again")
    return template


def llama3_chat(template, system_prefix="", system_default=None, date_default=None):
    def header(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return {
        "template": template,
        "trim": True,
        "begin": "<|begin_of_text|>",
        "system": [header("system") + system_prefix, "<|eot_id|>"],
        "system_default": system_default,
        "user": [header("user"), "<|eot_id|>"],
        "assistant": [header("assistant"), "<|eot_id|>"],
        "date_default": date_default,
    }


def known_chats(plain):
    """The chat templates that the engine knows, as turn marks.

    `plain`: a conversation without a system text, as the checkpoint's template renders it. Variants of ChatML differ in
    their default system text, which is taken from there."""
    prefix, date = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n", "26 Jul 2024"
    default = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", plain, re.DOTALL)
    if default and len(default[1].encode()) > 16384:  # the engine's limit
        default = None
    chatml = {
        "template": "chatml",
        "trim": False,
        "begin": "",
        "system": ["<|im_start|>system\n", "<|im_end|>\n"],
        "system_default": default and default[1],
        "user": ["<|im_start|>user\n", "<|im_end|>\n"],
        "assistant": ["<|im_start|>assistant\n", "<|im_end|>\n"],
        "date_default": None,
    }
    return [
        llama3_chat("llama-3"),
        llama3_chat("llama-3.1", prefix, "", date),
        llama3_chat("llama-3.2", prefix, "", date),
        chatml,
    ]


def render_marks(chat, messages, date):
    """The text that the engine makes of a conversation: begin, each content between its marks, the assistant header."""
    if messages[0]["role"] != "system" and chat["system_default"] is not None:
        messages = [{"role": "system", "content": chat["system_default"]}, *messages]
    text = chat["begin"]
    for message in messages:
        before, after = chat[message["role"]]
        text += before + (message["content"].strip() if chat["trim"] else message["content"]) + after
    return (text + chat["assistant"][0]).replace("{date}", date)


def recognise_chat(tokenizer):
    """The `chat` metadata for the tokenizer's template, or None without a template or for an unknown one.

    Templates are compared by the text they render, in the way Hugging Face renders them. A template is known if it
    renders every conversation as one known template does."""
    if not tokenizer.template:
        return None
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise Failure("jinja2: not installed, and the chat template needs it; pip install jinja2") from None

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    if len(tokenizer.template) > TEMPLATE_LIMIT:
        return None
    today = "01 Jan 2000"
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    names = {key: text for key, text in names.items() if text is not None}
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda _: today)

    def render(messages):
        try:
            return environment.from_string(tokenizer.template).render(
                messages=messages, add_generation_prompt=True, **names
            )
        except Exception:  # it may raise anything; then it is not a known template
            return None

    def turns(*contents):
        roles = ["user", "assistant"] * len(contents)
        return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]

    def system(content):
        return [{"role": "system", "content": content}]

    conversations = [
        turns("Hi."),
        turns("  a b\n\n", " c \t", "\u3000d\x1c"),
        turns("1", "2", "3", "4", "5"),
        system("Be brief.") + turns("Hi."),
        system(" \n s t \n") + turns("x", "y", " z"),
        system("") + turns("Hi."),
        turns("\n"),
        turns("a<b>'\"\\ é", "", "c"),
    ]
    rendered = in_a_child(lambda: [render(c) for c in conversations]) or [None]
    for chat in known_chats(rendered[0] or ""):
        date = today if chat["template"] == "llama-3.2" else chat["date_default"] or ""
        marks = [m for role in ("system", "user", "assistant") for m in chat[role]] + [chat["begin"]]
        spelled = set(re.findall(r"<\|\w+\|>", "".join(marks)))
        if spelled <= set(tokenizer.special.values()) and rendered == [
            render_marks(chat, c, date) for c in conversations
        ]:
            return chat
    return None


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
