#!/usr/bin/env python3
"""study/adapt.py MODEL OUT --data FILE... --k SET... --minutes M --work FOLDER: adapts a chat model to a policy.

MODEL is a Hugging Face folder of a Llama, or the exporter's file. OUT becomes a PEFT folder (with --full: a Hugging
Face folder) that export_weights.py takes, with what it was adapted to, the log and the command. Run it with
hf/run.sh python study/adapt.py. --work FOLDER keeps the state: the same command goes on where it was cut off.

SPEED: every part of a step draws its own K. A SET is 20, or 15-30, or 15-22:2,23-30 (the first twice as likely);
several SETs are stages, each with its share of the run: 20-24@0.3 15-20@0.7. --k 30 on 30 layers is the control.
Loss: on look-ups the cross entropy of the right answers; on chats the KL divergence from the stock model's
distribution; on a share of the chats that at full depth, so that full depth stays what it was.

The data are trees (adapt_trees.py). --prepare FILE.npz tokenizes them and ends; --data takes the result too.
"""

import argparse
import json
import math
import os
import random
import shlex
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "hf" / "src")]
from speed_llama import SpeedLlamaConfig, SpeedLlamaForCausalLM  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from adapt_forward import KINDS, NORMS, Forward, Full, Lora, Masks, SwiftKV, head, joined, over_rows, stacked  # noqa: E402
from adapt_trees import Stream, Trees, cut  # noqa: E402
from common import fail, file_digest  # noqa: E402

WARM_UP = 0.03  # share of the run in which the learning rate rises
PROBES = 15, 18, 20, 22, 24  # depths of 30 at which held-out trees are measured, beside full depth


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def parse_stages(texts, layers):
    """[(share of the run, [K], [weight])] of --k."""
    stages = []
    for text in texts:
        try:
            numbers, _, share = text.partition("@")
            ks, weights = [], []
            for part in numbers.split(","):
                spread, _, weight = part.partition(":")
                first, _, last = spread.partition("-")
                found = range(int(first), int(last or first) + 1)
                ks += found
                weights += [float(weight or 1)] * len(found)
            share = float(share or 1)
        except ValueError:
            fail(f"--k {text}: no set of layers; write for example 20, 15-30, 15-22:2,23-30 or 20-24@0.3")
        if not ks or min(ks) < 1 or max(ks) > layers or min(weights) <= 0 or share <= 0:
            fail(f"--k {text}: expected layers from 1 to {layers}, weights and shares above 0")
        stages.append((share, ks, weights))
    whole = sum(share for share, *_ in stages)
    return [(share / whole, *rest) for share, *rest in stages]


def draw_k(stages, done, rng):
    """A K of the stage at `done`, the share of the run that is over."""
    for stage in stages:
        done -= stage[0]
        if done < 0:
            break
    return rng.choices(*stage[1:])[0]


class Method:
    """A policy to adapt to. draw(done, rng) -> (what the log calls it, schedule); probes: [(name, schedule)] to measure
    held-out trees at; adapted: the key speed_adapted."""

    def __init__(self, net, o):
        self.net, layers = net, net.layers
        self.full = str(layers), net.speed(layers)
        if o.method == "speed":
            self.stages = parse_stages(o.k, layers)
            drawn = {k for _, ks, _ in self.stages for k in ks} - {layers}
            self.adapted = [{"policy": "speed", "k": k, "bos": True} for k in sorted(drawn)]
            probes = sorted({round(k * layers / 30) for k in PROBES} - {layers})
            self.probes = [(str(k), net.speed(k)) for k in probes] + [self.full]
        elif o.method == "share":
            self.adapted = [{"policy": "share", "k": None, "bos": True}]
            self.probes = [(f"1/{n}", net.share(list(range(0, layers, n)))) for n in (4, 2)] + [self.full]
        else:
            k = parse_stages(o.k, layers)[0][1]
            if len(k) != 1 or k[0] == layers:
                fail("--method swiftkv trains for one K below the number of layers; give for example --k 15")
            self.k, self.adapted = k[0], []
            self.probes = [(f"swiftkv {self.k}", net.swiftkv(self.k, o.group))]
        self.name = o.method

    def draw(self, done, rng):
        if self.name == "speed":
            k = draw_k(self.stages, done, rng)
            return str(k), self.net.speed(k)
        if self.name == "swiftkv":
            return self.probes[0]
        # R-CLA's random routing (arXiv 2604.22782): how many caches stay is drawn, then which; the first always does.
        layers = self.net.layers
        count = rng.randint(-(-layers // 4), layers)
        kept = [0, *sorted(rng.sample(range(1, layers), count - 1))]
        return f"{25 * -(-4 * count // layers)} %", self.net.share(kept)


def rate(done):
    """The learning rate's factor at `done`."""
    if done < WARM_UP:
        return (done + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1, (done - WARM_UP) / (1 - WARM_UP))))


# ---- losses ----------------------------------------------------------------------------------------------------------


def kl(teacher, logits):
    """Sum over rows of KL(teacher || student), from logits."""
    p = F.log_softmax(teacher, -1)
    return F.kl_div(F.log_softmax(logits, -1), p, reduction="sum", log_target=True)


class Losses:
    """The losses of parts of a step, each with its gradient added to the leaves."""

    def __init__(self, net, full, stock, options):
        self.net, self.full, self.stock, self.o = net, full, stock, options
        self.sums = defaultdict(list)

    def note(self, name, value, rows):
        self.sums[name].append((value, rows))

    def add(self, leaves, batch, name, schedule, is_chat, weight):
        """One batch under a schedule, weighted."""
        o, net, n = self.o, self.net, len(batch.target)
        masks = Masks(batch, net.dtype)
        is_full = schedule == self.full
        distil = o.method == "swiftkv"  # from stock alone, on all rows
        self_weight = 0.0 if is_full else 1.0 if distil else o.self_weight
        teacher, teaches = None, self.stock if is_chat or distil or o.self_teacher == "stock" else leaves
        if is_chat or self_weight:
            with torch.no_grad():
                teacher = net.answers(teaches, batch, masks, self.full)
        before, rows = net.answers(leaves, batch, masks, schedule)
        scale, t = weight / n, o.temperature

        def answers(a, z, logits):
            value = logits.new_zeros(())
            if not is_chat and not distil:
                value = F.cross_entropy(logits, batch.target[a:z], reduction="sum")
                self.note(f"look-ups {name}", value.detach(), z - a)
            if teacher is not None:
                with torch.no_grad():
                    expected = F.linear(teacher[1][a:z], head(teaches)).float()
                distance = kl(expected / t, logits / t) * t**2
                self.note(f"{'chats' if is_chat else 'self'} {name}", distance.detach(), z - a)
                value = value + distance * (1 if is_chat else self_weight)
            return value * scale

        _, gradient = over_rows(rows, head(leaves), o.chunk, answers)
        roots, gradients = [rows], [gradient]
        if teacher is not None and o.hidden_weight and not is_full:
            other = teacher[0].float()
            distance = (((before.float() - other) ** 2).sum(-1) / (other**2).sum(-1)).sum()
            roots.append(distance * (o.hidden_weight * scale))
            gradients.append(None)
            self.note(f"hidden {name}", distance.detach(), n)
        torch.autograd.backward(roots, gradients)

    def take(self):
        """{name: mean over rows} since the last call; reads them off the device at once."""
        names = list(self.sums)
        if not names:
            return {}
        sums = torch.stack([torch.stack([v for v, _ in self.sums[name]]).sum() for name in names]).tolist()
        rows = [sum(n for _, n in self.sums[name]) for name in names]
        self.sums.clear()
        return {name: s / n for name, s, n in zip(names, sums, rows, strict=True)}


@torch.no_grad()
def measure(net, w, stock, trees, chats, lookups, full, probes, chunk):
    """{name: measures} on held-out trees, under each of `probes`, (name, schedule). found: the share in %
    of questions of which every answer token is the most likely one, so that greedy decoding finds it. kl, same: on
    chats, KL from the stock model's full depth, and how many % of the rows have its most likely token."""
    table = {name: {} for name, _ in probes}
    sums = {name: torch.zeros(5, device=net.device, dtype=torch.float64) for name, _ in probes}
    for chosen, is_chat in ((chats, True), (lookups, False)):
        order = chosen[trees.length[chosen].argsort(kind="stable")]
        for part in cut(order, trees.length, 4096 if net.device.type == "cpu" else 32768):
            batch = trees.batch(part).to(net.device)
            masks = Masks(batch, net.dtype)
            teacher = net.answers(stock, batch, masks, full)[1] if is_chat else None
            questions = int(batch.branch.max()) + 1
            for k, schedule in probes:
                rows = net.answers(w, batch, masks, schedule)[1]
                right = torch.ones(questions, device=net.device)
                for a in range(0, len(rows), chunk):
                    logits = F.linear(rows[a : a + chunk], head(w)).float()
                    if is_chat:
                        expected = F.linear(teacher[a : a + chunk], head(stock)).float()
                        same = (logits.argmax(-1) == expected.argmax(-1)).sum()
                        sums[k] += torch.stack([kl(expected, logits), same, same * 0 + len(logits), same * 0, same * 0])
                    else:
                        hit = (logits.argmax(-1) == batch.target[a : a + chunk]).float()
                        right.scatter_reduce_(0, batch.branch[a : a + chunk], hit, "amin")
                if not is_chat:
                    zero = right.sum() * 0
                    sums[k] += torch.stack([zero, zero, zero, right.sum(), zero + questions])
    for k in table:
        distance, same, rows, found, questions = sums[k].tolist()
        if rows:
            table[k].update(kl=round(distance / rows, 4), same=round(100 * same / rows, 2))
        if questions:
            table[k].update(found=round(100 * found / questions, 2))
    return table


# ---- state and output ------------------------------------------------------------------------------------------------


def write_whole(path, write):
    """Writes a file so that a run cut at any moment leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path, value):
    write_whole(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def write_adapter(out, learner, adapted, model):
    """The PEFT folder, LoRA weights in bf16."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for kind, name in KINDS.items():
        for part, letter in (("a", "A"), ("b", "B")):
            stack = learner.parameters[f"{kind}_{part}"].detach().to("cpu", torch.bfloat16)
            for i, x in enumerate(stack):
                tensors[f"base_model.model.model.layers.{i}.{name}.lora_{letter}.weight"] = x.contiguous().clone()
    write_whole(out / "adapter_model.safetensors", lambda p: save_file(tensors, p, metadata={"format": "pt"}))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": Path(model).name,
        "r": learner.rank,
        "lora_alpha": learner.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(name.split(".")[1] for name in KINDS.values()),
    }
    if adapted:
        config["speed_adapted"] = adapted
    write_json(out / "adapter_config.json", config)


def read_adapter(folder, learner):
    """Sets the LoRA weights to those of a folder that write_adapter made, for the same base and rank."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file, torch.no_grad():
        for kind, name in KINDS.items():
            for part, letter in (("a", "A"), ("b", "B")):
                p = learner.parameters[f"{kind}_{part}"]
                names = [f"base_model.model.model.layers.{i}.{name}.lora_{letter}.weight" for i in range(len(p))]
                x = torch.stack([file.get_tensor(each) for each in names])
                if x.shape != p.shape:
                    fail(
                        f"{folder}: {kind} has the shape {list(x.shape)}, expected {list(p.shape)}; give its own --rank"
                    )
                p.copy_(x)


def write_full(out, learner, adapted, model, tokenizer):
    """The Hugging Face folder of all parameters, weights in bf16."""
    p = {name: x.detach().cpu() for name, x in learner.parameters.items()}
    for i, layer in enumerate(model.model.layers):
        for kind, name in {**KINDS, **NORMS}.items():
            layer.get_parameter(name + ".weight").data.copy_(p[kind][i])
    model.model.norm.weight.data.copy_(p["norm"])
    model.model.embed_tokens.weight.data.copy_(p["embed"])
    if "head" in p:
        model.lm_head.weight.data.copy_(p["head"])
    save_model(out, model, adapted, tokenizer)


def save_model(out, model, adapted, tokenizer):
    if adapted:
        model.config.speed_adapted = adapted
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.float()


def write_swiftkv(out, learner, model, k, group, tokenizer):
    """The Hugging Face folder with SwiftKV's projections beside the ordinary ones, weights in bf16."""
    config = SpeedLlamaConfig.from_dict({**model.config.to_dict(), "num_key_value_layers": k, "policy": "swiftkv",
                                         "key_value_group_size": group, "swiftkv_layers": k})  # fmt: skip
    config.has_rope_divisors = model.config.has_rope_divisors
    whole = SpeedLlamaForCausalLM(config)
    whole.load_state_dict(model.state_dict(), strict=False)
    whole.tie_weights()
    p = {name: x.detach().cpu() for name, x in learner.parameters.items()}
    whole.model.norm_swiftkv.weight.data.copy_(p["norm_swiftkv"])
    for i, layer in enumerate(whole.model.layers[k:]):
        layer.self_attn.q_proj_swiftkv.weight.data.copy_(p["swiftkv_q"][i])
        if i % group == 0:
            layer.self_attn.k_proj_swiftkv.weight.data.copy_(p["swiftkv_k"][i // group])
            layer.self_attn.v_proj_swiftkv.weight.data.copy_(p["swiftkv_v"][i // group])
    save_model(out, whole, [], tokenizer)


# ---- the run ---------------------------------------------------------------------------------------------------------


class Ahead:
    """Makes the batches of the steps to come on a thread, in order, and sends them to the device."""

    def __init__(self, make, first, depth=4):
        self.make, self.pool = make, ThreadPoolExecutor(1)
        self.coming = [self.pool.submit(make, first + i) for i in range(depth)]
        self.next = first + depth

    def take(self):
        self.coming.append(self.pool.submit(self.make, self.next))
        self.next += 1
        return self.coming.pop(0).result()

    def close(self):
        self.pool.shutdown(wait=True, cancel_futures=True)


class Run:
    """The state of a run, and its loop."""

    def __init__(self, o):
        self.o = o
        # First of all: it forks, which a process should not do once it has used a GPU.
        data, test = read_trees(o, o.data), read_trees(o, o.test) if o.test else None
        self.trees = Trees.joined([data, test]) if test else data
        self.device = torch.device(o.device)
        if self.device.type == "cpu":
            torch.set_num_threads(o.threads)
        else:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and each batch has its own
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[o.dtype]
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self.model = SpeedLlamaForCausalLM.from_pretrained(o.model, dtype=torch.float32).eval()
        self.net = Forward(self.model, self.device, self.dtype)
        self.method = Method(self.net, o)
        base = stacked(self.model, self.dtype, self.device)
        if o.method == "swiftkv":
            self.learner = SwiftKV(base, self.method.k, o.group)
        else:
            self.learner = (
                Full(base) if o.full else Lora(base, o.rank, o.alpha or o.rank, o.seed, self.device.type == "cpu")
            )
        if o.start:
            read_adapter(Path(o.start), self.learner)
        self.stock = joined(base)
        self.parameters = list(self.learner.parameters.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=o.lr, betas=(0.9, 0.98), weight_decay=0,
                                           fused=self.device.type == "cuda")  # fmt: skip
        self.losses = Losses(self.net, self.method.full[1], self.stock, o)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.folder = Path(o.work)
        chats, lookups, held_chats, held_lookups = self.trees.split(len(test) if test else 0)
        self.held = held_chats[: o.held_out], held_lookups[: o.held_out]
        share = o.chat_share if len(chats) and len(lookups) else float(len(lookups) == 0)
        self.streams = []  # (stream, is chat, weight)
        for chosen, is_chat, part in ((lookups, False, 1 - share), (chats, True, share)):
            if part > 0 and len(chosen):
                size = max(int(o.step_tokens * part / o.parts), 1)
                self.streams.append((Stream(self.trees, chosen, size, o.seed * 2 + is_chat), is_chat,
                                     o.chat_weight if is_chat else 1.0))  # fmt: skip
        self.terminal = sys.stderr.isatty()

    def make(self, step):
        """What step number `step` computes: [(batch, is chat, weight)]."""
        parts = []
        for i in range(self.o.parts):
            for stream, is_chat, weight in self.streams:
                batch = stream[step * self.o.parts + i].to(self.device)
                parts.append((batch, is_chat, weight / self.o.parts))
        return parts

    def done(self):
        """The share of the run that is over."""
        o = self.o
        return self.seconds / (60 * o.minutes) if o.minutes else self.tokens / o.tokens

    def train_step(self, parts):
        o, done = self.o, self.done()
        rng = random.Random(f"{o.seed} {self.step}")
        w = self.learner.weights()
        leaves = {name: x.detach().requires_grad_(x.requires_grad) for name, x in w.items()}
        for batch, is_chat, weight in parts:
            name, schedule = self.method.draw(done, rng)
            if is_chat and o.method != "swiftkv" and rng.random() < o.drift:
                (name, schedule), weight = self.method.full, weight * o.drift_weight
            self.losses.add(leaves, batch, name, schedule, is_chat, weight)
            self.tokens += batch.tokens
        wanted = [name for name, x in leaves.items() if x.grad is not None]
        torch.autograd.backward([w[name] for name in wanted], [leaves[name].grad for name in wanted])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, o.clip, foreach=True)
        self.losses.note("gradient", norm, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = o.lr * rate(done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def save(self):
        if not all(bool(p.isfinite().all()) for p in self.parameters):
            fail(f"step {self.step}: a weight is not finite; lower --lr. {self.folder} holds the last good state")
        state = {
            "parameters": self.learner.parameters,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "asked": asked(self.o),
        }
        write_whole(self.folder / "state.pt", lambda p: torch.save(state, p))

    def resume(self):
        path, log = self.folder / "state.pt", self.folder / "log.jsonl"
        if not path.exists():
            log.write_text("")
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["asked"] != asked(self.o):
            changed = [key for key, value in asked(self.o).items() if state["asked"].get(key) != value]
            fail(f"{path}: was begun with another {', '.join(changed)}; give the same, or another --work folder")
        with torch.no_grad():
            for name, p in self.learner.parameters.items():
                p.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        # What was logged after this state was saved comes again.
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        write_whole(log, lambda p: p.write_text("".join(line + "\n" for line in kept)))

    def log(self, **what):
        line = json.dumps({"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1), **what})
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(line + "\n")

    def show(self, text, end="\n"):
        if self.terminal:
            sys.stderr.write("\r\033[K" + text + end)
            sys.stderr.flush()

    def evaluate(self):
        w = {name: x.detach() for name, x in self.learner.weights().items()}
        table = measure(self.net, w, self.stock, self.trees, *self.held, self.method.full[1],
                        self.method.probes, self.o.chunk)  # fmt: skip
        self.log(held_out=table)
        self.show("  ".join(f"{name}: {row}" for name, row in table.items()))

    def output(self):
        """OUT: the adapter so far, the log, the command."""
        o, out, adapted = self.o, Path(self.o.out), self.method.adapted
        out.mkdir(parents=True, exist_ok=True)
        if o.method == "swiftkv":
            write_swiftkv(out, self.learner, self.model, self.method.k, o.group, read_tokenizer(o.model))
        elif o.full:
            write_full(out, self.learner, adapted, self.model, read_tokenizer(o.model))
        else:
            write_adapter(out, self.learner, adapted, o.model)
        write_whole(out / "log.jsonl", lambda p: p.write_bytes((self.folder / "log.jsonl").read_bytes()))
        write_whole(out / "command.txt", lambda p: p.write_text(shlex.join(["study/adapt.py", *sys.argv[1:]]) + "\n"))

    def loop(self):
        o = self.o
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        if self.step == 0:
            about = {"torch": torch.__version__, "device": name_of(self.device), "dtype": o.dtype, **asked(o)}
            self.log(about=about, trees=len(self.trees), held_out_trees=[len(x) for x in self.held])
            if o.evaluate_minutes:
                self.evaluate()
        ahead = Ahead(self.make, self.step)
        last = saved = measured = logged = time.monotonic()
        logged_tokens, events = self.tokens, []
        while self.done() < 1 and (not o.stop_at or self.step < o.stop_at):
            self.train_step(ahead.take())
            if self.device.type == "cuda":  # the processor may run two steps ahead, so that the clock means something
                events.append(torch.cuda.Event())
                events[-1].record()
                if len(events) > 2:
                    events.pop(0).synchronize()
            now = time.monotonic()
            self.seconds += now - last
            last = now
            if now - logged >= o.log_seconds or self.done() >= 1:
                losses = self.losses.take()
                speed = (self.tokens - logged_tokens) / (time.monotonic() - logged)
                self.log(tokens_per_second=round(speed, 1), done=round(self.done(), 4),
                         losses={name: round(value, 4) for name, value in losses.items()})  # fmt: skip
                if not all(math.isfinite(x) for x in losses.values()):
                    fail(f"step {self.step}: a loss is not finite; lower --lr. {self.folder} holds the last good state")
                short = " ".join(f"{name} {value:.3f}" for name, value in sorted(losses.items())[:6])
                self.show(f"{100 * self.done():.1f} %  step {self.step}  {speed:.0f} tokens/s  {short}", end="")
                logged, logged_tokens = time.monotonic(), self.tokens
            if o.checkpoint_minutes and now - saved >= 60 * o.checkpoint_minutes:
                self.save()
                self.output()
                saved = time.monotonic()
            if o.evaluate_minutes and now - measured >= 60 * o.evaluate_minutes:
                self.evaluate()
                measured = time.monotonic()
        ahead.close()
        self.save()
        if o.evaluate_minutes and self.done() >= 1:
            self.evaluate()
        self.output()


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def asked(o):
    """The options that make a run what it is. Those about time and place may change when it goes on."""
    free = ("out", "work", "stop_at", "checkpoint_minutes", "log_seconds", "evaluate_minutes", "threads", "workers",
            "device", "prepare", "data", "test", "model", "start")  # fmt: skip
    about = {key: value for key, value in vars(o).items() if key not in free}
    start = o.start and file_name(Path(o.start) / "adapter_model.safetensors")
    files = {name: [file_name(path) for path in getattr(o, name)] for name in ("data", "test")}
    return {**about, "model": file_name(o.model), **files, "start": start}


def file_name(path):
    """A name with a digest, so that another file under the same name is noticed."""
    path = Path(path)
    return path.name if path.is_dir() else f"{path.name} {file_digest(path)[:16]}"


def read_tokenizer(model):
    if Path(model).is_file():
        from speed_llama import read_tokenizer as read_exported_tokenizer

        return read_exported_tokenizer(model)
    return AutoTokenizer.from_pretrained(model)


def read_trees(o, paths):
    """The Trees of files: JSON lines, and .npz as --prepare makes them."""
    several = []
    for path in paths:
        if str(path).endswith(".npz"):
            several.append(Trees.load(path))
            continue
        trees, long = Trees.tokenize(path, o.model, read_tokenizer, o.longest, o.workers)
        several.append(trees)
        if long:
            print(f"adapt.py: {path}: {long} trees are longer than {o.longest} tokens and left out", file=sys.stderr)
    return Trees.joined(several)


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="MODEL")
    p.add_argument("out", metavar="OUT", nargs="?", help="the folder to write")
    p.add_argument("--data", nargs="+", required=True, metavar="FILE", help="trees: JSON lines, or .npz")
    p.add_argument("--test", nargs="+", default=[], metavar="FILE", help="trees to measure; else a part of the data")
    p.add_argument("--prepare", metavar="FILE.npz", help="only tokenize the data, into this file")
    p.add_argument("--method", choices=("speed", "swiftkv", "share"), default="speed")
    p.add_argument("--group", type=int, default=1, help="layers that share SwiftKV's keys and values")
    p.add_argument("--k", nargs="+", default=["15-22:2,23-30"], metavar="SET", help="layers of a prompt token")
    p.add_argument("--minutes", type=float, help="length of the run")
    p.add_argument("--tokens", type=float, help="or: length in tokens")
    p.add_argument("--work", metavar="FOLDER", help="where the run's state is kept")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--start", metavar="FOLDER", help="begin with the LoRA weights of an earlier OUT")
    p.add_argument("--full", action="store_true", help="train all parameters instead of LoRA")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--alpha", type=float, help="of LoRA; by default its rank")
    p.add_argument("--lr", type=float, default=1.2e-3)
    p.add_argument("--clip", type=float, default=1.0, help="of the gradient's norm")
    p.add_argument("--step-tokens", type=int, help="tokens a step (32768 on a GPU, 2048 on a CPU)")
    p.add_argument("--parts", type=int, default=2, help="batches of each kind a step, each with its own K")
    p.add_argument("--chat-share", type=float, default=0.4, help="of tokens")
    p.add_argument("--chat-weight", type=float, default=1.0)
    p.add_argument("--drift", type=float, default=0.3, help="share of chats at full depth")
    p.add_argument("--drift-weight", type=float, default=2.0)
    p.add_argument("--self-weight", type=float, default=0.0, help="of KL from full depth on look-ups")
    p.add_argument("--self-teacher", choices=("stock", "adapted"), default="adapted", help="whose full depth that is")
    p.add_argument(
        "--hidden-weight", type=float, default=0.0, help="of the distance from full depth's last hidden states"
    )
    p.add_argument("--temperature", type=float, help="of KL (2 for swiftkv, else 1)")
    p.add_argument("--longest", type=int, default=1024, help="tokens of a tree")
    p.add_argument("--held-out", type=int, default=128, help="trees of each kind for measures, at most")
    p.add_argument("--chunk", type=int, help="rows of logits at a time")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("fp32", "bf16"), help="of the computation (bf16 on a GPU, fp32 on a CPU)")
    p.add_argument("--threads", type=int, default=1, help="of a CPU run")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenize")
    p.add_argument("--checkpoint-minutes", type=float, default=10.0)
    p.add_argument("--evaluate-minutes", type=float, default=10.0, help="between measures of held-out trees; 0: none")
    p.add_argument("--log-seconds", type=float, default=10.0)
    p.add_argument("--stop-at", type=int, help="stop after this step, as if cut off")
    o = p.parse_args()
    gpu = o.device.startswith("cuda")
    o.step_tokens = o.step_tokens or (32768 if gpu else 2048)
    o.temperature = o.temperature or (2.0 if o.method == "swiftkv" else 1.0)
    o.chunk = o.chunk or (4096 if gpu else 256)
    o.dtype = o.dtype or ("bf16" if gpu else "fp32")
    if not o.prepare and (o.out is None or o.work is None or (o.minutes is None) == (o.tokens is None)):
        p.error("give OUT, --work, and either --minutes or --tokens")
    if o.start and o.full:
        p.error("--start takes LoRA weights, --full trains none")
    for path in (o.model, *o.data, *o.test, *([o.start] if o.start else [])):
        if not Path(path).exists():
            fail(f"{path}: no such file")
    return o


def main():
    o = options()
    if o.prepare:
        trees = read_trees(o, o.data)
        trees.save(o.prepare)
        lengths, rows = int(trees.length.sum()), int((trees.arrays["target"] >= 0).sum())
        print(f"{o.prepare}: {len(trees)} trees, {lengths} tokens, {rows} of them answers', "
              f"{int(trees.arrays['is_chat'].sum())} chats")  # fmt: skip
        return
    Run(o).loop()


if __name__ == "__main__":
    main()
