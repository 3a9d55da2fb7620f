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
STACKED = "qkv", "o", "gate_up", "down", "swiftkv_q", "swiftkv_kv"
STACKED += tuple(f"{name}_{part}" for name in STACKED[:4] for part in "ab")
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


JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up"), "o": ("o",), "down": ("down",)}


def joined(w):
    """The same with q, k, v and gate, up each as one, which is what Forward takes."""
    rest = {name: x for name, x in w.items() if name not in KINDS}
    return {**{name: torch.cat([w[kind] for kind in kinds], 1) for name, kinds in JOINED.items()}, **rest}


class ThinLinear(torch.autograd.Function):
    """x W' for a merged W = W0 + B A. Its gradients go to A [r, in] and B [out, r] straight: two thin products each
    instead of the gradient of W, a third of a step's arithmetic."""

    @staticmethod
    def forward(ctx, x, w, a, b):
        ctx.save_for_backward(x, w, a, b)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b = ctx.saved_tensors
        flat_x, flat_dy = x.flatten(0, -2), dy.flatten(0, -2)
        return dy @ w, None, (flat_dy @ b).T @ flat_x, flat_dy.T @ (flat_x @ a.T)


class Linear:
    """The linear layers of joined weights: call it with x, a name and a layer; `part`, a slice, takes some outputs."""

    def __init__(self, w):
        self.each = {name: w[name].unbind(0) for name in STACKED if name in w}

    def __call__(self, x, name, i, part=slice(None)):
        w = self.each[name][i][part]
        if name + "_a" in self.each:
            return ThinLinear.apply(x, w, self.each[name + "_a"][i], self.each[name + "_b"][i][part])
        return F.linear(x, w)


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
        linear, norm1, norm2 = Linear(w), w["norm1"].unbind(0), w["norm2"].unbind(0)
        for i in range(self.layers):
            h = narrow_h = self.norm(x, norm1[i])
            source = schedule.source[i]
            if i == schedule.narrow_from:  # prompt rows stop: from here on x is narrow
                if "swiftkv" in schedule.source:
                    swiftkv, first = self.norm(x, w["norm_swiftkv"]), i
                x, narrow_h, *rope = (
                    t.flatten(0, 1).index_select(0, masks.rows).view(*batch.column.shape, *t.shape[2:])
                    for t in (x, h, *rope)
                )
                wide = True
            mask = masks.wide if not wide else masks.short if i >= schedule.short_from else masks.narrow
            if source == "rows":
                qk, v = linear(h, "qkv", i).split((queries + kv_size, kv_size), -1)
                q, k = self.rotate(self.heads_of(qk), rope).split((self.heads, self.kv_heads), 2)
                k, v = self.grouped(k), self.grouped(self.heads_of(v))
            else:  # queries from the rows that go on, keys and values from all of them, or those of a lower layer
                if swiftkv is not None:
                    q = linear(narrow_h, "swiftkv_q", i - first)
                else:
                    q = linear(narrow_h, "qkv", i, slice(queries))
                q = self.rotate(self.heads_of(q), rope)
                if source == "none":
                    k, v = made[schedule.reads[i]]
                else:
                    if source == "swiftkv":
                        kv = linear(swiftkv, "swiftkv_kv", schedule.source[:i].count("swiftkv"))
                    else:
                        kv = linear(h, "qkv", i, slice(queries, None))
                    k, v = (self.heads_of(x) for x in kv.split(kv_size, -1))
                    k, v = self.grouped(self.rotate(k, rope_wide)), self.grouped(v)
            if "none" in schedule.source:
                made[i] = k, v
            a = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
            x = x + linear(a.transpose(1, 2).flatten(2), "o", i)
            gate, up = linear(self.norm(x, norm2[i]), "gate_up", i).chunk(2, -1)
            x = x + linear(F.silu(gate) * up, "down", i)
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
    """LoRA on all seven projections of every layer, as PEFT begins it: A random, B zero. Trained in float32.

    thin: gradients by ThinLinear, for a CPU, which has arithmetic to spare; a GPU has none of those thin products'
    memory traffic and prefers one large one."""

    def __init__(self, base, rank, alpha, seed, thin=False):
        self.base, self.scale, self.rank, self.alpha, self.thin = base, alpha / rank, rank, alpha, thin
        generator = torch.Generator().manual_seed(seed)
        self.parameters = {}
        for kind in KINDS:
            layers, out, width = base[kind].shape
            bound = width**-0.5  # kaiming_uniform with a = sqrt(5)
            a = (torch.rand(layers, rank, width, generator=generator) * 2 - 1) * bound
            for part, x in ("a", a), ("b", torch.zeros(layers, out, rank)):
                self.parameters[f"{kind}_{part}"] = x.to(base[kind].device).requires_grad_()

    def weights(self):
        """The merged weights, in the base's dtype: under bf16 those that the exporter would write."""
        w, dtype = dict(self.base), self.base["q"].dtype
        a, b = ({kind: self.parameters[f"{kind}_{part}"].to(dtype) for kind in KINDS} for part in "ab")
        with torch.set_grad_enabled(not self.thin):
            for kind in KINDS:
                w[kind] = torch.baddbmm(w[kind], b[kind], a[kind], alpha=self.scale)
            w = joined(w)
        if self.thin:
            for name, kinds in JOINED.items():  # those of joined weights: A one upon the other, B along a diagonal
                w[name + "_a"] = torch.cat([a[kind] for kind in kinds], 1)
                rest = (len(kinds) - 1) * self.rank
                padded = [F.pad(b[kind], (j * self.rank, rest - j * self.rank)) for j, kind in enumerate(kinds)]
                w[name + "_b"] = torch.cat(padded, 1) * self.scale
        return w


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
