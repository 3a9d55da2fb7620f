"""The harness: at K = L as its own `hf` model, to the bit; below, contexts are prompts."""

import json

import pytest
import torch
from conftest import TOLERANCE, fields
from transformers import AutoTokenizer

pytest.importorskip("lm_eval")

YAML = {
    "likelihood": """task: speed_likelihood
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: acc}}]
""",
    "generation": """task: speed_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 6, do_sample: false, until: []}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks on a local JSON file."""
    folder = tmp_path_factory.mktemp("tasks")
    text, choices = (
        "the sand and the band of another hand on the inner land in an oranger",
        [" the sand", " in", " band on"],
    )
    documents = [{"text": text[3 * i : 20 + 5 * i], "choices": choices, "target": i % 3, "answer": "the"}
                 for i in range(12)]  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.fixture(scope="module")
def evaluate(tasks, tmp_path_factory):
    import os

    os.environ.setdefault("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import speed_llama.evaluation  # noqa: F401  registers the model

    def run(model, arguments):
        out = simple_evaluate(model=model, model_args=arguments, tasks=["speed_likelihood", "speed_generation"],
                              task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
                              batch_size=4, device="cpu", log_samples=True, bootstrap_iters=0)  # fmt: skip
        samples = {name: [[x["resps"], x["filtered_resps"]] for x in each] for name, each in out["samples"].items()}
        return out["results"], samples

    return run


@pytest.mark.slow
def test_all_layers_equal_the_stock_model(wide, evaluate):
    stock = evaluate("hf", f"pretrained={wide.folder},dtype=float32")
    layers = wide.config["num_hidden_layers"]
    for policy in ("policy=full", f"policy=speed,k={layers}", f"policy=pop,k={layers}"):
        assert evaluate("speed", f"pretrained={wide.folder},dtype=float32,{policy}") == stock
    other = evaluate("speed", f"pretrained={wide.folder},dtype=float32,policy=speed,k=2")
    assert other[1]["speed_likelihood"] != stock[1]["speed_likelihood"]
    assert other[1]["speed_generation"] != stock[1]["speed_generation"]


def test_contexts_are_prompts(wide):
    """Scores under a policy are those of one row alone with its context's split; at full depth those of the stock
    loop."""
    from speed_llama.evaluation import SpeedLM

    tokenizer = AutoTokenizer.from_pretrained(wide.folder)
    texts = [("the sand and", " the land"), ("on", " hand"), ("another inner band of the", " hat and sand in")]
    requests = [((c, t), tokenizer(c)["input_ids"], tokenizer(t)["input_ids"]) for c, t in texts]
    model = SpeedLM(str(wide.folder), policy="full", dtype="float32", batch_size=3)
    for (a, x), (b, y) in zip(model.score(requests), model._loglikelihood_tokens(requests), strict=True):
        assert a == pytest.approx(b, rel=TOLERANCE) and x == y
    for policy in ({"policy": "speed", "k": 3}, {"policy": "speed", "k": 3, "bos": False}, {"policy": "pop", "k": 2}):
        model.model.set_policy(**fields(**policy))
        scores = model._loglikelihood_tokens(requests)
        for (_, context, continuation), (score, _) in zip(requests, scores, strict=True):
            start = len(context) - 1
            for split, equal in ((start, True), (start - 1, False)):
                ids = torch.tensor([context + continuation])
                logits = model.model(ids, decode_start=max(split, 0)).logits[0, start:-1].log_softmax(-1)
                alone = float(logits.gather(1, torch.tensor(continuation)[:, None]).sum())
                if equal or start > 2:
                    assert (score == pytest.approx(alone, rel=TOLERANCE)) == equal, (policy, split)
    with pytest.raises(NotImplementedError, match="no prompt"):
        model.loglikelihood_rolling([])


def test_k_must_fit_the_policy(wide, random_model):
    from speed_llama.evaluation import SpeedLM

    for wrong, words in (({"policy": "speed"}, "give num_key_value_layers"), ({"k": 3}, "takes no num_key_value"),
                         ({"policy": "swiftkv"}, "has none")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            SpeedLM(str(wide.folder), dtype="float32", **wrong)
    model = SpeedLM(str(random_model("swiftkv2").file), policy="swiftkv", dtype="float32")
    assert model.model.config.num_key_value_layers == 1
