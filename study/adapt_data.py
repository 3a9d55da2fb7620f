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
import hashlib
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from adapt_grammar import (
    AFTER,
    BEFORE,
    DAYS,
    FACTS,
    FIRST,
    KIN,
    LAST,
    LAST_END,
    LINES,
    LOG,
    MAN_END,
    MEN,
    MONTHS,
    NUMBERS,
    PREFIXES,
    PROSE_WORDS,
    REPLIES,
    SEASONS,
    SINCE,
    SMALL_TALK,
    SYSTEMS,
    TASKS,
    TENS,
    TOWN,
    TOWN_END,
    WOMAN_END,
    WOMEN,
    WORDS,
    split_list,
)

STUDY = Path(__file__).resolve().parent
HELD_OUT = [STUDY / "questions.json", STUDY / "adapt_eval.json"]


def fail(why):
    """Ends the script with one line on standard error."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {why}")


# ---- the two splits --------------------------------------------------------------------------------------------------

SHARED = 12  # a list of words with fewer items belongs to both splits


def held_out(name):
    """Whether a name is kept for the test split: one in five, by its spelling alone."""
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


def part(items, split, shared=SHARED):
    """The items of a split: every fifth is for the test split, the others are for training."""
    if len(items) < shared:
        return list(items)
    return [item for i, item in enumerate(items) if (i % 5 == 4) == (split == "test")]


class Rule(NamedTuple):
    """A fact as a template. questions: (question, short answer)."""

    key: str
    clause: str
    questions: list


def rules(name, text):
    out = []
    for line in text.strip().split("\n"):
        if line.startswith(" "):
            out[-1].questions.append(tuple(line.strip().rsplit(" = ", 1)))
        else:
            out.append(Rule(f"{name}{len(out) + 1}", line, []))
    return out


def numbered(name, text):
    """The lines of a text with a key each."""
    return [(f"{name}{i + 1}", line) for i, line in enumerate(text.strip().split("\n"))]


class Bank:
    """The words and the templates of one split. `forbidden`: names, in lower case, that no text may have."""

    def __init__(self, split, forbidden):
        self.split = split

        def allowed(text):
            return not any(word[0].isupper() and word.lower() in forbidden for word in re.findall(r"[^\W\d_]+", text))

        def own(names):
            return sorted(n for n in set(names) if held_out(n) == (split == "test") and allowed(n))

        def made(parts, ends):
            return own(a + b for a in parts for b in ends if a[-1].lower() != b[0])

        def mixed(ordinary, invented):  # as many of one sort as of the other
            ordinary = own(ordinary)
            return invented + ordinary * max(1, len(invented) // len(ordinary))

        self.words = {kind: [w for w in part(split_list(text), split) if allowed(w)] for kind, text in WORDS.items()}
        for kind in set(WORDS) - {"adjective", "quality"}:  # elsewhere a hyphen stands for a space: post-office
            self.words[kind] = [w.replace("-", " ") for w in self.words[kind]]
        self.women = mixed(WOMEN, made(FIRST, WOMAN_END))
        self.men = mixed(MEN, made(FIRST, MAN_END))
        self.last, self.towns = made(LAST, LAST_END), made(TOWN, TOWN_END)
        self.rules = {name: part(rules(name, text), split, 5) for name, text in FACTS.items()}
        self.lines = {name: part(numbered(name, text), split, 5) for name, text in LINES.items()}
        self.before, self.after = part(BEFORE, split), part(AFTER, split)
        self.prose_words = {kind: text.split() for kind, text in PROSE_WORDS.items()}


# ---- grammar ---------------------------------------------------------------------------------------------------------

PAST = dict(
    pair.split("=")
    for pair in """keep=kept leave=left sleep=slept eat=ate drink=drank wear=wore sell=sold grow=grew sit=sat write=wrote
    get=got swim=swam pay=paid speak=spoke make=made teach=taught have=had do=did say=said stand=stood send=sent run=ran
    hang=hung lie=lay lose=lost steal=stole take=took know=knew ride=rode cost=cost begin=began bring=brought go=went
    hide=hid lead=led may=might swear=swore tell=told build=built find=found meet=met sing=sang drive=drove hear=heard
    buy=bought think=thought travel=travelled stop=stopped admit=admitted hold=held bite=bit blow=blew""".split()
)


def inflect(verb, person, past):
    """person: "3" (he keeps), "1" (I keep) or "p" (they keep)."""
    if verb == "be":
        if past:
            return "were" if person == "p" else "was"
        return {"3": "is", "1": "am", "p": "are"}[person]
    if verb == "was":  # past in every story
        return "were" if person == "p" else "was"
    if past:
        if verb in PAST:
            return PAST[verb]
        if verb.endswith("e"):
            return verb + "d"
        return verb[:-1] + "ied" if verb[-1] == "y" and verb[-2] not in "aeiou" else verb + "ed"
    if person != "3" or verb == "may":
        return verb
    if verb in ("have", "go", "do"):
        return {"have": "has", "go": "goes", "do": "does"}[verb]
    if verb[-1] == "y" and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")


def article(noun):
    """The noun with "a" or "an". No word of the lists has a silent h or begins like "unit" except those named."""
    word = noun.lower()
    vowel = word[0] in "aeio" or (word[0] == "u" and not word.startswith(("uni", "uku")))
    return ("an " if (vowel and not word.startswith(("one", "ewe"))) or word.startswith("hour") else "a ") + noun


def plural(noun):
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "sh", "ch", "x")) else "s")


IRREGULAR_PLURALS = {"reindeer": "reindeer", "scarf": "scarves", "tomato": "tomatoes", "midwife": "midwives", "bellows": "bellows"}  # fmt: skip


def capital(text):
    """The text with its first letter as a capital; a quotation mark may stand before it."""
    for i, c in enumerate(text[:3]):
        if c.isalnum():
            return text[:i] + c.upper() + text[i + 1 :]
    return text


def sentence(text):
    text = capital(text)
    if text[-1] in ".?!":
        return text
    if text[-1] == '"':
        return (
            text
            if text[-2] in ".?!,:"
            else text[:-1] + '."'
            if text.count('"') % 2 == 0 and ': "' in text
            else text + "."
        )
    return text + "."


CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
MARK = re.compile(r"\{(S|S's|he|him|his|himself)\}|([~^=])(\w+)")
SLOT = re.compile(r"\{([a-z][^{}]*)\}")
OWNED = re.compile(r"\{S's\} ([\w' ,-]+?)(?= [~^=]|\?|\.|$| (?:of|called|made|to|in|for|by|on) )")
PRONOUNS = frozenset(["he", "him", "his", "himself"])


class Spent(Exception):
    """No word of this kind is left that the passage does not have yet."""


class Draw:
    """One tree's random choices. A word is drawn once for a passage, so that an answer is never ambiguous."""

    def __init__(self, bank, rng):
        self.bank, self.rng, self.used, self.templates = bank, rng, set(), []

    def chance(self, p):
        return self.rng.random() < p

    def pick(self, items):
        return items[int(self.rng.random() * len(items))]

    def between(self, low, high):
        return low + int(self.rng.random() * (high - low + 1))

    def line(self, name):
        """A line of this name, and its template is noted."""
        key, text = self.pick(self.bank.lines[name])
        self.templates.append(key)
        return self.choose(text)[0]

    def fresh(self, items):
        for _ in range(12):
            item = self.pick(items)
            if item not in self.used:
                self.used.add(item)
                return item
        raise Spent

    def choose(self, text):
        """The text with each (a|b) replaced by one of them, and those that were chosen."""
        chosen = []

        def one(match):
            chosen.append(self.pick(match[1].split("|")))
            return chosen[-1]

        while "|" in text:
            text = CHOICE.sub(one, text)
        return text, chosen

    def value(self, kind):
        """A word or phrase of this kind that the passage does not have yet."""
        if kind in self.bank.words:
            return self.fresh(self.bank.words[kind])
        return getattr(self, kind)()

    def thing(self):
        return (
            f"{self.fresh(self.bank.words['adjective'])} {self.value('object')}"
            if self.chance(0.6)
            else self.value("object")
        )

    def town(self):
        name = self.fresh(self.bank.towns)
        if self.chance(0.25):
            name = (
                self.pick(["Upper", "Lower", "Great", "Little", "Old", "Saint", "Port", "North", "West"]) + " " + name
            )
        return name

    def ship(self):
        return f"{self.value('ship_adjective')} {self.value('ship_noun')}"

    def person(self):
        return self.name(self.chance(0.5))

    def name(self, woman):
        first = self.fresh(self.bank.women if woman else self.bank.men)
        return f"{first} {self.fresh(self.bank.last)}"

    def where(self):
        r = self.rng.random()
        if r < 0.45:
            return (
                self.pick(["behind", "beside", "opposite", "near", "next to", "close to", "above"])
                + f" the {self.value('landmark')}"
            )
        if r < 0.75:
            return (
                self.pick(
                    [
                        "behind",
                        "beside",
                        "opposite",
                        "in the yard of",
                        "on the roof of",
                        "in front of",
                        "at the back of",
                        "in the cellar of",
                    ]
                )
                + f" the {self.value('building')}"
            )
        if r < 0.9:
            return f"between the {self.value('landmark')} and the {self.value('building')}"
        return f"at the end of {self.value('street')}"

    def number(self):
        return self.fresh(NUMBERS) if self.chance(0.85) else self.fresh(TENS) + "-" + self.pick(NUMBERS[:8])

    def age(self):
        return self.fresh(AGES)

    def year(self):
        return self.fresh(YEARS)

    def day(self):
        return self.fresh(DAYS)

    def month(self):
        return self.fresh(MONTHS)

    def season(self):
        return self.fresh(SEASONS)

    def kin(self):
        return self.fresh(KIN)

    def sum(self):
        return f"{self.fresh(NUMBERS)} {self.pick(COINS)}"

    def time(self):
        r = self.rng.random()
        if r < 0.4:
            return self.fresh(
                ["noon", "midnight", "dawn", "sunset", "daybreak", "dusk", "tea-time", "low tide", "high tide"]
            )
        if r < 0.7:
            return self.pick(["half past ", "a quarter past ", "a quarter to ", "ten past "]) + self.fresh(NUMBERS[:10])
        return self.fresh(NUMBERS[:10]) + " o'clock"

    def fill(self, text, values, chosen=()):
        """The text with each slot of words filled: from `values`, which also keeps what is drawn."""

        def one(match):
            slot = match[1]
            if slot in PRONOUNS:
                return match[0]
            how, _, key = slot.rpartition(" ")
            key, possessive = (key[:-2], True) if key.endswith("'s") else (key, False)
            if key not in values:
                values[key] = self.value(key.rstrip("0123456789"))
            word = values[key]
            if how == "a":
                return article(word)
            if how == "pl":
                return plural(word)
            return word + "'s" if possessive else word

        for i, choice in enumerate(chosen):
            text = text.replace(f"[{i}]", choice)
        return SLOT.sub(one, text)


# ---- subjects and facts ----------------------------------------------------------------------------------------------


class Subject:
    """Whom facts are about. full: the name that questions use; short: what the passage may call it later; noun: what a
    description begins with, as in "the woman who keeps goats"."""

    def __init__(self, kind, full, short, pronouns, noun):
        self.kind, self.full, self.short, self.noun = kind, full, list(short), noun
        self.he, self.him, self.his = pronouns
        self.facts = []
        self.job = self.kin = None


SHE, HE, IT, THEY = ("she", "her", "her"), ("he", "him", "his"), ("it", "it", "its"), ("they", "them", "their")


def put(text, subject, ref, past):
    """The text about a subject that is called `ref`: its name, a description, a pronoun or "I"."""
    first = ref == "I"
    if "{S's}" in text and (" of " in ref or "'s" in ref or len(ref) > 30):  # not "the goat of Ruth's best friend"
        text = OWNED.sub(r"the \1 of {S}", text)

    def one(match):
        slot, mark, verb = match[1], match[2], match[3]
        if mark:
            person = "p" if mark == "=" else "1" if mark == "~" and first else "3"
            return inflect(verb, person, past)
        if slot == "S":
            return ref
        if slot == "S's":
            return "my" if first else subject.his if ref == subject.he else ref + "'s"
        if first:
            return {"he": "I", "him": "me", "his": "my", "himself": "myself"}[slot]
        if slot == "himself":
            return subject.him + "self"
        return {"he": subject.he, "him": subject.him, "his": subject.his}[slot]

    return MARK.sub(one, text)


class Fact:
    """A rule with its words. clause: with the subject's marks still in it."""

    def __init__(self, draw, rule, subject, values=None):
        self.rule, self.subject = rule, subject
        self.pattern, self.chosen = draw.choose(rule.clause)
        self.values = dict(values or {})
        self.clause = draw.fill(self.pattern, self.values, self.chosen)
        self.verbal = self.clause.startswith("{S} ~")  # may follow "who"
        self.owned = self.clause.startswith("{S's} ")  # may follow "whose"
        self.timed = re.search(TIMED, self.clause) is not None
        self.said = None  # the sentence that states it

    def vp(self):
        """The verb phrase, for "who ..."; only where `verbal`."""
        return self.clause[4:]

    def contrast(self, draw):
        """The clause with "not on Monday but on Sunday" in place of "on Sunday", or None."""
        found = [m for m in CONTRASTED.finditer(self.pattern) if m[3].rstrip("0123456789") in draw.bank.words]
        if not found or re.search(r"\b(only|never|nothing|but|not)\b", self.pattern):
            return None
        m = draw.pick(found)
        if self.pattern.count(m[3]) > 1:  # the word stands in the clause twice
            return None
        other = dict(self.values)
        other[m[3]] = draw.value(m[3].rstrip("0123456789"))
        phrase = f"{m[1]}{{{m[2]}{m[3]}}}"
        both = f"not {draw.fill(phrase, other)} but {draw.fill(phrase, self.values)}"
        return draw.fill(self.pattern[: m.start()] + both + self.pattern[m.end() :], self.values, self.chosen)

    def wrong(self, draw):
        """The clause with one word changed, or None."""
        keys = [k for k in self.values if k.rstrip("0123456789") in draw.bank.words]
        if not keys:
            return None
        values = dict(self.values)
        key = draw.pick(keys)
        values[key] = draw.value(key.rstrip("0123456789"))
        return draw.fill(self.pattern, values, self.chosen)


TIMED = re.compile(
    r"\b(every|once|before|when|whenever|year|winter|summer|spring|autumn|night|morning|last|until|while|at|in \d+|"
    r"used to|never|always|still|often|[A-Z][a-z]+days?)\b"
)
CONTRASTED = re.compile(
    r"\b((?:in|at|to|from|with|on|by|for) )\{((?:a |pl )?)([a-z]+\d?)\}(?! (?:of|from|in|that|who|called|by|when|and)\b)"
)
AGES = [
    *NUMBERS[7:],
    "twenty-two",
    "thirty-one",
    "thirty-six",
    "forty",
    "forty-five",
    "fifty-two",
    "sixty",
    "seventy-one",
]
YEARS = [str(y) for y in range(1683, 1990)]
COINS = "coins crowns pennies shillings dollars francs marks guilders".split()
# ---- stories ---------------------------------------------------------------------------------------------------------


def new_person(draw, past):
    woman = draw.chance(0.5)
    full = draw.name(woman)
    first, last = full.split()
    short = [first, first, f"{'Mrs' if woman else 'Mr'} {last}"]
    title = draw.rng.random()
    if title < 0.12:
        full = draw.pick(["Doctor ", "Professor ", "Captain ", "Old ", "Sister " if woman else "Father "]) + full
    s = Subject(
        "person", full, short, SHE if woman else HE, draw.pick(["woman", "person"] if woman else ["man", "person"])
    )
    if draw.chance(0.75):
        s.job, s.town = draw.value("job"), draw.town()
    return s


def new_place(draw, past):
    noun, town = draw.pick([draw.value("building"), draw.value("shop")]), draw.town()
    s = Subject("place", f"the {noun} {draw.pick(['of', 'of', 'in'])} {town}", [f"the {noun}"], IT, noun)
    s.noun_at = (noun, town)
    return s


def new_town(draw, past):
    town = draw.town()
    if draw.chance(0.4):
        return Subject(
            "town", f"the {draw.pick(['village', 'town', 'parish', 'district'])} of {town}", [town], IT, "place"
        )
    return Subject("town", town, [town], IT, "town")


def new_animal(draw, past):
    animal, pet = draw.value("animal"), draw.value("pet")
    r = draw.rng.random()
    if r < 0.4:
        return Subject("animal", f"{pet} the {animal}", [pet], draw.pick([SHE, HE, IT]), animal)
    if r < 0.7:
        return Subject("animal", f"the {animal} {pet}", [pet, f"the {animal}"], IT, animal)
    return Subject("animal", f"{draw.person()}'s {animal}", [f"the {animal}"], IT, animal)


def new_thing(draw, past):
    thing = draw.thing()
    owner = draw.town() if draw.chance(0.5) else draw.person()
    return Subject("thing", f"the {thing} of {owner}", [f"the {thing.split()[-1]}"], IT, "thing")


def new_group(draw, past):
    what = draw.pick(
        ["{instrument} band", "{hobby} club", "{job}s' guild", "society for {study}", "choir", "{garment} company"]
    )
    name = draw.fill(what, {})
    return Subject(
        "group",
        f"the {name} of {draw.town()}",
        [f"the {name.split()[-1] if 'for' not in name else 'society'}"],
        IT,
        "group",
    )


def new_event(draw, past):
    event = draw.value("event")
    return Subject("event", f"the {event} of {draw.town()}", [f"the {event.split()[-1]}"], IT, "event")


NEW = dict(person=new_person, place=new_place, town=new_town, animal=new_animal, thing=new_thing, group=new_group,
           event=new_event)  # fmt: skip
HOME = Rule("home", "{S} ~be the {job} of {town}", [
    ("(What ^be {S's} (job|profession|trade)|What ~do {S} do for a living)?", "{a job}"),
    ("In which (town|place) ~do {S} work as {a job}?", "in {town}"),
])  # fmt: skip


class Told(NamedTuple):
    """A sentence of a passage and the facts in it."""

    text: str
    facts: tuple


class Story:
    """A passage about a few subjects. told: its sentences in order, paragraph by paragraph."""

    def __init__(self, draw, subjects, facts_each, past=None, mixed=None, rivals=0.5):
        self.draw = draw
        self.past = draw.chance(0.25) if past is None else past
        self.mixed = draw.chance(0.25) if mixed is None else mixed
        self.subjects, self.paragraphs = [], []
        for kind in subjects:
            try:
                self.add(kind, facts_each, rivals)
            except Spent:
                continue
        if self.draw.chance(0.7):
            self.relate()
        self.facts = [f for s in self.subjects for f in s.facts]

    def add(self, kind, facts_each, rivals):
        draw = self.draw
        subject = NEW[kind](draw, self.past)
        pool = draw.bank.rules[kind]
        same = [f.rule for s in self.subjects if s.kind == kind for f in s.facts if f.rule.key != "home"]
        chosen, acts = [], set()
        want = min(draw.between(*facts_each), len(pool))
        if subject.job:
            subject.facts.append(Fact(draw, HOME, subject, dict(job=subject.job, town=subject.town)))
        for _ in range(3 * want):
            if len(chosen) >= want:
                break
            rule = draw.pick(same) if same and draw.chance(rivals) else draw.pick(pool)
            # Two facts of one verb would make some questions ambiguous: "What does she sell?"
            act = re.search(r"\{S\} ~?(?:have )?(\w+)", rule.clause)
            act = act and act[1] not in ("be", "was", "have") and act[1]
            if rule in chosen or (act and act in acts) or (subject.job and "worked as" in rule.clause):
                continue
            try:
                fact = Fact(draw, rule, subject)
            except Spent:
                continue
            chosen.append(rule)
            acts.add(act)
            subject.facts.append(fact)
        if not chosen:
            raise Spent
        self.subjects.append(subject)

    # ---- a subject's sentences ----

    def relate(self):
        """Makes one person the sister (neighbour, ...) of another: (her description, her)."""
        people = [s for s in self.subjects if s.kind == "person"]
        if len(people) < 2:
            return
        a, b = self.draw.rng.sample(people, 2)
        kin = self.draw.value("kin")
        if kin in (MALE_KIN if b.he == "she" else FEMALE_KIN):
            return
        rule = Rule("kin", "{S's} {kin} ^be {person}", [("Who ^be {S's} {kin}?", "{person}")])
        fact = Fact(self.draw, rule, a, dict(kin=kin, person=b.full))
        a.facts.append(fact)
        b.kin = f"{a.full}'s {kin}"

    def ref(self, s, first):
        """What the subject is called in the next sentence."""
        r = self.draw.rng.random()
        if first:
            return s.full
        if self.mixed:
            return s.full if r < 0.5 else self.draw.pick(s.short)
        return s.he if r < 0.6 else self.draw.pick(s.short) if r < 0.87 else s.full

    def paragraph(self, s):
        draw, past, out = self.draw, self.past, []
        todo = list(s.facts)
        home = todo.pop(0) if s.job else None
        draw.rng.shuffle(todo)
        say = lambda text, ref: put(text, s, ref, past)  # noqa: E731

        def take(test):
            for i, f in enumerate(todo):
                if test(f):
                    return todo.pop(i)
            return None

        if home:
            key, text = draw.pick(draw.bank.lines["introduction"])
            facts = [home]
            if "{vp}" in text:
                second = take(lambda f: f.verbal)
                if second is None:
                    key, text = "", "{S} ~be the {job} of {town}"
                else:
                    facts.append(second)
                    text = text.replace("{vp}", second.vp())
            text = draw.fill(draw.choose(text)[0], dict(home.values))
            out.append(Told(sentence(say(text, s.full)), tuple(facts)))
            if key:
                draw.templates.append(key)
            s.short.append(f"the {s.job}")
        elif s.kind == "place" and draw.chance(0.5):
            second = take(lambda f: f.verbal or f.owned)
            if second is not None:
                key, text = draw.pick(draw.bank.lines["place_introduction"])
                noun, town = s.noun_at
                which = "which " + second.vp() if second.verbal else "whose " + second.clause[6:]
                text = draw.fill(draw.choose(text)[0].replace("{which}", "@"), dict(noun=noun, town=town)).replace(
                    "@", which
                )
                out.append(Told(sentence(say(text, s.full)), (second,)))
                draw.templates.append(key)
        while todo:
            first = not out
            f = todo.pop(0)
            ref = self.ref(s, first)
            if ref == s.he and not f.clause.startswith("{S"):  # not "the people of it"
                ref = draw.pick(s.short)
            r = draw.rng.random()
            text, facts = None, (f,)
            if f.verbal and r < 0.16 and (g := take(lambda x: x.verbal)):
                facts = (f, g)
                key, frame = draw.pick(draw.bank.lines["merged"])
                draw.templates.append(key)
                text = draw.choose(frame)[0].replace("{vp1}", f.vp()).replace("{vp2}", g.vp())
                if s.kind != "person":
                    text = (
                        text.replace("who (also|even)", "which")
                        .replace(", who ", ", which ")
                        .replace("about whom", "about which")
                    )
                if ref == s.he and not text.startswith("{S} {"):
                    ref = draw.pick(s.short)
                text = ". ".join(capital(x) for x in say(text, ref).split(". "))
            elif f.owned and r < 0.2 and ref != s.he and (g := take(lambda x: x.verbal)):
                facts = (f, g)
                text = say(f"{{S}}, whose {f.clause[6:]}, {g.vp()}", ref)
            elif r < 0.3 and (g := take(lambda x: True)):
                facts = (f, g)
                link = draw.pick([", and ", ", and ", "; ", ", but ", " and ", ", and as everyone knows, "])
                text = (
                    say(f.clause, ref) + link + say(g.clause, s.he if g.clause.startswith("{S") else draw.pick(s.short))
                )
            elif r < 0.36 and '"' not in f.clause and (contrast := self.contrast(f)):
                text = say(contrast, ref)
            elif r < 0.42 and (wrong := self.wrong(f)):
                key, frame = draw.pick(draw.bank.lines["wrong"])
                draw.templates.append(key)
                right = say(f.clause, s.he if draw.chance(0.5) else ref)
                text = draw.choose(frame)[0].replace("{right}", right).replace("{wrong}", say(wrong, ref))
            elif r < 0.51 and s.kind == "person" and (f.verbal or f.owned) and '"' not in f.clause:
                key, frame = draw.pick(draw.bank.lines["speech"])
                draw.templates.append(key)
                clause = put(f.clause, s, "I", False)
                if frame.startswith('"{') or ('"{clause}"' in frame and ": " in frame):
                    clause = capital(clause)
                elif frame.endswith('. "{clause}"'):
                    clause = capital(clause)
                if ref == s.he:
                    frame = frame.replace("{says} {S}", "{S} {says}")
                says = draw.pick(["say", "say", "explain", "answer", "admit", "repeat", "insist", "reply"])
                text = frame.replace("{clause}", clause).replace("{says}", inflect(says, "3", past)).replace("{S}", ref)
                if text.endswith('"'):
                    text = text[:-1] + '."'
            else:
                text = say(f.clause, ref)
                if f.verbal and r > 0.8 and not f.timed:
                    text += draw.fill(draw.choose(draw.pick(draw.bank.after))[0], {})
                elif r > 0.6 and not first and not f.timed:
                    text = draw.choose(draw.pick(draw.bank.before))[0] + " " + text
                elif r > 0.55 and f.verbal and not first and not f.timed:
                    text = draw.pick(SINCE) + " " + text
            out.append(Told(sentence(text), facts))
            if draw.chance(0.22):
                name = "about_person" if s.kind == "person" and draw.chance(0.6) and not self.mixed else "about_any"
                key, text = draw.pick(draw.bank.lines[name])
                out.append(Told(sentence(say(draw.choose(text)[0], s.he)), ()))
        return out

    def wrong(self, f):
        try:
            return f.wrong(self.draw)
        except Spent:
            return None

    def contrast(self, f):
        try:
            return f.contrast(self.draw)
        except Spent:
            return None

    def write(self, words, breaks):
        """Writes the paragraphs, and prose between them until there are about so many words. The passage's text."""
        draw = self.draw
        paragraphs = [self.paragraph(s) for s in self.subjects]
        if self.mixed and len(paragraphs) > 1:  # all heads first, then the rest in any order
            rest = [t for p in paragraphs for t in p[1:]]
            draw.rng.shuffle(rest)
            paragraphs = [[p[0] for p in paragraphs] + rest]
        count = sum(len(t.text.split()) for p in paragraphs for t in p)
        while count < words:
            block = [Told(prose(draw), ()) for _ in range(draw.between(1, 5))]
            count += sum(len(t.text.split()) for t in block)
            at = draw.between(0, len(paragraphs))
            if draw.chance(0.5) or at == len(paragraphs):
                paragraphs.insert(at, block)
            else:
                inside = draw.pick([0, len(paragraphs[at])])
                paragraphs[at][inside:inside] = block
        self.told = [t for p in paragraphs for t in p]
        for told in self.told:
            for f in told.facts:
                f.said = told.text
        return breaks.join(" ".join(t.text for t in p) for p in paragraphs)


def prose(draw):
    """A sentence in which nothing is said that a question asks for."""
    _, text = draw.pick(draw.bank.lines["prose"])
    words = {}

    def one(match):
        kind = match[1].rstrip("0123456789")
        if match[1] not in words:
            words[match[1]] = draw.pick(draw.bank.prose_words[kind])
            if words[match[1]] in [v for k, v in words.items() if k != match[1]]:
                words[match[1]] = draw.pick(draw.bank.prose_words[kind])
        return words[match[1]]

    text = SLOT.sub(one, draw.choose(text)[0])
    return sentence(re.sub(r"\ba (?=[aeiou])", "an ", text))


# ---- questions about a story -----------------------------------------------------------------------------------------


def description(draw, fact):
    """The fact's subject by this fact alone, as in "the woman who keeps goats behind the mill"."""
    s = fact.subject
    who = "who" if s.kind == "person" else "that"
    if fact.verbal:
        return f"the {s.noun} {who} {fact.vp()}"
    return f"the {s.noun} whose {fact.clause[6:]}"


def ask_fact(draw, story, fact, two):
    """A branch that asks for a fact. two: the subject is described by another of its facts. None where that cannot
    be."""
    s, past = fact.subject, story.past
    questions = fact.rule.questions
    n = len(questions)
    k = draw.between(0, n if fact.verbal or fact.owned else n - 1)
    full = put(fact.clause, s, s.full, past)
    if k == n:  # who
        if s.kind == "person":
            question = put("Who " + fact.vp() if fact.verbal else "Whose " + fact.clause[6:], s, s.full, past)
        elif fact.verbal:
            question = put(draw.pick([f"Which {s.noun} ", "What "]) + fact.vp(), s, s.full, past)
        else:
            question = put(f"Which {s.noun} is it whose {fact.clause[6:]}", s, s.full, past)
        if two:
            return None
        short = s.full + ("'s" if s.kind == "person" and fact.owned else "")
        key = f"{fact.rule.key}-who"
        question += "?"
    else:
        text, short = questions[k]
        text, _ = draw.choose(text)
        key = f"{fact.rule.key}-{k + 1}"
        ref = s.full
        if two:
            others = [
                f
                for f in s.facts
                if f is not fact
                and (f.verbal or f.owned)
                and f.said
                and not re.search(r'[",]', f.clause)
                and len(f.clause) < 75
            ]
            if not others or "{S" not in text or len(text) > 70:
                return None
            by = draw.pick(others)
            key += f"+{by.rule.key}"
            ref = s.kin if s.kin and draw.chance(0.6) else put(description(draw, by), s, s.full, past)
        elif s.job and fact.rule.key != "home" and draw.chance(0.15):
            ref = f"the {s.job} of {s.town}"
        values = fact.values
        question = put(draw.fill(text, values, fact.chosen), s, ref, past)
        short = put(draw.fill(short, values, fact.chosen), s, s.he if "{his}" in short else s.full, past)
        question = capital(question)
    draw.templates.append(key)
    r = draw.rng.random()
    if r < 0.5:
        answer = full
    elif r < 0.68 and k != n and fact.clause.startswith("{S"):
        answer = put(fact.clause, s, s.he, past)
    elif r < 0.72:
        answer = draw.pick(["According to the text, ", "The text says that "]) + full
    else:
        answer = short
    return dict(question=question, answer=sentence(answer))


MALE_KIN = {"brother", "uncle", "grandfather", "nephew", "son", "landlord"}
FEMALE_KIN = {"sister", "aunt", "grandmother", "niece", "daughter", "godmother"}


def unique(text, phrase):
    """Whether the phrase stands in the text exactly once."""
    at = text.find(phrase)
    return at >= 0 and text.find(phrase, at + 1) < 0


def ask_quote(draw, story, passage):
    """Quote the sentence that a question is about, or that has a certain word."""
    told = draw.pick(story.told)
    r = draw.rng.random()
    if r < 0.6:
        facts = [f for t in story.told for f in t.facts]
        if not facts:
            return None
        fact = draw.pick(facts)
        text, _ = draw.pick(fact.rule.questions)
        question = put(
            draw.fill(draw.choose(text)[0], fact.values, fact.chosen), fact.subject, fact.subject.full, story.past
        )
        return dict(question=draw.line("quote_fact").format(question=capital(question)), answer=fact.said)
    words = [w.strip('",.;:') for w in told.text.split()]
    words = [w for w in words if len(w) > 4 and unique(passage, w)]
    if not words or not unique(passage, told.text):
        return None
    return dict(question=draw.line("quote_word").format(word=draw.pick(words)), answer=told.text)


def ask_continue(draw, story, passage):
    """How a sentence goes on, or which sentence follows."""
    i = draw.between(0, len(story.told) - 1)
    words = story.told[i].text.split()
    r = draw.rng.random()
    if r < 0.7 and len(words) > 6:
        cut = draw.between(3, min(8, len(words) - 3))
        begin = " ".join(words[:cut])
        if not unique(passage, begin):
            return None
        rest = " ".join(words[cut:])
        return (
            dict(question=draw.line("continue").format(begin=begin.replace('"', "")), answer=rest)
            if '"' not in story.told[i].text
            else None
        )
    if i + 1 == len(story.told) or not unique(passage, story.told[i].text):
        return None
    # Only within a paragraph or across two: the next sentence of the text is meant.
    return dict(question=draw.line("next").format(sentence=story.told[i].text), answer=story.told[i + 1].text)


def length(draw):
    """How many words a passage aims at: most 90 to 240, a few up to 480."""
    r = draw.rng.random()
    return draw.between(40, 90) if r < 0.15 else draw.between(90, 240) if r < 0.85 else draw.between(240, 470)


def story_tree(draw, kind="story"):
    r = draw.rng.random()
    kinds = (
        ["person"] * 10 + ["place"] * 4 + ["town"] * 2 + ["animal"] * 2 + ["thing"] * 2 + ["group"] * 2 + ["event"] * 2
    )
    n = 1 if r < 0.2 else 2 if r < 0.5 else 3 if r < 0.75 else draw.between(4, 6)
    if kind == "two facts":
        subjects = (
            ["person"] * max(2, n) if draw.chance(0.7) else [draw.pick(["place", "person", "person"])] * max(2, n)
        )
    else:
        subjects = [draw.pick(kinds) for _ in range(n)]
    story = Story(draw, subjects, (3, 6) if n < 3 else (2, 4), rivals=0.6 if kind == "two facts" else 0.4)
    if not story.facts:
        raise Spent
    breaks = draw.pick([" ", "\n", "\n\n", "\n\n"])
    passage = story.write(length(draw) if draw.chance(0.5) else 0, breaks)
    wanted, branches, seen = draw.between(3, 8), [], set()
    share = dict(story=(0.72, 0.82, 0.92), quote=(0.2, 0.3, 0.8), **{"two facts": (0.25, 1, 1)})[kind]
    for _ in range(4 * wanted):
        if len(branches) == wanted:
            break
        r = draw.rng.random()
        if r < share[0]:
            branch = ask_fact(draw, story, draw.pick(story.facts), False)
        elif r < share[1]:
            branch = ask_fact(draw, story, draw.pick(story.facts), True)
        elif r < share[2]:
            branch = ask_quote(draw, story, passage)
        else:
            branch = ask_continue(draw, story, passage)
        if branch and branch["question"] not in seen:
            seen.add(branch["question"])
            branches.append(branch)
    return kind, passage, branches


# ---- lists, tables, letters and other texts --------------------------------------------------------------------------
# A maker returns (passage, asks). asks: functions that return (question, short answer, full answer) at each call.


def code(draw):
    letters = "ABCDEFGHJKLMNPRSTUVWXYZ"
    r = draw.rng.random()
    if r < 0.35:
        return f"{draw.between(1000, 99999)}"
    if r < 0.7:
        return draw.pick(letters) + draw.pick(letters) + f"-{draw.between(10, 999)}"
    return draw.pick(letters) + str(draw.between(2, 99))


def word(draw):
    """A word that means nothing."""
    syllable = lambda: draw.pick("b d f g h k l m n p r s t v w z br dr kl pl st tr".split()) + draw.pick("aeiou")  # noqa: E731
    return "".join(syllable() for _ in range(draw.between(2, 3))) + draw.pick(["", "n", "r", "l", "k", "sh", "x"])


# What may be a key and what a value: how each is called, and how it is drawn.
COLUMNS = {
    "name": lambda d: d.person(), "colour": lambda d: d.value("colour"), "job": lambda d: d.value("job"),
    "town": lambda d: d.town(), "room": lambda d: f"{d.between(1, 9)}{d.between(0, 4)}{d.between(0, 9)}",
    "code": code, "password": word, "object": lambda d: d.thing(), "animal": lambda d: d.value("animal"),
    "favourite food": lambda d: d.value("food"), "street": lambda d: d.value("street"), "drink": lambda d: d.value("drink"),
    "instrument": lambda d: d.value("instrument"), "hobby": lambda d: d.value("hobby"), "plant": lambda d: d.value("plant"),
    "birthday": lambda d: f"{d.between(1, 28)} {d.pick(MONTHS)}", "age": lambda d: str(d.between(6, 97)),
    "telephone": lambda d: f"{d.between(20, 99)} {d.between(100, 999)}", "ship": lambda d: d.ship(),
    "score": lambda d: str(d.between(1, 400)), "price": lambda d: f"{d.between(1, 90)}.{d.between(10, 99)}",
    "pet": lambda d: d.value("pet"), "material": lambda d: d.value("material"),
}  # fmt: skip
KEYS = ["name", "name", "name", "ship", "object", "town", "animal", "pet", "code", "plant", "job", "password", "street"]


def distinct(draw, kind, n):
    out = []
    for _ in range(4 * n):
        if len(out) == n:
            return out
        v = COLUMNS[kind](draw)
        if v not in out and not any(v in w or w in v for w in out):
            out.append(v)
    raise Spent


def key_values(draw):
    key = draw.pick(KEYS)
    value = draw.pick([c for c in COLUMNS if c != key])
    n = draw.between(4, 18)
    keys, values = distinct(draw, key, n), distinct(draw, value, n)
    form = draw.pick([
        "{k}: {v}", "{k} = {v}", "- {k}: {v}", "* {k} -> {v}", "{k}\t{v}", '"{k}": "{v}",', "{k} ({v})", "{k} | {v}", "{k}, {v}",
        "the {value} of {k} is {v}", "{k} has the {value} {v}", "{i}. {k} - {v}", "[{k}] {v}",
    ])  # fmt: skip
    entries = [form.format(k=k, v=v, i=i + 1, value=value) for i, (k, v) in enumerate(zip(keys, values, strict=True))]
    if form.startswith(("the", "{k} has")):
        entries = [sentence(e) for e in entries]
        text = draw.pick([" ", "\n"]).join(entries)
    elif draw.chance(0.15) and "," not in form:
        text = "; ".join(entries) + "."
    else:
        text = "\n".join(entries)
    if draw.chance(0.6):
        heads = ["List of the {value}s by {key}", "{key}: {value}", "Here is the {value} for each {key}.", "{Key} and {value}:",
                 "The following list gives every {key} and its {value}."]  # fmt: skip
        text = draw.pick(heads).format(key=key, Key=key.capitalize(), value=value) + "\n" + text

    def by_key():
        i = draw.between(0, n - 1)
        q = draw.line("value_of").format(key=key, value=value, k=keys[i])
        return q, values[i], f"The {value} of {keys[i]} is {values[i]}"

    def by_value():
        i = draw.between(0, n - 1)
        q = draw.line("key_of").format(key=key, value=value, v=values[i])
        return q, keys[i], f"The {key} with the {value} {values[i]} is {keys[i]}"

    def line_of():
        i = draw.between(0, n - 1)
        return draw.line("copy_entry").format(k=keys[i], key=key), None, entries[i]

    return text, [by_key, by_key, by_value, line_of]


def table(draw):
    columns = draw.rng.sample([c for c in COLUMNS if c not in ("name", "ship", "town", "object")], draw.between(2, 4))
    key = draw.pick(["name", "ship", "town", "object"])
    n = draw.between(3, 9)
    rows = list(zip(distinct(draw, key, n), *(distinct(draw, c, n) for c in columns), strict=True))
    head = [key, *columns]
    r = draw.rng.random()
    if r < 0.35:
        lines = [
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
    elif r < 0.55:
        sep = draw.pick([", ", "; ", "\t"])
        lines = [sep.join(head), *(sep.join(row) for row in rows)]
    else:  # in words
        form = draw.pick(
            [
                "For {k}, {rest}",
                "{k}: {rest}",
                "{k} stands in the list with {rest}",
                "As to {k}, {rest}",
                "{k} comes with {rest}",
            ]
        )
        lines = []
        for row in rows:
            pairs = [
                f"the {c} {draw.pick(['is ', '']) if form.startswith(('For', 'As')) else ''}{v}".replace("is ", "is ")
                for c, v in zip(columns, row[1:], strict=True)
            ]
            if form.startswith(("For", "As")):
                pairs = [f"the {c} is {v}" for c, v in zip(columns, row[1:], strict=True)]
            lines.append(
                sentence(
                    form.format(
                        k=row[0], rest=", ".join(pairs[:-1]) + " and " + pairs[-1] if len(pairs) > 1 else pairs[0]
                    )
                )
            )
        if draw.chance(0.4):
            lines = [" ".join(lines)]

    def cell():
        row, j = draw.pick(rows), draw.between(1, len(columns))
        q = draw.line("value_of").format(key=key, value=head[j], k=row[0])
        return q, row[j], f"The {head[j]} of {row[0]} is {row[j]}"

    def back():
        row, j = draw.pick(rows), draw.between(1, len(columns))
        q = draw.line("key_of").format(key=key, value=head[j], v=row[j])
        return q, row[0], f"The {key} with the {head[j]} {row[j]} is {row[0]}"

    def across():
        row, (i, j) = draw.pick(rows), draw.rng.sample(range(1, len(head)), 2)
        q = draw.line("across").format(key=key, value=head[j], by=head[i], v=row[i])
        return q, row[j], f"The {head[j]} of the {key} with the {head[i]} {row[i]} is {row[j]}"

    return "\n".join(lines), [cell, cell, back, across]


def clock(minutes):
    return f"{minutes // 60 % 24}:{minutes % 60:02}"


def timetable(draw):
    what = draw.pick(["train", "bus", "ferry", "coach", "tram"])
    place = dict(train="platform", bus="stop", ferry="pier", coach="bay", tram="stop")[what]
    n, at = draw.between(4, 10), draw.between(300, 700)
    rows = []
    for _ in range(n):
        at += draw.between(7, 95)
        rows.append((clock(at), draw.town(), str(draw.between(1, 12)), clock(at + draw.between(20, 220))))
    form = draw.pick([
        "{t} {what} to {to}, {place} {p}, arrives {a}", "{to}: departure {t}, {place} {p}, arrival {a}",
        "The {t} {what} goes to {to} from {place} {p} and arrives at {a}.", "{t} | {to} | {place} {p} | {a}",
        "At {t} the {what} to {to} leaves from {place} {p}; it is there at {a}.",
    ])  # fmt: skip
    lines = [form.format(what=what, t=t, to=to, p=p, a=a, place=place) for t, to, p, a in rows]
    title = draw.pick([f"Timetable ({what})\n", f"Departures from {draw.town()}\n", ""])
    if "|" in form:
        title += f"departure | destination | {place} | arrival\n"

    def ask():
        t, to, p, a = draw.pick(rows)
        k = draw.between(0, 4)
        q = draw.line(f"timetable_{'time to place arrival time_of'.split()[k] if k < 4 else 'by_place'}") if 0 else None
        kinds = {
            "when": (f"at {t}", f"The {what} to {to} leaves at {t}"),
            "where": (f"to {to}", f"The {t} {what} goes to {to}"),
            "from": (f"from {place} {p}", f"The {what} to {to} leaves from {place} {p}"),
            "arrive": (f"at {a}", f"The {what} to {to} arrives at {a}"),
        }
        kind = draw.pick(list(kinds))
        q = draw.line("timetable_" + kind).format(what=what, t=t, to=to, place=place)
        return q, *kinds[kind]

    return title + draw.pick(["\n", "\n", " "] if form.endswith(".") else ["\n"]).join(lines), [ask]


def recipe(draw):
    base = draw.value("food")
    name = draw.pick(
        [f"{draw.town()} {base}", f"{base} in the manner of {draw.person()}", f"{base} with {draw.value('food')}"]
    )
    n = draw.between(4, 8)
    things = distinct(draw, "favourite food", n)
    amounts = [
        f"{draw.between(2, 90) * 5} grams"
        if draw.chance(0.5)
        else f"{draw.pick(NUMBERS[:8])} {draw.pick(['spoons', 'cups', 'handfuls', 'pinches', 'slices'])}"
        for _ in things
    ]
    form = draw.pick(["- {a} of {t}", "{t}: {a}", "{a} of {t}", "* {t} ({a})"])
    minutes, heat = draw.between(5, 90), draw.between(12, 25) * 10
    vessel, after = draw.value("object"), draw.pick(things)
    first = draw.pick([t for t in things if t != after])
    steps = [
        f"First put the {first} into {article(vessel)} and stir.",
        f"Add the {after} only when everything has turned {draw.pick(['brown', 'soft', 'clear', 'thick', 'golden'])}.",
        f"Bake it for {minutes} minutes at {heat} degrees.",
    ]
    guest = draw.value("drink")
    steps.append(
        draw.pick([f"Serve it with {guest}.", f"It tastes best with {guest}.", f"With it one drinks {guest}."])
    )
    listed = [form.format(a=a, t=t) for a, t in zip(amounts, things, strict=True)]
    if draw.chance(0.4):
        text = (
            f"For {name} you need "
            + ", ".join(f"{a} of {t}" for a, t in zip(amounts, things, strict=True))
            + ". "
            + " ".join(steps)
        )
    else:
        text = f"{capital(name)}\n\n" + "\n".join(listed) + "\n\n" + draw.pick(["\n", " "]).join(steps)

    def ask():
        i = draw.between(0, n - 1)
        kinds = {
            "amount": (amounts[i], f"You need {amounts[i]} of {things[i]}"),
            "amount2": (amounts[i], f"The recipe takes {amounts[i]} of {things[i]}"),
            "long": (f"for {minutes} minutes", f"It is baked for {minutes} minutes"),
            "heat": (f"at {heat} degrees", f"It is baked at {heat} degrees"),
            "with": (guest, f"It is served with {guest}"),
            "first": (f"the {first}", f"First you put the {first} into the {vessel}"),
            "vessel": (f"into {article(vessel)}", f"The {first} goes into {article(vessel)}"),
        }
        kind = draw.pick(list(kinds))
        q = draw.line("recipe_" + kind.rstrip("2")).format(t=things[i], first=first, vessel=vessel)
        return q, *kinds[kind]

    return text, [ask]


def inventory(draw):
    n = draw.between(4, 14)
    things = [plural(draw.thing()) for _ in range(n)]
    numbers = [str(draw.between(2, 240)) for _ in things]
    places = [
        draw.pick(
            [
                f"shelf {draw.pick('ABCDEFGH')}{draw.between(1, 30)}",
                f"the {draw.value('room') if draw.chance(0.4) else 'box ' + str(draw.between(1, 99))}",
            ]
        )
        for _ in things
    ]
    places = [p.replace("the box", "box") for p in places]
    form = draw.pick([
        "{t}: {c}, {p}", "{c} {t} ({p})", "{c} x {t} - {p}", "In {p} there are {c} {t}.", "{T}, {c} of them, are kept in {p}.",
        "There are {c} {t} in {p}.", "{p}: {c} {t}",
    ])  # fmt: skip
    lines = [capital(form.format(t=t, T=capital(t), c=c, p=p)) for t, c, p in zip(things, numbers, places, strict=True)]
    owner = draw.pick([f"the {draw.value('building')} of {draw.town()}", draw.person(), f"the {draw.value('shop')}"])
    text = draw.pick(
        [f"Inventory of {owner}\n", f"What {owner} has in store:\n", f"Stock list, {owner}\n"]
    ) + draw.pick(["\n"] if "." not in form else ["\n", " "]).join(lines)

    def ask():
        i = draw.between(0, n - 1)
        kinds = {
            "count": (numbers[i], f"There are {numbers[i]} {things[i]}"),
            "place": (f"in {places[i]}", f"The {things[i]} are in {places[i]}"),
        }
        kind = draw.pick(list(kinds))
        return draw.line("inventory_" + kind).format(t=things[i]), *kinds[kind]

    return text, [ask]


def notice(draw):
    event, town, hall = draw.value("event"), draw.town(), draw.value("building")
    day, month, date, time_ = draw.day(), draw.month(), draw.between(1, 28), draw.time()
    person, job, bring, cost, food = draw.person(), draw.value("job"), draw.thing(), draw.sum(), draw.value("food")
    forbidden, rain = plural(draw.value("animal")), draw.value("building")
    said = [
        draw.choose(
            f"(The|This year's) {event} of {town} (takes place|will be held) on {day}, {date} {month}, in the {hall}."
        )[0],
        draw.choose(f"(It begins|We begin|The doors open) at {time_}.")[0],
        draw.choose(f"(Admission is|Entrance costs|A ticket costs) {cost}.")[0],
        draw.choose(f"(Everyone is asked to bring|Please bring|Do not forget) {article(bring)}.")[0],
        draw.choose(f"(There will be|The kitchen serves|The guests will be given) {food}.")[0],
        draw.choose(f"{capital(forbidden)} (are not admitted|must stay outside|are not welcome).")[0],
        draw.choose(f"If it rains, (we meet in|everything moves to) the {rain}.")[0],
        draw.choose(f"(Questions are answered by|For questions turn to|Please send questions to) {person}, the {job}.")[
            0
        ],
    ]
    head, rest = said[0], said[1:]
    draw.rng.shuffle(rest)
    text = draw.pick(["NOTICE\n\n", "", f"To the people of {town}\n\n", "Announcement: "]) + draw.pick(
        [" ", "\n"]
    ).join([head, *rest])
    kinds = {
        "date": (f"on {day}, {date} {month}", f"The {event} of {town} takes place on {day}, {date} {month}"),
        "hall": (f"in the {hall}", f"The {event} takes place in the {hall}"),
        "time": (f"at {time_}", f"It begins at {time_}"),
        "cost": (cost, f"It costs {cost}"),
        "bring": (article(bring), f"Everyone is asked to bring {article(bring)}"),
        "food": (food, f"There will be {food}"),
        "forbidden": (forbidden, f"{capital(forbidden)} are not admitted"),
        "rain": (f"in the {rain}", f"If it rains, it takes place in the {rain}"),
        "who": (f"{person}, the {job}", f"Questions are answered by {person}, the {job}"),
    }

    def ask():
        kind = draw.pick(list(kinds))
        return draw.line("notice_" + kind).format(event=event, town=town), *kinds[kind]

    return text, [ask]


def voices(draw, n, each):
    """Persons who speak of themselves: (subject, facts) of each."""
    story = Story(draw, ["person"] * n, each, past=False, rivals=0.5)
    if len(story.subjects) < n:
        raise Spent
    return story


def spoken(draw, fact):
    return sentence(put(fact.clause, fact.subject, "I", False))


def letter(draw):
    story = voices(draw, 1, (4, 7))
    s = story.subjects[0]
    to, place = draw.person(), draw.town()
    date = f"{draw.between(1, 28)} {draw.pick(MONTHS)}"
    body = [spoken(draw, f) for f in s.facts]
    for i in range(draw.between(0, 4)):
        body.insert(draw.between(0, len(body)), draw.choose(draw.pick(SMALL_TALK))[0])
    for f in s.facts:
        f.said = spoken(draw, f)
    sign = draw.pick(["Yours", "With best wishes", "Your old friend", "Yours sincerely", "Love"])
    if draw.chance(0.35):
        text = (
            f"From: {s.full}\nTo: {to}\nDate: {date}\nSubject: {draw.pick(['News', 'Hello', 'About me', 'A few lines', 'Answer to your questions'])}\n\n"
            + " ".join(body)
        )
    else:
        text = f"{place}, {date}\n\nDear {to.split()[0]},\n\n" + " ".join(body) + f"\n\n{sign},\n{s.full}"
        if draw.chance(0.5):
            text = text.replace(f"Dear {to.split()[0]}", f"Dear {to}")

    def ask():
        branch = ask_fact(draw, story, draw.pick(s.facts), False)
        return branch["question"], None, branch["answer"]

    def frame():
        kinds = {
            "date": (f"on {date}", f"The letter was written on {date}"),
            "from": (s.full, f"It was written by {s.full}"),
        }
        kind = draw.pick(list(kinds))
        return draw.line("letter_" + kind), *kinds[kind]

    return text, [ask, ask, ask, ask, frame]


def dialogue(draw):
    story = voices(draw, draw.between(2, 4), (2, 4))
    turns = [(f.subject, f) for f in story.facts]
    draw.rng.shuffle(turns)
    form = draw.pick(["{s}: {t}", '"{t}" said {s}.', '{s} said: "{t}"', "- {s}: {t}", '{s}: "{t}"', "[{s}] {t}"])
    lines = []
    for s, f in turns:
        f.said = spoken(draw, f)
        t = f.said
        if draw.chance(0.3):
            t = draw.choose(draw.pick(REPLIES))[0] + " " + t
        if form.startswith('"{t}" said') and t.endswith("."):
            t = t[:-1] + ","
        if '"' in form:
            t = t.replace('"', "'")
        lines.append(form.format(s=s.full, t=t))
    text = (
        draw.pick(["\n", "\n\n", " "]).join(lines) if not form.startswith(("-", "[", "{s}: {t}")) else "\n".join(lines)
    )

    def ask():
        branch = ask_fact(draw, story, draw.pick(story.facts), draw.chance(0.25))
        return (branch["question"], None, branch["answer"]) if branch else None

    return text, [ask]


def chronicle(draw):
    """Years, and what happened in each."""
    story = Story(
        draw,
        draw.rng.sample(["place", "town", "thing", "event", "group", "person", "person"], draw.between(2, 4)),
        (3, 5),
        past=True,
    )
    facts = [f for f in story.facts if not f.timed and "year" not in f.values and f.rule.key != "home"]
    if len(facts) < 3:
        raise Spent
    draw.rng.shuffle(facts)
    years = sorted(draw.rng.sample(range(1690, 1985), len(facts)))
    form = draw.pick(
        ["{y}: {t}", "In {y} {u}", "({y}) {t}", "- {y} - {t}", "From the year {y} we read: {t}", "{y}. {t}"]
    )
    lines, clauses = [], []
    for y, f in zip(years, facts, strict=True):
        clause = put(f.clause, f.subject, f.subject.full, True)
        clauses.append(clause)
        lines.append(sentence(form.format(y=y, t=sentence(clause), u=clause)))

    def year_of():
        i = draw.between(0, len(years) - 1)
        return draw.line("chronicle_year").format(t=clauses[i]), f"in {years[i]}", f"In {years[i]} {clauses[i]}"

    def what():
        i = draw.between(0, len(years) - 1)
        return (
            draw.line("chronicle_what").format(y=years[i]),
            None,
            draw.pick([clauses[i], f"In {years[i]} {clauses[i]}"]),
        )

    return draw.pick(["\n", " "] if form.startswith(("In", "From")) else ["\n"]).join(lines), [year_of, what]


def log(draw):
    ship, at = draw.ship(), draw.between(300, 800)
    rows = []
    for _ in range(draw.between(4, 12)):
        at += draw.between(4, 80)
        subject = draw.choose(draw.fill(draw.pick(LOG), {}))[0]
        rows.append((clock(at).rjust(5, "0"), subject))
    form = draw.pick(["[{t}] {e}", "{t} {e}", "{t} - {e}", "{t}: {e}.", "At {t} {e}."])
    text = draw.pick(
        [f"Log of the {ship}\n", "", f"{draw.pick(DAYS)}, {draw.between(1, 28)} {draw.pick(MONTHS)}\n"]
    ) + "\n".join(form.format(t=t, e=e) for t, e in rows)

    def when():
        t, e = draw.pick(rows)
        return draw.line("log_when").format(e=e), f"at {t}", f"At {t} {e}"

    def what():
        t, e = draw.pick(rows)
        return draw.line("log_what").format(t=t), e, f"At {t} {e}"

    def after():
        i = draw.between(0, len(rows) - 2)
        return (
            draw.line("log_after").format(e=rows[i][1], t=rows[i][0]),
            rows[i + 1][1],
            f"At {rows[i + 1][0]} {rows[i + 1][1]}",
        )

    return text, [when, what, after]


def chain(draw):
    """Three sets that belong together: who has what, and where it is."""
    n = draw.between(3, 7)
    people, things = [draw.person() for _ in range(n)], [draw.value("object") for _ in range(n)]
    where, marks = [draw.where() for _ in range(n)], [draw.value("colour") for _ in range(n)]
    first = draw.pick(["{p} owns the {t}", "the {t} belongs to {p}", "{p} is the owner of the {t}", "the {t} was given to {p}",
                       "what {p} has bought is the {t}"])  # fmt: skip
    second = draw.pick(
        [
            "the {t} is {w}",
            "you will find the {t} {w}",
            "the {t} was left {w}",
            "{w} lies the {t}",
            "the {t} stands {w}",
        ]
    )
    third = draw.pick(["the {t} is {c}", "{c} is the colour of the {t}", "somebody painted the {t} {c}"])
    said = [sentence(first.format(p=p, t=t)) for p, t in zip(people, things, strict=True)]
    said += [sentence(second.format(w=w, t=t)) for w, t in zip(where, things, strict=True)]
    coloured = draw.chance(0.5)
    if coloured:
        said += [sentence(third.format(c=c, t=t)) for c, t in zip(marks, things, strict=True)]
    if draw.chance(0.7):
        draw.rng.shuffle(said)

    def ask():
        i = draw.between(0, n - 1)
        p, t, w, c = people[i], things[i], where[i], marks[i]
        kinds = {
            "where": (w, f"{p}'s {t} is {w}"),
            "who": (p, f"The {t} {w} belongs to {p}"),
            "what": (f"the {t}", f"{p} owns the {t}"),
        }
        if coloured:
            kinds["colour"] = (c, f"{p}'s {t} is {c}")
            kinds["by_colour"] = (p, f"The {c} {t} belongs to {p}")
        kind = draw.pick(list(kinds))
        return draw.line("chain_" + kind).format(p=p, w=w, c=c), *kinds[kind]

    return " ".join(said), [ask]


def glossary(draw):
    """Words of a made-up language."""
    n = draw.between(4, 14)
    kinds = ["animal", "object", "food", "colour", "plant", "garment", "building", "weather"]
    words, meanings = distinct(draw, "password", n), [draw.value(draw.pick(kinds)) for _ in range(n)]
    form = draw.pick(
        [
            '"{w}" means "{m}"',
            "{w}: {m}",
            "{w} = {m}",
            "the word for {m} is {w}",
            "{m} is called {w}",
            "they say {w} when they mean {m}",
            "{w} stands for {m}",
        ]
    )
    lines = [form.format(w=w, m=m) for w, m in zip(words, meanings, strict=True)]
    place = draw.town()
    if " is " in form or "mean" in form or "stands" in form:
        text = " ".join(capital(x) + "." for x in lines)
    else:
        text = "\n".join(lines)
    text = (
        draw.pick(
            [
                f"Some words in the language of {place}:\n",
                f"A short dictionary ({place})\n",
                "",
                f"In {place} people have words of their own. ",
            ]
        )
        + text
    )

    def meaning():
        i = draw.between(0, n - 1)
        return draw.line("word_meaning").format(w=words[i]), meanings[i], f'"{words[i]}" means "{meanings[i]}"'

    def word_for():
        i = draw.between(0, n - 1)
        return draw.line("word_for").format(m=meanings[i]), words[i], f'The word for "{meanings[i]}" is "{words[i]}"'

    return text, [meaning, word_for]


def copy(draw):
    """Lines to be repeated."""
    r = draw.rng.random()
    n = draw.between(3, 12)
    if r < 0.35:
        lines = [prose(draw) for _ in range(n)]
    elif r < 0.6:
        kinds = ["animal", "object", "food", "colour", "plant", "garment", "job", "instrument"]
        lines = [" ".join(draw.value(draw.pick(kinds)) for _ in range(draw.between(2, 5))) for _ in range(n)]
    elif r < 0.8:
        lines = [f"{word(draw)} {word(draw)} {word(draw)}" for _ in range(n)]
    else:
        lines = [f"{code(draw)} {draw.person()}" for _ in range(n)]
    if len({x.split()[0] for x in lines}) < n or len({x.split()[-1] for x in lines}) < n:
        raise Spent

    def begins():
        x = draw.pick(lines)
        return draw.line("copy_begins").format(w=x.split()[0]), None, x

    def ends():
        x = draw.pick(lines)
        return draw.line("copy_ends").format(w=x.split()[-1].rstrip(".")), None, x

    def after():
        i = draw.between(0, n - 2)
        return draw.line("copy_after").format(x=lines[i]), None, lines[i + 1]

    def edge():
        i = draw.pick([0, -1])
        return draw.line("copy_first" if i == 0 else "copy_last"), None, lines[i]

    return "\n".join(lines), [begins, ends, after, edge]


MAKERS = {"key-value": key_values, "table": table, "timetable": timetable, "recipe": recipe, "inventory": inventory,
          "notice": notice, "letter": letter, "dialogue": dialogue, "chronicle": chronicle, "log": log, "chain": chain,
          "glossary": glossary, "copy": copy}  # fmt: skip


def document_tree(draw, kind):
    text, asks = MAKERS[kind](draw)
    if kind not in ("copy", "letter", "dialogue") and draw.chance(0.4):
        want, before, after = length(draw), [], []
        while len(text.split()) + sum(len(x.split()) for x in before + after) < want:
            draw.pick([before, after]).append(prose(draw))
        text = "\n\n".join(x for x in (" ".join(before), text, " ".join(after)) if x)
    wanted, branches, seen = draw.between(3, 8), [], set()
    for _ in range(4 * wanted):
        if len(branches) == wanted:
            break
        asked = draw.pick(asks)()
        if asked is None or asked[0] in seen:
            continue
        question, short, full = asked
        seen.add(question)
        if kind in ("copy",) or question.startswith(("Copy", "Repeat")):
            answer = full
        elif short is None:
            answer = full if full.endswith(".") else sentence(full)
        else:
            answer = sentence(full if draw.chance(0.65) else short)
        branches.append(dict(question=question, answer=answer))
    return kind, text, branches


# ---- trees -----------------------------------------------------------------------------------------------------------

SHARES = {"story": 46, "two facts": 12, "quote": 6, "key-value": 6, "table": 5, "timetable": 2, "recipe": 2, "inventory": 2,
          "notice": 3, "letter": 4, "dialogue": 4, "chronicle": 2, "log": 2, "chain": 3, "glossary": 2, "copy": 3}  # fmt: skip


def tree(bank, seed, i):
    """The tree number i of a seed. It depends on nothing else, so any part of a file can be made again."""
    for attempt in range(100):
        rng = random.Random(f"{bank.split} {seed} {i} {attempt}")
        draw = Draw(bank, rng)
        kind = rng.choices(list(SHARES), SHARES.values())[0]
        try:
            kind, passage, branches = (
                story_tree(draw, kind) if kind in ("story", "two facts", "quote") else document_tree(draw, kind)
            )
        except Spent:
            continue
        if len(branches) < 2:
            continue
        if draw.chance(0.35):
            passage = draw.pick(TASKS) + "\n\n" + passage
        if draw.chance(0.3):
            prefix = draw.pick(PREFIXES)
            for b in branches:
                b["question"] = prefix + b["question"]
        system = draw.pick(SYSTEMS) if draw.chance(0.1) else None
        return dict(
            kind=kind, template="+".join(sorted(set(draw.templates))), system=system, passage=passage, branches=branches
        )
    raise AssertionError("no tree in 100 attempts")


def make(out, count, seed, split="train", start=0):
    bank = Bank(split, forbidden_names())
    with open(out, "w") as file:
        for i in range(start, start + count):
            file.write(json.dumps(tree(bank, seed, i), ensure_ascii=False) + "\n")


# ---- what must not occur in the data ---------------------------------------------------------------------------------

ORDINARY = set(
    """the a an of in on at and or to it its he she his her they their when every today some last old one people
    what which who whom whose where how why upper lower great little saint port north south east west new street
    doctor professor captain mr mrs x ray lady miss sir father frau dona senator avenue bay bride castle combe grand
    heath hotel isles lake loch mount pole well society improvement puddings venus santa"""
    .split() + [w.lower() for w in DAYS + MONTHS + [d + "s" for d in DAYS]] + SEASONS + NUMBERS + TENS
)  # fmt: skip
ALSO_WORDS = set(
    """ash biscuit broom clay crabbe drowned duchess finch freed grey hyacinth keel lanterns low magnolia mercy monk nether
    poole sorrel strand viola wren""".split()
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
    "the a an of to is are what how why who i you my your me can do does and in for on with it this that write tell".split()
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
            if batch % 5 == 4
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


QUESTIONS_EACH = 4  # that the model is asked to write about a passage


def asked_about_passages(chatter, bank, seed, batch, leaks):
    """Passages of the grammar with questions and answers by the model, where the answer's words stand in the passage."""
    trees = [tree(bank, f"{seed} asked {batch}", i) for i in range(3 * chatter.batch // QUESTIONS_EACH)]
    passages = [t["passage"] for t in trees if t["kind"] in ("story", "two facts", "letter", "notice", "dialogue")]
    passages = [p for p in passages if len(p.split()) < 250][: max(1, chatter.batch // QUESTIONS_EACH)]
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
