"""Data for adapting a chat model to a policy: look-ups by a grammar, and chats sampled from the model itself.

    python3 study/adapt_data.py make --out lookups.jsonl --count 20000 --seed 1
    hf/run.sh python study/adapt_data.py chats --model MODEL --out chats.jsonl --count 600 --seed 1
    python3 study/adapt_data.py check lookups.jsonl chats.jsonl

Each line of a file is a tree: one passage, and branches that each ask something about it.

    {"kind": "story", "template": "person12+person40", "system": null, "passage": "...",
     "branches": [{"question": "...", "answer": "..."}, ...]}

A branch is one chat: the user's turn is the passage, an empty line and the question; or the question alone where the
passage is empty. `check` proves that no name, sentence or question of study/questions.json and study/adapt_eval.json is
in the data. The grammar has two splits, of different words and different templates, for measuring how far what was
learned from one carries to the other.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

from adapt_grammar import DAYS, MONTHS, NUMBERS, SEASONS, TENS
from adapt_lookups import Bank, tree

STUDY = Path(__file__).resolve().parent
HELD_OUT = [STUDY / "questions.json", STUDY / "adapt_eval.json"]


def fail(why):
    """Ends the script with one line on standard error."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {why}")


# ---- look-ups --------------------------------------------------------------------------------------------------------


def make(out, count, seed, split="train", start=0):
    bank = Bank(split, forbidden_names())
    with open(out, "w") as file:
        for i in range(start, start + count):
            file.write(json.dumps(tree(bank, seed, i), ensure_ascii=False) + "\n")


# ---- what must not occur in the data ---------------------------------------------------------------------------------

# Words with a capital in the held-out texts that are no invented names.
ORDINARY = set(
    """the a an of in on at and or to it its he she his her they their when every today some last old one people
    what which who whom whose where how why upper lower great little saint port north south east west new street
    doctor professor captain mr mrs x ray lady miss sir father frau dona senator avenue bay bride castle combe grand
    heath hotel isles lake loch mount pole well society improvement puddings venus santa"""
    .split() + [w.lower() for w in DAYS + MONTHS + [d + "s" for d in DAYS]] + SEASONS + NUMBERS + TENS
)  # fmt: skip
# Names that are words too: they count within a sentence only.
ALSO_WORDS = set(
    """ash biscuit broom clay crabbe drowned duchess finch freed grey hyacinth keel lanterns low magnolia mercy monk
    nether poole sorrel strand viola wren""".split()
)
GRAM = 8  # a sentence counts as known if so many words of it in a row are


def held_out_texts(paths):
    """(passages, questions about them, other questions) of the held-out files. The first two hold invented names."""
    passages, asked, others = [], [], []
    for path in paths:
        if not path.exists():
            fail(f"{path}: no such file; its names and questions are kept out of the data")
        data = json.loads(path.read_text())
        for p in data["paragraphs"]:
            passages += [p["text"]] if "text" in p else []
            asked.append(p["question"])
        others += [q["text"] for q in data.get("questions", []) if "text" in q]
    return passages, asked, others


def words_of(text):
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def names_in(text):
    """(name, whether it begins a sentence) for each word with a capital."""
    for match in re.finditer(r"[^\W\d_]+", text):
        if match[0][0].isupper():
            before = text[: match.start()].rstrip(" \"'(")
            yield match[0].lower(), not before or before[-1] in ".?!:\n"


def names_of(texts):
    """The names in the texts, in lower case: words that have a capital within a sentence and never stand in lower
    case."""
    plain = {word for text in texts for word in re.findall(r"[^\W\d_]+", text) if word.islower()}
    return {name for text in texts for name, begins in names_in(text) if not begins} - plain - ORDINARY


def forbidden_names():
    passages, asked, _ = held_out_texts(HELD_OUT)
    return frozenset(names_of(passages + asked))


class Leaks:
    """Finds what is held out in other texts: a name, eight words in a row of a passage, a whole question."""

    def __init__(self, paths=HELD_OUT):
        passages, asked, others = held_out_texts(paths)
        self.names = names_of(passages + asked)
        self.grams = {gram for text in passages for gram in self.grams_of(words_of(text))}
        self.questions = {" ".join(words_of(q)) for q in asked + others}
        self.lengths = sorted({q.count(" ") + 1 for q in self.questions})

    @staticmethod
    def grams_of(words):
        return {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}

    def find(self, text):
        """What of it the text has: a list of lines. A name that is also a word counts within a sentence only."""
        names = {name for name, begins in names_in(text) if not (begins and name in ALSO_WORDS)}
        found = [f"name {name}" for name in names & self.names]
        words = words_of(text)
        found += [f"sentence ... {gram} ..." for gram in self.grams_of(words) & self.grams]
        for n in self.lengths:
            spans = {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}
            found += [f"question {q}" for q in spans & self.questions]
        return sorted(set(found))


def check(paths):
    """Ends the script with status 1 if a file has something of the held-out questions."""
    leaks, bad = Leaks(), 0
    for path in paths:
        kinds, branches = {}, 0
        with open(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    t = json.loads(line)
                    texts = [
                        t["system"] or "",
                        t["passage"],
                        *(b[key] for b in t["branches"] for key in ("question", "answer")),
                    ]
                except (ValueError, KeyError, TypeError) as error:
                    fail(f"{path}:{number}: not a tree ({type(error).__name__}: {error}); make the file again")
                kinds[t["kind"]] = kinds.get(t["kind"], 0) + 1
                branches += len(t["branches"])
                for found in leaks.find("\n".join(texts)):
                    print(f"{path}:{number}: {found}")
                    bad += 1
        print(
            f"{path}: {sum(kinds.values())} trees, {branches} branches; "
            + ", ".join(f"{k} {n}" for k, n in sorted(kinds.items()))
        )
    print(
        f"held out: {len(leaks.names)} names, {len(leaks.grams)} runs of {GRAM} words, {len(leaks.questions)} questions"
    )
    if bad:
        fail(f"{bad} times something held out occurs; leave those trees out")
    print("none of them occurs")


# ---- chats of the model itself ---------------------------------------------------------------------------------------

USER_TOKENS = (4, 60)  # a user's turn
ANSWER_TOKENS = 96
COMMON = set(
    """the a an of to is are what how why who i you my your me can do does and in for on with it this that write
    tell""".split()
)
MARKS = re.compile(r"<\||\|>|\[/?INST|<s>|</s>|im_start|im_end|^(user|assistant|system)$", re.M)


class Chatter:
    """A model that writes chats, both turns. model: a Hugging Face folder, or a file of export_weights.py."""

    def __init__(self, model, device, batch):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        self.torch, self.device, self.batch = torch, device, batch
        dtype = torch.bfloat16 if device != "cpu" else torch.float32
        if Path(model).is_dir():
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        else:
            from speed_llama.exported import read_exported, read_tokenizer  # hf/run.sh has it on the path

            values, tensors, divisors = read_exported(Path(model))
            if divisors is not None:
                fail(f"{model}: divides the RoPE frequencies; give the Hugging Face folder that it was exported from")
            values.pop("model_type"), values.pop("speed_adapted", None)
            self.tokenizer = read_tokenizer(model)
            self.model = LlamaForCausalLM(LlamaConfig(**values)).to(dtype)
            missing, _ = self.model.load_state_dict(tensors, strict=False)
            if set(missing) - {"lm_head.weight"}:
                fail(f"{model}: lacks {sorted(missing)[0]}")
            self.model.tie_weights()
        self.model.to(device).eval()
        # The chat template's text before and after the user's words, and its token that ends a turn.
        mark = "4f9c1d"
        chat = [dict(role="user", content=mark)]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        self.before, self.after = text.split(mark)
        after = self.ids(self.after)
        ends = {after[0], self.tokenizer.eos_token_id}
        configured = self.model.generation_config.eos_token_id
        ends.update(configured if isinstance(configured, list) else [configured])
        self.ends = sorted(e for e in ends if e is not None)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def write(self, prompts, limit, temperature, stop=None):
        """How the model goes on after each prompt: (text, whether it ended its turn). 0: greedily."""
        torch = self.torch
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
        out = [None] * len(prompts)
        pad = self.ends[0]
        for at in range(0, len(order), self.batch):
            some = order[at : at + self.batch]
            rows = [self.ids(prompts[i]) for i in some]
            width = max(map(len, rows))
            ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=self.device)
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.device)
            how = (
                dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
                if temperature
                else dict(do_sample=False)
            )
            with torch.inference_mode():
                made = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=limit,
                    eos_token_id=self.ends,
                    pad_token_id=pad,
                    **how,
                )
            for i, row in zip(some, made[:, width:].tolist(), strict=True):
                n = next((k for k, token in enumerate(row) if token in self.ends), None)
                out[i] = self.tokenizer.decode(row[:n]), n is not None
        return out

    def answer(self, users, temperature):
        """The model's own answers, at full depth."""
        return self.write([self.before + u + self.after for u in users], ANSWER_TOKENS, temperature)


def usable(text, seen, leaks):
    """Whether a user's turn is worth a place: printable, English-looking, new, without template marks or held-out
    names."""
    words = words_of(text)
    if not text.isprintable() and not text.replace("\n", "").isprintable():
        return False
    letters = sum(c.isascii() for c in text) / max(1, len(text))
    key = " ".join(words)
    if (
        len(words) < 3
        or letters < 0.97
        or not COMMON & set(words)
        or MARKS.search(text)
        or key in seen
        or leaks.find(text)
    ):
        return False
    seen.add(key)
    return True


def full_answer(text, ended):
    """The answer as a branch has it. One that was cut off says so: no end of turn may be learned from it."""
    return dict(answer=text) if ended else dict(answer=text, cut=True)


def grounded(question, answer, passage):
    """Whether every word of an answer stands in its passage or its question, and a telling one in the passage alone."""
    told, asked = set(words_of(passage)), set(words_of(question))
    new = [w for w in words_of(answer) if w not in asked and w not in FUNCTION]
    return bool(new) and all(w in told for w in new)


FUNCTION = set(
    """the a an of in on at to and or is are was were be been it its he she his her they their that which who this from
    by with for as has have had does do did not no one called name named there""".split()
)


def chats(chatter, out, count, seed, resume, leaks):
    """Writes `count` trees. A run that was cut off goes on as if it had not been: beside the file stands how far it
    is."""
    torch, state = chatter.torch, Path(f"{out}.progress")
    lines, batch = [], 0
    if resume and state.exists():
        at = json.loads(state.read_text())
        if at["seed"] != seed:
            fail(f"{state}: was begun with seed {at['seed']}; give --seed {at['seed']} or a new file")
        lines, batch = Path(out).read_text().split("\n")[: at["lines"]], at["batch"]
    seen = {" ".join(words_of(b["question"])) for line in lines for b in json.loads(line)["branches"]}
    Path(out).write_text("".join(line + "\n" for line in lines))
    bank = Bank("train", forbidden_names())
    began = time.monotonic()
    while len(lines) < count:
        torch.manual_seed(seed * 1_000_003 + batch)
        new = (
            asked_about_passages(chatter, bank, seed, batch, leaks)
            if batch % PASSAGES_EVERY == PASSAGES_EVERY - 1
            else free_chats(chatter, batch, seen, leaks)
        )
        new = [json.dumps(tree, ensure_ascii=False) for tree in new][: count - len(lines)]
        lines += new
        batch += 1
        with open(out, "a") as file:
            file.write("".join(line + "\n" for line in new))
        state.write_text(json.dumps(dict(seed=seed, batch=batch, lines=len(lines))))
        print(f"{len(lines)} of {count} trees, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def free_chats(chatter, batch, seen, leaks):
    """Both turns by the model. Every fourth answer is sampled, the others are greedy."""
    users = [
        text.strip()
        for text, ended in chatter.write([chatter.before] * chatter.batch, USER_TOKENS[1], 0.9)
        if ended and len(chatter.ids(text)) >= USER_TOKENS[0]
    ]
    users = [u for u in users if usable(u, seen, leaks)]
    out = []
    for some, temperature in ((users[::4], 0.7), ([u for i, u in enumerate(users) if i % 4], 0)):
        for user, (text, ended) in zip(some, chatter.answer(some, temperature) if some else [], strict=True):
            if text.strip() and not MARKS.search(text) and not leaks.find(text):
                branch = dict(question=user, **full_answer(text, ended))
                out.append(dict(kind="chat", template="chat", system=None, passage="", branches=[branch]))
    return out


PASSAGES_EVERY = 10  # one batch in ten asks about passages; few of its answers are kept
QUESTIONS_EACH = 4  # that the model is asked to write about a passage


def asked_about_passages(chatter, bank, seed, batch, leaks):
    """Passages of the grammar; questions and answers by the model, kept where the passage has the answer's words."""
    trees = [tree(bank, f"{seed} asked {batch}", i) for i in range(3 * chatter.batch // QUESTIONS_EACH)]
    passages = [t["passage"] for t in trees if t["kind"] in ("story", "two facts", "letter", "notice", "dialogue")]
    passages = [p for p in passages if len(p.split()) < 180][: max(1, chatter.batch // QUESTIONS_EACH)]
    begun = [p for p in passages for _ in range(QUESTIONS_EACH)]
    made = chatter.write([f"{chatter.before}{p}\n\nQuestion:" for p in begun], 32, 0.8)
    pairs = []
    for passage, (text, _) in zip(begun, made, strict=True):
        question = text.strip().split("\n")[0].strip()
        if "?" in question:
            question = question[: question.index("?") + 1]
            if len(words_of(question)) >= 4 and not MARKS.search(question) and (passage, question) not in pairs:
                pairs.append((passage, question))
    answers = chatter.answer([f"{p}\n\nQuestion: {q}" for p, q in pairs], 0) if pairs else []
    branches = {}
    for (passage, question), (text, ended) in zip(pairs, answers, strict=True):
        if ended and grounded(question, text, passage) and not leaks.find(f"{question} {text}"):
            branches.setdefault(passage, []).append(dict(question=f"Question: {question}", answer=text))
    return [
        dict(kind="model question", template="model question", system=None, passage=passage, branches=some)
        for passage, some in branches.items()
    ]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("make", help="writes look-up trees by the grammar")
    c.add_argument("--out", required=True)
    c.add_argument("--count", type=int, required=True)
    c.add_argument("--seed", type=int, default=0)
    c.add_argument(
        "--start", type=int, default=0, help="number of the first tree (0); a tree depends on seed and number"
    )
    c.add_argument("--split", choices=["train", "test"], default="train", help="which words and templates (train)")
    c = commands.add_parser("chats", help="samples chats, and questions about passages, from a model")
    c.add_argument("--model", required=True, help="a Hugging Face folder, or a file of export_weights.py")
    c.add_argument("--out", required=True)
    c.add_argument("--count", type=int, required=True, help="trees in the file when it is done")
    c.add_argument("--seed", type=int, default=0)
    c.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    c.add_argument("--batch", type=int, help="rows at once (24 on a CPU, 512 on a GPU)")
    c.add_argument("--resume", action="store_true", help="go on with the file")
    c = commands.add_parser("check", help="looks for held-out names, sentences and questions in data")
    c.add_argument("files", nargs="+")
    a = p.parse_args()
    if a.command == "make":
        make(a.out, a.count, a.seed, a.split, a.start)
    elif a.command == "check":
        check(a.files)
    else:
        batch = a.batch or (24 if a.device == "cpu" else 512)
        chats(Chatter(a.model, a.device, batch), a.out, a.count, a.seed, a.resume, Leaks())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
