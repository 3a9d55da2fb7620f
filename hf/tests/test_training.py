"""Training: losses and gradients against a model of full depth in which masks hide what is skipped here."""

import contextlib

import pytest
import reference
import torch
from conftest import TOLERANCE, difference, policies, random_tokens

from speed_llama import SpeedLlamaForCausalLM

SPLITS = (30, 22, 35)
LENGTH = 40

# In float64 a gradient rounds by some 1e-16 a product; a few hundred of them in a row give 1e-14. Angles come as
# fp32, but the same ones on both sides.
TIGHT = 1e-11


@contextlib.contextmanager
def float64(model):
    """The random model with both implementations in float64; transformers' own norm would go by fp32."""
    with reference.double_precision(model.reference) as exact:
        model.model.double()
        try:
            yield exact
        finally:
            model.model.float()  # exact: the weights came from bf16
            model.model.zero_grad()
            model.reference[0].zero_grad()


def batch():
    """(ids, labels): three sequences with a split each; labels on what follows it."""
    ids = torch.tensor([random_tokens(i, LENGTH) for i in range(3)])
    labels = ids.clone()
    for row, split in enumerate(SPLITS):
        labels[row, : split + 1] = -100
    return ids, labels


def masked_loss(exact, ids, labels, policy="full", k=None, bos=True, keep=None):
    """The loss of the whole batch, sequence by sequence through the masked model."""
    model, swiftkv, config = exact
    total = 0.0
    for sequence, label, split in zip(ids, labels, SPLITS, strict=True):
        with reference.hooks() as handles:
            if policy == "speed":
                reference.mask_prompt(handles, model.model.layers[k:], len(sequence), split, bos)
            elif policy == "pop":
                reference.replace_by_projections_of_residual(handles, model.model.layers, k, split)
            elif policy == "swiftkv" and k < len(model.model.layers):
                reference.replace_by_swiftkv(handles, model.model, swiftkv, config, k)
            elif policy == "share":
                reference.replace_by_kept_layers(handles, model.model.layers, keep)
            logits = model(sequence[None], use_cache=False).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], label[1:], reduction="sum", ignore_index=-100)
    return total / (labels[:, 1:] != -100).sum()


def exact_loss(model, ids, labels):
    """The loss of this package's model in float64, from packed logits: transformers' own loss goes by fp32."""
    out = model(ids, decode_start=SPLITS, packed=True)
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    if out.decode_columns is not None:
        targets = targets.gather(1, out.decode_columns.clamp(min=0)).masked_fill(out.decode_columns < 0, -100)
    return torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cases(random_model, name):
    """Every policy and K of one model; of the SwiftKV models, which run the others too, swiftkv alone."""
    model = random_model(name)
    return [(model, p) for p in policies(model.config) if name == "wide" or p["policy"] == "swiftkv" or name == "tied"]


@pytest.mark.parametrize("name", ["wide", "swiftkv4", "swiftkv2-bare", pytest.param("tied", marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_masked_model(random_model, name):
    ids, labels = batch()
    for model, policy in cases(random_model, name):
        with float64(model) as exact:
            ours = model.under(**policy)
            ours.train()
            loss = exact_loss(ours, ids, labels)
            loss.backward()
            expected = masked_loss(exact, ids, labels, **policy)
            expected.backward()
            assert abs(loss.item() - expected.item()) <= TIGHT * expected.item(), policy
            got = gradients(ours)
            swiftkv = {name: x for name, x in got.items() if "swiftkv" in name}  # constants in the masked model
            for name, gradient in gradients(exact[0]).items():
                mine = got.get(name, torch.zeros_like(gradient))
                error = (mine - gradient).norm() / gradient.norm().clamp(min=1e-8)
                assert error <= 1e3 * TIGHT, (policy, name, float(error))
            assert bool(swiftkv) == (policy["policy"] == "swiftkv" and policy["k"] < len(ours.model.layers))
            ours.eval()


def test_planted_faults_move_gradients(wide):
    ids, labels = batch()
    right = {"policy": "speed", "k": 3}
    with float64(wide) as exact:
        masked_loss(exact, ids, labels, **right).backward()
        expected = gradients(exact[0])
        for wrong in ({"policy": "speed", "k": 4}, {"policy": "speed", "k": 3, "bos": False}, "detached"):
            model = wide.under(**(right if wrong == "detached" else wrong))
            model.zero_grad()
            handle = None
            if wrong == "detached":  # prompt rows that no gradient reaches: the lower layers learn from answers alone
                handle = model.model.layers[2].register_forward_pre_hook(
                    lambda module, args: (args[0], args[1].detach(), *args[2:])
                )
            exact_loss(model, ids, labels).backward()
            if handle:
                handle.remove()
            got = gradients(model)["model.layers.0.mlp.up_proj.weight"]
            name = "model.layers.0.mlp.up_proj.weight"
            assert (got - expected[name]).norm() / expected[name].norm() > 1e-4, wrong


@pytest.mark.parametrize("policy", [{"policy": "speed", "k": 3}, {"policy": "swiftkv", "k": 2}], ids=str)
def test_finite_differences(random_model, policy):
    """A few weights of each kind, moved by hand. Central differences of step h are off by about h^2."""
    model, (ids, labels), h = random_model("swiftkv4"), batch(), 1e-5
    with float64(model):
        ours = model.under(**policy)
        exact_loss(ours, ids, labels).backward()
        chosen = [name for name, p in ours.named_parameters()
                  if p.grad is not None and (".0." in name or ".6." in name or "layers" not in name)]  # fmt: skip
        assert len(chosen) > 12
        for name in chosen:
            p = ours.get_parameter(name)
            at = tuple(int(i) for i in torch.nonzero(p.grad.abs() == p.grad.abs().max())[0])
            losses = []
            with torch.no_grad():
                for step in (h, -2 * h, h):
                    p[at] += step
                    losses.append(exact_loss(ours, ids, labels).item())
            slope = (losses[0] - losses[1]) / (2 * h)
            assert slope == pytest.approx(p.grad[at].item(), rel=1e-5), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(random_model, reentrant):
    ids, labels = batch()
    for model, policy in cases(random_model, "wide") + cases(random_model, "swiftkv4"):
        if policy.get("k") not in (None, 2, 3):
            continue
        with float64(model):
            ours = model.under(**policy)
            ours.train()
            exact_loss(ours, ids, labels).backward()
            plain = {name: x.clone() for name, x in gradients(ours).items()}
            ours.zero_grad()
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                ours.enable_input_require_grads()
            try:
                exact_loss(ours, ids, labels).backward()
            finally:
                ours.gradient_checkpointing_disable()
                ours.eval()
            again = gradients(ours)
            assert plain.keys() == again.keys()
            for name, x in plain.items():
                assert (again[name] - x).norm() <= TIGHT * x.norm(), (policy, name)


def test_k_and_anchor_change_from_batch_to_batch(wide):
    ids, labels = batch()
    seen = {}
    for _ in range(2):
        for policy in ({"policy": "speed", "k": 2}, {"policy": "speed", "k": 5, "bos": False}, {"policy": "full"}):
            model = wide.under(**policy)
            model.train()
            out = model(ids, labels=labels, decode_start=SPLITS)
            assert out.past_key_values is None
            assert seen.setdefault(str(policy), out.loss.item()) == out.loss.item()
            model.eval()
    assert len(set(seen.values())) == 3


def test_loss_where_nothing_predicts_is_refused(wide):
    ids, labels = batch()
    model = wide.under(policy="speed", k=3)
    with pytest.raises(ValueError, match="prompt row has one to predict"):
        model(ids, labels=labels, decode_start=[31, 22, 35])
    with pytest.raises(ValueError, match="prompt row has one to predict"):
        model(ids, labels=ids)
    assert torch.isfinite(model(ids, labels=labels, decode_start=[3, 22, 35]).loss)


def test_packed_logits_give_the_same_loss(wide):
    """What a loss of one's own starts from: the logits of answer rows alone, and the columns they belong to."""
    ids, labels = batch()
    model = wide.under(policy="speed", k=3)
    whole = model(ids, labels=labels, decode_start=SPLITS)
    packed = model(ids, decode_start=SPLITS, packed=True)
    loss = exact_loss(model, ids, labels)
    assert packed.logits.shape[1] == LENGTH - min(SPLITS) + 1 < whole.logits.shape[1]
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)


def tree():
    """One passage of 20 tokens, three questions of 4, 6 and 5 tokens with answers of 3, 5 and 4, in one sequence.

    Returns (trunk, branches as (question, answer), and the arguments of the call on the whole)."""
    trunk = random_tokens(50, 20)
    branches = [(random_tokens(60 + i, q + 1)[1:], random_tokens(70 + i, a + 1)[1:])
                for i, (q, a) in enumerate(((4, 3), (6, 5), (5, 4)))]  # fmt: skip
    ids, places, segments, rows, labels = list(trunk), list(range(20)), [0] * 20, [False] * 20, [-100] * 20
    for i, (question, answer) in enumerate(branches):
        n = len(question) + len(answer)
        ids += question + answer
        places += range(20, 20 + n)
        segments += [i + 1] * n
        rows += [False] * (len(question) - 1) + [True] * (len(answer) + 1)  # a question's last token predicts
        labels += [-100] * len(question) + answer
    sees = torch.eye(4, dtype=torch.bool)
    sees[:, 0] = True
    whole = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([places]), "labels": torch.tensor([labels]),
             "segment_ids": torch.tensor([segments]), "segment_sees": sees[None],
             "decode_rows": torch.tensor([rows])}  # fmt: skip
    return trunk, branches, whole


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_several_answers_on_one_prompt(random_model, implementation):
    """A tree is its branches alone: same logits under every policy; a segment seen that should not be is noticed."""
    trunk, branches, whole = tree()
    for model, policy in cases(random_model, "wide") + cases(random_model, "swiftkv4"):
        ours = model.under(implementation, **policy)
        with torch.no_grad():
            packed = ours(**whole, packed=True)
            at = dict(zip(packed.decode_columns[0].tolist(), packed.logits[0], strict=True)) \
                    if packed.decode_columns is not None else dict(enumerate(packed.logits[0]))  # fmt: skip
            column = len(trunk)
            for question, answer in branches:
                start = len(trunk) + len(question) - 1
                alone = ours(torch.tensor([trunk + question + answer]), decode_start=start).logits[0, start:]
                got = torch.stack([at[column + len(question) - 1 + i] for i in range(len(answer) + 1)])
                assert difference(got, alone) <= TOLERANCE, policy
                column += len(question) + len(answer)
            assert torch.isfinite(packed.loss)
    ours = random_model("wide").under(implementation, policy="speed", k=3)
    sees = whole["segment_sees"].clone()
    sees[0, 3, 1] = True
    with torch.no_grad():
        right, wrong = (
            ours(**{**whole, "segment_sees": x}, packed=True).logits[0] for x in (whole["segment_sees"], sees)
        )
    assert torch.equal(right[:8], wrong[:8]) and difference(wrong[-5:], right[-5:]) > 50 * TOLERANCE


@pytest.mark.slow
def test_trainer(wide, tmp_path):
    """transformers' own loop, with accumulation and checkpointing: the loss of what it learns by heart falls."""
    from transformers import Trainer, TrainingArguments

    ids, labels = batch()
    rows = [{"input_ids": a, "labels": b, "decode_start": s} for a, b, s in zip(ids, labels, SPLITS, strict=True)]
    model = SpeedLlamaForCausalLM.from_pretrained(wide.folder, policy="speed", num_key_value_layers=3)
    arguments = TrainingArguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=12,
                                  learning_rate=3e-3, report_to=[], logging_steps=4, gradient_checkpointing=True,
                                  use_cpu=True, save_strategy="no", remove_unused_columns=False)  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert len(losses) == 3 and losses[-1] < losses[0] / 2
