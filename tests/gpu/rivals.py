"""What others reach on this GPU in the shapes of Llama-3.1-8B, through PyTorch: `rivals.py [STEM]`, a line each.

Attention by cuDNN and by FlashAttention-2, products by cuBLAS, copies, in the sizes of times.cu. Then the whole model
in transformers with random weights: a prompt with each backend, and tokens after it. Every time is the median of
several runs after one uncounted. STEM.tsv is the same for programs.
"""

import sys


def main():
    try:
        import torch
        import torch.nn.functional as F
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError as error:
        print(f"skipped: {error}")
        return 3
    if not torch.cuda.is_available():
        print("skipped: PyTorch finds no GPU")
        return 3
    record = open(f"{sys.argv[1]}.tsv", "w") if len(sys.argv) > 1 else None

    def median_seconds(work, *operands, repeats=7, **more):
        seconds = []
        for _ in range(repeats + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work(*operands, **more)
            end.record()
            torch.cuda.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        return sorted(seconds[1:])[repeats // 2]

    def line(what, seconds, moved=0, flops=0):
        rate, unit = (flops / seconds / 1e12, "TFLOP/s") if flops else (moved / seconds / 1e9, "GB/s")
        print(f"{what:<44} {seconds * 1e6:10.1f} us {rate:8.0f} {unit}", flush=True)
        if record:
            print(what, f"{seconds * 1e6:.3f}", f"{rate:.1f}", unit, sep="\t", file=record, flush=True)

    def values(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def attention(name, backend, length, rows):
        """Causal attention of the last `rows` of `length` slots, 32 query heads to 8 key heads."""
        q, k, v = values(1, 32, rows, 128), values(1, 8, length, 128), values(1, 8, length, 128)
        flops = 4 * 32 * 128 * (rows * (length - rows) + rows * (rows + 1) / 2) if rows > 1 else 0
        repeats = 3 if length > 16384 else 7
        refused = ""
        for grouped in (True, False):  # where a backend has no grouped heads, with keys and values repeated
            if not grouped:
                k, v = (x.repeat_interleave(4, 1) for x in (k, v))
            try:
                with sdpa_kernel(backend):
                    seconds = median_seconds(
                        F.scaled_dot_product_attention, q, k, v, repeats=repeats, is_causal=rows > 1, enable_gqa=grouped
                    )
                line(f"{name}, {length}" + ("" if grouped else ", keys repeated"), seconds, length * 4096, flops)
                return
            except RuntimeError as error:
                refused = str(error).splitlines()[0]
        print(f"{name}, {length}: refused: {refused[:90]}", flush=True)

    print(f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {torch.cuda.get_device_name()}")
    a, b = values(1 << 29), values(1 << 29)
    line("copy 1 GiB, read and written", median_seconds(b.copy_, a), 4 << 29)
    line("largest of 1 GiB, read", median_seconds(torch.max, a.view(torch.int32)), 2 << 29)
    kinds = ((SDPBackend.CUDNN_ATTENTION, "cuDNN attention"), (SDPBackend.FLASH_ATTENTION, "FlashAttention-2"))
    for length in (2048, 8192, 32768):
        for backend, name in kinds:
            attention(name, backend, length, length)
    for length in (8192, 32768, 131072):
        for backend, name in kinds:
            attention(f"{name}, one row", backend, length, 1)
    x = values(8192, 8192)
    line("cuBLAS 8192^3", median_seconds(torch.matmul, x, x.T), flops=2 * 8192**3)
    for rows in (2048, 8192):
        for name, n_in, n_out in (
            ("Q, K and V in one", 4096, 6144),
            ("O", 4096, 4096),
            ("gate and up in one", 4096, 28672),
            ("down", 14336, 4096),
        ):
            x, w = values(rows, n_in), values(n_out, n_in)
            line(f"cuBLAS {name}, {rows} rows", median_seconds(torch.matmul, x, w.T), flops=2 * rows * n_in * n_out)
    del a, b, x, w

    try:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers import __version__ as version
    except ImportError as error:
        print(f"transformers: skipped: {error}")
        return 0
    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        rope_theta=500000.0,
        max_position_embeddings=131072,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cuda").eval()
    with torch.device("cuda"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table was left empty, too
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    print(f"transformers {version}, Llama-3.1-8B, random weights in bf16", flush=True)
    with torch.inference_mode():
        for length in (2048, 8192, 32768):
            ids = torch.randint(1000, (1, length), device="cuda")
            for backend, name in (*kinds, (SDPBackend.EFFICIENT_ATTENTION, "memory-efficient")):
                try:
                    with sdpa_kernel(backend):
                        seconds = median_seconds(model, ids, repeats=3, use_cache=True, logits_to_keep=1)
                except RuntimeError as error:
                    print(f"prompt of {length}, {name}: refused: {str(error).splitlines()[0][:90]}", flush=True)
                    continue
                line(f"prompt of {length}, {name}", seconds, flops=2 * length * 6.98e9 + 4 * 32 * 4096 * length**2 / 2)
            if length > 8192:
                continue
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

            def steps(ids=ids, cache=cache):
                for _ in range(16):
                    model(ids[:, :1], past_key_values=cache, use_cache=True)

            seconds = median_seconds(steps, repeats=2) / 16
            line(f"token after {length}", seconds, 2 * 7.5e9 + length * 32 * 4096)
    return 0


if __name__ == "__main__":
    sys.exit(main())
