"""Checks study/importance.py, on the bundled model and on SmolLM2-135M-Instruct, in half a minute.

Gradients of gates must equal finite differences of real gates in float64. Drawn labels must give the Fisher information
that enumerating all labels gives. Closed gates must be POP as reference.py has it. Planted faults must be caught.
"""

import sys
import time
from unittest import mock

import torch

import reference
from places import ROOT, SMOLLM2

sys.path.insert(0, str(ROOT / "study"))
import importance
from importance import ROWS, Pass, load


class Case:
    """A model in float64 and random tokens: an answer of at least 3, a header of 3, and the rest prompt."""

    def __init__(self, loaded, n_prompt, n_answer, seed=0):
        self.loaded, self.model = loaded, loaded.model
        generator = torch.Generator().manual_seed(seed)
        vocab, self.n_layers = self.model.config.vocab_size, len(self.model.model.layers)
        self.tokens = torch.randint(vocab, (n_prompt + n_answer - 1,), generator=generator).tolist()
        self.n_prompt, self.split, self.n_answer = n_prompt, n_prompt - 3, n_answer
        self.labels = torch.randint(vocab, (n_answer,), generator=generator)
        self.rows = {
            "anchor": slice(0, 1),
            "prompt": slice(1, self.split),
            "header": slice(self.split, n_prompt - 1),
            "answer": slice(n_prompt - 1, None),
        }

    def loss(self, logits):
        return torch.nn.functional.cross_entropy(logits, self.labels, reduction="sum")

    def open_gates(self):
        return torch.ones(self.n_layers, len(self.tokens), dtype=torch.float64)

    def logits(self, gates):
        with torch.no_grad():
            return Pass(self.model, self.tokens, self.n_answer, gates).logits

    def derivative(self, f, layer, rows, step=1e-4):
        """df(logits)/dg of one layer's gate of the rows. Central differences at two steps are extrapolated
        (Richardson), so that the error is of order step^4."""

        def at(move):
            gates = self.open_gates()
            gates[layer, self.rows[rows]] += move
            return f(self.logits(gates))

        near, far = ((at(e) - at(-e)) / (2 * e) for e in (step, 2 * step))
        return (4 * near - far) / 3

    def gradients(self, model=None):
        run = Pass(model or self.model, self.tokens, self.n_answer)
        return run.gate_gradients(self.labels, importance.row_sets(len(self.tokens), self.split, self.n_prompt))


def check_gradients(case, layers):
    """Gradients equal finite differences. The tolerance is 1e-7: a loss of 50 nats in float64 is wrong by some hundred
    roundings (1e-12), which a step of 1e-4 turns into 1e-8. The extrapolation's own error is far smaller: 1e-16 times a
    fifth derivative of 1e6, as seen at steps of 1e-3 and more."""
    got = case.gradients()
    for layer in layers:
        for i, rows in enumerate(ROWS):
            want = case.derivative(case.loss, layer, rows)
            if not abs(got[layer, i] - want) <= 1e-7 * max(1, abs(want)):
                yield f"layer {layer}, {rows}: gradient {got[layer, i]:.9g}, finite difference {want:.9g}"


def check_zeros(case):
    """The last layer's output of a row that predicts nothing is never read. Those gates, and no others, have gradient
    0."""
    got = case.gradients()
    zero = torch.zeros(case.n_layers, len(ROWS), dtype=torch.bool)
    zero[-1, : ROWS.index("answer")] = True
    if not got.isfinite().all() or not torch.equal(got == 0, zero):
        yield f"zero gradients at {(got == 0).nonzero().tolist()}, expected at {zero.nonzero().tolist()}"
    closed = case.open_gates()
    closed[-1, : case.n_prompt - 1] = 0
    if not torch.equal(case.logits(closed), case.logits(case.open_gates())):
        yield "closing the last layer's gates of rows that are never read changes the logits"


def check_pop(case):
    """Closed gates equal POP as reference.py has it, with masks and replaced keys: in float64, to 1e-9."""
    for k in (1, case.n_layers // 2, case.n_layers - 2):
        want = torch.from_numpy(reference.logits(case.loaded, case.tokens, case.n_prompt - 1, "pop", k))
        got = importance.pop(case.model, Pass(case.model, case.tokens, case.n_answer), k, case.n_prompt)
        if not ((got - want).norm(dim=-1) <= 1e-9 * want.norm(dim=-1)).all():
            yield f"POP at K={k}: closed gates differ by {float((got - want).abs().max()):.2g}"


def check_fisher(case, n_draws=20000):
    """Over drawn labels the mean squared score is the Fisher information and the mean score is zero, both within five
    standard errors. The scores of all labels come from finite differences of log probabilities."""
    logits = case.logits(case.open_gates())
    p = torch.softmax(logits, -1)
    labels = torch.stack([importance.draw_labels(logits, torch.Generator().manual_seed(i)) for i in range(n_draws)])
    for layer, rows in ((0, "prompt"), (case.n_layers // 2, "anchor"), (case.n_layers - 1, "answer")):
        score = case.derivative(lambda x: torch.log_softmax(x, -1), layer, rows)  # [T, vocab]
        drawn = score.gather(1, labels.T).sum(0)
        for name, x, want in (("mean score", drawn, 0), ("mean squared score", drawn**2, (p * score**2).sum())):
            if not abs(x.mean() - want) <= 5 * x.std() / n_draws**0.5:
                yield f"layer {layer}, {rows}: {name} {x.mean():.4g} of {n_draws} draws, expected {want:.4g}"


def check_single_precision(path, case):
    """The study measures in fp32 with fused attention, and the checks above use float64. The two differ by rounding
    only: some hundred roundings of 6e-8, together 1e-5. The tolerance of 1e-4 is far smaller than any interval."""
    want = case.gradients()
    model = load(path).model
    model.set_attn_implementation("sdpa")
    got = case.gradients(model)
    if not ((got - want).norm(dim=0) <= 1e-4 * want.norm(dim=0)).all():
        yield f"fp32 gradients differ from float64 by {((got - want).norm(dim=0) / want.norm(dim=0)).tolist()}"


def planted():
    """For each planted fault: its name, the patch that plants it, and the check that must catch it."""

    def split_off_by_one(n_rows, split, n_prompt, right=importance.row_sets):
        return right(n_rows, split + 1, n_prompt)

    def embedding_counted(self, labels, sets, right=Pass.gate_gradients):
        self.residual = [torch.zeros_like(self.residual[0]), *self.residual[1:]]
        return right(self, labels, sets)

    def most_likely(logits, generator):
        return logits.argmax(-1)

    def hotter(logits, generator, right=importance.draw_labels):
        return right(logits / 1.1, generator)

    def one_layer_up(model, run, k, n_prompt, right=importance.pop):
        return right(model, run, k + 1, n_prompt)

    def last_prompt_row_too(model, run, k, n_prompt, right=importance.pop):
        return right(model, run, k, n_prompt + 1)

    def answer_row_as_header(n_rows, split, n_prompt, right=importance.row_sets):
        return right(n_rows, split, n_prompt + 1)

    def patch(name, wrong):
        return mock.patch.object(importance, name, wrong)

    yield "split off by one", patch("row_sets", split_off_by_one), check_gradients
    yield (
        "embedding counted as an update",
        mock.patch.object(Pass, "gate_gradients", embedding_counted),
        check_gradients,
    )
    yield "first answer row counted as header", patch("row_sets", answer_row_as_header), check_zeros
    yield "most likely labels", patch("draw_labels", most_likely), check_fisher
    yield "labels at temperature 1.1", patch("draw_labels", hotter), check_fisher
    yield "K off by one", patch("pop", one_layer_up), check_pop
    yield "boundary row skipped", patch("pop", last_prompt_row_too), check_pop


def main():
    """Prints what was compared. Returns 1 if anything failed or a planted fault was not caught."""
    torch.set_num_threads(1)
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
                report("planted fault", [] if list(checks[check]()) else [f"{name}: not caught"])
    with reference.double_precision(load(SMOLLM2)) as loaded:
        case = Case(loaded, n_prompt=14, n_answer=4)
        for found in (check_gradients(case, (1, case.n_layers - 3)), check_zeros(case), check_pop(case)):
            report(SMOLLM2.stem, found)
        report(SMOLLM2.stem, check_single_precision(SMOLLM2, case))
    for line in failures:
        print(f"FAILED {line}")
    print(
        f"gates, draws and closed gates checked on two models, {len(list(planted()))} planted faults, "
        f"{len(failures)} failures, {time.time() - began:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
