"""docs/map.md: every file, name, test and command of its tables exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/map.md"
COLUMNS = ["claim", "code", "test", "see it", "station"]


def defines(source, name):
    """Is `name` a function, type, method or variable in this source, not just a word of a comment?"""
    code = re.sub(r"//.*|(?m:^\s*#.*$)", "", source)
    return re.search(rf"\b(?:def|class|struct|[\w>&*\]]+)\s+{name}\b\s*[({{=;,:]|\"{name}\"|\w\* {name}\b", code)


def code_faults(cell):
    """Of `file: name, name` or `file`, once or several times."""
    for place in re.findall(r"`([^`]+)`", cell):
        file, _, names = place.partition(": ")
        if not (ROOT / file).exists():
            yield f"no file {file}"
            continue
        source = (ROOT / file).read_text()
        for name in filter(None, names.split(", ")):
            if not defines(source, name):
                yield f"{file} has no {name}"


def test_faults(cell):
    """Of `file: title`, the title of a test case or the name of a test function."""
    for place in re.findall(r"`([^`]+)`", cell):
        file, _, title = place.partition(": ")
        if not (ROOT / file).exists():
            yield f"no file {file}"
            continue
        source = (ROOT / file).read_text()
        if title and f'TEST_CASE("{title}"' not in source and f"def {title}(" not in source:
            yield f'{file} has no test "{title}"'


def faults(text, walkthrough):
    stations = set(re.findall(r"(?m)^## (\d+)\.", walkthrough))
    rows = re.findall(r"(?m)^\| (.*) \|$", text)
    for row in rows:
        cells = row.split(" | ")
        if cells == COLUMNS:
            continue
        # An empty cell is "| |", which the split leaves in one piece with its neighbour.
        cells = [cell.strip() for cell in re.split(r" ?\| ?", row)]
        if len(cells) != len(COLUMNS):
            yield f"{PAGE}: {len(cells)} cells: {row}"
            continue
        claim, code, test, _, station = cells
        if not code or not test:
            yield f"{PAGE}: {claim}: no code or no test"
        for fault in [*code_faults(code), *test_faults(test)]:
            yield f"{PAGE}: {claim}: {fault}"
        if station and station not in stations:
            yield f"{PAGE}: {claim}: no station {station}"
    if len(rows) < 20:
        yield f"{PAGE}: {len(rows)} rows of its tables were found"


PLANTED = [
    (PAGE, "make_anchor", "make_anchors"),
    (PAGE, "law 6: a second turn", "law 6: a third turn"),
    (PAGE, "--batch 2", "--batches 2"),
    (PAGE, "`cli/trace.h: look", "`cli/traces.h: look"),
    (PAGE, "| 16 |", "| 17 |"),
]
