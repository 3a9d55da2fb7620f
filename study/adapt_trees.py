"""Training data of study/adapt.py: trees as JSON lines, tokenized, packed into arrays, cut into padded batches.

A tree is {"kind", "template", "system": text or null, "passage", "branches": [{"question", "answer"}, ...]}: several
questions on one passage. A branch with "cut": true has only the beginning of an answer. The user's turn of a branch is
passage + "\\n\\n" + question, or the question alone. What the branches' tokens have in common at their beginning, the
trunk, stands in the row once. Tokens are those of each branch's whole text, so a branch is what the engine would read.
"""

import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

CHAT = "chat"  # the kind whose answers the model itself gave; all others have right answers
NONE = -100  # no target
POOL = 2048  # trees that are sorted by length together: similar ones share a batch, yet batches stay mixed
HELD_OUT = 16  # one template in so many is held out
FIELDS = ("token", "position", "segment", "column", "target", "branch")


class Tree(NamedTuple):
    """One row. token, position, segment: [tokens]; segment 0 is the trunk. column, target, branch: [rows that visit all
    layers]: the anchor, then of every branch its header and its answer, with the token that each row predicts."""

    token: list
    position: list
    segment: list
    column: list
    target: list
    branch: list


def make_tree(branches, header, end, longest):
    """The Tree of branches (prompt ids, answer ids, true if the answer is cut), None if not even one fits in `longest`
    tokens. A prompt ends with the assistant's `header` ids; `end`, the stop token, follows an answer that is whole."""
    for prompt, *_ in branches:
        if prompt[-len(header) :] != header:
            raise ValueError("a prompt does not end with the assistant's header")
    trunk = branches[0][0][: min(len(p) for p, *_ in branches) - len(header)]
    for prompt, *_ in branches[1:]:
        differ = (i for i, (a, b) in enumerate(zip(trunk, prompt, strict=False)) if a != b)
        trunk = trunk[: next(differ, len(trunk))]
    tree = Tree(list(trunk), list(range(len(trunk))), [0] * len(trunk), [0], [NONE], [-1])
    for number, (prompt, answer, *cut) in enumerate(branches):
        own = prompt[len(trunk) :] + answer
        at = len(tree.token)
        if at + len(own) > longest:
            break
        tree.token.extend(own)
        tree.position.extend(range(len(trunk), len(trunk) + len(own)))
        tree.segment.extend([number + 1] * len(own))
        first = at + len(prompt) - len(trunk) - len(header)
        tree.column.extend(range(first, at + len(own)))
        tree.target.extend([NONE] * (len(header) - 1) + answer + [NONE if any(cut) else end])
        tree.branch.extend([number] * (len(header) + len(answer)))
    return tree if len(tree.column) > 1 else None


def tokenize_line(line, tokenizer, longest):
    """(Tree or None, whether it is a chat, a number for its template) of one JSON line."""
    each = json.loads(line)
    system = [] if each.get("system") is None else [{"role": "system", "content": each["system"]}]
    passage = each.get("passage") or ""

    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def write(question, header):
        user = passage + "\n\n" + question if passage else question
        chat = [*system, {"role": "user", "content": user}]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=header)

    with_header = write("?", True)
    header = ids(with_header[len(write("?", False)) :])
    branches = [(ids(write(b["question"], True)), ids(b["answer"]), b.get("cut", False)) for b in each["branches"]]
    template = int(hashlib.sha256(str(each.get("template")).encode()).hexdigest()[:8], 16)
    return make_tree(branches, header, tokenizer.eos_token_id, longest), each["kind"] == CHAT, template


_worker = {}


def _start_worker(read_tokenizer, model, longest):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker["do"] = (read_tokenizer(model), longest)


def _tokenize_part(part):
    return [tokenize_line(line, *_worker["do"]) for line in part]


class Trees:
    """All trees in flat arrays. start, row_start [n + 1]: where a tree's tokens and its rows begin. is_chat, template
    [n]."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.length, self.rows = np.diff(arrays["start"]), np.diff(arrays["row_start"])

    def __len__(self):
        return len(self.length)

    @classmethod
    def tokenize(cls, path, model, read_tokenizer, longest, workers):
        """Reads a file of JSON lines, on `workers` processes. (trees, how many were too long)."""
        lines = [line for line in Path(path).read_text().split("\n") if line.strip()]
        parts = [lines[i : i + 256] for i in range(0, len(lines), 256)]
        if workers <= 1:
            _start_worker(read_tokenizer, model, longest)
            done = [each for part in parts for each in _tokenize_part(part)]
        else:
            with ProcessPoolExecutor(workers, initializer=_start_worker,
                                     initargs=(read_tokenizer, model, longest)) as pool:  # fmt: skip
                done = [each for part in pool.map(_tokenize_part, parts) for each in part]
        kept = [each for each in done if each[0] is not None]
        if not kept:
            raise ValueError(f"{path}: no tree fits in {longest} tokens")
        kinds = dict(zip(FIELDS, (np.int32, np.int16, np.int16, np.int16, np.int32, np.int16), strict=True))
        flat = {name: np.concatenate([np.asarray(getattr(t, name), kind) for t, *_ in kept])
                for name, kind in kinds.items()}  # fmt: skip
        ends = [np.cumsum([0] + [len(getattr(t, name)) for t, *_ in kept]) for name in ("token", "column")]
        about = {"is_chat": np.array([c for _, c, _ in kept]), "template": np.array([t for *_, t in kept], np.int64)}
        return cls({**flat, "start": ends[0], "row_start": ends[1], **about}), len(done) - len(kept)

    def save(self, path):
        with open(path, "wb") as file:
            np.savez_compressed(file, **self.arrays)

    @classmethod
    def load(cls, path):
        with np.load(path) as file:
            return cls({name: file[name] for name in file.files})

    @classmethod
    def joined(cls, several):
        """All trees of several Trees, in order."""
        arrays = {name: np.concatenate([t.arrays[name] for t in several]) for name in (*FIELDS, "is_chat", "template")}
        for name, each in (("start", "length"), ("row_start", "rows")):
            arrays[name] = np.cumsum(np.concatenate([[0], *(getattr(t, each) for t in several)]))
        return cls(arrays)

    def split(self, test=0):
        """(chats, look-ups, held-out chats, held-out look-ups), each an array of tree numbers. The last `test` trees
        are held out; without them whole templates, and one chat in sixteen."""
        chat, template = self.arrays["is_chat"], self.arrays["template"]
        out = np.arange(len(self)) >= len(self) - test
        if not test:
            out = np.arange(len(self)) % HELD_OUT == HELD_OUT - 1
            names = np.unique(template[~chat])
            if len(names) >= 2 * HELD_OUT:
                out = np.where(chat, out, np.isin(template, names[HELD_OUT - 1 :: HELD_OUT]))
        return [np.flatnonzero(which & where) for where in (~out, out) for which in (chat, ~chat)]

    def batch(self, chosen):
        """The Batch of the chosen trees, on the CPU."""
        lengths, rows = self.length[chosen], self.rows[chosen]
        # The attention kernels of a GPU want a multiple of eight.
        shape = len(chosen), -(-int(lengths.max()) // 8) * 8
        narrow = len(chosen), -(-int(rows.max()) // 8) * 8

        def padded(name, shape, counts, start, fill):
            out = np.full(shape, fill, np.int64)
            inside = np.arange(shape[1]) < counts[:, None]
            flat, start = self.arrays[name], self.arrays[start]
            out[inside] = np.concatenate([flat[start[i] : start[i + 1]] for i in chosen])
            return out

        token = padded("token", shape, lengths, "start", 0)
        position = padded("position", shape, lengths, "start", 0)
        segment = padded("segment", shape, lengths, "start", -1)
        column = padded("column", narrow, rows, "row_start", -1)
        target = padded("target", narrow, rows, "row_start", NONE)
        branch = padded("branch", narrow, rows, "row_start", -1)
        answer = np.flatnonzero(target.ravel() != NONE)
        branch = (branch + np.arange(len(chosen))[:, None] * 1024).ravel()[answer]
        arrays = (
            token,
            position,
            segment,
            column,
            answer,
            target.ravel()[answer],
            np.unique(branch, return_inverse=True)[1],
        )
        return Batch(*map(torch.from_numpy, arrays), int(lengths.sum()))


class Batch(NamedTuple):
    """B trees, T columns, R rows of a tree that visit all layers, N rows that predict an answer's token.

    token, position [B, T]; segment [B, T], -1 for padding. column [B, R], -1 for padding; column 0 comes first.
    answer [N]: of the B R rows flattened, those that predict target [N]. branch [N]: counted over the batch.
    tokens: without padding."""

    token: torch.Tensor
    position: torch.Tensor
    segment: torch.Tensor
    column: torch.Tensor
    answer: torch.Tensor
    target: torch.Tensor
    branch: torch.Tensor
    tokens: int

    def to(self, device):
        if device.type == "cpu":
            return self
        return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in self[:-1]), self.tokens)


class Stream:
    """Endless batches of some trees, each of at most `size` tokens, padding included. Batch i depends on the seed and
    on i alone."""

    def __init__(self, trees, chosen, size, seed):
        self.trees, self.chosen, self.size, self.seed = trees, chosen, size, seed
        self.plans, self.ends = [], []

    def plan(self, epoch):
        """The batches of one epoch, as arrays of tree numbers."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.chosen)
        batches = []
        for first in range(0, len(order), POOL):
            pool = order[first : first + POOL]
            batches += cut(pool[np.argsort(self.trees.length[pool], kind="stable")], self.trees.length, self.size)
        return [batches[i] for i in rng.permutation(len(batches))]

    def __getitem__(self, i):
        while not self.ends or self.ends[-1] <= i:
            self.plans.append(self.plan(len(self.plans)))
            self.ends.append((self.ends[-1] if self.ends else 0) + len(self.plans[-1]))
            if len(self.plans) > 1:
                self.plans[-2] = None if self.ends[-2] <= i else self.plans[-2]
        epoch = int(np.searchsorted(self.ends, i, side="right"))
        if self.plans[epoch] is None:
            self.plans[epoch] = self.plan(epoch)
        return self.trees.batch(self.plans[epoch][i - (self.ends[epoch - 1] if epoch else 0)])


def cut(order, length, size):
    """Cuts tree numbers, ascending in length, into batches of at most `size` tokens with padding, or of one tree."""
    batches, first = [], 0
    for i in range(1, len(order) + 1):
        if i == len(order) or (i + 1 - first) * (-(-int(length[order[i]]) // 8) * 8) > size:
            batches.append(order[first:i])
            first = i
    return batches
