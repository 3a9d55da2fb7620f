"""Holds the pages true: `make test-docs` (needs ./speed; the standard library only).

- docs/walkthrough.md: every block of "$ command" lines is run, and the output shown must be the output it gives.
- README.md, CONTRIBUTING.md and all pages of docs/ and exercises/: every command exists, with every flag it is given,
  and runs where it needs no files but the project's; every page, file and `--flag` that a page names exists; output
  shown without its command is that of the command listed in QUOTED.
- Tables and figures that come from a stored record are made again from the record (figures.py).
- docs/map.md: every file, name, test and station of its tables exists (paper_map.py).
- Then faults are planted in the pages, one at a time: each must be noticed.

What does not count: times and rates (a number before ms, s or tokens/s; a table's columns "time", "first token" and
"tokens/s"), runs of spaces, and the last digit of what exercises/look.py and rows.py round.
A line "..." stands for any lines. Commands of SmolLM2 (./run.sh) run where ./run.sh has fetched it.

    python3 tests/docs/check.py           # all of it
    python3 tests/docs/check.py --fill    # writes the output of every command into docs/walkthrough.md
"""

import functools
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import figures
import paper_map

ROOT = Path(__file__).resolve().parents[2]
WALKTHROUGH = "docs/walkthrough.md"
XDG_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
CACHE = Path(os.environ.get("SPEED_CACHE") or XDG_CACHE / "speed")
SMOLLM2 = CACHE / "smollm2-135m-instruct.safetensors"

# Output that a page shows without "$": page, the line it begins with, the command.
QUOTED = [
    ("docs/trace.md", "layer  prompt  K,V", "./speed trace --chat -f tests/page/story.txt --k 5"),
    ("README.md", "policy      prompt     prefill", "./speed plan --shape llama-3.1-8b --ctx 131072 --k 24"),
    (
        "README.md",
        "policy             same token",
        './run.sh --chat -p "Explain in two sentences why the sky is blue." -n 80 '
        "--compare speed:24,speed:24:no-bos,pop:20",
    ),
]
# Modes whose commands are run; chat and bench need a terminal or minutes, and only their names and flags are checked.
RUN_MODES = ("generate", "trace", "plan", "perplexity", "tokenize", "info", "logits")


class Command(NamedTuple):
    page: str
    text: str
    output: list  # of lines, as shown


def pages():
    found = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("exercises/**/*.md"))]
    return {str(p.relative_to(ROOT)): p.read_text() for p in found}


def blocks(text):
    """Yields the lines of each indented block of code."""
    block = []
    for line in [*text.split("\n"), "end"]:
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line[4:])
        elif block:
            while block and not block[-1].strip():
                block.pop()
            yield block
            block = []


def shown_commands(page, text):
    """Yields the "$ command" lines of a page, each with the output beneath."""
    for block in blocks(text):
        if not block[0].startswith("$ "):
            continue
        at = 0
        while at < len(block):
            command = block[at][2:]
            while command.endswith("\\"):
                at += 1
                command = command[:-1] + block[at].strip()
            begin = at = at + 1
            while at < len(block) and not block[at].startswith("$ "):
                at += 1
            yield Command(page, command, [line.rstrip() for line in block[begin:at]])


# ---- running ----


@functools.cache
def run(command):
    """(exit code, lines of standard output, standard error); None if the command needs a model that is not here."""
    environment = {k: v for k, v in os.environ.items() if k != "SPEED_MODEL"}
    if "./run.sh" in command:
        if not SMOLLM2.exists():
            return None
        command = command.replace("./run.sh", "./speed")
        environment["SPEED_MODEL"] = str(SMOLLM2)
    r = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=100,
    )
    return r.returncode, r.stdout.rstrip("\n").split("\n"), r.stderr


NUMBER = r"(?<![\w.])\d[\d.,]*"


def masked(lines):
    """Lines with times and rates replaced, as the head of this file says."""
    timed = 0
    for line in lines:
        columns = re.search(r"( +time| +first token +tokens/s)$", line)
        if columns:
            timed = 2 if "first" in columns[0] else 1
        elif not line.strip():
            timed = 0
        line = re.sub(NUMBER + r" ?(?=(ms|s|us|µs|tokens/s)\b)", "# ", line)
        line = re.sub(r"# (ms|us|µs|s)\b", "# s", line)
        if timed == 2:
            line = re.sub(r" +[\d.]+$", " #", line)
        yield re.sub(r"[ ]+", " ", line).rstrip()


# A weight or probability that exercises/look.py made of one byte; a norm that exercises/rows.py prints whole.
ROUNDED = {"look.py": (r"\d+%|\d\.\d\d(?= \()", 0.021), "rows.py": (r"\d+", 1)}


def near(a, b, pattern, bound):
    """Are two lines equal but for the rounding of numbers of this pattern? A percent is a hundredth."""
    if re.sub(pattern, "#", a) != re.sub(pattern, "#", b):
        return False
    pairs = zip(re.findall(pattern, a), re.findall(pattern, b), strict=True)
    return all(abs(float(x.rstrip("%")) - float(y.rstrip("%"))) <= bound * (100 if "%" in x else 1) for x, y in pairs)


def first_difference(shown, got, command):
    """Where the shown lines are not those got, in words; None if they are."""
    shown, got = list(masked(shown)), list(masked(got))
    rounded = next((ROUNDED[script] for script in ROUNDED if script in command), None)

    def same(a, b):
        return near(a, b, *rounded) if rounded else a == b

    at, free = 0, False
    for line in shown:
        if line == "...":
            free = True
            continue
        if free:
            while at < len(got) and not same(line, got[at]):
                at += 1
        if at >= len(got) or not same(line, got[at]):
            return f'"{line}" is not what it prints' + (f': "{got[at]}"' if at < len(got) else "")
        at, free = at + 1, False
    return None if free or at == len(got) else f'it also prints "{got[at]}"'


def check_shown(command, skipped):
    result = run(command.text)
    if result is None:
        skipped.append(command.text)
        return None
    code, lines, err = result
    if code != 0:
        return f"exit code {code}: {err.strip()[-200:]}"
    return first_difference(command.output, lines if lines != [""] else [], command.text)


# ---- flags, targets, files ----


@functools.cache
def mode_flags(mode):
    """The flags of a mode, from its help; None for no such mode."""
    r = subprocess.run([ROOT / "speed", mode, "--help"], capture_output=True, text=True)
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", r.stdout)) if r.returncode == 0 else None


@functools.cache
def modes():
    help_text = subprocess.run([ROOT / "speed", "--help"], capture_output=True, text=True).stdout
    return re.findall(r"^  (\w+)  ", help_text.split("Modes")[1].split("Policies")[0], re.M)


@functools.cache
def targets():
    return set(re.findall(r"^([a-z][\w-]*)(?=[ \w-]*:)", (ROOT / "Makefile").read_text(), re.M)) | set(
        re.findall(r"[\w-]+", re.search(r"\.PHONY:((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text())[1])
    )


@functools.cache
def all_flags():
    """Every flag that a mode, a script or a shell file of the project takes."""
    found = set().union(*(mode_flags(m) for m in modes())) | {"--help", "--version"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("[a-z]*/**/*.py"), *ROOT.glob("[a-z]*/**/*.sh")]:
        if "build" not in path.parts[len(ROOT.parts)]:
            found |= set(re.findall(r"--[a-z][\w-]*", path.read_text()))
    return found


@functools.cache
def own_commands():
    """What run.sh does itself; all else it hands to ./speed."""
    return re.findall(r'"\$\{1:-\}" = ([\w-]+) \]', (ROOT / "run.sh").read_text())


def command_fault(text):
    """Why a command of a page cannot be right, or None. Placeholders in capitals stand for anything."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return None  # prose between back ticks
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if not words:
        return None
    if words[0] == "make":
        for word in words[1:]:
            if re.fullmatch(r"[a-z][\w-]*", word) and word not in targets():
                return f"no target {word} in the Makefile"
        return None
    if words[0] in ("./speed", "speed", "./run.sh"):
        rest = words[1:]
        if words[0] == "./run.sh" and rest and rest[0] in own_commands():
            return None
        mode = "generate"
        if rest and re.fullmatch(r"[a-z]\w*", rest[0]):
            mode = rest.pop(0)
            if mode not in modes():
                return f"no mode {mode}"
        known = mode_flags(mode)
        for word in rest:
            if word in ("|", ">", "2>/dev/null"):
                break
            flag = word.split("=")[0]
            if re.fullmatch(r"--?[a-z][\w-]*", flag) and flag not in known | {"--version", "--help"}:
                return f"speed {mode} has no flag {flag}"
        return None
    if words[0] in ("python3", "hf/run.sh", "tests/hf/run.sh", "bash"):
        script = next((w for w in words[1:] if w.endswith((".py", ".sh"))), words[0])
        if script.startswith("kit/"):
            return None
        if not (ROOT / script).exists():
            return f"no file {script}" if script != words[0] else None
        source = (ROOT / script).read_text()
        for word in words[words.index(script) + 1 :] if script in words else []:
            if re.fullmatch(r"--[a-z][\w-]*", word) and word not in source and word[2:] not in source:
                return f"{script} has no flag {word}"
    return None


RUNNERS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\./speed|\./run\.sh|make|python3|hf/run\.sh|tests/hf/run\.sh|bash)\b")


def page_commands(text):
    """The commands of a page, each one of a chain by itself."""
    for line in page_lines(text):
        yield from line.split(" && ")


def page_lines(text):
    """Lines of commands, in blocks of code and between back ticks."""
    for block in blocks(text):
        lines = iter(block)
        for line in lines:
            line = line.removeprefix("$ ")
            if RUNNERS.match(line):
                while line.endswith("\\"):
                    line = line[:-1] + next(lines).strip()
                yield re.split(r"  +#|  +\w+ .*$", line)[0].strip() if "  #" in line else line.strip()
    prose = re.sub(r"(?m)^    .*$", "", text)
    for quoted in re.findall(r"`([^`]+)`", prose):
        quoted = " ".join(quoted.split())
        if RUNNERS.match(quoted) or re.match(r"speed [a-z]+", quoted):
            yield quoted


def runnable(command):
    """The command with its output files in build/, or None if it is not one to run: it has placeholders, or needs files
    that are not the project's."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        return None
    if words[0] not in ("./speed", "./run.sh") or len(words) == 1 or words[1] in own_commands():
        return None
    mode = words[1] if re.fullmatch(r"[a-z]\w*", words[1]) else "generate"
    placeholder = any(re.fullmatch(r"[A-Z]+|\.\.\.", word) for word in words)
    missing = any(f in ("-m", "-f") and not (ROOT / file).exists() for f, file in itertools.pairwise(words))
    if mode not in RUN_MODES or placeholder or missing:
        return None
    return re.sub(r"(--html|>) (?!build/)(?=\w)", r"\1 build/", command)


def check_page(page, text):
    """Yields the faults of a page's commands, flags, links and files."""
    for command in page_commands(text):
        fault = command_fault(command)
        if fault:
            yield f"{page}: {command}: {fault}"
        elif page != WALKTHROUGH and runnable(command):
            result = run(runnable(command))
            if result and result[0] != 0:
                yield f"{page}: {command}: exit code {result[0]}: {result[2].strip()[-200:]}"
    prose = re.sub(r"(?m)^    .*$", "", text)
    for flag in re.findall(r"`(--[a-z][\w-]*)", prose):
        if flag not in all_flags() and not page.startswith("docs/hf") and flag != "--apply_chat_template":
            yield f"{page}: nothing takes {flag}"
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        if "://" not in link and not (folder / link).exists():
            yield f"{page}: no file {link}"
    for path in re.findall(
        r"`((?:[\w.-]+/)+[\w.-]+\.(?:h|cpp|cu|cuh|py|md|sh|json|svg|css|js|html|txt|patch))`", prose
    ):
        if not any((base / path).exists() for base in (ROOT, folder)):
            yield f"{page}: no file {path}"


def check_quoted(texts, skipped):
    for page, begins, command in QUOTED:
        block = next((b for b in blocks(texts[page]) if b[0].startswith(begins)), None)
        if block is None:
            yield f'{page}: no block that begins with "{begins}"'
            continue
        result = run(command)
        if result is None:
            skipped.append(command)
            continue
        fault = first_difference(["...", *block, "..."], result[1], command)
        if fault:
            yield f"{page}: {command}: {fault}"


def all_faults(texts, skipped):
    for command in shown_commands(WALKTHROUGH, texts[WALKTHROUGH]):
        fault = check_shown(command, skipped)
        if fault:
            yield f"{WALKTHROUGH}: $ {command.text}\n    {fault}"
    for page, text in texts.items():
        yield from check_page(page, text)
    yield from check_quoted(texts, skipped)
    yield from figures.faults(texts)
    yield from paper_map.faults(texts[paper_map.PAGE], texts[WALKTHROUGH])


# ---- planted faults ----

# (page, text, what to put in its place): each must be noticed.
PLANTED = [
    (WALKTHROUGH, "161,247,232", "161,247,233"),
    (WALKTHROUGH, "A ring.", "A wing."),
    (WALKTHROUGH, "BoS + 4", "BoS + 5"),
    (WALKTHROUGH, "-n 16 \\\n", "-n 3 \\\n"),
    (WALKTHROUGH, "--batch 2", "--batches 2"),
    ("docs/trace.md", "240,640", "240,641"),
    ("docs/trace.md", "--compare pop:5", "--compares pop:5"),
    ("README.md", "4.55 PFLOP", "4.56 PFLOP"),
    ("README.md", "make help", "make halp"),
    ("README.md", "](docs/performance.md", "](docs/performances.md"),
    *figures.PLANTED,
    *paper_map.PLANTED,
]


def check_planted(texts):
    for page, was, becomes in PLANTED:
        if page not in texts:
            continue
        if was not in texts[page]:
            yield f'planted fault: {page} has no "{was}" any more: plant another'
        elif not any(True for _ in all_faults({**texts, page: texts[page].replace(was, becomes, 1)}, [])):
            yield f'planted fault: {page} with "{becomes}" for "{was}" was not noticed'


def fill():
    """Writes what each command of the walkthrough prints beneath it."""
    lines, out = (ROOT / WALKTHROUGH).read_text().split("\n"), []
    at = 0
    while at < len(lines):
        out.append(lines[at])
        if lines[at].startswith("    $ "):
            text = lines[at][6:]
            while text.endswith("\\"):
                at += 1
                out.append(lines[at])
                text = text[:-1] + lines[at].strip()
            result = run(text)
            shown = at + 1
            while shown < len(lines) and re.match(r"    (?!\$ )|$", lines[shown]):
                shown += 1
            while not lines[shown - 1].strip():
                shown -= 1
            old = [line[4:] for line in lines[at + 1 : shown]]
            if result is None or (old and first_difference(old, result[1], text) is None):
                out += lines[at + 1 : shown]
            elif result[1] != [""]:
                out += [f"    {line}".rstrip() for line in result[1]]
            at = shown - 1
        at += 1
    (ROOT / WALKTHROUGH).write_text("\n".join(out))


def main():
    os.chdir(ROOT)
    (ROOT / "build").mkdir(exist_ok=True)
    if sys.argv[1:] == ["--fill"]:
        return fill()
    texts, skipped = pages(), []
    faults = list(all_faults(texts, skipped))
    if not faults:
        faults = list(check_planted(texts))
    for fault in faults:
        print(fault, file=sys.stderr)
    for command in skipped:
        print(f"not run, ./run.sh has not fetched SmolLM2: {command}")
    if faults:
        sys.exit(f"{len(faults)} faults")
    print(f"{len(texts)} pages hold what they say; {len(PLANTED)} planted faults noticed")


if __name__ == "__main__":
    main()
