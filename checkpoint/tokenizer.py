"""Turns tokenizer.json, a byte-level BPE tokenizer, into the tensors and rules that the engine reads.

tokenizer.json is not trusted. A feature that would change token ids is refused by name. So are tokens and merges that
contradict each other.
"""

import json

import numpy as np

from .chat import read_template
from .failure import Failure, unsupported
from .files import is_naturals, read_json
from .pattern import check_pattern

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Hugging Face's Digits uses Rust's char::is_numeric. It has 13 code points that \p{N} of its regex engine lacks.
DIGIT = r"[\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}]"


def byte_letters():
    """letter -> byte. Byte-level BPE writes each byte as one printable letter (GPT-2's bytes_to_unicode)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(others)}}


def component_name(component):
    return repr(component.get("type", "?") if isinstance(component, dict) else component)


def sequence(component, key):
    """A tokenizer component as a list. A Sequence becomes its parts, and null the empty list."""
    if component is None:
        return []
    if isinstance(component, dict) and component.get("type") == "Sequence":
        return [leaf for part in component.get(key) or [] for leaf in sequence(part, key)]
    return [component]


def split_patterns(pre_tokenizer):
    """The regular expressions of a pre-tokenizer, in order. Its last part must be ByteLevel."""

    def refuse(part):
        return unsupported(f"the pre-tokenizer {component_name(part)} ({json.dumps(part)[:200]})", "tokenizer.json")

    parts = sequence(pre_tokenizer, "pretokenizers")
    patterns = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "Split":
            regex = part["pattern"].get("Regex") if isinstance(part.get("pattern"), dict) else None
            if not isinstance(regex, str) or part.get("behavior") != "Isolated" or part.get("invert"):
                raise refuse(part)
            patterns.append(regex)
        elif kind == "Digits":
            patterns.append(DIGIT if part.get("individual_digits") else DIGIT + "+")
        elif kind == "ByteLevel":
            if part.get("add_prefix_space") or i != len(parts) - 1:
                raise refuse(part)
            if part.get("use_regex", True):
                patterns.append(GPT2_SPLIT)
            if len(patterns) > 16:
                raise unsupported("more than 16 split patterns", "tokenizer.json")
            for pattern in patterns:
                check_pattern(pattern)
            return patterns
        else:
            raise refuse(part)
    raise unsupported("a pre-tokenizer without ByteLevel at its end", "tokenizer.json")


class Tokenizer:
    """Byte-level BPE.

    vocab: token in byte letters -> id
    merges: pairs of tokens, by rank
    special: id -> text of the tokens that text becomes only where that is asked for
    plain: id -> text of the added tokens that text always becomes
    names: "bos_token" and so on -> text, for the chat template
    """

    def __init__(self, vocab, merges, special, plain, split, ignore_merges, template, names):
        self.vocab, self.merges, self.special, self.plain = vocab, merges, special, plain
        self.split, self.ignore_merges, self.template, self.names = split, ignore_merges, template, names

    def added(self):
        """spelling of an added token -> whether it is special"""
        return {**dict.fromkeys(self.plain.values(), False), **dict.fromkeys(self.special.values(), True)}

    def size(self):
        return 1 + max([*self.vocab.values(), *self.special, *self.plain], default=-1)

    def id_of(self, name):
        """The id of "bos_token" or "eos_token", or None."""
        text = self.names.get(name)
        ids = [i for i, t in {**self.plain, **self.special}.items() if t == text]
        return ids[0] if ids else self.vocab.get(text)

    def tensors(self, vocab_size):
        """The tensors tokenizer.bytes, tokenizer.offsets and tokenizer.merges."""
        if self.size() > vocab_size:
            raise Failure(f"tokenizer: has {self.size()} tokens, vocab_size is {vocab_size}; use the checkpoint's own")
        letters = byte_letters()
        spelling = [b""] * vocab_size
        unmatched = set(self.unmatched())
        for token, i in self.vocab.items():
            spelling[i] = token.encode() if i in unmatched else bytes(letters[c] for c in token)
        added = {**self.plain, **self.special}
        ordinary = [spelling[i] for i in self.vocab.values() if i not in added and i not in unmatched and spelling[i]]
        if len(set(ordinary)) != len(ordinary):
            raise Failure("tokenizer: two tokens have the same bytes; get the file again")
        for i, text in {**self.plain, **self.special}.items():
            spelling[i] = text.encode()
            if len(spelling[i]) > 1024:
                raise Failure(f"tokenizer: the added token {i} is longer than 1024 bytes; get the file again")
        # A merge of a token that no text becomes never happens.
        joined = [merge for merge in self.merges if not any(self.vocab.get(t) in unmatched for t in merge)]
        merges = np.empty((len(joined), 3), np.uint32)
        for rank, (left, right) in enumerate(joined):
            what = f"tokenizer: merge {rank} ({left!r}, {right!r})"
            try:
                merges[rank] = a, b, ab = self.vocab[left], self.vocab[right], self.vocab[left + right]
            except KeyError as error:
                raise Failure(f"{what}: {error} is no token; get the file again") from None
            if not spelling[a] or not spelling[b] or spelling[ab] != spelling[a] + spelling[b]:
                raise Failure(f"{what}: does not join the bytes of two tokens; get the file again")
            if added.keys() & {a, b, ab}:
                raise Failure(f"{what}: holds an added token; get the file again")
        if len(set(self.merges)) != len(self.merges):
            raise Failure("tokenizer: a merge appears twice; get the file again")
        offsets = np.cumsum([0, *map(len, spelling)])
        if offsets[-1] >= 1 << 32:
            raise Failure("tokenizer: more than 4 GiB of tokens; get the file again")
        return {
            "tokenizer.offsets": offsets.astype(np.uint32),
            "tokenizer.merges": merges,
            "tokenizer.bytes": np.frombuffer(b"".join(spelling), np.uint8),
        }

    def unmatched(self):
        """The ids of tokens that are not written in byte letters. BPE never makes them, and Hugging Face decodes them
        to their text."""
        letters = byte_letters().keys()
        return sorted(i for token, i in self.vocab.items() if not letters >= set(token))

    def leave_out_beyond(self, vocab_size):
        """Leaves out added tokens that no row of the embedding has. Returns their spellings."""
        beyond = [(added, i) for added in (self.plain, self.special) for i in added if i >= vocab_size]
        return [added.pop(i) for added, i in beyond]

    def metadata(self):
        added, unmatched = [[i, text] for i, text in sorted(self.plain.items())], self.unmatched()
        return {
            "split": self.split,
            "ignore_merges": self.ignore_merges,
            "special": [[i, text] for i, text in sorted(self.special.items())],
            **({"added": added} if added else {}),
            **({"unmatched": unmatched} if unmatched else {}),
        }


def overlap(a, b):
    """Whether the two texts can share characters in a longer one."""
    short = min(len(a), len(b))
    return a in b or b in a or any(a[-n:] == b[:n] or b[-n:] == a[:n] for n in range(1, short))


def added_tokens(tokens):
    """(special, plain): id -> text of the added tokens, which are matched in text before BPE. Special is a token if it
    is so wherever it is listed."""
    added, ids, special, normalized = {}, {}, set(), 0
    for token in tokens:
        text, i = token["content"], token["id"]
        if not isinstance(text, str) or not text or not is_naturals([i]):
            raise Failure(f"tokenizer: added token {token!r} has no content or no id; get the files again")
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise unsupported(f"{flag} on the added token {text!r}", "tokenizer")
        if added.get(i, text) != text or ids.get(text, i) != i:
            raise Failure(f"tokenizer: added token {text!r} clashes with another one at id {i}; get the files again")
        if token.get("special"):
            special.add(i)
        if token.get("normalized"):
            # Hugging Face matches these after the others.
            normalized += 1
            if normalized > 1000:  # each is compared with all others
                raise unsupported("normalized on more than 1000 added tokens", "tokenizer")
            if any(overlap(text, t) for j, t in added.items() if j != i):
                raise unsupported(f"normalized on the added token {text!r}, which overlaps another,", "tokenizer")
        added[i], ids[text] = text, i
    return {i: t for i, t in added.items() if i in special}, {i: t for i, t in added.items() if i not in special}


def read_settings(folder, own):
    """(tokenizer_config.json with the older files that transformers reads beside it, the added tokens, those of
    tokenizer.json, `own`, first, and the names of the files read). special_tokens_map.json and added_tokens.json count
    only where tokenizer_config.json has no added_tokens_decoder."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    settings, older, added = (read_json(folder / name, required=False) for name in names)
    files = [name for name in names if (folder / name).is_file()]
    if "added_tokens_decoder" in settings:
        files = [name for name in files if name == "tokenizer_config.json"]
        more = settings["added_tokens_decoder"] or {}
        return settings, [*own, *({**t, "id": int(i)} for i, t in more.items())], files
    settings = {**settings, **older}
    special = {special_text(settings[key]) for key in SPECIAL_NAMES if settings.get(key)}
    special |= {special_text(t) for t in settings.get("additional_special_tokens") or []}
    known = {token["id"] for token in own}
    tokens = [
        {"content": text, "id": i, "special": text in special, "normalized": text not in special}
        for text, i in added.items()
        if i not in known
    ]
    return settings, [*own, *tokens], files


SPECIAL_NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def special_text(token):
    """A special token's text. It is written as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def read_tokenizer(folder):
    """(the Tokenizer in tokenizer.json and the files beside it, the names of the files read). A feature that would
    change ids is refused by name."""
    path = folder / "tokenizer.json"
    data = read_json(path)
    settings, added, files = read_settings(folder, data.get("added_tokens") or [])
    model = data["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise unsupported(f"a tokenizer of type {component_name(model)}", path)
    for feature in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(feature):
            raise unsupported(f"the BPE option {feature}", path)
    for normalizer in sequence(data.get("normalizer"), "normalizers"):
        raise unsupported(f"the normalizer {component_name(normalizer)}", path)
    for decoder in sequence(data.get("decoder"), "decoders"):
        if decoder.get("type") != "ByteLevel":
            raise unsupported(f"the decoder {component_name(decoder)}", path)
    for processor in sequence(data.get("post_processor"), "processors"):
        kind = component_name(processor)
        # The engine puts BoS in front by itself, and adds nothing else to a text.
        pieces = [next(iter(p)) for p in processor["single"]] if kind == "'TemplateProcessing'" else None
        if kind != "'ByteLevel'" and pieces not in (["SpecialToken", "Sequence"], ["Sequence"]):
            raise unsupported(f"the post-processor {kind} (only one BoS in front is possible)", path)
    vocab = model["vocab"]
    if not is_naturals(list(vocab.values())) or len(set(vocab.values())) != len(vocab):
        raise Failure(f"{path}: vocab: an id is no number or two tokens share it; get the file again")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    for rank, merge in enumerate(merges):
        if len(merge) != 2:
            raise Failure(f"{path}: merge {rank} is not a pair of tokens; get the file again")
    special, plain = added_tokens(added)
    at = {i: token for token, i in vocab.items()}
    for i, text in {**special, **plain}.items():
        if vocab.get(text, i) != i or at.get(i, text) != text:
            raise Failure(f"{path}: added token {text!r} and token {i} of the vocabulary clash; get the file again")
    if model.get("unk_token") is not None and not set(byte_letters()) <= set(vocab):
        raise unsupported("an unk_token for bytes that have no token", path)
    names = {name: special_text(settings.get(name)) for name in SPECIAL_NAMES}
    template, template_file = read_template(folder, settings)
    tokenizer = Tokenizer(
        vocab,
        merges,
        special,
        plain,
        split_patterns(data.get("pre_tokenizer")),
        bool(model.get("ignore_merges")),
        template,
        {name: text for name, text in names.items() if text is not None},
    )
    used = ["tokenizer.json", *files]
    return tokenizer, used if template is None or template_file in used else [*used, template_file]
