"""The policies, computed the slow way by an unchanged Hugging Face Llama model in fp32.

Every token visits every layer. A policy is made of attention masks and of replaced keys, values and queries. So this
file computes what the engine skips, and then hides it.

The policies are hooks on Hugging Face's own modules. So RoPE, norms, softmax and the rest are Hugging Face's. Positions
are true indices in every layer.
"""

import contextlib
import json
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama


class Loaded(NamedTuple):
    model: LlamaForCausalLM
    swiftkv: dict  # name -> tensor
    config: dict  # as exported


def load(path):
    """The Loaded of an exported file. bf16 weights are widened to fp32; attention is eager."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("tokenizer.")}
    rope = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    if config["rope_scaling"]:
        rope.update(config["rope_scaling"], rope_type="llama3")
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    model = LlamaForCausalLM(
        LlamaConfig(**{key: config[key] for key in keys}, rope_parameters=rope, attn_implementation="eager")
    )
    divisors = tensors.pop("rope.freq_divisors", None)
    return finish(model, {name: x.float() for name, x in tensors.items()}, config, divisors)


def load_folder(folder, config):
    """The Loaded of a Hugging Face folder, read by Hugging Face. config: as exported, for SwiftKV's K and group."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name).float() for name in file.keys()})
    return finish(
        LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"), tensors, config
    )


def finish(model, tensors, config, divisors=None):
    """Puts the tensors into the model. SwiftKV's are kept apart, because Hugging Face's model has no place for them."""
    swiftkv = {name: tensors.pop(name) for name in list(tensors) if "swiftkv" in name}
    missing, unknown = model.load_state_dict(tensors, strict=False)
    assert not unknown, unknown
    if config["tie_word_embeddings"]:
        missing = [name for name in missing if name != "lm_head.weight"]
        model.tie_weights()
    if config["swiftkv"] and not config["swiftkv"]["original_projections"]:
        missing = [name for name in missing if not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
    assert not missing, missing
    if divisors is not None:
        model.model.rotary_emb.inv_freq /= divisors
    return Loaded(model.float().eval(), swiftkv, config)


@contextlib.contextmanager
def hooks():
    """A list for hook handles. All of them are removed at the end."""
    handles = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def logits(loaded, tokens, split, policy="full", k=None, bos=True, keep=None):
    """[N - split, vocab]: the logits after each decode-phase token. float64 if the model is, else float32.

    loaded: from `load`. tokens: N ids. split: tokens [0, split) are the prompt. policy: full; speed (k; bos: do upper
    layers see token 0?); pop (k); swiftkv (k: the model's own, or L); share (keep: the layers that keep a cache)."""
    model, swiftkv, config = loaded
    layers = model.model.layers
    n = len(tokens)
    k = len(layers) if k is None else k
    assert 1 <= split < n and 1 <= k <= len(layers)
    with hooks() as handles, torch.no_grad():
        if policy == "speed":
            mask_prompt(handles, layers[k:], n, split, bos)
        elif policy == "pop":
            replace_by_projections_of_residual(handles, layers, k, split)
        elif policy == "swiftkv" and k < len(layers):
            replace_by_swiftkv(handles, model.model, swiftkv, config, k)
        elif policy == "share":
            replace_by_kept_layers(handles, layers, keep)
        out = model(torch.tensor([tokens]), use_cache=False, logits_to_keep=n - split)
        x = out.logits[0].cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def mask_prompt(handles, upper, n, split, bos):
    """SPEED: in an upper layer a decode-phase token sees the anchor (if bos) and decode-phase tokens up to itself. The
    anchor sees itself. The other prompt tokens are never read there, so their mask does not matter."""
    visible = torch.zeros(n, n, dtype=torch.bool)
    visible[:, split:] = True
    visible[split:, 0] = bos
    visible = visible.tril() | torch.eye(n, dtype=torch.bool)
    mask = torch.zeros(n, n).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]

    def replace(module, args, kwargs):
        return args, {**kwargs, "attention_mask": mask}

    for layer in upper:
        handles.append(layer.self_attn.register_forward_pre_hook(replace, with_kwargs=True))


def capture_residual(handles, layer, store):
    """Puts the residual stream that enters the layer, [1, N, hidden], into store[0]."""

    def capture(module, args):
        store[:] = [args[0]]

    handles.append(layer.register_forward_pre_hook(capture))


def replace_by_projections_of_residual(handles, layers, k, split):
    """POP: in an upper layer the keys and values of prompt tokens are made from h_K, by the layer's own norm and
    projections."""
    if k == len(layers):
        return
    residual = []
    capture_residual(handles, layers[k], residual)
    for layer in layers[k:]:

        def replace(module, args, out, layer=layer):
            replaced = torch.nn.functional.linear(layer.input_layernorm(residual[0]), module.weight)
            return torch.cat([replaced[:, :split], out[:, split:]], dim=1)

        handles.append(layer.self_attn.k_proj.register_forward_hook(replace))
        handles.append(layer.self_attn.v_proj.register_forward_hook(replace))


def replace_by_swiftkv(handles, model, weights, config, k):
    """SwiftKV: in an upper layer all keys and values are made from RMSNorm(h_K; norm_swiftkv), by the projections of
    the group's first layer. Queries are made by the layer's own SwiftKV projection."""
    group = config["swiftkv"]["key_value_group_size"]
    norm = modeling_llama.LlamaRMSNorm(config["hidden_size"], config["rms_norm_eps"])
    norm.weight.data = weights["model.norm_swiftkv.weight"]
    normed = []

    def keep_normed(module, args):
        normed[:] = [norm(args[0])]

    handles.append(model.layers[k].register_forward_pre_hook(keep_normed))
    for i, layer in enumerate(model.layers[k:], start=k):
        for p, source in (("q", i), ("k", i - (i - k) % group), ("v", i - (i - k) % group)):

            def replace(module, args, out, p=p, source=source):
                weight = weights[f"model.layers.{source}.self_attn.{p}_proj_swiftkv.weight"]
                return torch.nn.functional.linear(args[0] if p == "q" else normed[0], weight)

            handles.append(getattr(layer.self_attn, f"{p}_proj").register_forward_hook(replace))


def replace_by_kept_layers(handles, layers, keep):
    """R-CLA: a dropped layer uses the keys and values of the nearest kept layer below it."""
    assert 0 in keep
    for p in ("k_proj", "v_proj"):
        kept = []
        for i, layer in enumerate(layers):

            def replace(module, args, out, i=i, kept=kept):
                if i not in keep:
                    return kept[0]
                kept[:] = [out]
                return out

            handles.append(getattr(layer.self_attn, p).register_forward_hook(replace))


def greedy(loaded, tokens, split, count, **policy):
    """Greedy decoding of `count` ids, or up to an EoS id. Also the smallest lead of a chosen token over the second
    best, in logits."""
    tokens, lead = list(tokens), float("inf")
    start = len(tokens)
    for _ in range(count):
        row = logits(loaded, tokens, split, **policy)[-1]
        best = row.argmax()
        second = row[row.argsort()[-2]]
        lead = min(lead, float(row[best] - second))
        tokens.append(int(best))
        if tokens[-1] in loaded.config["eos_token_id"]:
            break
    return tokens[start:], lead


@contextlib.contextmanager
def double_precision(loaded):
    """The model in float64, to tell rounding errors from faults. Angles, sines and cosines stay in fp32, as Hugging
    Face computes them. Its norm and its softmax always use fp32, so they are replaced."""
    model, swiftkv, config = loaded
    norm, attention = modeling_llama.LlamaRMSNorm.forward, modeling_llama.eager_attention_forward

    def norm64(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def attention64(module, query, key, value, attention_mask, scaling, **_):
        key, value = (modeling_llama.repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        weights = torch.softmax(query @ key.transpose(2, 3) * scaling + attention_mask, dim=-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    modeling_llama.LlamaRMSNorm.forward, modeling_llama.eager_attention_forward = norm64, attention64
    try:
        yield Loaded(model.double(), {name: x.double() for name, x in swiftkv.items()}, config)
    finally:
        modeling_llama.LlamaRMSNorm.forward, modeling_llama.eager_attention_forward = norm, attention
        model.float()  # exact, because the weights came from bf16


@contextlib.contextmanager
def rounded_otherwise(loaded, seed):
    """The model with other rounding errors: the last bit of each matrix weight is changed at random. This changes a
    product about as much as another order of summation would. Any order is correct, so each program has its own."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in [*loaded.model.parameters(), *loaded.swiftkv.values()] if p.dim() == 2]
    before = [p.detach().clone() for p in matrices]
    with torch.no_grad():
        for p in matrices:
            p.mul_(1 + 2.0**-23 * torch.randint(-1, 2, p.shape, generator=generator))
    try:
        yield loaded
    finally:
        with torch.no_grad():
            for p, x in zip(matrices, before, strict=True):
                p.copy_(x)


# ---- planted faults --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fault(loaded, kind):
    """The model with one small fault. A comparison made meanwhile must fail.

    rope-sign: one frequency rotates in the wrong direction. head: in layer 0, query heads read the next key head.
    scale: the attention scores of layer 0 are 1 % too large."""
    model, _, config = loaded
    attention = model.model.layers[0].self_attn
    with hooks() as handles:
        if kind == "rope-sign":

            def flip(module, args, kwargs, out):
                cos, sin = out[0], out[1].clone()
                half = sin.shape[-1] // 2
                sin[..., half // 2] *= -1
                sin[..., half + half // 2] *= -1
                return cos, sin

            handles.append(model.model.rotary_emb.register_forward_hook(flip, with_kwargs=True))
        elif kind == "head":

            def roll(module, args, out):
                heads = out.view(*out.shape[:-1], config["num_key_value_heads"], config["head_dim"])
                return heads.roll(1, dims=-2).reshape(out.shape)

            handles.append(attention.k_proj.register_forward_hook(roll))
        scaling = attention.scaling
        if kind == "scale":
            attention.scaling *= 1.01
        try:
            yield
        finally:
            attention.scaling = scaling
