"""Which law catches which planted fault: `make test-exercises`.

Applies each patch of faults/ to a copy of speed.cu, builds the laws on it, and runs them one by one. What fails must be
what the table of exercises/README.md says.

    python3 exercises/check_faults.py [NAME...]    # all faults, or those of these names
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "faults"
# The name of a column of the table, and the beginning of the test's title. "as it is": no fault.
LAWS = {
    "Hugging Face": "every policy equals*",
    **{str(n): f"law {n}:*" for n in range(1, 9)},
    "counts": "predicted = counted*",
}
CXX = os.environ.get("CXX", "g++")
# -O0: these tests compile longer than they run.
FLAGS = "-std=c++20 -O0 -march=native -fopenmp -fno-trapping-math".split()


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def headers():
    """Everything that no fault changes, compiled once."""
    WORK.mkdir(parents=True, exist_ok=True)
    system = "catch2/catch.hpp", "chrono", "filesystem", "fstream", "functional", "random"
    lines = [f"#include <{name}>" for name in system]
    lines += [f'#include "{ROOT}/{name}"' for name in ("cpu/cpu.h", "model.h")]
    (WORK / "all.h").write_text("\n".join(lines) + "\n")
    r = run(CXX, *FLAGS, "-x", "c++-header", WORK / "all.h", "-o", WORK / "all.h.gch")
    if r.returncode:
        sys.exit(r.stderr)


def build(name):
    """A program of the laws on speed.cu with this patch."""
    place = WORK / name
    shutil.rmtree(place, ignore_errors=True)
    (place / "tests").mkdir(parents=True)
    for file in ("speed.cu", "tests/helpers.h", "tests/test_laws.cpp"):
        shutil.copy(ROOT / file, place / file)
    if name != "as it is":
        r = run("patch", "-p1", "-d", place, "-i", ROOT / "exercises" / "faults" / f"{name}.patch")
        if r.returncode:
            sys.exit(f"check_faults.py: {name}.patch does not fit speed.cu any more: {r.stdout}")
    one = place / "one.cpp"
    one.write_text(
        '#include "tests/test_laws.cpp"\ntemplate class speed::Engine<speed::Cpu>;\n'
        "int main(int argc, char** argv) { return Catch::Session().run(argc, argv); }\n"
    )
    program = place / "laws"
    r = run(CXX, *FLAGS, "-DCATCH_CONFIG_RUNNER", f"-I{ROOT}", "-include", WORK / "all.h", one, "-o", program,
            "-lopenblas", "-lpcre2-8")  # fmt: skip
    if r.returncode:
        sys.exit(f"check_faults.py: {name}: {r.stderr[-2000:]}")
    return program


def caught_by(program):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return {law for law, title in LAWS.items() if run(program, title, cwd=ROOT, env=environment).returncode != 0}


def table():
    """{fault: the laws that the table of the README marks}."""
    rows = re.findall(r"(?m)^\| `?([\w -]+?)`? \| (.*) \|$", (ROOT / "exercises" / "README.md").read_text())
    head = next(cells for name, cells in rows if name == "fault").split(" | ")
    return {
        name: {law for law, mark in zip(head, re.split(r" ?\| ?", cells), strict=True) if mark == "x"}
        for name, cells in rows
        if (ROOT / "exercises" / "faults" / f"{name}.patch").exists() or name == "as it is"
    }


def main():
    expected, wrong = table(), 0
    names = sys.argv[1:] or list(expected)
    missing = {p.stem for p in (ROOT / "exercises" / "faults").glob("*.patch")} - set(expected)
    if missing:
        sys.exit(f"check_faults.py: not in the table: {', '.join(sorted(missing))}")
    headers()
    for name in names:
        caught = caught_by(build(name))
        wrong += caught != expected[name]
        said = "" if caught == expected[name] else f", the table says {', '.join(sorted(expected[name])) or 'nothing'}"
        print(f"{name}: caught by {', '.join(law for law in LAWS if law in caught) or 'nothing'}{said}", flush=True)
    if wrong:
        sys.exit(f"{wrong} rows of the table are wrong")


if __name__ == "__main__":
    main()
