"""What the studies share: paths, digests, runs of ./speed, policies, table cells, and the look of a plot.

matplotlib is imported when the first plot is drawn. So a study can measure and write its table without it.
"""

import hashlib
import json
import math
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "hf")]
from places import CACHE  # noqa: E402

SMOLLM2 = CACHE / "smollm2-135m-instruct.safetensors"
SMALL = ROOT / "models" / "small.safetensors"


def fail(why):
    """Ends the script with one line on standard error."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {why}")


# ---- digests ---------------------------------------------------------------------------------------------------------


def file_digest(path):
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def digest(value):
    """SHA-256, in hex, of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ---- ./speed ---------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    text: str
    record: dict  # the run record


class Speed:
    """The program on one model. A run that fails ends the script with the program's own message."""

    def __init__(self, program, model):
        self.program, self.model = program, model

    def run(self, mode, *flags, text=None):
        """Standard output of one run; `text` goes to its standard input."""
        command = [str(part) for part in (self.program, mode, "-m", self.model, *flags)]
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8")
        if done.returncode:
            fail(f"{' '.join(command)[:300]}: {done.stderr.strip()}")
        return done.stdout

    def rows(self, mode, *flags):
        """The rows that a mode prints with `-o json`."""
        return json.loads(self.run(mode, *flags, "-o", "json"))["rows"]

    def generate(self, prompt, *flags):
        """The Answer to one question, asked as a chat."""
        with tempfile.NamedTemporaryFile(suffix=".json") as record:
            said = self.run("generate", "--chat", "--record", record.name, *flags, "-", text=prompt)
            return Answer(said[:-1], json.loads(Path(record.name).read_text()))

    def version(self):
        return subprocess.run([self.program, "--version"], capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True)
class Policy:
    """A policy as `speed --compare` spells it: full, speed:24, speed:24:no-bos, pop:20, share:2."""

    method: str
    number: int | None = None  # K. Under share: one layer in every `number` keeps its cache.
    bos: bool = True

    @classmethod
    def parse(cls, spec):
        method, *rest = spec.split(":")
        numbers = [int(word) for word in rest if word != "no-bos"]
        return cls(method, numbers[0] if numbers else None, "no-bos" not in rest)

    def flags(self):
        flags = ["--policy", self.method]
        if self.number is not None:
            flags += ["--every" if self.method == "share" else "--k", str(self.number)]
        return flags if self.bos else [*flags, "--no-bos"]

    def line(self):
        """The name of its line in a plot and in a table."""
        return f"speed, BoS {'on' if self.bos else 'off'}" if self.method == "speed" else self.method


# ---- work that can be cut off ----------------------------------------------------------------------------------------


def resume(path, name, tasks, work, jobs, so_far, report):
    """{key: row} of what `path` holds, and, unless so_far, of the tasks that it does not hold.

    tasks: {key: task}, done in this order on `jobs` threads; work(task) gives the row, a dict. `path` gets each row as
    a line of JSON as it comes, its key under `name`. So a run that was cut off, in the middle of a line too, goes on
    from there. After each task report(key, count, missing) is called: it was number `count` of the `missing` keys.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    done = {row[name]: row for row in map(json.loads, lines)}
    if lines and not so_far:
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    missing = [key for key in tasks if key not in done and not so_far]
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(work, tasks[key]): key for key in missing}
        try:
            for count, future in enumerate(as_completed(running), start=1):
                key = running[future]
                done[key] = {name: key, **future.result()}
                with open(path, "a") as file:
                    file.write(json.dumps(done[key]) + "\n")
                report(key, count, missing)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if sys.stderr.isatty() and missing:
        print("\r\033[K", end="", file=sys.stderr)
    return done


# ---- numbers and tables ----------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    low: float
    high: float


def wilson(right, n):
    """95 % interval of a share, in % (Wilson 1927)."""
    z, share = 1.959964, right / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(*(round(100 * x / (1 + z * z / n), 1) for x in (middle - half, middle + half)))


def percentiles(samples):
    """The interval that holds the middle 95 % of the samples."""
    samples = sorted(samples)
    at = (len(samples) - 1) / 40  # 2.5 % at either end
    return Interval(samples[round(at)], samples[round(39 * at)])


def cell(value, low, high, digits):
    """A number with its interval, as a table shows it; digits: a format such as ".1f"."""
    return f"{value:{digits}} ({low:{digits}}–{high:{digits}})"


def table(columns, rows):
    """The lines of a Markdown table."""

    def line(cells):
        return f"| {' | '.join(map(str, cells))} |"

    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]


# ---- plots -----------------------------------------------------------------------------------------------------------


class Style(NamedTuple):
    color: str
    marker: str
    dash: str  # "": markers only


STYLES = {
    "speed, BoS on": Style("#1f8fe0", "o", "-"),
    "speed, BoS off": Style("#e0782f", "s", "--"),
    "pop": Style("#35a853", "^", ":"),
    "share": Style("#a05fd0", "D", ""),
}


def subplots(*grid, **options):
    """matplotlib's `subplots`. Text is grey on no background, so that it reads on light and on dark pages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.fonttype": "path",
            "svg.hashsalt": "speed",
            "font.size": 11,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "legend.fontsize": 9,
            **dict.fromkeys(
                ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "#808080"
            ),
        }
    )
    return plt.subplots(*grid, **options)


def save(figure, path):
    """Writes the figure. The same lines give the same bytes: no date is stored."""
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
