"""Which layers matter to the rows of a prompt, and which to those of the answer? POP's layer importance, measured.

    tests/hf/run.sh ~/.cache/speed study/importance.py [--check]      # in the virtual environment of the tests
    -> docs/importance/results.json, results.md, results.svg

A gate g_l = 1 multiplies what layer l adds to the residual stream, h_{l+1} = h_l + g_l (layer_l(h_l) - h_l), as in POP
(arXiv 2602.03295, section 2.1); prompt rows and decode-phase rows have gates of their own. Let L be the negative log
probability of an answer of T tokens. The importance of a gate is

    I_l = E[(dL/dg_l)^2] / T        nats per answer token

over prompts, over answers the model itself samples at full depth and temperature 1, and over labels drawn anew at each
token of the answer from the model's own distribution there. So it is the Fisher information of the gate: moved by e, it
moves the distribution by I_l e^2 / 2 nats of KL divergence a token, to second order. POP at K is all prefill gates of
layers >= K moved from 1 to 0 at once; what the second order says of that stands beside the KL divergence it really has.

A gate needs no parameter: dL/dg_l = sum over its rows of <dL/dh_{l+1}, h_{l+1} - h_l>. `--check` compares that with
finite differences of real gates in float64, the draws with the Fisher information by enumeration and closed gates with
POP as the tests know it, and plants faults that must be caught; under half a minute.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "hf"))
try:
    import numpy as np
    import torch
    import transformers

    import plots
    import quality
    import reference
except ImportError as error:
    raise SystemExit(f"importance.py: {error}; run it as  tests/hf/run.sh ~/.cache/speed study/importance.py")

ROWS = ("anchor", "prompt", "header", "answer")  # disjoint sets of rows; a gate has some of them
GATES = {
    "prefill": ("anchor", "prompt"),
    "prefill, no anchor": ("prompt",),
    "decode": ("header", "answer"),
    "prefill, POP's split": ("anchor", "prompt", "header"),
    "decode, POP's split": ("answer",),
}
TABLE = ("prefill", "prefill, no anchor", "decode")  # the other two serve POP's closed gates and the JSON


# ---- gradients of gates ----------------------------------------------------------------------------------------------


def row_sets(n_rows, split, n_prompt):
    """float [4, n_rows] of 0 and 1, in the order of ROWS. Rows from split on, the assistant header's first, are
    decode-phase; those of the answer begin with the row that predicts its first token, n_prompt - 1. To POP the other
    rows of the header are prompt."""
    row = torch.arange(n_rows)
    return torch.stack(
        [row == 0, (row > 0) & (row < split), (row >= split) & (row < n_prompt - 1), row >= n_prompt - 1]
    ).float()


class Pass:
    """One forward pass. logits: [n_targets, vocab], after each of the last n_targets rows; residual: h_0 .. h_L.

    tokens: ids, or the residual stream [1, n_rows, hidden] that enters layer `first`, where the pass then begins.
    gates: None, or [L - first, n_rows], what multiplies each layer's update of each row."""

    def __init__(self, model, tokens, n_targets, gates=None, first=0):
        self.residual = []
        decoder, layers = model.model, model.model.layers
        x = tokens if first else decoder.embed_tokens(torch.tensor([tokens])).detach().requires_grad_(gates is None)
        with reference.hooks() as handles:
            for module in (*layers[first:], decoder.norm):
                handles.append(module.register_forward_pre_hook(lambda _, args: self.residual.append(args[0])))
            for layer, g in zip(layers[first:], [] if gates is None else gates):
                handles.append(
                    layer.register_forward_hook(lambda _, args, out, g=g[:, None]: args[0] + g * (out - args[0]))
                )
            try:
                decoder.layers = layers[first:]
                self.logits = model(inputs_embeds=x, use_cache=False, logits_to_keep=n_targets).logits[0]
            finally:
                decoder.layers = layers

    def loss(self, labels):
        """Negative log probability of the labels [n_targets], summed over them."""
        return torch.nn.functional.cross_entropy(self.logits, labels, reduction="sum")

    def gate_gradients(self, labels, sets):
        """float64 [L, 4]: dL/dg of every layer, summed over each set of rows."""
        h = self.residual
        gradients = torch.autograd.grad(self.loss(labels), h[1:], retain_graph=True)
        rows = torch.stack([(d[0] * (after - before)[0]).sum(-1) for d, before, after in zip(gradients, h, h[1:])])
        return rows.detach().double() @ sets.double().T


def draw_labels(logits, generator):
    """[n_targets]: one label a target, from the distribution the logits give."""
    return torch.multinomial(torch.softmax(logits.detach().double(), -1), 1, generator=generator)[:, 0]


def by_gate(x):
    """{gate: [..., L]} of gradients [..., L, 4]."""
    return {gate: x[..., [ROWS.index(r) for r in rows]].sum(-1) for gate, rows in GATES.items()}


def cuts(n_layers):
    """The K of POP at which its KL divergence is measured."""
    return list(range(n_layers - 2, 4, -4))


def pop(model, run, k, n_prompt):
    """[n_targets, vocab]: the logits of a pass if its prompt rows had closed gates in layers >= K. To POP the last
    prompt row is the first of full depth."""
    gates = torch.ones(len(run.residual) - 1 - k, run.residual[k].shape[1], dtype=run.logits.dtype)
    gates[:, : n_prompt - 1] = 0
    with torch.no_grad():
        return Pass(model, run.residual[k].detach(), len(run.logits), gates, first=k).logits


def kl_divergence(logits, other):
    """Mean over rows, in nats."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (logits, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def load(path):
    if not Path(path).exists():
        raise SystemExit(f"importance.py: {path}: no such file; run ./run.sh first, it fetches the model")
    loaded = reference.load(path)
    for parameter in loaded[0].parameters():
        parameter.requires_grad_(False)
    return loaded


# ---- measuring -------------------------------------------------------------------------------------------------------


def machine():
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def answer(a, prompt, seed):
    """(ids of the prompt, split, ids of an answer): sampled by ./speed at full depth, temperature 1. The answer ends
    with its stop token, unless it was cut off after a.n tokens."""
    with tempfile.NamedTemporaryFile(suffix=".json") as record:
        done = subprocess.run(
            [
                a.speed,
                "generate",
                "-m",
                a.model,
                "--chat",
                "--policy",
                "full",
                "--temp",
                "1",
                "-n",
                str(a.n),
                "-s",
                str(seed),
                "-t",
                str(a.threads),
                "--record",
                record.name,
                "-",
            ],
            input=prompt.encode(),
            capture_output=True,
        )
        if done.returncode:
            raise SystemExit(f"importance.py: {done.stderr.decode().strip()}")
        got = json.load(open(record.name))
    return got["prompt_ids"], got["result"]["split"], got["new_ids"]


def measure(a, model, prompt, number):
    """One prompt: its lengths, a.draws gradients [L, 4], and POP's KL divergence at each of `cuts`."""
    began = time.time()
    prompt_ids, split, answer_ids = answer(a, prompt, a.seed + number)
    tokens, n_prompt, n_layers = prompt_ids + answer_ids[:-1], len(prompt_ids), len(model.model.layers)
    generator = torch.Generator().manual_seed(a.seed + number)
    run = Pass(model, tokens, len(answer_ids))
    sets = row_sets(len(tokens), split, n_prompt)
    draws = [run.gate_gradients(draw_labels(run.logits, generator), sets) for _ in range(a.draws)]
    kl = [kl_divergence(run.logits.detach(), pop(model, run, k, n_prompt)) for k in cuts(n_layers)]
    return dict(
        n_prompt=n_prompt,
        split=split,
        n_answer=len(answer_ids),
        kl=kl,
        seconds=time.time() - began,
        gradients=[d.tolist() for d in draws],
    )


def measure_all(a, prompts, store):
    """A measurement of each prompt, or with a.so_far of those that have one. Each is kept in the file `store` at once,
    and a run cut off, or after a change of some prompts, goes on from there."""
    kept = {}
    for line in store.read_text().splitlines() if store.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last one, if it was cut off
            x = json.loads(line)
            if x["number"] < len(prompts) and x["prompt"] == digest(prompts[x["number"]]):
                kept[x["number"]] = x
    missing = [] if a.so_far else [number for number in range(len(prompts)) if number not in kept]
    if missing:
        model = load(a.model)[0]
        model.set_attn_implementation("sdpa")  # it keeps no rows x rows matrices for the way back
    store.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with open(store, "w") as out:
        out.writelines(json.dumps(x) + "\n" for x in kept.values())
        for done, number in enumerate(missing, 1):
            prompt = prompts[number]
            kept[number] = dict(number=number, prompt=digest(prompt), **measure(a, model, prompt, number))
            out.write(json.dumps(kept[number]) + "\n")
            out.flush()
            if sys.stderr.isatty():
                left = (time.time() - began) / done * (len(missing) - done) / 60
                print(
                    f"\r{done} of {len(missing)} prompts, {left:.1f} minutes left ",
                    end="" if done < len(missing) else "\n",
                    file=sys.stderr,
                    flush=True,
                )
    return [kept[number] for number in sorted(kept)]


# ---- what it comes to ------------------------------------------------------------------------------------------------


def summarise(kept, seed, resamples=10000):
    """Tables with 95 % intervals by bootstrap over prompts (percentiles): the importance of every gate in every layer,
    ratios of the last third to the middle one, and POP's KL divergence by K, foretold and measured.

    The last layer stays out of the last third: its prefill gate is 0 because nobody reads those rows, in any model."""
    gradients = np.array([x["gradients"] for x in kept])  # [prompts, draws, L, 4]
    n_answer = np.array([x["n_answer"] for x in kept])[:, None]
    n = gradients.shape[2]
    draws = np.random.default_rng(seed).multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=resamples)

    def estimate(f, *each):
        """f of the means over prompts of arrays [prompts, ...], and its interval."""
        low, high = np.percentile(f(*(draws @ x / len(kept) for x in each)), (2.5, 97.5), axis=0)
        return [
            dict(value=float(v), low=float(a), high=float(b))
            for v, a, b in zip(*map(np.atleast_1d, (f(*(x.mean(0) for x in each)), low, high)))
        ]

    def information(x):
        return (x**2).mean(1) / n_answer

    each = {gate: information(x) for gate, x in by_gate(gradients).items()}
    middle, last = slice(n // 3, n - n // 3), slice(n - n // 3, n - 1)

    def fall(x):
        return x[..., last].mean(-1) / x[..., middle].mean(-1)

    ratios = {gate: estimate(fall, each[gate])[0] for gate in TABLE}
    ratios["prefill over decode"] = estimate(lambda x, y: fall(x) / fall(y), each["prefill"], each["decode"])[0]
    closed = by_gate(gradients)["prefill, POP's split"]
    foretold = np.stack([information(closed[..., k:].sum(-1, keepdims=True))[:, 0] / 2 for k in cuts(n)], -1)
    measured = np.array([x["kl"] for x in kept])
    columns = (
        estimate(lambda x: x, foretold),
        estimate(lambda x: x, measured),
        estimate(lambda x, y: x / y, foretold, measured),
    )
    return dict(
        importance={
            gate: [dict(layer=l, **e) for l, e in enumerate(estimate(lambda x: x, each[gate]))] for gate in GATES
        },
        third=dict(last=[last.start, last.stop - 1], middle=[middle.start, middle.stop - 1], ratios=ratios),
        pop=[dict(k=k, foretold=f, measured=m, ratio=r) for k, f, m, r in zip(cuts(n), *columns)],
    )


def cell(e):
    return f"{e['value']:.3g} ({e['low']:.3g}–{e['high']:.3g})"


def markdown(results):
    run, third = results["run"], results["third"]
    lines = [
        f"Importance in nats per answer token, with 95 % intervals over {run['prompts']} prompts; {run['model']}.",
        "",
        f"| layer | {' | '.join(TABLE)} |",
        "|---|" + "---|" * len(TABLE),
    ]
    for row in zip(*(results["importance"][gate] for gate in TABLE)):
        lines.append(f"| {row[0]['layer']} | {' | '.join(map(cell, row))} |")
    lines += [
        "",
        "Mean importance of layers {} to {} over that of layers {} to {}:".format(*third["last"], *third["middle"]),
        "",
        "| gates | ratio |",
        "|---|---|",
    ]
    lines += [f"| {gate} | {cell(e)} |" for gate, e in third["ratios"].items()]
    lines += [
        "",
        "POP at K closes the prefill gates of layers >= K. KL divergence from full depth in nats per answer "
        "token, as their importance foretells it and as measured:",
        "",
        "| K | foretold | measured | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['k']} | {cell(r['foretold'])} | {cell(r['measured'])} | {cell(r['ratio'])} |" for r in results["pop"]
    ]
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Importance over layers; POP's KL divergence over K."""
    fig, (left, right) = plots.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2))

    def line(ax, x, rows, label, color, marker, dash):
        ax.plot(x, [r["value"] for r in rows], color=color, marker=marker, ls=dash, lw=1.8, ms=4.5, label=label)
        ax.fill_between(x, [r["low"] for r in rows], [r["high"] for r in rows], color=color, alpha=0.25, lw=0)

    for gate, style in (
        ("decode", ("#e0782f", "s", "-")),
        ("prefill", ("#1f8fe0", "o", "-")),
        ("prefill, no anchor", ("#35a853", "^", ":")),
    ):
        rows = [r for r in results["importance"][gate] if r["value"] > 0]
        line(left, [r["layer"] for r in rows], rows, gate, *style)
    left.axvspan(
        results["third"]["last"][0] - 0.5, len(results["importance"]["decode"]) - 0.5, color="#808080", alpha=0.12, lw=0
    )
    left.set(
        yscale="log",
        xlabel="layer (grey: the last third; prefill is 0 in the last)",
        ylabel="importance, nats per answer token",
    )
    x = [r["k"] for r in results["pop"]]
    line(right, x, [r["measured"] for r in results["pop"]], "measured", "#8a63c9", "D", "-")
    line(right, x, [r["foretold"] for r in results["pop"]], "foretold by importance", "#1f8fe0", "o", "--")
    right.set(yscale="log", xlabel="K: layers the prompt visits", ylabel="KL of pop, nats per token")
    right.set_xticks(x)
    for ax in (left, right):
        ax.legend()
    plots.save(fig, path)


# ---- checks ----------------------------------------------------------------------------------------------------------


class Case:
    """A model in float64 and made-up tokens: 3 of an answer at least, a header of 3, the rest prompt."""

    def __init__(self, loaded, n_prompt, n_answer, seed=0):
        self.loaded, self.model = loaded, loaded[0]
        generator = torch.Generator().manual_seed(seed)
        vocab, self.n_layers = self.model.config.vocab_size, len(self.model.model.layers)
        self.tokens = torch.randint(vocab, (n_prompt + n_answer - 1,), generator=generator).tolist()
        self.n_prompt, self.split, self.n_answer = n_prompt, n_prompt - 3, n_answer
        self.labels = torch.randint(vocab, (n_answer,), generator=generator)
        self.rows = dict(
            anchor=slice(0, 1),
            prompt=slice(1, self.split),
            header=slice(self.split, n_prompt - 1),
            answer=slice(n_prompt - 1, None),
        )

    def loss(self, logits):
        return torch.nn.functional.cross_entropy(logits, self.labels, reduction="sum")

    def open(self):
        return torch.ones(self.n_layers, len(self.tokens), dtype=torch.float64)

    def logits(self, gates):
        with torch.no_grad():
            return Pass(self.model, self.tokens, self.n_answer, gates).logits

    def derivative(self, f, layer, rows, step=1e-4):
        """df(logits)/dg of one layer's gate of the rows: central differences at two steps, extrapolated (Richardson),
        so that the error is of order step^4."""

        def at(move):
            gates = self.open()
            gates[layer, self.rows[rows]] += move
            return f(self.logits(gates))

        near, far = ((at(e) - at(-e)) / (2 * e) for e in (step, 2 * step))
        return (4 * near - far) / 3

    def gradients(self):
        run = Pass(self.model, self.tokens, self.n_answer)
        return run.gate_gradients(self.labels, row_sets(len(self.tokens), self.split, self.n_prompt))


def check_gradients(case, layers):
    """A loss of 50 nats in float64, wrong by some hundred roundings (1e-12), over a step of 1e-4: 1e-8. What is left of
    the extrapolation is far less: 1e-16 times a fifth derivative of 1e6, seen at steps of 1e-3 and more."""
    got = case.gradients()
    for l in layers:
        for i, rows in enumerate(ROWS):
            want = case.derivative(case.loss, l, rows)
            if not abs(got[l, i] - want) <= 1e-7 * max(1, abs(want)):
                yield f"layer {l}, {rows}: gradient {got[l, i]:.9g}, finite difference {want:.9g}"


def check_zeros(case):
    """Nobody reads the last layer's output of a row that predicts nothing: those gates alone have gradient 0."""
    got = case.gradients()
    zero = torch.zeros(case.n_layers, len(ROWS), dtype=torch.bool)
    zero[-1, : ROWS.index("answer")] = True
    if not got.isfinite().all() or not torch.equal(got == 0, zero):
        yield f"zero gradients at {(got == 0).nonzero().tolist()}, expected at {zero.nonzero().tolist()}"
    closed = case.open()
    closed[-1, : case.n_prompt - 1] = 0
    if not torch.equal(case.logits(closed), case.logits(case.open())):
        yield "closing the last layer's gates of rows nobody reads changes the logits"


def check_pop(case):
    """Closed gates are POP as tests/hf/reference.py has it, with masks and replaced keys; in float64, to 1e-9."""
    for k in (1, case.n_layers // 2, case.n_layers - 2):
        want = torch.from_numpy(reference.logits(case.loaded, case.tokens, case.n_prompt - 1, "pop", k))
        got = pop(case.model, Pass(case.model, case.tokens, case.n_answer), k, case.n_prompt)
        if not ((got - want).norm(dim=-1) <= 1e-9 * want.norm(dim=-1)).all():
            yield f"POP at K={k}: closed gates differ by {float((got - want).abs().max()):.2g}"


def check_fisher(case, n_draws=20000):
    """The mean of squared scores of drawn labels is the Fisher information, the mean of the scores zero, within five
    standard errors. The scores of all labels come from finite differences of log probabilities."""
    logits = case.logits(case.open())
    p = torch.softmax(logits, -1)
    labels = torch.stack([draw_labels(logits, torch.Generator().manual_seed(i)) for i in range(n_draws)])
    for l, rows in ((0, "prompt"), (case.n_layers // 2, "anchor"), (case.n_layers - 1, "answer")):
        score = case.derivative(lambda x: torch.log_softmax(x, -1), l, rows)  # [T, vocab]
        drawn = score.gather(1, labels.T).sum(0)
        for name, x, want in (("mean score", drawn, 0), ("mean squared score", drawn**2, (p * score**2).sum())):
            if not abs(x.mean() - want) <= 5 * x.std() / n_draws**0.5:
                yield f"layer {l}, {rows}: {name} {x.mean():.4g} of {n_draws} draws, expected {want:.4g}"


def check_single_precision(path, case):
    """What is measured, in fp32 with fused attention, is what is checked, but for roundings: some hundred of 6e-8 each,
    1e-5. 1e-4 is far less than any interval."""
    want = case.gradients()
    model = load(path)[0]
    model.set_attn_implementation("sdpa")
    got = Pass(model, case.tokens, case.n_answer).gate_gradients(
        case.labels, row_sets(len(case.tokens), case.split, case.n_prompt)
    )
    if not ((got - want).norm(dim=0) <= 1e-4 * want.norm(dim=0)).all():
        yield f"fp32 gradients differ from float64 by {((got - want).norm(dim=0) / want.norm(dim=0)).tolist()}"


def planted():
    """(fault, check that must catch it)"""

    def off_by_one(n_rows, split, n_prompt, right=row_sets):
        return right(n_rows, split + 1, n_prompt)

    def whole_output(self, labels, sets, right=Pass.gate_gradients):
        self.residual = [torch.zeros_like(self.residual[0]), *self.residual[1:]]
        return right(self, labels, sets)

    def likeliest(logits, generator):
        return logits.argmax(-1)

    def hotter(logits, generator, right=draw_labels):
        return right(logits / 1.1, generator)

    def one_layer_up(model, run, k, n_prompt, right=pop):
        return right(model, run, k + 1, n_prompt)

    def last_prompt_row_too(model, run, k, n_prompt, right=pop):
        return right(model, run, k, n_prompt + 1)

    def header_read(n_rows, split, n_prompt, right=row_sets):
        return right(n_rows, split, n_prompt + 1)

    here = sys.modules[__name__]
    yield "split off by one", mock.patch.object(here, "row_sets", off_by_one), check_gradients
    yield "embedding counted as an update", mock.patch.object(Pass, "gate_gradients", whole_output), check_gradients
    yield "first answer row counted as header", mock.patch.object(here, "row_sets", header_read), check_zeros
    yield "likeliest labels", mock.patch.object(here, "draw_labels", likeliest), check_fisher
    yield "labels at temperature 1.1", mock.patch.object(here, "draw_labels", hotter), check_fisher
    yield "K off by one", mock.patch.object(here, "pop", one_layer_up), check_pop
    yield "boundary row skipped", mock.patch.object(here, "pop", last_prompt_row_too), check_pop


def check_all(path):
    """Prints what was compared; exits with 1 if anything failed or a planted fault was not seen."""
    failures, began = [], time.time()

    def report(name, found):
        failures.extend(f"{name}: {x}" for x in found)

    with reference.double_precision(load(ROOT / "models" / "small.safetensors")) as loaded:
        case = Case(loaded, n_prompt=12, n_answer=5)
        checks = {
            check_gradients: lambda: check_gradients(case, range(case.n_layers)),
            check_zeros: lambda: check_zeros(case),
            check_pop: lambda: check_pop(case),
            check_fisher: lambda: check_fisher(case),
        }
        for check in checks.values():
            report("small model", check())
        for name, fault, check in planted():
            with fault:
                report("planted fault", [] if list(checks[check]()) else [f"{name}: nobody noticed"])
    with reference.double_precision(load(path)) as loaded:
        case = Case(loaded, n_prompt=14, n_answer=4)
        for found in (check_gradients(case, (1, case.n_layers - 3)), check_zeros(case), check_pop(case)):
            report(Path(path).stem, found)
        report(Path(path).stem, check_single_precision(path, case))
    for line in failures:
        print(f"FAILED {line}")
    print(
        f"importance.py: gates, draws and closed gates checked on two models, {len(list(planted()))} planted faults, "
        f"{len(failures)} failures, {time.time() - began:.0f} s"
    )
    return bool(failures)


# ---- the program -----------------------------------------------------------------------------------------------------


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def digest(x):
    return hashlib.sha256(json.dumps(x).encode()).hexdigest()


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("-m", "--model", default=str(quality.CACHE / "smollm2-135m-instruct.safetensors"))
    p.add_argument("--speed", default=str(ROOT / "speed"), help="the program, which samples the answers")
    p.add_argument("--prompts", default=str(ROOT / "study" / "questions.json"))
    p.add_argument("--longest", type=int, default=400, help="characters of a prompt, at most; longer runs longer")
    p.add_argument("--out", default=str(ROOT / "docs" / "importance"))
    p.add_argument("-n", type=int, default=48, help="tokens of an answer, at most")
    p.add_argument("--draws", type=int, default=4, help="draws of labels a prompt")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--so-far", action="store_true", help="tables and plot of a run that was cut off")
    p.add_argument("--check", action="store_true", help="test this script instead")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.check:
        return check_all(a.model)
    prompts = [q["text"] for q in quality.written_questions(Path(a.prompts)) if len(q["text"]) <= a.longest]
    settings = dict(model_sha256=sha256(a.model), n=a.n, draws=a.draws, seed=a.seed)
    kept = measure_all(a, prompts, quality.CACHE / f"importance-{digest(settings)[:16]}.jsonl")
    run = dict(
        command=sys.argv,
        model=Path(a.model).stem,
        prompts=len(kept),
        prompts_in_all=len(prompts),
        prompts_sha256=digest(prompts),
        **settings,
        prompt_tokens=[x["n_prompt"] for x in kept],
        answer_tokens=[x["n_answer"] for x in kept],
        seconds=round(sum(x["seconds"] for x in kept)),
        threads=a.threads,
        machine=machine(),
        speed=subprocess.run([a.speed, "--version"], capture_output=True, text=True).stdout.strip(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        numpy=np.__version__,
    )
    results = dict(run=run, **summarise(kept, a.seed))
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(markdown(results))
    plot(results, out / "results.svg")


if __name__ == "__main__":
    sys.exit(main())
