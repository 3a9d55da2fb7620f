"""Compares the data of `./speed trace -o json` with Hugging Face's attention weights and hidden states, live.

The data is read by a decoder of its own, from docs/trace.md. Hugging Face runs under the same policy by masks and
replaced keys (reference.py). A weight is stored as the byte nearest to 255 times its square root. The two programs'
logits differ by at most 2e-5 of a row's norm, so a byte may only differ where the exact value is close to the middle of
two: by less than SLACK of a byte. Faults planted in the reference must make the comparison fail.
Takes about two minutes on two cores.
"""

import base64
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

import reference
from places import ROOT
from test_logits import SMOLLM2, results, run

SLACK = 0.02  # of a byte
STRONGEST = 16
STORY = "Finsu lives in the valley. Datha is a pilot. Finsu has a camera. What does the one in the valley have?"
QUESTION = "The dog of the choir is a spaniel called Biscuit. What is the name of the dog?"


class Rows:
    """A run. looks(l, r): {position: (byte, head)}. shares(l, r): 3 bytes. lens(l, r): [(word, byte)], byte."""

    def __init__(self, document, run):
        self.run, self.n = run, len(document["tokens"])
        self.layers = document["model"]["shape"]["n_layers"]
        self.bytes = {key: base64.b64decode(run[key]) for key in ("attention", "shares", "lens", "same")}
        self.start, at, share = {}, 0, 0
        for layer in range(run["from"], self.layers):
            for row in range(self.first(layer), self.n):
                self.start[layer, row] = at, share
                slots = len(self.positions(layer, row))
                at += 2 * slots if run["dense"] else 4 * min(STRONGEST, slots)
                share += 3
        assert at == len(self.bytes["attention"]) and share == len(self.bytes["shares"])

    def first(self, layer):
        return 0 if self.run["from"] == 0 and layer < self.run["prompt_layers"] else self.run["split"]

    def positions(self, layer, row):
        if self.run["policy"] != "speed" or layer < self.run["k"]:
            return range(row + 1)
        return [0] * bool(self.run["bos"]) + list(range(self.run["split"], row + 1))

    def looks(self, layer, row):
        at, data, where = self.start[layer, row][0], self.bytes["attention"], self.positions(layer, row)
        if self.run["dense"]:
            return {p: (data[at + 2 * i], data[at + 2 * i + 1]) for i, p in enumerate(where)}
        entries = [data[at + 4 * i : at + 4 * i + 4] for i in range(min(STRONGEST, len(where)))]
        return {where[e[0] + 256 * e[1]]: (e[2], e[3]) for e in entries}

    def shares(self, layer, row):
        at = self.start[layer, row][1]
        return self.bytes["shares"][at : at + 3]

    def lens(self, layer, row):
        at = 10 * ((layer - self.run["from"]) * (self.n - self.run["split"]) + row - self.run["split"])
        b = self.bytes["lens"][at : at + 10]
        return [(b[3 * i] + 256 * b[3 * i + 1], b[3 * i + 2]) for i in range(3)], b[9]


def hugging_face(loaded, ids, split, **policy):
    """Attention weights [L][heads, N, N], and the state after each layer [L][N, d], under a policy."""
    attentions, states = [], []

    def keep_weights(module, args, out):
        attentions.append(out[1][0].double())

    def keep_state(module, args, out):
        states.append((out[0] if isinstance(out, tuple) else out).reshape(len(ids), -1))

    with reference.hooks() as handles:
        for layer in loaded.model.model.layers:
            handles.append(layer.self_attn.register_forward_hook(keep_weights))
            handles.append(layer.register_forward_hook(keep_state))
        reference.logits(loaded, ids, split, **policy)
    return attentions, states


def differences(document, run, loaded, **policy):
    """How many bytes of a run differ from Hugging Face's by more than rounding, how many heads, how many words; and how
    many were compared."""
    rows, ids, split = Rows(document, run), document["ids"], run["split"]
    attentions, states = hugging_face(loaded, ids, split, **policy)
    following = [*ids[1:], document["last"]]
    wrong, compared = 0, 0

    def byte(x):
        nonlocal compared
        compared += 1
        return 255 * x

    def off(stored, exact):
        return not abs(stored - exact) <= 0.5 + SLACK

    for layer in range(run["from"], rows.layers):
        w = attentions[layer].numpy()
        for row in range(rows.first(layer), rows.n):
            looks, where = rows.looks(layer, row), list(rows.positions(layer, row))
            most = w[:, row, :].max(axis=0)
            for position, (stored, head) in looks.items():
                wrong += off(stored, byte(np.sqrt(most[position])))
                wrong += not w[head, row, position] >= most[position] - 1e-4
            least = min(stored for stored, _ in looks.values())
            wrong += any(np.sqrt(most[p]) * 255 > least + 1 for p in where if p not in looks)
            mean = w[:, row, :].mean(axis=0)
            exact = mean[0] if split > 0 else 0, mean[1:split].sum(), mean[split : row + 1].sum()
            wrong += sum(off(stored, byte(x)) for stored, x in zip(rows.shares(layer, row), exact, strict=True))
        with torch.no_grad():
            p = torch.softmax(loaded.model.lm_head(loaded.model.model.norm(states[layer][split:])).double(), -1).numpy()
        for row in range(split, rows.n):
            words, following_byte = rows.lens(layer, row)
            ranked = np.sort(p[row - split])[::-1][:3]
            for (word, stored), exact in zip(words, ranked, strict=True):
                wrong += off(stored, byte(np.sqrt(exact)))
                wrong += not 0 <= word < len(document["words"])
            wrong += off(following_byte, byte(np.sqrt(p[row - split][following[row]])))
    return wrong, compared


def compare(model, *flags):
    document = json.loads(run("trace", "-m", model, "-o", "json", *flags))
    # The token after the last one: the answer's last, which no run is fed.
    loaded = reference.load(model)
    asked, ids = document["request"], document["ids"]
    whole = reference.greedy(loaded, ids[: asked["tokens"]], document["split"], asked["new_tokens"])[0]
    document["last"] = whole[-1]
    results.check(f"{model.stem}: the answer", ids[asked["tokens"] :] == whole[:-1], whole)
    total = 0
    for one in [document["full"], *document["runs"]]:
        policy = {"policy": one["policy"]}
        if one["policy"] != "full":
            policy["k"] = one["k"]
        if one["bos"] is False:
            policy["bos"] = False
        wrong, compared = differences(document, one, loaded, **policy)
        total += compared
        results.check(f"{model.stem} {policy}", wrong == 0 and compared > 100, f"{wrong} of {compared} differ")
        if one["policy"] == "full":
            for kind in ("rope-sign", "head", "scale"):
                with reference.fault(loaded, kind):
                    noticed = differences(document, one, loaded)[0] > 10
                results.check(f"{model.stem}: fault {kind}", noticed, "not noticed")
        if one["policy"] == "speed" and one["bos"]:
            noticed = differences(document, one, loaded, **policy, bos=False)[0] > 10
            results.check(f"{model.stem}: fault, the anchor unseen", noticed, "not noticed")
    print(f"{model.stem}: {total} numbers compared", flush=True)


def main():
    logging.set_verbosity_error()
    compare(ROOT / "models" / "small.safetensors", "--chat", "-p", STORY, "-n", "6", "--ks", "3,5")
    compare(
        ROOT / "models" / "small.safetensors", "-p", STORY * 4, "--split", "100", "-n", "3", "--ks", "5"
    )  # the 16 strongest slots
    compare(Path(SMOLLM2), "--chat", "-p", QUESTION, "-n", "8", "--ks", "15,24")
    print(f"{results.passed} passed, {results.failed} failed")
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
