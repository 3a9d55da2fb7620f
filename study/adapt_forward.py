"""The forward pass that study/adapt.py trains through: speed_llama's, for whole trees, made of few operations.

speed_llama runs any batch and keeps caches, and PEFT adds four small operations to every linear layer. At 135 M
parameters a training step would be all launches and memory traffic. Here the weights of a kind stand in one tensor for
all layers, LoRA is merged once a step, as the exporter merges it, q, k, v are one product and so are gate and up, masks
are made once a batch, and nothing is read off the device. hf/tests/test_adapt.py holds the logits against
speed_llama's and the engine's.
"""

import torch
from speed_llama.policy import make_schedule
from torch import Tensor
from torch.nn import functional as F

KINDS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
         "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip
STACKED = "qkv", "o", "gate_up", "down", "norm1", "norm2", "swiftkv_q", "swiftkv_kv"
NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}


def stacked(model, dtype, device):
    """The weights of a SpeedLlamaForCausalLM, those of a kind in one tensor [layers, ...]; `head` where it is not
    the embedding."""
    layers = model.model.layers

    def stack(name):
        return torch.stack([layer.get_parameter(name + ".weight") for layer in layers])

    w = {kind: stack(name) for kind, name in {**KINDS, **NORMS}.items()}
    w["norm"], w["embed"] = model.model.norm.weight, model.model.embed_tokens.weight
    if model.lm_head.weight.data_ptr() != w["embed"].data_ptr():
        w["head"] = model.lm_head.weight
    return {name: x.detach().to(device, dtype) for name, x in w.items()}


def joined(w):
    """The same with q, k, v and gate, up each as one, which is what Forward takes."""
    rest = {name: x for name, x in w.items() if name not in KINDS or name in ("o", "down")}
    return {"qkv": torch.cat([w["q"], w["k"], w["v"]], 1), "gate_up": torch.cat([w["gate"], w["up"]], 1), **rest}


class Masks:
    """Which rows of a batch see which, as numbers to add to attention's scores, and where rows lie in flattened
    tensors. All of it on the device."""

    def __init__(self, batch, dtype):
        segment, column = batch.segment, batch.column
        trees, width = segment.shape
        every = torch.arange(width, device=segment.device)
        place = column.clamp(min=0)
        own = segment.gather(1, place)

        def added(sees, query, key):
            """A row sees itself whatever else, so that padding has something to see."""
            sees = sees | (query[..., None] == key[:, None])
            return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, -torch.inf)[:, None]

        def sees(query, q_segment, key, k_segment):
            same = (k_segment[:, None] == 0) | (k_segment[:, None] == q_segment[..., None])
            return same & (key[:, None] <= query[..., None])

        columns = every.expand(trees, width)
        self.wide = added(sees(columns, segment, columns, segment), columns, columns)
        self.narrow = added(sees(place, own, columns, segment), place, columns)
        # A padding row stands at column 0 too; nobody may see it but itself.
        slot = torch.arange(column.shape[1], device=column.device).expand_as(column)
        short = sees(place, own, place, own) & (column >= 0)[:, None]
        self.short = added(short, slot, slot)
        self.rows = (place + torch.arange(trees, device=place.device)[:, None] * width).flatten()


class Forward:
    """Shapes and rotations of one model. `device` and `dtype`: where and in what it computes."""

    def __init__(self, model, device, dtype):
        c = model.config
        self.layers, self.heads, self.kv_heads, self.size = (
            c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim)  # fmt: skip
        self.eps, self.device, self.dtype = c.rms_norm_eps, device, dtype
        self.frequency = model.model.rotary_emb.inv_freq.to(device, torch.float32)
        self.scaling = float(model.model.rotary_emb.attention_scaling)

    def norm(self, x, w):
        return F.rms_norm(x, (x.shape[-1],), w, self.eps)

    def rope(self, position):
        """Cosines, and sines with the sign that rotate_half gives each half, [B, T, 1, head size]."""
        angle = position[..., None].float() * self.frequency
        cos, sin = (f(angle) * self.scaling for f in (torch.cos, torch.sin))
        return torch.cat([cos, cos], -1)[:, :, None].to(self.dtype), torch.cat([-sin, sin], -1)[:, :, None].to(
            self.dtype
        )

    def rotate(self, x, rope):
        return torch.addcmul(x * rope[0], x.roll(self.size // 2, -1), rope[1])

    def heads_of(self, x):
        return x.unflatten(-1, (-1, self.size))

    def grouped(self, x):
        """[B, S, KV heads, size] -> [B, heads, S, size]"""
        group = self.heads // self.kv_heads
        return x.transpose(1, 2).repeat_interleave(group, 1) if group > 1 else x.transpose(1, 2)

    def hidden(self, w, batch, masks, schedule):
        """What layer L-1 leaves of the rows that visit all layers, [B, R, d], before the last norm. w: joined()
        weights. schedule: speed_llama's."""
        x = F.embedding(batch.token, w["embed"])
        rope = rope_wide = self.rope(batch.position)
        queries, kv_size = self.heads * self.size, self.kv_heads * self.size
        made, wide, swiftkv = {}, False, None
        each = {name: w[name].unbind(0) for name in STACKED if name in w}
        for i in range(self.layers):
            h = self.norm(x, each["norm1"][i])
            qkv, source = each["qkv"][i], schedule.source[i]
            narrow_h = h
            if i == schedule.narrow_from:  # prompt rows stop: from here on x is narrow
                if "swiftkv" in schedule.source:
                    swiftkv, above = self.norm(x, w["norm_swiftkv"]), i
                x, narrow_h, *rope = (
                    t.flatten(0, 1).index_select(0, masks.rows).view(*batch.column.shape, *t.shape[2:])
                    for t in (x, h, *rope)
                )
                wide = True
            mask = masks.wide if not wide else masks.short if i >= schedule.short_from else masks.narrow
            if swiftkv is not None:
                q = self.rotate(self.heads_of(F.linear(narrow_h, each["swiftkv_q"][i - above])), rope)
                if source == "swiftkv":
                    lead = sum(kind == "swiftkv" for kind in schedule.source[:i])
                    k, v = F.linear(swiftkv, each["swiftkv_kv"][lead]).split(kv_size, -1)
                    k, v = self.grouped(self.rotate(self.heads_of(k), rope_wide)), self.grouped(self.heads_of(v))
                else:
                    k, v = made[schedule.reads[i]]
            elif source == "none":
                q = self.rotate(self.heads_of(F.linear(narrow_h, qkv[:queries])), rope)
                k, v = made[schedule.reads[i]]
            elif source == "stream":  # the layer in which prompt rows stop: keys and values of all, queries of the rest
                q = self.rotate(self.heads_of(F.linear(narrow_h, qkv[:queries])), rope)
                k, v = F.linear(h, qkv[queries:]).split(kv_size, -1)
                k, v = self.grouped(self.rotate(self.heads_of(k), rope_wide)), self.grouped(self.heads_of(v))
            else:
                qk, v = F.linear(h, qkv).split((queries + kv_size, kv_size), -1)
                q, k = self.rotate(self.heads_of(qk), rope).split((self.heads, self.kv_heads), 2)
                k, v = self.grouped(k), self.grouped(self.heads_of(v))
            if "none" in schedule.source:
                made[i] = k, v
            a = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
            x = x + F.linear(a.transpose(1, 2).flatten(2), each["o"][i])
            gate, up = F.linear(self.norm(x, each["norm2"][i]), each["gate_up"][i]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, each["down"][i])
        return x

    def answers(self, w, batch, masks, schedule):
        """The rows that predict an answer's tokens, [N, d], before and after the last norm."""
        x = self.hidden(w, batch, masks, schedule).flatten(0, 1).index_select(0, batch.answer)
        return x, self.norm(x, w["norm"])

    def speed(self, k):
        """The schedule of SPEED at K; full depth is K = layers."""
        return make_schedule("speed", self.layers, k)

    def swiftkv(self, k, group):
        return make_schedule("swiftkv", self.layers, k, swiftkv_k=k, group=group)

    def share(self, kept):
        return make_schedule("share", self.layers, kept=kept)


def head(w):
    """The output matrix [vocabulary, d]."""
    return w.get("head", w["embed"])


def over_rows(rows: Tensor, output: Tensor, chunk: int, loss) -> tuple[Tensor, Tensor]:
    """(sum of a loss over rows [N, d], its gradient by them), never more than `chunk` rows of logits at a time. loss(a,
    z, logits fp32) is the sum over the rows a..z. Adds to output.grad if that is wanted."""
    total, gradient = rows.new_zeros((), dtype=torch.float32), []
    for a in range(0, len(rows), chunk):
        part = rows[a : a + chunk].detach().requires_grad_()
        value = loss(a, a + len(part), F.linear(part, output).float())
        value.backward()
        total += value.detach()
        gradient.append(part.grad)
    return total, torch.cat(gradient)


class Lora:
    """LoRA on all seven projections of every layer, as PEFT begins it: A random, B zero. Trained in float32."""

    def __init__(self, base, rank, alpha, seed):
        self.base, self.scale, self.rank, self.alpha = base, alpha / rank, rank, alpha
        generator = torch.Generator().manual_seed(seed)
        self.parameters = {}
        for kind in KINDS:
            layers, out, width = base[kind].shape
            bound = width**-0.5  # kaiming_uniform with a = sqrt(5)
            a = (torch.rand(layers, rank, width, generator=generator) * 2 - 1) * bound
            self.parameters[kind + "_a"] = a.to(base[kind].device).requires_grad_()
            self.parameters[kind + "_b"] = (
                torch.zeros(layers, out, rank, device=a.device).to(base[kind].device).requires_grad_()
            )

    def weights(self):
        """The merged weights, in the base's dtype: under bf16 those that the exporter would write."""
        w = dict(self.base)
        for kind in KINDS:
            a, b = (self.parameters[f"{kind}_{part}"].to(w[kind].dtype) for part in "ab")
            w[kind] = torch.baddbmm(w[kind], b, a, alpha=self.scale)
        return joined(w)


class Full:
    """All parameters, in float32."""

    def __init__(self, base):
        self.dtype = base["q"].dtype
        self.parameters = {name: x.float().clone().requires_grad_() for name, x in base.items()}

    def weights(self):
        return joined({name: p.to(self.dtype) for name, p in self.parameters.items()})


class SwiftKV:
    """SwiftKV's projections of the layers from K on and its norm, in float32; all else stays. They begin as the
    ordinary ones; a group's keys and values as the mean of its layers', as SwiftKV's authors have it (arXiv
    2410.03960)."""

    def __init__(self, base, k, group):
        self.dtype, self.rest = base["q"].dtype, joined(base)

        def leaders(x):
            return torch.stack([part.float().mean(0) for part in x[k:].split(group)])

        self.parameters = {
            "swiftkv_q": base["q"][k:].float().clone(),
            "swiftkv_k": leaders(base["k"]),
            "swiftkv_v": leaders(base["v"]),
            "norm_swiftkv": base["norm1"][k].float().clone(),
        }
        for p in self.parameters.values():
            p.requires_grad_()

    def weights(self):
        p = {name: x.to(self.dtype) for name, x in self.parameters.items()}
        kv = torch.cat([p["swiftkv_k"], p["swiftkv_v"]], 1)
        return {**self.rest, "swiftkv_q": p["swiftkv_q"], "swiftkv_kv": kv, "norm_swiftkv": p["norm_swiftkv"]}
