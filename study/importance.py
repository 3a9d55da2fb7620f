"""Which layers matter to prompt tokens, and which to the answer? POP's layer importance, measured.

    tests/hf/run.sh ~/.cache/speed study/importance.py      # in the virtual environment of the tests
    -> docs/importance/results.json, results.md, results.svg

A gate g_l = 1 multiplies what layer l adds to the residual stream, h_{l+1} = h_l + g_l (layer_l(h_l) - h_l), as in POP
(arXiv 2602.03295, section 2.1). Prompt rows and decode-phase rows have separate gates. Let L be the negative log
probability of an answer of T tokens. The importance of a gate is

    I_l = E[(dL/dg_l)^2] / T        nats per answer token

The mean is over prompts, over answers that the model samples at full depth and temperature 1, and over labels that are
drawn again at each token of the answer from the model's own distribution there. So I_l is the Fisher information of the
gate: a gate moved by e moves the distribution by I_l e^2 / 2 nats of KL divergence a token, to second order. POP at K
moves the prefill gates of all layers >= K from 1 to 0. The results show what the second order predicts for that, beside
the KL divergence that POP really has.

A gate needs no parameter: dL/dg_l = sum over its rows of <dL/dh_{l+1}, h_{l+1} - h_l>. tests/hf/test_importance.py
checks this file.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    import torch
    import transformers

    import common
    import quality
    import reference  # tests/hf/reference.py: importing common puts it on the path
except ImportError as error:
    raise SystemExit(f"importance.py: {error}; run it as  tests/hf/run.sh ~/.cache/speed study/importance.py") from None

ROWS = ("anchor", "prompt", "header", "answer")  # disjoint sets of rows; a gate acts on some of them
GATES = {
    "prefill": ("anchor", "prompt"),
    "prefill, no anchor": ("prompt",),
    "decode": ("header", "answer"),
    "prefill, POP's split": ("anchor", "prompt", "header"),
    "decode, POP's split": ("answer",),
}
TABLE = ("prefill", "prefill, no anchor", "decode")  # the gates of the table; the JSON holds all


# ---- gradients of gates ----------------------------------------------------------------------------------------------


def row_sets(n_rows, split, n_prompt):
    """float [4, n_rows] of 0 and 1, in the order of ROWS.

    Rows from split on are decode-phase; the assistant header comes first. The answer's rows begin with the row that
    predicts its first token, n_prompt - 1. Under POP the other rows of the header are prompt."""
    row = torch.arange(n_rows)
    return torch.stack(
        [row == 0, (row > 0) & (row < split), (row >= split) & (row < n_prompt - 1), row >= n_prompt - 1]
    ).float()


class Pass:
    """One forward pass. logits: [n_targets, vocab], after each of the last n_targets rows. residual: h_0 .. h_L.

    tokens: ids, or the residual stream [1, n_rows, hidden] that enters layer `first`; then the pass begins there.
    gates: None, or [L - first, n_rows], the factors of each layer's update of each row."""

    def __init__(self, model, tokens, n_targets, gates=None, first=0):
        self.residual = []
        decoder, layers = model.model, model.model.layers
        x = tokens if first else decoder.embed_tokens(torch.tensor([tokens])).detach().requires_grad_(gates is None)
        with reference.hooks() as handles:
            for module in (*layers[first:], decoder.norm):
                handles.append(module.register_forward_pre_hook(lambda _, args: self.residual.append(args[0])))
            for layer, g in zip(layers[first:], gates, strict=True) if gates is not None else ():
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
        layers = zip(gradients, h[:-1], h[1:], strict=True)
        rows = torch.stack([(d[0] * (after - before)[0]).sum(-1) for d, before, after in layers])
        return rows.detach().double() @ sets.double().T


def draw_labels(logits, generator):
    """[n_targets]: one label for each target, from the distribution that the logits give."""
    return torch.multinomial(torch.softmax(logits.detach().double(), -1), 1, generator=generator)[:, 0]


def by_gate(x):
    """{gate: [..., L]} of gradients [..., L, 4]."""
    return {gate: x[..., [ROWS.index(r) for r in rows]].sum(-1) for gate, rows in GATES.items()}


def cuts(n_layers):
    """The K at which POP's KL divergence is measured."""
    return list(range(n_layers - 2, 4, -4))


def pop(model, run, k, n_prompt):
    """[n_targets, vocab]: the logits of the pass `run` if its prompt rows had closed gates in layers >= K. Under POP
    the last prompt row is the first one of full depth."""
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
        common.fail(f"{path}: no such file; run ./run.sh first, it fetches the model")
    loaded = reference.load(path)
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    return loaded


# ---- measuring -------------------------------------------------------------------------------------------------------


def machine():
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


class Sampled(NamedTuple):
    prompt_ids: list
    split: int
    answer_ids: list  # with the stop token, unless the answer was cut off


def sample(a, prompt, seed):
    """An answer that ./speed samples at full depth and temperature 1, of a.n tokens at most."""
    speed = common.Speed(a.speed, a.model)
    flags = ["--policy", "full", "--temp", "1", "-n", a.n, "-s", seed, "-t", a.threads]
    record = speed.generate(prompt, *flags).record
    return Sampled(record["prompt_ids"], record["result"]["split"], record["new_ids"])


def measure(a, model, prompt, number):
    """One prompt: its lengths, a.draws gradients [L, 4], and POP's KL divergence at each of `cuts`."""
    began = time.time()
    sampled = sample(a, prompt, a.seed + number)
    tokens, n_prompt = sampled.prompt_ids + sampled.answer_ids[:-1], len(sampled.prompt_ids)
    generator = torch.Generator().manual_seed(a.seed + number)
    run = Pass(model, tokens, len(sampled.answer_ids))
    sets = row_sets(len(tokens), sampled.split, n_prompt)
    draws = [run.gate_gradients(draw_labels(run.logits, generator), sets) for _ in range(a.draws)]
    ks = cuts(len(model.model.layers))
    return dict(
        n_prompt=n_prompt,
        split=sampled.split,
        n_answer=len(sampled.answer_ids),
        kl=[kl_divergence(run.logits.detach(), pop(model, run, k, n_prompt)) for k in ks],
        seconds=time.time() - began,
        gradients=[d.tolist() for d in draws],
    )


def read_kept(store, prompts):
    """{number: measurement} from the file `store`, of the prompts that have not changed since."""
    kept = {}
    for line in store.read_text().splitlines() if store.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line may be cut off
            x = json.loads(line)
            if x["number"] < len(prompts) and x["prompt"] == common.digest(prompts[x["number"]]):
                kept[x["number"]] = x
    return kept


def measure_all(a, prompts, store):
    """A measurement of each prompt; with a.so_far, only those that `store` holds.

    Each measurement is written to the file `store` at once. So a run that was cut off continues there, and a changed
    prompt is the only one measured again."""
    kept = read_kept(store, prompts)
    missing = [] if a.so_far else [number for number in range(len(prompts)) if number not in kept]
    if missing:
        model = load(a.model).model
        model.set_attn_implementation("sdpa")  # it stores no [rows, rows] matrices for the backward pass
    store.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with open(store, "w") as out:
        out.writelines(json.dumps(x) + "\n" for x in kept.values())
        for done, number in enumerate(missing, 1):
            prompt = prompts[number]
            kept[number] = dict(number=number, prompt=common.digest(prompt), **measure(a, model, prompt, number))
            out.write(json.dumps(kept[number]) + "\n")
            out.flush()
            if sys.stderr.isatty():
                rest = (time.time() - began) / done * (len(missing) - done) / 60
                end = "" if done < len(missing) else "\n"
                text = f"\r{done} of {len(missing)} prompts, {rest:.1f} minutes left "
                print(text, end=end, file=sys.stderr, flush=True)
    return [kept[number] for number in sorted(kept)]


# ---- summary ---------------------------------------------------------------------------------------------------------


def summarize(kept, seed, resamples=10000):
    """Tables with 95 % intervals, by bootstrap over prompts (percentiles): the importance of every gate in every layer,
    the ratios of the last third to the middle one, and POP's KL divergence by K, predicted and measured.

    The last third leaves out the last layer. Its prefill gate is 0 in any model, because no row reads its output."""
    gradients = np.array([x["gradients"] for x in kept])  # [prompts, draws, L, 4]
    n_answer = np.array([x["n_answer"] for x in kept])[:, None]
    n = gradients.shape[2]
    draws = np.random.default_rng(seed).multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=resamples)

    def estimate(f, *each):
        """f of the means over prompts of arrays [prompts, ...], with its interval."""
        value = f(*(x.mean(0) for x in each))
        low, high = np.percentile(f(*(draws @ x / len(kept) for x in each)), (2.5, 97.5), axis=0)
        estimates = zip(*map(np.atleast_1d, (value, low, high)), strict=True)
        return [dict(value=float(v), low=float(a), high=float(b)) for v, a, b in estimates]

    def same(x):
        return x

    def information(x):
        return (x**2).mean(1) / n_answer

    each = {gate: information(x) for gate, x in by_gate(gradients).items()}
    middle, last = slice(n // 3, n - n // 3), slice(n - n // 3, n - 1)

    def last_over_middle(x):
        return x[..., last].mean(-1) / x[..., middle].mean(-1)

    ratios = {gate: estimate(last_over_middle, each[gate])[0] for gate in TABLE}
    ratios["prefill over decode"] = estimate(
        lambda x, y: last_over_middle(x) / last_over_middle(y), each["prefill"], each["decode"]
    )[0]
    closed = by_gate(gradients)["prefill, POP's split"]
    predicted = np.stack([information(closed[..., k:].sum(-1, keepdims=True))[:, 0] / 2 for k in cuts(n)], -1)
    measured = np.array([x["kl"] for x in kept])
    by_k = zip(
        cuts(n),
        estimate(same, predicted),
        estimate(same, measured),
        estimate(lambda x, y: x / y, predicted, measured),
        strict=True,
    )
    return dict(
        importance={gate: [dict(layer=i, **e) for i, e in enumerate(estimate(same, each[gate]))] for gate in GATES},
        third=dict(last=[last.start, last.stop - 1], middle=[middle.start, middle.stop - 1], ratios=ratios),
        pop=[dict(k=k, predicted=p, measured=m, ratio=r) for k, p, m, r in by_k],
    )


def cell(estimate):
    return common.cell(estimate["value"], estimate["low"], estimate["high"], ".3g")


def markdown(results):
    run, third, importance = results["run"], results["third"], results["importance"]
    layers = range(len(importance["decode"]))
    by_layer = [[layer, *(cell(importance[gate][layer]) for gate in TABLE)] for layer in layers]
    ratios = [[gate, cell(e)] for gate, e in third["ratios"].items()]
    by_k = [[r["k"], cell(r["predicted"]), cell(r["measured"]), cell(r["ratio"])] for r in results["pop"]]
    lines = [
        f"Importance in nats per answer token, with 95 % intervals over {run['prompts']} prompts; {run['model']}.",
        "",
        *common.table(["layer", *TABLE], by_layer),
        "",
        "Mean importance of layers {} to {} over that of layers {} to {}:".format(*third["last"], *third["middle"]),
        "",
        *common.table(["gates", "ratio"], ratios),
        "",
        "POP at K closes the prefill gates of layers >= K. KL divergence from full depth in nats per answer "
        "token, as importance predicts it and as measured:",
        "",
        *common.table(["K", "predicted", "measured", "ratio"], by_k),
    ]
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Importance over layers; POP's KL divergence over K."""
    fig, (left, right) = common.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 2))

    def line(ax, x, rows, label, style):
        looks = dict(color=style.color, marker=style.marker, ls=style.dash, lw=1.8, ms=4.5)
        ax.plot(x, [r["value"] for r in rows], **looks, label=label)
        ax.fill_between(x, [r["low"] for r in rows], [r["high"] for r in rows], color=style.color, alpha=0.25, lw=0)

    for gate, style in {
        "decode": common.Style("#e0782f", "s", "-"),
        "prefill": common.Style("#1f8fe0", "o", "-"),
        "prefill, no anchor": common.Style("#35a853", "^", ":"),
    }.items():
        rows = [r for r in results["importance"][gate] if r["value"] > 0]
        line(left, [r["layer"] for r in rows], rows, gate, style)
    first, last = results["third"]["last"][0] - 0.5, len(results["importance"]["decode"]) - 0.5
    left.axvspan(first, last, color="#808080", alpha=0.12, lw=0)
    left.set(
        yscale="log",
        xlabel="layer (grey: the last third; prefill is 0 in the last)",
        ylabel="importance, nats per answer token",
    )
    x = [r["k"] for r in results["pop"]]
    line(right, x, [r["measured"] for r in results["pop"]], "measured", common.Style("#8a63c9", "D", "-"))
    predicted = [r["predicted"] for r in results["pop"]]
    line(right, x, predicted, "predicted by importance", common.Style("#1f8fe0", "o", "--"))
    right.set(yscale="log", xlabel="K: layers the prompt visits", ylabel="KL of pop, nats per token")
    right.set_xticks(x)
    for ax in (left, right):
        ax.legend()
    common.save(fig, path)


# ---- main ------------------------------------------------------------------------------------------------------------


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("-m", "--model", default=common.SMOLLM2, help="default: SmolLM2 from the cache folder of ./run.sh")
    p.add_argument("--speed", default=common.ROOT / "speed", help="the program, which samples the answers (./speed)")
    p.add_argument("--prompts", type=Path, default=common.ROOT / "study" / "questions.json")
    p.add_argument(
        "--longest", type=int, default=400, help="leave out prompts of more characters, which are slow (400)"
    )
    p.add_argument("--out", type=Path, default=common.ROOT / "docs" / "importance", help="folder for the results")
    p.add_argument("-n", type=int, default=48, help="tokens of an answer, at most (48)")
    p.add_argument("--draws", type=int, default=4, help="how often the labels of an answer are drawn (4)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--so-far", action="store_true", help="measure nothing; tables and plot of a run that was cut off")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    prompts = [q["text"] for q in quality.written_questions(a.prompts) if len(q["text"]) <= a.longest]
    settings = dict(model_sha256=common.file_digest(a.model), n=a.n, draws=a.draws, seed=a.seed)
    kept = measure_all(a, prompts, common.CACHE / f"importance-{common.digest(settings)[:16]}.jsonl")
    run = dict(
        command=sys.argv,
        model=Path(a.model).stem,
        prompts=len(kept),
        prompts_in_all=len(prompts),
        prompts_sha256=common.digest(prompts),
        **settings,
        prompt_tokens=[x["n_prompt"] for x in kept],
        answer_tokens=[x["n_answer"] for x in kept],
        seconds=round(sum(x["seconds"] for x in kept)),
        threads=a.threads,
        machine=machine(),
        speed=common.Speed(a.speed, a.model).version(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        numpy=np.__version__,
    )
    results = dict(run=run, **summarize(kept, a.seed))
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (a.out / "results.md").write_text(markdown(results))
    plot(results, a.out / "results.svg")


if __name__ == "__main__":
    main()
