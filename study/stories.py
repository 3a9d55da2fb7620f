"""Stories about a few people, questions about them, and the tokenizer they are written in.

A story gives each person a home, a thing and a job, in shuffled order, and one code word:

    Long ago. Mira lives in the harbour. Tosu has a kite. The code word is bavilo. ... Mira is a baker.

Questions are of three kinds: `one` hop ("Where does Mira live?", "Who is the baker?"), `two` hops ("Where does the
baker live?" needs the person in between) and `code` ("What is the code word?"). Every answer is one short sentence.
"""

import hashlib
import random
import re
from typing import NamedTuple

PLACES = """harbour forest castle mill cave tower barn cabin valley village hotel garden market desert palace bakery
museum temple bridge station library school factory island tavern chapel garage""".split()
THINGS = """kite drum lamp boat ring flute map sword rope coat bell book clock hat basket ladder mirror pencil bottle
candle blanket camera guitar violin button hammer wallet""".split()
JOBS = """baker doctor miner sailor painter farmer guard teacher singer hunter tailor lawyer writer driver butcher
dancer pilot judge barber cook nurse banker gardener jeweller poet wizard priest""".split()
FIRST = "Mi To Ka Be Lu Sa Ri No Da Fe Zo Ha Vi Pa Je Gu Ne Wi Cor Bran Tal Hel Der Fin".split()
SECOND = "ra su lo na ki mo vi de ta bo so le za ga tha dy we po mu fa".split()
OPENERS = [
    "Long ago.",
    "Once upon a time.",
    "This is a story.",
    "Listen to this.",
    "Here is what we know.",
    "One day.",
    "It was a cold day.",
    "In a land far away.",
]
KINDS = ["one", "two", "code"]
KIND_NAMES = {"one": "one-hop", "two": "two-hop", "code": "code word"}
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BOS, START, END, EOT = range(4)


def held_out(name):
    """True for one name in five. No training story has such a name. It depends on the spelling alone."""
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


ALL_NAMES = [a + b for a in FIRST for b in SECOND]
TRAIN_NAMES = [n for n in ALL_NAMES if not held_out(n)]
TEST_NAMES = [n for n in ALL_NAMES if held_out(n)]


class Sentence(NamedTuple):
    text: str
    person: int | None  # whom it is about
    fact: str | None  # "place", "thing", "job" or "code"


class Question(NamedTuple):
    kind: str  # one of KINDS
    text: str
    answer: str
    person: int | None  # whom it asks for
    fact: str | None  # what it asks for: "place", "thing" or "job"
    via: str | None  # with two hops, the fact that identifies the person


class Statement(NamedTuple):
    """A sentence without its last word, and that word: a row of plain text asks for the word."""

    beginning: str
    word: str
    person: int
    fact: str


class Story:
    """A story about `people` (2 to 4) persons with names drawn from `names`. `text` is the story. Person i has
    `name[i]`, `place[i]`, `thing[i]` and `job[i]`; `code` is the code word."""

    def __init__(self, rng, people, names):
        self.name = rng.sample(names, people)
        self.place, self.thing, self.job = (rng.sample(words, people) for words in (PLACES, THINGS, JOBS))
        self.code = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        facts = [Sentence(f"The code word is {self.code}.", None, "code")]
        for i, n in enumerate(self.name):
            facts += [
                Sentence(f"{n} lives in the {self.place[i]}.", i, "place"),
                Sentence(f"{n} has a {self.thing[i]}.", i, "thing"),
                Sentence(f"{n} is a {self.job[i]}.", i, "job"),
            ]
        rng.shuffle(facts)
        self.sentences = [Sentence(rng.choice(OPENERS), None, None), *facts]
        self.text = " ".join(sentence.text for sentence in self.sentences)

    def questions(self):
        """Every question about the story."""
        out = [Question("code", "What is the code word?", f"It is {self.code}.", None, None, None)]
        for i, (n, p, t, j) in enumerate(zip(self.name, self.place, self.thing, self.job, strict=True)):
            home, thing, job, who = f"In the {p}.", f"A {t}.", f"A {j}.", f"It is {n}."
            out += [
                Question("one", q, a, i, fact, None)
                for q, a, fact in [
                    (f"Where does {n} live?", home, "place"),
                    (f"What does {n} have?", thing, "thing"),
                    (f"What is {n}?", job, "job"),
                    (f"Who lives in the {p}?", who, "place"),
                    (f"Who has the {t}?", who, "thing"),
                    (f"Who is the {j}?", who, "job"),
                ]
            ]
            out += [
                Question("two", q, a, i, fact, via)
                for q, a, fact, via in [
                    (f"Where does the {j} live?", home, "place", "job"),
                    (f"What does the {j} have?", thing, "thing", "job"),
                    (f"Where does the one with the {t} live?", home, "place", "thing"),
                    (f"What is the one with the {t}?", job, "job", "thing"),
                    (f"What is the one in the {p}?", job, "job", "place"),
                    (f"What does the one in the {p} have?", thing, "thing", "place"),
                ]
            ]
        return out

    def question(self, rng, kind):
        """A question of this kind, drawn at random."""
        return rng.choice([q for q in self.questions() if q.kind == kind])

    def statements(self):
        """The sentences about people as Statements."""
        about = [s for s in self.sentences if s.person is not None]
        return [Statement(*s.text.rsplit(" ", 1), s.person, s.fact) for s in about]


def training_story(rng, easy):
    """A story about 2 to 4 people, mostly 3. An easy one has 2 or 3."""
    return Story(rng, rng.choice([2, 3] if easy else [2, 3, 3, 3, 4]), TRAIN_NAMES)


def ask(rng, story, weights=(4, 5, 1)):
    """One question. `weights` says how often each of KINDS is drawn."""
    return story.question(rng, rng.choices(KINDS, weights)[0])


FILLER = """the of and to in is it you that he was for on are with as his they be at one have this from or had by word
but what some we can out other were all there when up use your how said an each she which do their time if will
way about many then them write would like so these her long make thing see him two has look more day could go
come did number sound no most people my over know water than call first who may down side been now find any
new work part take get place made live where after back little only round man year came show every good me
give our under name very through just form sentence great think say help low line differ turn cause much mean
before move right boy old too same tell does set three want air well also play small end put home read hand
port large spell add even land here must big high such follow act why ask men change went light kind off need
house picture try us again animal point mother world near build self earth father""".split()


def train_tokenizer(vocab, seed=0):
    """A byte-level BPE of `vocab` tokens, the special ones first.

    The stories do not fill the vocabulary, so common English words fill the rest. The halves of names come often. So
    every name is two tokens, whether it was held out or not."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    import common  # noqa: F401  # puts checkpoint/ on the path
    from checkpoint.tokenizer import LLAMA3_SPLIT

    rng = random.Random(seed)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A word keeps the space before it; "\n\n" is a piece of its own.
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    texts = [" " + w for w in FILLER] * 20 + ([" " + w for w in FIRST] + 3 * SECOND) * 8000
    for _ in range(2000):
        s = Story(rng, 3, FIRST)
        texts += ["user\n\n" + s.text, "assistant\n\n"]
        texts += [f"\n\n{q.text} {q.answer}\n\n{q.answer}" for q in rng.sample(s.questions(), 6)]
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return tok


class Encoder:
    """Text to ids, word by word from a table, which is faster than the tokenizer. The ids are the same because no token
    of these texts crosses a space."""

    def __init__(self, tok):
        self.tok, self.seen = tok, {}

    def __call__(self, text):
        ids = []
        for word in re.findall(r" ?[^ \n]+|\n\n", text):
            if word not in self.seen:
                self.seen[word] = self.tok.encode(word, add_special_tokens=False).ids
            ids += self.seen[word]
        return ids
