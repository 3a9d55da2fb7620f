"""Look-ups by a grammar: a passage about invented people and things, and questions that it answers.

A passage is drawn fact by fact. A *rule* of adapt_grammar.py is a clause with slots for words. With its words it is a
*fact* about a *subject*. A Story puts its facts into sentences: by themselves, two in one, in direct speech, beside a
denial of something wrong. A question asks for one of a fact's words. Since no word is drawn twice for a passage, there
is one answer. Other makers write lists, tables, letters, logs and so on.
"""

import hashlib
import random
import re
from typing import NamedTuple

from adapt_grammar import (
    AFTER,
    AGES,
    BEFORE,
    BEFORE_HOUR,
    BY,
    BY_BUILDING,
    COINS,
    DAYS,
    FACTS,
    FIRST,
    FORMS,
    GLOSSARY_HEADS,
    GROUPS,
    KIN,
    LAST,
    LAST_END,
    LINES,
    LOG,
    MAN_END,
    MEASURES,
    MEN,
    MONTHS,
    NUMBERS,
    PREFIXES,
    PROSE_WORDS,
    REPLIES,
    SEASONS,
    SIGNED,
    SINCE,
    SMALL_TALK,
    SUBJECT_LINES,
    SYSTEMS,
    TASKS,
    TENS,
    TIMES,
    TOWN,
    TOWN_BEFORE,
    TOWN_END,
    WOMAN_END,
    WOMEN,
    WORDS,
    YEARS,
    split_list,
)

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
    for pair in """keep=kept leave=left sleep=slept eat=ate drink=drank wear=wore sell=sold grow=grew sit=sat
    write=wrote get=got swim=swam pay=paid speak=spoke make=made teach=taught have=had do=did say=said stand=stood
    send=sent run=ran
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


IRREGULAR_PLURALS = {
    "reindeer": "reindeer", "scarf": "scarves", "tomato": "tomatoes", "midwife": "midwives", "bellows": "bellows",
}  # fmt: skip


def capital(text):
    """The text with its first letter as a capital; a quotation mark may stand before it."""
    for i, c in enumerate(text[:3]):
        if c.isalnum():
            return text[:i] + c.upper() + text[i + 1 :]
    return text


def sentence(text):
    """The text as a sentence: a capital, and a full stop where it has no other end."""
    text = capital(text)
    if text[-1] in ".?!" or text[-2:] in ('."', '?"', '!"', ',"'):
        return text
    return text[:-1] + '."' if text[-1] == '"' and ': "' in text else text + "."


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

    def form(self, name):
        """One of the ways to write an entry of this name; they belong to both splits."""
        return self.pick(FORMS[name])

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
        return f"{self.value('adjective')} {self.value('object')}" if self.chance(0.6) else self.value("object")

    def town(self):
        name = self.fresh(self.bank.towns)
        return f"{self.pick(TOWN_BEFORE)} {name}" if self.chance(0.25) else name

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
            return f"{self.pick(BY)} the {self.value('landmark')}"
        if r < 0.75:
            return f"{self.pick(BY_BUILDING)} the {self.value('building')}"
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
            return self.fresh(TIMES)
        hour = self.fresh(NUMBERS[:10])
        return f"{self.pick(BEFORE_HOUR)} {hour}" if r < 0.7 else f"{hour} o'clock"

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


SHE, HE, IT = ("she", "her", "her"), ("he", "him", "his"), ("it", "it", "its")


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
        self.describes = (self.verbal or self.owned) and len(self.clause) < 75 and not re.search('[",]', self.clause)
        self.timed = re.search(TIMED, self.clause) is not None
        self.said = None  # the sentence that states it

    def vp(self):
        """The verb phrase, for "who ..."; only where `verbal`."""
        return self.clause[4:]

    def contrast(self, draw):
        """The clause with "not on Monday but on Sunday" in place of "on Sunday", or None."""
        found = [m for m in CONTRASTED.finditer(self.pattern) if m[3].rstrip("0123456789") in draw.bank.words]
        if not found or re.search(r"\b(only|never|nothing|but|not|refused)\b", self.pattern):
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
    r"\b((?:in|at|to|from|with|on|by|for) )\{((?:a |pl )?)([a-z]+\d?)\}"
    r"(?! (?:of|from|in|that|who|called|by|when|and)\b)"
)


# ---- stories ---------------------------------------------------------------------------------------------------------


def new_person(draw):
    woman = draw.chance(0.5)
    full = draw.name(woman)
    first, last = full.split()
    short = [first, first, f"{'Mrs' if woman else 'Mr'} {last}"]
    if draw.chance(0.12):
        full = f"{draw.pick(['Doctor', 'Professor', 'Captain', 'Old', 'Sister' if woman else 'Father'])} {full}"
    noun = draw.pick(["woman" if woman else "man", "person"])
    s = Subject("person", full, short, SHE if woman else HE, noun)
    if draw.chance(0.75):
        s.job, s.town = draw.value("job"), draw.town()
    return s


def new_place(draw):
    noun, town = draw.pick([draw.value("building"), draw.value("shop")]), draw.town()
    s = Subject("place", f"the {noun} {draw.pick(['of', 'of', 'in'])} {town}", [f"the {noun}"], IT, noun)
    s.noun_at = (noun, town)
    return s


def new_town(draw):
    town = draw.town()
    if draw.chance(0.4):
        full = f"the {draw.pick(['village', 'town', 'parish', 'district'])} of {town}"
        return Subject("town", full, [town], IT, "place")
    return Subject("town", town, [town], IT, "town")


def new_animal(draw):
    animal, pet = draw.value("animal"), draw.value("pet")
    r = draw.rng.random()
    if r < 0.4:
        return Subject("animal", f"{pet} the {animal}", [pet], draw.pick([SHE, HE, IT]), animal)
    if r < 0.7:
        return Subject("animal", f"the {animal} {pet}", [pet, f"the {animal}"], IT, animal)
    return Subject("animal", f"{draw.person()}'s {animal}", [f"the {animal}"], IT, animal)


def new_thing(draw):
    thing = draw.thing()
    owner = draw.town() if draw.chance(0.5) else draw.person()
    return Subject("thing", f"the {thing} of {owner}", [f"the {thing.split()[-1]}"], IT, "thing")


def new_group(draw):
    name = draw.fill(draw.pick(GROUPS), {})
    short = re.match("(guild|society)|", name)[0] or name.split()[-1]
    return Subject("group", f"the {name} of {draw.town()}", [f"the {short}"], IT, "group")


def new_event(draw):
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
        self.subjects = []
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
        subject = NEW[kind](draw)
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
                text = draw.choose(text)[0].replace("{which}", "@")  # its words are filled already
                text = draw.fill(text, dict(noun=noun, town=town)).replace("@", which)
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
                    text = text.replace(", who ", ", which ").replace("about whom", "about which")
                if ref == s.he and not text.startswith("{S} {"):
                    ref = draw.pick(s.short)
                text = ". ".join(capital(x) for x in say(text, ref).split(". "))
            elif f.owned and r < 0.2 and ref != s.he and (g := take(lambda x: x.verbal)):
                facts = (f, g)
                text = say(f"{{S}}, whose {f.clause[6:]}, {g.vp()}", ref)
            elif r < 0.3 and (g := take(lambda x: True)):
                facts = (f, g)
                link = draw.pick([", and ", ", and ", "; ", ", but ", " and ", ", and as everyone knows, "])
                again = s.he if g.clause.startswith("{S") else draw.pick(s.short)
                text = say(f.clause, ref) + link + say(g.clause, again)
            elif r < 0.36 and '"' not in f.clause and (contrast := self.contrast(f)):
                text = say(contrast, ref)
            elif r < 0.42 and (wrong := self.wrong(f)):
                key, frame = draw.pick(draw.bank.lines["wrong"])
                draw.templates.append(key)
                right = say(f.clause, s.he if f.clause.startswith("{S") and draw.chance(0.5) else ref)
                text = draw.choose(frame)[0].replace("{right}", right).replace("{wrong}", say(wrong, ref))
            elif r < 0.51 and s.kind == "person" and (f.verbal or f.owned) and '"' not in f.clause:
                key, frame = draw.pick(draw.bank.lines["speech"])
                draw.templates.append(key)
                clause = put(f.clause, s, "I", False)
                if re.search(r'(^|: |\. )"\{clause\}', frame):
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
                _, text = draw.pick(draw.bank.lines[name])
                if text not in draw.used:
                    draw.used.add(text)
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
            others = [f for f in s.facts if f is not fact and f.said and f.describes]
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
        question = draw.fill(draw.choose(text)[0], fact.values, fact.chosen)
        question = put(question, fact.subject, fact.subject.full, story.past)
        return dict(question=draw.line("quote_fact").format(question=capital(question)), answer=fact.said)
    words = [w.strip('",.;:') for w in told.text.split()]
    words = [w for w in words if len(w) > 4 and unique(passage.lower(), w.lower())]
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
        if not unique(passage, begin) or '"' in story.told[i].text:
            return None
        return dict(question=draw.line("continue").format(begin=begin), answer=" ".join(words[cut:]))
    if i + 1 == len(story.told) or not unique(passage, story.told[i].text):
        return None
    return dict(question=draw.line("next").format(sentence=story.told[i].text), answer=story.told[i + 1].text)


def length(draw):
    """How many words a passage aims at: most 90 to 240, a few up to 480."""
    r = draw.rng.random()
    return draw.between(40, 90) if r < 0.15 else draw.between(90, 240) if r < 0.85 else draw.between(240, 470)


SUBJECTS = dict(person=10, place=4, town=2, animal=2, thing=2, group=2, event=2)  # how often each


def story_tree(draw, kind):
    r = draw.rng.random()
    n = 1 if r < 0.2 else 2 if r < 0.5 else 3 if r < 0.75 else draw.between(4, 6)
    if kind == "two facts":
        subjects = [draw.pick(["person", "person", "person", "place"])] * max(2, n)
    else:
        subjects = draw.rng.choices(list(SUBJECTS), SUBJECTS.values(), k=n)
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
        return str(draw.between(1000, 99999))
    if r < 0.7:
        return f"{draw.pick(letters)}{draw.pick(letters)}-{draw.between(10, 999)}"
    return f"{draw.pick(letters)}{draw.between(2, 99)}"


CONSONANTS = "b d f g h k l m n p r s t v w z br dr kl pl st tr".split()


def word(draw):
    """A word that means nothing."""
    syllables = [draw.pick(CONSONANTS) + draw.pick("aeiou") for _ in range(draw.between(2, 3))]
    return "".join(syllables) + draw.pick(["", "n", "r", "l", "k", "sh", "x"])


def date(draw):
    return f"{draw.between(1, 28)} {draw.pick(MONTHS)}"


# What may be a key or a value: what it is called, and how it is drawn. Words of WORDS are drawn as words.
COLUMNS = {
    **{kind: (lambda d, kind=kind: d.value(kind)) for kind in """colour job animal street drink instrument hobby plant
       material pet town ship""".split()},
    "name": Draw.person, "object": Draw.thing, "code": code, "password": word, "birthday": date,
    "favourite food": lambda d: d.value("food"), "age": lambda d: str(d.between(6, 97)),
    "room": lambda d: f"{d.between(1, 9)}{d.between(0, 4)}{d.between(0, 9)}",
    "telephone": lambda d: f"{d.between(20, 99)} {d.between(100, 999)}", "score": lambda d: str(d.between(1, 400)),
    "price": lambda d: f"{d.between(1, 90)}.{d.between(10, 99)}",
}  # fmt: skip
KEYS = ["name", "name", "name", "ship", "object", "town", "animal", "pet", "code", "plant", "job", "password", "street"]


def distinct(draw, kind, n):
    """n values of a column, none of which is a part of another."""
    out = []
    for _ in range(4 * n):
        v = COLUMNS[kind](draw)
        if not any(v in w or w in v for w in out):
            out.append(v)
        if len(out) == n:
            return out
    raise Spent


def key_values(draw):
    key = draw.pick(KEYS)
    value = draw.pick([c for c in COLUMNS if c != key])
    n = draw.between(4, 18)
    keys, values = distinct(draw, key, n), distinct(draw, value, n)
    form = draw.form("entry")
    entries = [form.format(k=k, v=v, i=i + 1, value=value) for i, (k, v) in enumerate(zip(keys, values, strict=True))]
    if form.startswith(("the", "{k} has")):
        entries = [sentence(e) for e in entries]
        text = draw.pick([" ", "\n"]).join(entries)
    elif draw.chance(0.15) and "," not in form:
        text = "; ".join(entries) + "."
    else:
        text = "\n".join(entries)
    if draw.chance(0.6):
        text = draw.form("entries_head").format(key=key, Key=capital(key), value=value) + "\n" + text

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
        lines = [f"| {' | '.join(cells)} |" for cells in [head, *rows]]
        lines.insert(1, "|" + "---|" * len(head))
    elif r < 0.55:
        separator = draw.pick([", ", "; ", "\t"])
        lines = [separator.join(cells) for cells in [head, *rows]]
    else:  # in words
        form = draw.form("row")
        link = "is " if form.startswith(("For", "As")) else ""
        lines = []
        for name, *cells in rows:
            pairs = [f"the {c} {link}{v}" for c, v in zip(columns, cells, strict=True)]
            lines.append(sentence(form.format(k=name, rest=f"{', '.join(pairs[:-1])} and {pairs[-1]}")))
        lines = [" ".join(lines)] if draw.chance(0.4) else lines

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
    form = draw.form("departure")
    lines = [form.format(what=what, t=t, to=to, p=p, a=a, place=place) for t, to, p, a in rows]
    title = draw.pick([f"Timetable ({what})\n", f"Departures from {draw.town()}\n", ""])
    if "|" in form:
        title += f"departure | destination | {place} | arrival\n"

    def ask():
        t, to, p, a = draw.pick(rows)
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
    name = draw.fill(draw.pick(["{town} " + base, base + " in the manner of {person}", base + " with {food}"]), {})
    n = draw.between(4, 8)
    things = distinct(draw, "favourite food", n)
    amounts = [
        f"{draw.between(2, 90) * 5} grams" if draw.chance(0.5) else f"{draw.pick(NUMBERS[:8])} {draw.pick(MEASURES)}"
        for _ in things
    ]
    form = draw.form("ingredient")
    minutes, heat = draw.between(5, 90), draw.between(12, 25) * 10
    vessel, after = draw.value("object"), draw.pick(things)
    first = draw.pick([t for t in things if t != after])
    steps = [
        f"First put the {first} into {article(vessel)} and stir.",
        f"Add the {after} only when everything has turned {draw.pick(['brown', 'soft', 'clear', 'thick', 'golden'])}.",
        f"Bake it for {minutes} minutes at {heat} degrees.",
    ]
    guest = draw.value("drink")
    steps.append(draw.pick(["Serve it with", "It tastes best with", "With it one drinks"]) + f" {guest}.")
    listed = [form.format(a=a, t=t) for a, t in zip(amounts, things, strict=True)]
    if draw.chance(0.4):
        needed = ", ".join(f"{a} of {t}" for a, t in zip(amounts, things, strict=True))
        text = f"For {name} you need {needed}. {' '.join(steps)}"
    else:
        text = "\n".join([capital(name), "", *listed, "", draw.pick(["\n", " "]).join(steps)])

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
        f"the {draw.value('room')}"
        if draw.chance(0.2)
        else draw.pick([f"shelf {draw.pick('ABCDEFGH')}{draw.between(1, 30)}", f"box {draw.between(1, 99)}"])
        for _ in things
    ]
    where = [f"{'on' if p.startswith('shelf') else 'in'} {p}" for p in places]
    form = draw.form("stock")
    lines = [
        capital(form.format(t=t, T=capital(t), c=c, p=p, w=w, W=capital(w)))
        for t, c, p, w in zip(things, numbers, places, where, strict=True)
    ]
    owner = draw.fill(draw.pick(["the {building} of {town}", "{person}", "the {shop}"]), {})
    head = draw.pick(["Inventory of {}", "What {} has in store:", "Stock list, {}"]).format(owner)
    text = head + "\n" + draw.pick(["\n", " "] if form.endswith(".") else ["\n"]).join(lines)

    def ask():
        i = draw.between(0, n - 1)
        kinds = {
            "count": (numbers[i], f"There are {numbers[i]} {things[i]}"),
            "place": (where[i], f"The {things[i]} are {where[i]}"),
        }
        kind = draw.pick(list(kinds))
        return draw.line("inventory_" + kind).format(t=things[i]), *kinds[kind]

    return text, [ask]


def notice(draw):
    event, town, hall = draw.value("event"), draw.town(), draw.value("building")
    day, day_of, month, time_ = draw.day(), draw.between(1, 28), draw.month(), draw.time()
    person, job, bring, cost, food = draw.person(), draw.value("job"), draw.thing(), draw.sum(), draw.value("food")
    forbidden, rain = plural(draw.value("animal")), draw.value("building")
    said = f"""(The|This year's) {event} of {town} (takes place|will be held) on {day}, {day_of} {month}, in the {hall}.
(It begins|We begin|The doors open) at {time_}.
(Admission is|Entrance costs|A ticket costs) {cost}.
(Everyone is asked to bring|Please bring|Do not forget) {article(bring)}.
(There will be|The kitchen serves|The guests will be given) {food}.
{capital(forbidden)} (are not admitted|must stay outside|are not welcome).
If it rains, (we meet in|everything moves to) the {rain}.
(Questions are answered by|For questions turn to|Please send questions to) {person}, the {job}."""
    first, *rest = draw.choose(said)[0].split("\n")
    draw.rng.shuffle(rest)
    head = draw.pick(["NOTICE\n\n", "", f"To the people of {town}\n\n", "Announcement: "])
    text = head + draw.pick([" ", "\n"]).join([first, *rest])
    kinds = {
        "date": (f"on {day}, {day_of} {month}", f"The {event} of {town} takes place on {day}, {day_of} {month}"),
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
    """A story of n persons who speak of themselves."""
    story = Story(draw, ["person"] * n, each, past=False)
    if len(story.subjects) < n:
        raise Spent
    for s in story.subjects:  # the others would need "me" for the subject
        s.facts = [f for f in s.facts if re.match(r"\{S('s)?\} (?!and\b)", f.clause)]
    story.facts = [f for s in story.subjects for f in s.facts]
    for fact in story.facts:
        fact.said = spoken(fact)
    return story


def spoken(fact):
    return sentence(put(fact.clause, fact.subject, "I", False))


def letter(draw):
    story = voices(draw, 1, (4, 7))
    s = story.subjects[0]
    to, place = draw.person(), draw.town()
    day = date(draw)
    body = [spoken(f) for f in s.facts]
    for _ in range(draw.between(0, 4)):
        body.insert(draw.between(0, len(body)), draw.choose(draw.fresh(SMALL_TALK))[0])
    if draw.chance(0.35):
        head = f"From: {s.full}\nTo: {to}\nDate: {day}\nSubject: {draw.pick(SUBJECT_LINES)}"
        text = f"{head}\n\n{' '.join(body)}"
    else:
        dear = to if draw.chance(0.5) else to.split()[0]
        text = f"{place}, {day}\n\nDear {dear},\n\n{' '.join(body)}\n\n{draw.pick(SIGNED)},\n{s.full}"

    def ask():
        branch = ask_fact(draw, story, draw.pick(s.facts), False)
        return branch["question"], None, branch["answer"]

    def frame():
        kinds = {"date": (f"on {day}", f"It was written on {day}"), "from": (s.full, f"It was written by {s.full}")}
        kind = draw.pick(list(kinds))
        return draw.line("letter_" + kind), *kinds[kind]

    return text, [ask, ask, ask, ask, frame]


def dialogue(draw):
    story = voices(draw, draw.between(2, 4), (2, 4))
    facts = list(story.facts)
    draw.rng.shuffle(facts)
    form = draw.form("turn")
    lines = []
    for f in facts:
        said = f"{draw.choose(draw.pick(REPLIES))[0]} {f.said}" if draw.chance(0.3) else f.said
        if form.startswith('"{t}" said') and said.endswith("."):
            said = said[:-1] + ","
        lines.append(form.format(s=f.subject.full, t=said.replace('"', "'") if '"' in form else said))
    text = draw.pick(["\n", "\n\n", " "] if form.endswith(('"', ".")) else ["\n"]).join(lines)

    def ask():
        branch = ask_fact(draw, story, draw.pick(story.facts), draw.chance(0.25))
        return (branch["question"], None, branch["answer"]) if branch else None

    return text, [ask]


def chronicle(draw):
    """Years, and what happened in each."""
    kinds = draw.rng.sample(["place", "town", "thing", "event", "group", "person", "person"], draw.between(2, 4))
    story = Story(draw, kinds, (3, 5), past=True)
    facts = [f for f in story.facts if not f.timed and "year" not in f.values and f.rule.key != "home"]
    if len(facts) < 3:
        raise Spent
    draw.rng.shuffle(facts)
    years = sorted(draw.rng.sample(range(1690, 1985), len(facts)))
    form = draw.form("year")
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
        answer = draw.pick([clauses[i], f"In {years[i]} {clauses[i]}"])
        return draw.line("chronicle_what").format(y=years[i]), None, answer

    return draw.pick(["\n", " "] if form.startswith(("In", "From")) else ["\n"]).join(lines), [year_of, what]


def log(draw):
    ship, at = draw.ship(), draw.between(300, 800)
    rows = []
    for _ in range(draw.between(4, 12)):
        at += draw.between(4, 80)
        subject = draw.choose(draw.fill(draw.pick(LOG), {}))[0]
        rows.append((clock(at).rjust(5, "0"), subject))
    form = draw.form("entry_of_log")
    head = draw.pick([f"Log of the {ship}\n", "", f"{draw.pick(DAYS)}, {date(draw)}\n"])
    text = head + "\n".join(form.format(t=t, e=e) for t, e in rows)

    def when():
        t, e = draw.pick(rows)
        return draw.line("log_when").format(e=e), f"at {t}", f"At {t} {e}"

    def what():
        t, e = draw.pick(rows)
        return draw.line("log_what").format(t=t), e, f"At {t} {e}"

    def after():
        i = draw.between(0, len(rows) - 2)
        (t, e), (later, then) = rows[i : i + 2]
        return draw.line("log_after").format(e=e, t=t), then, f"At {later} {then}"

    return text, [when, what, after]


def chain(draw):
    """Three sets that belong together: who has what, and where it is."""
    n = draw.between(3, 7)
    people, things = [draw.person() for _ in range(n)], [draw.value("object") for _ in range(n)]
    where, marks = [draw.where() for _ in range(n)], [draw.value("colour") for _ in range(n)]
    first, second, third = draw.form("owner"), draw.form("lies"), draw.form("coloured")
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
    form = draw.form("meaning")
    lines = [form.format(w=w, m=m) for w, m in zip(words, meanings, strict=True)]
    in_words = " is " in form or "mean" in form or "stands" in form
    text = " ".join(capital(x) + "." for x in lines) if in_words else "\n".join(lines)
    text = draw.pick(GLOSSARY_HEADS).format(draw.town()) + text

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

SHARES = {
    "story": 46, "two facts": 12, "quote": 6, "key-value": 6, "table": 5, "letter": 4, "dialogue": 4, "notice": 3,
    "chain": 3, "copy": 3, "timetable": 2, "recipe": 2, "inventory": 2, "chronicle": 2, "log": 2, "glossary": 2,
}  # fmt: skip


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
