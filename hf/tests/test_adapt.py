"""study/adapt.py: what it trains through is the model that the engine runs, and a run cut off goes on as if it had not
been."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TOLERANCE, difference, engine_logits, random_tokens

sys.path[:0] = [str(ROOT / "study")]
import adapt  # noqa: E402
import export_weights  # noqa: E402
from adapt_forward import KINDS, Forward, Lora, Masks, SwiftKV, head, joined, over_rows, stacked  # noqa: E402
from adapt_trees import NONE, Batch, Stream, Trees, make_tree  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from speed_llama import SpeedLlamaForCausalLM, read_tokenizer  # noqa: E402

HEADER = [5, 6, 7]
END = 9


def branches(seed, trunk, questions):
    """[(prompt, answer)] with a trunk of `trunk` tokens."""
    start = random_tokens(seed, trunk)
    return [(start + random_tokens(seed + 10 + i, 1 + q)[1:] + HEADER, random_tokens(seed + 20 + i, 1 + a)[1:])
            for i, (q, a) in enumerate(questions)]  # fmt: skip


TEXTS = [branches(100, 14, ((4, 3), (7, 6), (1, 1))), branches(200, 30, ((3, 8),)), branches(300, 3, ((2, 2), (5, 1)))]


def trees():
    made = [make_tree(each, HEADER, END, 99) for each in TEXTS]
    flat = {name: np.concatenate([np.asarray(getattr(t, name)) for t in made])
            for name in ("token", "position", "segment", "column", "target", "branch")}  # fmt: skip
    ends = [np.cumsum([0] + [len(getattr(t, name)) for t in made]) for name in ("token", "column")]
    return Trees({**flat, "start": ends[0], "row_start": ends[1], "is_chat": np.zeros(len(made), bool),
                  "template": np.arange(len(made))})  # fmt: skip


def adapted(model, seed=0):
    """Lora on the model with all its weights random, exact in bf16."""
    learner = Lora(stacked(model, torch.float32, "cpu"), 4, 8, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in learner.parameters.items():
        with torch.no_grad():
            p.copy_((torch.randn(p.shape, generator=generator) * 0.1 if name.endswith("b") else p).bfloat16())
    return learner


def tree_logits(net, w, k, chosen=(0, 1, 2)):
    """The logits of answer rows, of all branches of the chosen trees in turn, as one batch."""
    batch = trees().batch(np.array(chosen))
    with torch.no_grad():
        return F.linear(net.answers(w, batch, Masks(batch, torch.float32), net.speed(k))[1], head(w))


def alone(get, k):
    """The same, branch by branch. get(tokens, split, k): the logits from position `split` on."""
    rows = []
    for tree in TEXTS:
        for prompt, answer in tree:
            got = get(prompt + answer, len(prompt) - len(HEADER), k)
            rows.append(np.asarray(got)[len(HEADER) - 1 :])
    return np.concatenate(rows)


@pytest.mark.parametrize("name", ["wide", "tied", "scaled", "single"])
def test_forward_is_speed_llamas_and_the_engines(random_model, name, tmp_path):
    """Trees as one padded batch against each branch alone, for every K."""
    made = random_model(name)
    net = Forward(made.model, torch.device("cpu"), torch.float32)
    w = joined(stacked(made.model, torch.float32, "cpu"))

    def speed_llama(tokens, split, k):
        return made.logits(tokens, split, policy="speed", k=k)

    def engine(tokens, split, k):
        return engine_logits(made.file, tokens, split, tmp_path, policy="speed", k=k)

    for k in range(1, net.layers + 1):
        ours = tree_logits(net, w, k)
        assert difference(ours, alone(speed_llama, k)) <= TOLERANCE, k
        assert difference(ours, alone(engine, k)) <= TOLERANCE, k
    assert difference(tree_logits(net, w, 1), tree_logits(net, w, 2)) > 50 * TOLERANCE


@pytest.mark.parametrize("name", ["swiftkv1", "swiftkv2", "swiftkv4"])
def test_swiftkv(random_model, name, tmp_path):
    """SwiftKV's projections against the engine, as they are and as they are written."""
    made = random_model(name)
    k, group, layers = made.config["swiftkv"]["num_key_value_layers"], None, made.model.model.layers
    group = made.config["swiftkv"]["key_value_group_size"]
    net, base = Forward(made.model, torch.device("cpu"), torch.float32), stacked(made.model, torch.float32, "cpu")
    learner = SwiftKV(base, k, group)
    for p, ordinary in (("q", base["q"][k:]), ("k", base["k"][k::group]), ("v", base["v"][k::group])):
        each = 1 if p == "q" else group
        got = torch.stack([getattr(x.self_attn, f"{p}_proj_swiftkv").weight.detach() for x in layers[k::each]])
        assert got.shape == ordinary.shape == learner.parameters[f"swiftkv_{p}"].shape
        learner.parameters[f"swiftkv_{p}"].data.copy_(got)
    learner.parameters["norm_swiftkv"].data.copy_(made.model.model.norm_swiftkv.weight)
    batch = trees().batch(np.arange(3))
    rows = net.answers(learner.weights(), batch, Masks(batch, torch.float32), net.swiftkv(k, group))[1]
    ours = F.linear(rows, head(base)).detach()

    def engine(file):
        return alone(lambda tokens, split, k: engine_logits(file, tokens, split, tmp_path, policy="swiftkv", k=k), k)

    assert difference(ours, engine(made.file)) <= TOLERANCE
    plain = SpeedLlamaForCausalLM.from_pretrained(made.folder, policy="full", dtype=torch.float32)
    adapt.write_swiftkv(tmp_path / "out", learner, plain, k, group, read_tokenizer(made.file))
    export_weights.export(tmp_path / "out", tmp_path / "out.safetensors", False)
    assert difference(ours, engine(tmp_path / "out.safetensors")) <= TOLERANCE
    with torch.no_grad():
        learner.parameters["swiftkv_k"] *= 1.1
        rows = net.answers(learner.weights(), batch, Masks(batch, torch.float32), net.swiftkv(k, group))[1]
    assert difference(F.linear(rows, head(base)), ours) > 50 * TOLERANCE


def test_share(wide, tmp_path):
    net, w = Forward(wide.model, torch.device("cpu"), torch.float32), joined(stacked(wide.model, torch.float32, "cpu"))
    batch = trees().batch(np.arange(3))
    for kept in ([0], [0, 2, 4], [0, 1, 2], [0, 5], [0, 3], list(range(6))):
        with torch.no_grad():
            rows = net.answers(w, batch, Masks(batch, torch.float32), net.share(kept))[1]

        def engine(tokens, split, _, kept=kept):
            return engine_logits(wide.file, tokens, split, tmp_path, policy="share", keep=kept)

        assert difference(F.linear(rows, head(w)), alone(engine, None)) <= TOLERANCE, kept


def test_planted_faults_are_seen(wide):
    """A mask or a position that is off by one moves the logits."""
    net = Forward(wide.model, torch.device("cpu"), torch.float32)
    w = joined(stacked(wide.model, torch.float32, "cpu"))
    batch = trees().batch(np.arange(3))
    right = tree_logits(net, w, 3)

    def logits(batch, masks):
        return F.linear(net.answers(w, batch, masks, net.speed(3))[1], head(w)).detach()

    for name in ("wide", "narrow", "short"):
        masks = Masks(batch, torch.float32)
        getattr(masks, name).clamp_(min=0)
        assert difference(logits(batch, masks), right) > 50 * TOLERANCE, name
    moved = batch._replace(position=batch.position + (batch.segment > 0))
    assert difference(logits(moved, Masks(batch, torch.float32)), right) > 50 * TOLERANCE


def test_adapter_is_pefts_and_the_engines(wide, tmp_path):
    """The folder that is written, merged here, by PEFT, and by the exporter for the engine."""
    from peft import PeftModel

    learner = adapted(wide.model)
    learner.rank, learner.alpha = 4, 8
    adapt.write_adapter(tmp_path / "adapter", learner, [{"policy": "speed", "k": 3, "bos": True}], "base")
    net, w = Forward(wide.model, torch.device("cpu"), torch.float32), learner.weights()
    fresh = SpeedLlamaForCausalLM.from_pretrained(wide.file, dtype=torch.float32)
    peft = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()

    def through_peft(tokens, split, k):
        fresh.set_policy(policy="speed", num_key_value_layers=k)
        with torch.no_grad():
            return peft(torch.tensor([tokens]), decode_start=[split]).logits[0, split:]

    for k in (1, 3, net.layers):
        assert difference(tree_logits(net, w, k), alone(through_peft, k)) <= TOLERANCE, k
    stock = joined(stacked(wide.model, torch.float32, "cpu"))
    assert difference(tree_logits(net, stock, 3), tree_logits(net, w, 3)) > 50 * TOLERANCE

    file = tmp_path / "merged.safetensors"
    export_weights.export(wide.folder, file, False, adapter=tmp_path / "adapter")
    merged = SpeedLlamaForCausalLM.from_pretrained(file, dtype=torch.float32)
    assert merged.config.speed_adapted == [{"policy": "speed", "k": 3, "bos": True}]
    theirs = joined(stacked(merged, torch.float32, "cpu"))
    for name, x in w.items():  # the exporter rounds to bf16: by at most half of 2^-7 of a number
        assert ((theirs[name] - x).abs() <= 2**-8 * x.abs()).all(), name
    for k in (1, 3, net.layers):
        engine = alone(lambda tokens, split, k: engine_logits(file, tokens, split, tmp_path, policy="speed", k=k), k)
        assert difference(tree_logits(net, theirs, k), engine) <= TOLERANCE, k


def test_bf16_merge_is_the_exporters(wide):
    """In bf16 the merged weights are those of fp32, rounded; a product's sum may differ by a rounding of its own."""
    learner = adapted(wide.model)
    exact = learner.weights()
    learner.base = {name: x.bfloat16() for name, x in learner.base.items()}
    for name, x in learner.weights().items():
        assert x.dtype == torch.bfloat16
        assert ((x.float() - exact[name]).abs() <= 2**-8 * exact[name].abs() + 2**-8 * 0.01).all(), name


@pytest.mark.parametrize("thin", [False, True])
def test_gradients_are_those_through_peft(wide, tmp_path, thin):
    """Cross entropy in pieces, merged weights and leaves between: the same gradient as plain autograd through PEFT."""
    from peft import PeftModel

    learner = adapted(wide.model)
    learner.thin = thin
    adapt.write_adapter(tmp_path / "adapter", learner, [], "base")
    net = Forward(wide.model, torch.device("cpu"), torch.float32)
    batch = trees().batch(np.arange(3))
    w = learner.weights()
    leaves = {name: x.detach().requires_grad_(x.requires_grad) for name, x in w.items()}
    rows = net.answers(leaves, batch, Masks(batch, torch.float32), net.speed(3))[1]
    loss, gradient = over_rows(rows, head(leaves), 5, lambda a, z, logits: F.cross_entropy(
        logits, batch.target[a:z], reduction="sum"))  # fmt: skip
    rows.backward(gradient)
    wanted = [name for name in leaves if leaves[name].grad is not None]
    torch.autograd.backward([w[name] for name in wanted], [leaves[name].grad for name in wanted])

    fresh = SpeedLlamaForCausalLM.from_pretrained(wide.file, dtype=torch.float32)
    fresh.set_policy(policy="speed", num_key_value_layers=3)
    peft = PeftModel.from_pretrained(fresh, tmp_path / "adapter", is_trainable=True)
    total = 0
    for tree in TEXTS:
        for prompt, answer in tree:
            logits = peft(torch.tensor([prompt + answer]), decode_start=[len(prompt) - len(HEADER)]).logits[0]
            total = total + F.cross_entropy(logits[len(prompt) - 1 :], torch.tensor([*answer, END]), reduction="sum")
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    theirs = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    for kind, name in KINDS.items():
        for part, letter in (("a", "A"), ("b", "B")):
            got = learner.parameters[f"{kind}_{part}"].grad
            expected = torch.stack([theirs[f"base_model.model.model.layers.{i}.{name}.lora_{letter}.default.weight"]
                                    for i in range(net.layers)])  # fmt: skip
            # Sums of some hundred products of fp32 in another order: 1e-6; five times that with the layers between.
            assert ((got - expected).norm() / expected.norm()) < 1e-5, (kind, part)


def test_a_step_reads_nothing_off_the_device(wide):
    """On the meta device, which has no numbers to read: so a GPU is never waited for. All losses."""
    device = torch.device("meta")
    learner = adapted(wide.model)
    for part in (learner.base, learner.parameters):
        part.update({name: x.to(device).requires_grad_(x.requires_grad) for name, x in part.items()})
    net = Forward(wide.model, device, torch.float32)
    chosen = SimpleNamespace(
        method="speed", self_weight=0.5, self_teacher="adapted", hidden_weight=0.1, temperature=1.0, chunk=8
    )
    loss = adapt.Losses(net, net.speed(net.layers), joined(learner.base), chosen)
    batch = trees().batch(np.arange(3))
    batch = Batch(*(x.to(device) for x in batch[:-1]), batch.tokens)
    w = learner.weights()
    leaves = {name: x.detach().requires_grad_(x.requires_grad) for name, x in w.items()}
    for k in (1, 3, net.layers):
        for is_chat in (False, True):
            loss.add(leaves, batch, str(k), net.speed(k), is_chat, 1.0)
    assert {name for name, x in leaves.items() if x.grad is not None} == {"qkv", "gate_up", "o", "down"}
    assert set(loss.sums) == {f"{name} {k}" for name in ("look-ups", "chats") for k in (1, 3, 6)} | {
        f"{name} {k}" for name in ("self", "hidden") for k in (1, 3)
    }
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.take()


def test_trees():
    """A tree holds each branch's tokens, and its rows say what comes next."""
    for text in TEXTS:
        tree = make_tree(text, HEADER, END, 99)
        for number, (prompt, answer) in enumerate(text):
            seen = [i for i, s in enumerate(tree.segment) if s in (0, number + 1)]
            assert [tree.token[i] for i in seen] == prompt + answer
            assert [tree.position[i] for i in seen] == list(range(len(seen)))
            rows = [r for r, b in enumerate(tree.branch) if b == number]
            assert [tree.target[r] for r in rows if tree.target[r] != NONE] == [*answer, END]
            assert [tree.token[tree.column[r]] for r in rows] == HEADER + answer
        assert tree.column[0] == 0 and tree.target[0] == NONE
    assert len(make_tree(TEXTS[0], HEADER, END, 14 + 10).token) == 14 + 10  # one branch fits
    assert make_tree(TEXTS[0], HEADER, END, 14 + 9) is None
    with pytest.raises(ValueError, match="header"):
        make_tree(TEXTS[0], [1, 2], END, 99)


def test_streams_give_every_tree_once_an_epoch():
    made = trees()
    stream = Stream(made, np.arange(3), 64, 1)
    again = Stream(made, np.arange(3), 64, 1)
    first = [stream[i].token for i in range(6)]
    assert all(torch.equal(again[i].token, first[i]) for i in (5, 0, 3))  # batch i depends on i alone
    for i in range(2):
        epoch = stream.plan(i)
        assert sorted(np.concatenate(epoch).tolist()) == [0, 1, 2]
    assert all(x.numel() <= 64 for x in first)


def run_adapt(model, folder, *more, out="out"):
    command = [sys.executable, str(ROOT / "study" / "adapt.py"), str(model), str(folder / out), "--work",
               str(folder / "work"), "--data", str(folder / "data.jsonl"), "--k", "2-3@0.5", "4@0.5", "--tokens",
               "6000", "--step-tokens", "500", "--log-seconds", "0", "--evaluate-minutes", "0", "--workers", "1",
               "--device", "cpu", *more]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "work" / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["tokens"], line["losses"]) for line in lines if "losses" in line]


def write_data(folder):
    folder.mkdir()
    questions = ("How old is Ann?", "And Bob?")
    with open(folder / "data.jsonl", "w") as file:
        for i in range(40):
            chat = i % 3 == 0
            each = {
                "kind": "chat" if chat else "facts",
                "template": f"t{i}",
                "system": "Be brief." if i % 2 else None,
                "passage": "" if chat else f"Ann is {i}. Bob is {i + 1}.",
                "branches": [{"question": q, "answer": str(i + j)} for j, q in enumerate(questions)][: 2 - chat],
            }
            file.write(json.dumps(each) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--full", "--lr", "1e-4"),
        ("--self-weight", "0.5", "--hidden-weight", "0.1"),
        ("--method", "swiftkv", "--k", "3", "--group", "2"),
        ("--method", "share", "--full"),
    ],
    ids=" ".join,
)
def test_resumed_run_equals_an_unbroken_one(wide, tmp_path, more):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        write_data(folder)
    done = run_adapt(wide.file, whole, *more)
    assert done.returncode == 0, done.stderr
    done = run_adapt(wide.file, cut, *more, "--stop-at", "4")
    assert done.returncode == 0, done.stderr
    assert losses(cut)[-1][0] == 4
    done = run_adapt(wide.file, cut, *more)
    assert done.returncode == 0, done.stderr
    assert len(losses(whole)) > 9 and losses(whole) == losses(cut)
    files = {path.name for path in (whole / "out").iterdir()}
    assert files == {path.name for path in (cut / "out").iterdir()} and "log.jsonl" in files
    for name in files - {"log.jsonl", "command.txt"}:
        assert (whole / "out" / name).read_bytes() == (cut / "out" / name).read_bytes(), name
    if "--full" in more or "swiftkv" in more:
        export_weights.export(whole / "out", tmp_path / "out.safetensors", False)
    done = run_adapt(wide.file, cut, *more, "--lr", "1e-5")
    assert done.returncode == 1 and "another lr" in done.stderr
    other = tmp_path / "other"
    write_data(other)
    assert run_adapt(wide.file, other, *more, "--seed", "1", "--stop-at", "2").returncode == 0
    assert losses(other) != losses(whole)[:2]


def test_bad_input_is_refused_in_a_line(wide, tmp_path):
    folder = tmp_path / "one"
    write_data(folder)
    for more, message in ((("--k", "7"), "expected layers from 1 to 6"), (("--k", "a-b"), "no set of layers"),
                          (("--data", "none.jsonl"), "no such file")):  # fmt: skip
        done = run_adapt(wide.file, folder, *more)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
