"""Trains the small model in models/: a Llama that answers questions about a story at any K, BoS on or off.

    python3 study/train_small.py OUT_FOLDER        # writes a Hugging Face folder; then run export_weights.py

In training, SPEED (arXiv 2605.06105) is an attention mask. The prompt runs through every layer. But in layers >= K a
decode-phase token (assistant header and answer) attends only to the anchor and to the decode-phase tokens before it in
its turn. So nothing reads a prompt token in those layers. First K = L; later every row of every batch draws its own K,
and whether BoS is on.

One row of a batch holds a story once, and then many questions about it. A question with its answer is a *branch*. It
attends to the story and to itself, and its positions continue from the end of the story. So the model sees each branch
as a chat of its own.
"""

import argparse
import json
import os
import random
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from stories import (
    BOS,
    END,
    EOT,
    KINDS,
    SPECIAL,
    START,
    TEST_NAMES,
    Encoder,
    Story,
    ask,
    train_tokenizer,
    training_story,
)

V, D, HEADS, KV_HEADS, E, MLP, L = 768, 128, 4, 2, 32, 384, 8
THETA, EPS, MAX_POSITION = 1000.0, 1e-5, 512
ROW, LOSSES, MARKS = 256, 64, 12  # a row holds at most so many tokens, answer tokens, and facts about people
# Lessons are auxiliary losses. They fix the layers in which a question is answered. The layers are low ones, so that
# the prompt need not visit more. The first two lessons are classifiers. After layer SUBJECT, one predicts from a fact
# the person it is about. After layer PERSON, the other predicts from an answer token the person that is asked about.
SUBJECT, PERSON = 1, 2
# The other lessons are about attention. In the layer named here head 0 attends, from an answer token, to the word of
# the story that it needs. The layer depends on the kind of question; `via` is the first of two hops. So the code word
# needs K >= 2, one hop K >= 3, two hops K >= 5.
LOOK = {"code": 1, "one": 2, "via": 2, "two": 4}
K_SHARE = [0.05, 0.1, 0.15, 0.1, 0.15, 0.1, 0.1, 0.25]  # how often K = 1..L is drawn


# ---- rows ------------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """Ids of one chat turn, and what its question is about. Prompt ids from `phase_from` on are decode-phase."""

    prompt: list
    phase_from: int
    answer: list  # with the stop token
    kind: str
    person: int | None
    fact: str | None
    via: str | None


class Row:
    """The arrays of one row. branch: 0 for the story, -1 for padding. phase: 0 for prompt tokens, else the number of
    the decode-phase turn."""

    def __init__(self):
        self.token, self.position, self.branch, self.phase = ([0] * ROW, [0] * ROW, [-1] * ROW, [0] * ROW)
        self.n, self.turns, self.branches = 0, 0, 0
        # One entry for each answer token. at: the token before it. person: two tokens, or -1s.
        self.at, self.target, self.person, self.turn = [], [], [], []
        self.look = {name: [] for name in LOOK}  # the token of the story to attend to, or -1
        # One entry for each fact about a person: its last word, and the two tokens of the person's name.
        self.mark, self.mark_person = [], []
        self.kind = []  # one entry for each turn

    def add(self, ids, branch, phase, position):
        """Appends tokens. Returns the position after them."""
        n = len(ids)
        here = slice(self.n, self.n + n)
        self.token[here], self.position[here] = ids, range(position, position + n)
        self.branch[here], self.phase[here] = [branch] * n, [phase] * n
        self.n += n
        return position + n


def make_row(rng, enc, story, plain=False, weights=(4, 5, 1)):
    """Fills a row with branches about `story`. Each has one or two chat turns; with `plain` it repeats a fact."""
    row = Row()
    names = [enc(" " + n) for n in story.name]
    user = [START, *enc("user"), END, *enc("\n\n")]
    header = [START, *enc("assistant"), END, *enc("\n\n")]
    start = row.add([BOS] if plain else [BOS, *user], 0, 0, 0)
    last_word = {}  # (person, fact) -> its last word in the row; of the code word, its first token
    for i, sentence in enumerate(story.sentences):
        first = row.n
        start = row.add(enc(" " + sentence.text if i else sentence.text), 0, 0, start)
        last_word[sentence.person, sentence.fact] = first + 4 if sentence.fact == "code" else row.n - 2
        if sentence.person is not None:
            row.mark.append(row.n - 2)
            row.mark_person.append(names[sentence.person])

    def add_turn(branch, position, turn):
        """Adds the prompt, the answer and the stop token of one turn. Returns the position after them."""
        row.turns += 1
        position = row.add(turn.prompt[: turn.phase_from], branch, 0, position)
        position = row.add(turn.prompt[turn.phase_from :], branch, row.turns, position)
        ids, person = turn.answer, turn.person
        says_it_is = ids[0] == enc("It")[0]
        for i, t in enumerate(ids):
            # Is this token from the story? The others are "It is", an article, the full stop and the stop token.
            from_story = (i >= 2 if says_it_is else i == len(ids) - 3) and i < len(ids) - 2
            looks = {}
            if from_story:
                code = turn.kind == "code"
                looks[turn.kind] = last_word[None, "code"] + i - 2 if code else last_word[person, turn.fact]
                if turn.via is not None:
                    looks["via"] = last_word[person, turn.via]
            row.at.append(row.n - 1)
            row.target.append(t)
            row.person.append([-1, -1] if person is None else names[person])
            for name in LOOK:
                row.look[name].append(looks.get(name, -1))
            row.turn.append(row.turns - 1)
            position = row.add([t], branch, row.turns, position)
        row.kind.append(turn.kind)
        return position

    while True:
        turns = []
        if plain:
            s = rng.choice(story.statements())
            prompt, word = enc(" " + s.beginning), [*enc(" " + s.word), EOT]
            turns.append(Turn(prompt, len(prompt) - 1, word, "one", s.person, s.fact, None))
        else:
            for t in range(2 if rng.random() < 0.2 else 1):
                q = ask(rng, story, weights)
                prompt = [*user, *enc(q.text), EOT] if t else [*enc(" " + q.text), EOT]
                answer = [*enc(q.answer), EOT]
                turns.append(Turn(prompt + header, len(prompt), answer, q.kind, q.person, q.fact, q.via))
        prompts, answers = sum(len(t.prompt) for t in turns), sum(len(t.answer) for t in turns)
        if row.n + prompts + answers > ROW or len(row.at) + answers > LOSSES:
            return row
        row.branches += 1
        position = start
        for turn in turns:
            position = add_turn(row.branches, position, turn)


def batch_of(rows):
    def pad(lists, width, fill):
        return torch.tensor([x + [fill] * (width - len(x)) for x in lists])

    def get(f):
        return [f(r) for r in rows]

    return dict(
        token=torch.tensor(get(lambda r: r.token)),
        position=torch.tensor(get(lambda r: r.position)),
        branch=torch.tensor(get(lambda r: r.branch)),
        phase=torch.tensor(get(lambda r: r.phase)),
        at=pad(get(lambda r: r.at), LOSSES, 0),
        target=pad(get(lambda r: r.target), LOSSES, -1),
        person=pad(get(lambda r: r.person), LOSSES, [-1, -1]),
        look={name: pad([r.look[name] for r in rows], LOSSES, -1) for name in LOOK},
        mark=pad(get(lambda r: r.mark), MARKS, 0),
        mark_person=pad(get(lambda r: r.mark_person), MARKS, [-1, -1]),
    )


def training_batch(seed, step, enc, size, easy):
    """The batch of one step. It depends on seed and step alone. Its stories are drawn first, so that small_eval.py can
    draw them again. Easy steps ask mostly one-hop questions."""
    rng = random.Random(f"{seed} {step}")
    stories = [training_story(rng, easy) for _ in range(size)]
    plain, weights = (0.3, (6, 2, 2)) if easy else (0.15, (4, 5, 1))
    return batch_of([make_row(rng, enc, s, rng.random() < plain, weights) for s in stories])


# ---- the model -------------------------------------------------------------------------------------------------------


def init(seed):
    """The weights. Those of all layers are stacked, so that the optimizer works on eight matrices at once."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return (torch.randn(*shape, generator=g) * std).requires_grad_()

    kv = KV_HEADS * E
    return {
        "embed": normal(V, D, std=1.0),  # as large as the layers' updates, so that upper layers can still copy it
        "q": normal(L, HEADS * E, D, std=D**-0.5),
        "k": normal(L, kv, D, std=D**-0.5),
        "v": normal(L, kv, D, std=D**-0.5),
        "o": normal(L, D, HEADS * E, std=D**-0.5 / 4),
        "gate": normal(L, MLP, D, std=D**-0.5),
        "up": normal(L, MLP, D, std=D**-0.5),
        "down": normal(L, D, MLP, std=MLP**-0.5 / 4),
        "norm1": torch.ones(L, D, requires_grad=True),
        "norm2": torch.ones(L, D, requires_grad=True),
        "norm": torch.full((D,), 0.2, requires_grad=True),  # keeps the logits small although the embedding is large
        "aux": normal(2, 2 * V, D, std=D**-0.5),
    }


def rms_norm(x, w):
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS) * w


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def masks(b, bos):
    """The attention masks [B, ROW, ROW] of layers < K and of layers >= K. bos [B]: do the latter see the anchor?"""
    earlier = torch.ones(ROW, ROW, dtype=torch.bool).tril()
    branch, phase = b["branch"], b["phase"]
    lower = earlier & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))
    same_turn = earlier & (phase[:, :, None] > 0) & (phase[:, None, :] == phase[:, :, None])
    anchor = bos[:, None, None] & (torch.arange(ROW) == 0)
    return lower, same_turn | anchor | torch.eye(ROW, dtype=torch.bool)


def at(x, index):
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def forward(w, b, k, bos):
    """k, bos: [B]. Returns the logits [B, LOSSES, V] after the tokens `at`, those of the two classifiers [B, n, 2, V],
    and for each attention lesson the negative log of head 0's attention to the word it should attend to."""
    B = b["token"].shape[0]
    lower, upper = (torch.where(m, 0.0, -1e4) for m in masks(b, bos))
    change = upper - lower
    angle = b["position"][..., None] * THETA ** (-torch.arange(0, E, 2) / E)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    x = w["embed"][b["token"]]
    aux, look = [], []
    for layer in range(L):
        h = rms_norm(x, w["norm1"][layer])
        q = rotate((h @ w["q"][layer].T).view(B, ROW, HEADS, E).transpose(1, 2), cos, sin)
        key = rotate((h @ w["k"][layer].T).view(B, ROW, KV_HEADS, E).transpose(1, 2), cos, sin)
        value = (h @ w["v"][layer].T).view(B, ROW, KV_HEADS, E).transpose(1, 2)
        bias = (lower + (layer >= k)[:, None, None] * change)[:, None, None]
        s = q.reshape(B, KV_HEADS, -1, E) @ key.transpose(2, 3) * E**-0.5
        p = s.view(B, KV_HEADS, HEADS // KV_HEADS, ROW, ROW).float().add(bias).softmax(-1)
        a = (p.view(B, KV_HEADS, -1, ROW).to(value.dtype) @ value).view(B, HEADS, ROW, E)
        x = x + a.transpose(1, 2).reshape(B, ROW, -1) @ w["o"][layer].T
        h = rms_norm(x, w["norm2"][layer])
        x = x + (F.silu(h @ w["gate"][layer].T) * (h @ w["up"][layer].T)) @ w["down"][layer].T
        for name, where in b["look"].items():
            if layer == LOOK[name]:
                seen, wanted = at(p.view(B, HEADS, ROW, ROW)[:, 0], b["at"]), (where >= 0) & (layer < k)[:, None]
                there = seen.gather(2, where.clamp(min=0)[..., None])[..., 0]
                look.append((-(there + 1e-6).log() * wanted).sum() / wanted.sum().clamp(min=1))
        if layer in (SUBJECT, PERSON):
            rows = at(x, b["mark"] if layer == SUBJECT else b["at"])
            aux.append((rms_norm(rows, 1.0) @ w["aux"][int(layer == PERSON)].T).view(B, -1, 2, V))
    return rms_norm(at(x, b["at"]), w["norm"]) @ w["embed"].T, aux, torch.stack(look)


def losses(w, b, k, bos):
    """The loss of the answers, the losses of the lessons (subject, person, attention), and which answer tokens are
    right. A lesson counts only where its layer is below K."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, aux, look = forward(w, b, k, bos)

    def ce(x, t, rows=None):
        t = t if rows is None else torch.where(rows[:, None, None], t, -1)
        wanted = (t >= 0).sum().clamp(min=1)
        return F.cross_entropy(x.flatten(0, -2).float(), t.flatten(), ignore_index=-1, reduction="sum") / wanted

    readers = [ce(aux[0], b["mark_person"], SUBJECT < k), ce(aux[1], b["person"], PERSON < k)]
    lessons = torch.cat([torch.stack(readers), look])
    return ce(logits, b["target"]), lessons, logits.argmax(-1) == b["target"]


# ---- optimizer -------------------------------------------------------------------------------------------------------


def orthogonal(g):
    """Newton-Schulz steps of Muon (Jordan et al. 2024) on a stack of matrices: singular values become about 1."""
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Muon:
    """Nesterov momentum 0.95, each update made orthogonal, no weight decay."""

    def __init__(self, params):
        self.params, self.m = params, [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, lr):
        for p, m in zip(self.params, self.m, strict=True):
            m.lerp_(p.grad, 0.05)
            p -= lr * max(1, p.shape[1] / p.shape[2]) ** 0.5 * orthogonal(p.grad.lerp(m, 0.95))


# ---- measure and write -----------------------------------------------------------------------------------------------


def measure(run, enc, w, ks, rows=24, bos=True, people=3):
    """Exact answers in %, by K, for each of KINDS. An answer is exact if every token is the argmax: then greedy
    decoding gives it."""
    rng = random.Random("probe")
    made = [make_row(rng, enc, Story(rng, people, TEST_NAMES)) for _ in range(rows)]
    table = {}
    for k in ks:
        good = {kind: [] for kind in KINDS}
        for i in range(0, rows, 8):
            part = made[i : i + 8]
            with torch.no_grad():
                right = run(w, batch_of(part), torch.full((8,), k), torch.full((8,), bos))[-1]
            for r, row in zip(right, part, strict=True):
                ok = [True] * row.turns
                for j, t in enumerate(row.turn):
                    ok[t] &= bool(r[j])
                for t, kind in enumerate(row.kind):
                    good[kind].append(ok[t])
        table[k] = [round(100 * np.mean(good[kind]), 1) for kind in KINDS]
    return table


# Llama-3's chat template.
TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def write(folder, w, tok):
    """Writes the Hugging Face folder: LlamaForCausalLM, bf16. The two classifiers are not part of it."""
    os.makedirs(folder, exist_ok=True)
    tok.save(f"{folder}/tokenizer.json")
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_act="silu",
        torch_dtype="bfloat16",
        vocab_size=V,
        hidden_size=D,
        intermediate_size=MLP,
        num_hidden_layers=L,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=E,
        rms_norm_eps=EPS,
        rope_theta=THETA,
        rope_scaling=None,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=BOS,
        eos_token_id=EOT,
        speed_adapted=[dict(policy="speed", k=None, bos=True), dict(policy="speed", k=None, bos=False)],
    )
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOT],
        model_max_length=MAX_POSITION,
        chat_template=TEMPLATE,
    )
    generation_config = dict(bos_token_id=BOS, eos_token_id=EOT)
    for name, x in ("config", config), ("tokenizer_config", tokenizer_config), ("generation_config", generation_config):
        with open(f"{folder}/{name}.json", "w") as f:
            json.dump(x, f, indent=2)
    tensors = {"model.embed_tokens.weight": w["embed"], "model.norm.weight": w["norm"]}
    for layer in range(L):
        p = f"model.layers.{layer}."
        tensors[p + "input_layernorm.weight"] = w["norm1"][layer]
        tensors[p + "post_attention_layernorm.weight"] = w["norm2"][layer]
        for n in "qkvo":
            tensors[f"{p}self_attn.{n}_proj.weight"] = w[n][layer]
        for n in ("gate", "up", "down"):
            tensors[f"{p}mlp.{n}_proj.weight"] = w[n][layer]
    save_safetensors(f"{folder}/model.safetensors", tensors)


def save_safetensors(path, tensors):
    header, data, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, t in tensors.items():
        raw = t.detach().bfloat16().contiguous().view(torch.int16).numpy().tobytes()
        header[name] = dict(dtype="BF16", shape=list(t.shape), data_offsets=[at, at + len(raw)])
        data.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + b"".join(data))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("out", metavar="OUT_FOLDER", help="the Hugging Face folder to write")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--base", type=int, default=1500, help="steps at full depth (1500)")
    p.add_argument("--joint", type=int, default=5000, help="steps with K and BoS drawn for each row (5000)")
    p.add_argument("--easy", type=int, default=1000, help="steps with easier questions, at the start (1000)")
    p.add_argument("--batch", type=int, default=8, help="rows of a batch (8)")
    p.add_argument("--lr", type=float, default=0.01, help="learning rate of Muon; AdamW's is a tenth (0.01)")
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    tok = train_tokenizer(V)
    enc = Encoder(tok)
    w = init(a.seed)
    muon = Muon([w[n] for n in ("q", "k", "v", "o", "gate", "up", "down")])
    adam = torch.optim.AdamW(
        [w[n] for n in ("embed", "norm1", "norm2", "norm", "aux")], betas=(0.9, 0.95), weight_decay=0
    )
    run = torch.compile(losses, dynamic=False)
    steps, began, seen, mean = a.base + a.joint, time.time(), 0, None
    for step in range(steps):
        b = training_batch(a.seed, step, enc, a.batch, step < a.easy)
        g = torch.Generator().manual_seed(a.seed * 1000003 + step)
        joint = step >= a.base
        drawn = 1 + torch.multinomial(torch.tensor(K_SHARE), a.batch, replacement=True, generator=g)
        k = drawn if joint else torch.full((a.batch,), L)
        bos = torch.randint(0, 2, (a.batch,), generator=g).bool()
        warm = min(1.0, (step + 1) / 100)
        fall = min(1.0, (steps - step) / (0.6 * steps))
        lesson = 0.3 * (1 - step / steps)
        loss, lessons, _ = run(w, b, k, bos)
        (loss + lesson * lessons.sum()).backward()
        muon.step(a.lr * warm * fall)
        for group in adam.param_groups:
            group["lr"] = a.lr / 10 * warm * fall
        adam.step()
        for t in w.values():
            t.grad = None
        seen += int((b["branch"] >= 0).sum())
        mean = loss.detach() if mean is None else mean.lerp(loss.detach(), 0.02)
        if (step + 1) % 100 == 0:
            spent = time.time() - began
            print(
                f"step {step + 1} loss {mean:.4f} lessons {lessons.detach().numpy().round(2)} "
                f"tokens/s {seen / spent:.0f} minutes {spent / 60:.1f}",
                flush=True,
            )
        if (step + 1) % 500 == 0 or step + 1 == steps:
            print(
                "  one/two/code, held-out names:",
                {
                    k: "/".join(map(str, v))
                    for k, v in measure(run, enc, w, (8, 6, 5, 4, 3, 2, 1) if joint else (8, 4)).items()
                },
                flush=True,
            )
            write(a.out, w, tok)


if __name__ == "__main__":
    main()
