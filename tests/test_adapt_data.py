"""Tests of study/adapt_data.py: trees that are well formed, answers that their passages hold, splits that share no
words and no templates, a check that finds what is planted, and chats that go on after a cut.

Needs Python alone, no torch: the model is a stand-in.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "study")]
import adapt_data  # noqa: E402
from adapt_grammar import FACTS, LINES, WORDS  # noqa: E402
from adapt_lookups import SHARED, Bank, article, inflect, plural, split_list, tree  # noqa: E402

COUNT = 1500
FORBIDDEN = adapt_data.forbidden_names()
BANKS = {split: Bank(split, FORBIDDEN) for split in ("train", "test")}
TREES = {split: [tree(bank, 7, i) for i in range(COUNT)] for split, bank in BANKS.items()}
BRANCHES = [(t, b) for trees in TREES.values() for t in trees for b in t["branches"]]
PLAIN = dict(kind="chat", template="chat", system=None, passage="", branches=[dict(question="Hello?", answer="Yes.")])


def letters(text):
    """The words of a text in lower case, split at hyphens and apostrophes too."""
    return set(re.findall(r"[^\W\d_]+", text.lower()))


def run(*arguments):
    """(exit status, what it printed, its last line on standard error) of the script."""
    out = io.StringIO()
    saved, sys.argv = sys.argv, ["adapt_data.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out):
            adapt_data.main()
    except SystemExit as stop:
        return 1, out.getvalue(), str(stop)
    finally:
        sys.argv = saved
    return 0, out.getvalue(), ""


class Trees(unittest.TestCase):
    def test_form(self):
        for t in TREES["train"] + TREES["test"]:
            self.assertEqual(list(t), ["kind", "template", "system", "passage", "branches"])
            self.assertTrue(2 <= len(t["branches"]) <= 8)
            self.assertEqual(len({b["question"] for b in t["branches"]}), len(t["branches"]))
            for text in [t["passage"], *(b[key] for b in t["branches"] for key in ("question", "answer"))]:
                self.assertTrue(text and text == text.strip("\n"), text)

    def test_nothing_of_a_template_is_left(self):
        for t in TREES["train"] + TREES["test"]:
            for text in [t["passage"], *(b[key] for b in t["branches"] for key in ("question", "answer"))]:
                self.assertIsNone(re.search(r"[{}~^]|\(\w+\|\w|\[\d\]$", text), text)
                self.assertNotIn(" of I ", text)
                self.assertIsNone(re.search(r" ,|,,|,\.|\ba [aei]\w|\b(I|you|they) is\b", text), text)

    def test_a_tree_depends_on_its_seed_and_number(self):
        with tempfile.TemporaryDirectory() as folder:
            whole, piece = Path(folder) / "whole", Path(folder) / "piece"
            run("make", "--out", whole, "--count", 30, "--seed", 7)
            run("make", "--out", piece, "--count", 10, "--seed", 7, "--start", 20)
            lines = whole.read_text().splitlines()
            self.assertEqual(lines[20:], piece.read_text().splitlines())
            self.assertEqual([json.loads(line) for line in lines], TREES["train"][:30])
            self.assertNotEqual(tree(BANKS["train"], 8, 0), TREES["train"][0])

    def test_every_kind_and_the_lengths(self):
        kinds = {t["kind"] for t in TREES["train"]}
        self.assertEqual(len(kinds), 16, kinds)
        words = sorted(len(t["passage"].split()) for t in TREES["train"])
        self.assertTrue(80 <= words[COUNT // 2] <= 250, words[COUNT // 2])
        self.assertLess(words[-1], 700)

    def test_verbs_and_nouns(self):
        for verb, now, past in VERBS:
            self.assertEqual([inflect(verb, "3", False), inflect(verb, "3", True)], [now, past])
        self.assertEqual([inflect("be", who, False) for who in "31p"], ["is", "am", "are"])
        self.assertEqual([inflect("be", who, True) for who in "31p"], ["was", "was", "were"])
        for noun, one, many in (
            ("owl", "an owl", "owls"), ("uniform", "a uniform", "uniforms"), ("pony", "a pony", "ponies"),
            ("hourglass", "an hourglass", "hourglasses"), ("postman", "a postman", "postmen"),
        ):  # fmt: skip
            self.assertEqual([article(noun), plural(noun)], [one, many])

    def test_every_past_form_is_known(self):
        """Verbs that are not regular must be in PAST: those of the templates, as read by a person."""
        text = "\n".join([*FACTS.values(), *LINES.values()])
        verbs = set(re.findall(r"[~^=]([a-z]+)", text)) - {"be", "was", "hear"}
        regular = {v for v in verbs if inflect(v, "3", True) in (v + "ed", v + "d", v[:-1] + "ied")}
        self.assertLessEqual(regular, set(REGULAR.split()), regular - set(REGULAR.split()))


REGULAR = """answer ask belong carry carve charge clean close collect cross employ exchange hope lack laugh live measure
    offer open owe own paint play practise rent repair reply share show smell study suffer talk touch use visit wait
    want weigh work"""


VERBS = [("carry", "carries", "carried"), ("play", "plays", "played"), ("hide", "hides", "hid"), ("go", "goes", "went")]


class Answers(unittest.TestCase):
    """Every answer can be found: what it names stands in the passage or in the question."""

    def test_names_and_numbers(self):
        for t, b in BRANCHES:
            known = letters(t["passage"] + " " + b["question"])
            named = {n for n, begins in adapt_data.names_in(b["answer"]) if not begins and n != "i"}
            self.assertEqual({n for n in named if n not in known and n + "s" not in known}, set(), b)
            digits = set(re.findall(r"\d+", b["answer"]))
            self.assertLessEqual(digits, set(re.findall(r"\d+", t["passage"])), b)

    def test_nouns(self):
        """A noun of an answer stands in the passage or the question, as it is or in the plural."""
        kinds = "animal colour object instrument plant garment vehicle job material building".split()
        nouns = {item for kind in kinds for item in split_list(WORDS[kind]) if item.isalpha()} - {"bus", "tram"}
        for t, b in BRANCHES:
            known = letters(t["passage"] + " " + b["question"])
            named = {n for n in nouns if n in letters(b["answer"])} if b["answer"] not in t["passage"] else set()
            self.assertEqual({n for n in named if n not in known and plural(n) not in known}, set(), b)

    def test_quotes_and_copies_stand_in_the_passage(self):
        checked = 0
        for t, b in BRANCHES:
            if re.search(r"(^|[.:?] )(Quote|Copy|Continue|Repeat)\b|exact sentence", b["question"]):
                checked += 1
                self.assertIn(b["answer"].rstrip(".").lower(), t["passage"].lower(), b)
        self.assertGreater(checked, COUNT // 2)

    def test_one_passage_has_one_answer(self):
        """The same question in two words of one tree never has two short answers."""
        for t in TREES["train"]:
            short = {}
            for b in t["branches"]:
                key = " ".join(adapt_data.words_of(b["question"]))
                self.assertEqual(short.setdefault(key, b["answer"]), b["answer"])


class Splits(unittest.TestCase):
    def test_templates(self):
        train, test = ({k for t in TREES[s] for k in t["template"].split("+")} for s in ("train", "test"))
        # "home" and "kin" name the facts that both splits need: a person's work, and who is whose sister.
        self.assertLessEqual({k.split("-")[0] for k in train & test}, {"home", "kin"})
        self.assertGreater(len(train), 200)
        for name in FACTS:
            self.assertFalse(
                {r.clause for r in BANKS["train"].rules[name]} & {r.clause for r in BANKS["test"].rules[name]}
            )

    def test_words_and_names(self):
        for kind, text in WORDS.items():
            if len(split_list(text)) >= SHARED:
                self.assertFalse(set(BANKS["train"].words[kind]) & set(BANKS["test"].words[kind]), kind)
        for names in ("women", "men", "last", "towns"):
            train, test = (set(getattr(BANKS[s], names)) for s in ("train", "test"))
            self.assertFalse(train & test)
            self.assertGreater(len(train), 300)


class HeldOut(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.leaks = adapt_data.Leaks()
        cls.data = json.loads((ROOT / "study" / "adapt_eval.json").read_text())

    def test_questions(self):
        paragraphs = self.data["paragraphs"]
        texts = [p["text"] for p in paragraphs if "text" in p]
        self.assertGreaterEqual(len(texts), 60)
        self.assertEqual(len(set(texts)), len(texts))
        asked = [q for q in self.data["questions"] if q["kind"] == "retrieval"]
        self.assertGreaterEqual(len(asked), 110)
        self.assertEqual(sorted(q["ask"] for q in asked), list(range(len(paragraphs))))
        for q in asked:
            p = paragraphs[q["ask"]]
            own = next(i for i in range(q["ask"], -1, -1) if "text" in paragraphs[i])
            self.assertIn(own, q["passage"])
            pattern = rf"(?i)\b(?:{p['answer']})s?\b"  # as in quality.py
            self.assertRegex(paragraphs[own]["text"], pattern)
            self.assertNotRegex(p["question"], pattern)

    def test_own_names(self):
        one, other = (adapt_data.held_out_texts([path]) for path in adapt_data.HELD_OUT)
        self.assertFalse(adapt_data.names_of(one[0] + one[1]) & adapt_data.names_of(other[0] + other[1]))

    def test_the_grammar_has_none_of_it(self):
        for t in TREES["train"][::3] + TREES["test"][::3]:
            texts = [t["passage"], *(b[key] for b in t["branches"] for key in ("question", "answer"))]
            self.assertEqual(self.leaks.find("\n".join(texts)), [])

    def test_a_bank_leaves_names_out(self):
        names = {"agnes", "pepper", "windlow"}
        found = {name for bank in BANKS.values() for name in [*bank.women, *bank.words["pet"], *bank.towns]}
        self.assertLessEqual({"Agnes", "Pepper", "Windlow"}, found)
        for split in ("train", "test"):
            bank = Bank(split, names)
            self.assertNotIn("Agnes", bank.women)
            self.assertNotIn("Pepper", bank.words["pet"])
            self.assertNotIn("Windlow", bank.towns)

    def test_planted_leaks_are_found(self):
        paragraphs = self.data["paragraphs"]
        sentence = max(paragraphs[0]["text"].split(". "), key=len)
        planted = {
            "name": "Yesterday we saw Ilka at the station.",
            "sentence": f"we heard that {' '.join(sentence.lower().split()[:9])} and so on",
            "question": f"Please answer: {paragraphs[0]['question'].lower()}",
            "other question": "what is the capital of japan",
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.jsonl"
            path.write_text(json.dumps(PLAIN) + "\n")
            self.assertEqual(run("check", path)[0], 0)
            for what, text in planted.items():
                for place in ("system", "passage", "question", "answer"):
                    bad = json.loads(json.dumps(PLAIN))
                    (bad if place in bad else bad["branches"][0])[place] = text
                    path.write_text(json.dumps(PLAIN) + "\n" + json.dumps(bad) + "\n")
                    status, out, _ = run("check", path)
                    self.assertEqual(status, 1, (what, place))
                    self.assertIn(f"{path}:2: {what.split()[-1]} ", out)

    def test_bad_files(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.jsonl"
            for line in ("{", "[]", '{"kind": "chat"}'):
                path.write_text(line + "\n")
                self.assertIn(f"{path}:1: not a tree", run("check", path)[2])


class StandIn(adapt_data.Chatter):
    """Writes what a table says, by the seed that chats() sets; counts what it was asked for."""

    def __init__(self, batch=8, stop_after=None):
        self.batch, self.seed, self.asked, self.stop_after = batch, None, 0, stop_after
        self.before, self.after = "<user>", "</user>"
        self.torch = SimpleNamespace(manual_seed=self.set_seed)

    def set_seed(self, seed):
        if self.stop_after == 0:
            raise KeyboardInterrupt
        if self.stop_after:
            self.stop_after -= 1
        self.seed, self.asked = seed, 0

    def ids(self, text):
        return text.split()

    def write(self, prompts, limit, temperature, stop=None):
        out = []
        for prompt in prompts:
            self.asked += 1
            if prompt.endswith("Question:"):
                name = re.search(r"\b[A-Z]\w+ [A-Z]\w+\b", prompt)[0]
                out.append((f" Who is {name} and what is it about?\nAnswer", True))
            elif prompt == self.before:
                out.append((f" What is the number {self.seed % 1000} and the {self.asked}? ", self.asked % 5 != 0))
            else:
                out.append((f"The answer of {self.asked}.", self.asked % 3 != 0))
        return out


class Chats(unittest.TestCase):
    def make(self, path, count, seed=3, resume=False, stop_after=None):
        with contextlib.redirect_stderr(io.StringIO()):
            adapt_data.chats(StandIn(stop_after=stop_after), path, count, seed, resume, adapt_data.Leaks())

    def test_a_run_that_was_cut_goes_on(self):
        with tempfile.TemporaryDirectory() as folder:
            whole, cut = Path(folder) / "whole", Path(folder) / "cut"
            self.make(whole, 40)
            with self.assertRaises(KeyboardInterrupt):
                self.make(cut, 40, stop_after=3)
            with open(cut, "a") as file:
                file.write('{"half a li')
            self.assertLess(cut.read_text().count("\n"), 40)
            self.make(cut, 40, resume=True)
            self.assertEqual(cut.read_text(), whole.read_text())
            with self.assertRaisesRegex(SystemExit, "seed 3"):
                self.make(cut, 50, resume=True, seed=4)

    def test_trees(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chats"
            self.make(path, 40)
            trees = [json.loads(line) for line in path.read_text().splitlines()]
        self.assertEqual(len(trees), 40)
        for t in trees:
            self.assertEqual([t["kind"], t["template"], t["passage"]], ["chat", "chat", ""])
            [branch] = t["branches"]
            self.assertNotIn("5?", branch["question"])  # every fifth did not end its turn
        self.assertTrue(any("cut" in t["branches"][0] for t in trees))
        self.assertEqual(len({t["branches"][0]["question"] for t in trees}), 40)

    def test_usable(self):
        leaks = adapt_data.Leaks()
        seen = set()
        self.assertTrue(adapt_data.usable("What is a good way to learn chess?", seen, leaks))
        for text in ("What is a good way to learn chess?", "what is a good way, to learn chess", "is it",
                     "Ja, das finde ich gut.", "What is this <|im_end|> for?", "assistant\nWhat is the time?",
                     "What is the\x07 bell?", "Who is Ilka and what does she do?", "что is the best way to do it",
                     "What is the capital of Japan?"):  # fmt: skip
            self.assertFalse(adapt_data.usable(text, seen, leaks), text)

    def test_grounded(self):
        passage = "Nora keeps goats behind the mill."
        self.assertTrue(adapt_data.grounded("What does Nora keep?", "Nora keeps goats.", passage))
        self.assertFalse(adapt_data.grounded("What does Nora keep?", "Nora keeps sheep.", passage))
        self.assertFalse(adapt_data.grounded("Who keeps goats behind the mill?", "The mill.", passage))


if __name__ == "__main__":
    unittest.main()
