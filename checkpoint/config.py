"""The exported config, and the shapes of the weights that belong to it, from Hugging Face's config.json.

Nothing in config.json is trusted. The limits are the engine's own (model.h), so it refuses no file that is written.
"""

import re

from .failure import Failure, unsupported

MOST_TOKENS = 1 << 24

# What config.json may hold beside the keys that are read here: no other key of a Llama model changes its results. The
# keys of the second group would, and are refused elsewhere unless they are off.
HARMLESS = set(
    """_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention architectures
    attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens cache_implementation
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id hidden_dropout hidden_dropout_prob id2label initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length max_window_layers min_length mlp_dropout model_max_length
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate sep_token_id
    speed_adapted speed_llama suppress_tokens swiftkv swiftkv_layers swiftkv_only task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16 use_cache

    attention_bias bos_token_id eos_token_id head_dim hidden_act hidden_size intermediate_size key_value_group_size
    layer_types max_position_embeddings mlp_bias model_type num_attention_heads num_hidden_layers
    num_key_value_heads num_key_value_layers original_max_position_embeddings partial_rotary_factor
    quantization_config rms_norm_eps rope_interleaved rope_parameters rope_scaling rope_theta sliding_window
    tie_word_embeddings use_sliding_window vocab_size""".split()
)
# A word of these in an unknown key's name says that it is about the computation.
COMPUTATION = re.compile(
    "kv|key|value|quer|attn|attention|head|layer|block|rope|rotary|position|window|moe|expert|router|norm|mlp|ffn|gate|"
    "scal|multipl|softcap|cap|bias|residual|embed|shar|logit|mup|alpha|group|act|weights|skip|depth|conv|ssm"
)


def check_unknown_keys(config, notes):
    """A key that is not known and may change the results is refused by its name; one that cannot is named in notes."""
    for key, value in config.items():
        if key in HARMLESS or value in (None, False, 0, "", [], {}):
            continue
        if COMPUTATION.search(key.lower()):
            raise unsupported(f"{key} ({str(value)[:100]}) in its config")
        notes.append(f"config: {key} is not known, and left out")


def number(config, key, default=None, low=1e-6, high=1e6):
    value = config.get(key, default)
    if type(value) not in (int, float) or not low <= value <= high:
        raise Failure(f"config: {key} is {value!r}, expected a number from {low:g} to {high:g}; repair the config")
    return value


def integer(config, key, default=None, high=1 << 30):
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or not 1 <= value <= high:
        raise Failure(f"config: {key} is {value!r}, expected an integer from 1 to {high}; repair the config")
    return value


def token_ids(config, key, vocab_size, default=None):
    """The value of the key as a list. It may be a token id, a list of them, or null."""
    value = config.get(key, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise Failure(f"config: {key} holds {i!r}, expected ids below {vocab_size}; repair the config")
    return ids


def stop_ids(config, generation, tokenizer, vocab_size, default, notes):
    """The ids that end an answer: the config's, those of generation_config.json, and the tokenizer's own. An id that no
    row of the embedding has is never generated, so it is left out."""
    found = []
    own = tokenizer.id_of("eos_token") if tokenizer else None
    for where in (config.get("eos_token_id"), generation.get("eos_token_id"), own):
        found += where if isinstance(where, list) else [] if where is None else [where]
    if not found and "eos_token_id" not in config and default is not None:
        notes.append(f"config: no eos_token_id anywhere, so it is Hugging Face's default, {default}")
        found = [default]
    for i in found:
        if type(i) is not int:
            raise Failure(f"config: eos_token_id holds {i!r}, expected token ids; repair the config")
        if not 0 <= i < vocab_size:
            notes.append(f"config: eos_token_id {i} is no id below {vocab_size}, and left out")
    return [i for i in dict.fromkeys(found) if 0 <= i < vocab_size]


def first_id(config, generation, tokenizer, vocab_size, default, notes):
    """The BoS id or None: the config's, else that of generation_config.json, else the tokenizer's own."""
    for where in (config, generation):
        if where.get("bos_token_id") is not None:
            ids = token_ids(where, "bos_token_id", vocab_size)
            if len(ids) > 1:
                raise unsupported("several BoS ids")
            return ids[0] if ids else None
    own = tokenizer.id_of("bos_token") if tokenizer else None
    if own is not None and own < vocab_size:
        return own
    if "bos_token_id" in config or default is None:
        return None
    notes.append(f"config: no bos_token_id anywhere, so it is Hugging Face's default, {default}")
    return token_ids({}, "bos_token_id", vocab_size, default)[0]


def check_rope(config):
    """(theta, llama3 scaling or None). Two spellings are read: rope_theta with rope_scaling, and rope_parameters."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise Failure(f"config: rope_scaling is {rope!r}, expected an object; repair the config")
    theta = number(rope if "rope_theta" in rope else config, "rope_theta", 10000.0, 1, 1e12)
    if number({**config, **rope}, "partial_rotary_factor", 1) != 1 or config.get("rope_interleaved"):
        raise unsupported("partial or interleaved RoPE")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "none", None) or (kind == "linear" and rope.get("factor") == 1):
        return theta, None
    if kind != "llama3":
        raise unsupported(f"RoPE scaling of type {kind!r}")
    scaling = {
        key: number(rope, key, low=1 if key == "factor" else 1e-6)
        for key in ("factor", "low_freq_factor", "high_freq_factor")
    }
    if not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise Failure("config: rope scaling: low_freq_factor is not below high_freq_factor; repair the config")
    # Hugging Face reads this key from the config, else from the scaling, else it takes the context length.
    key = "original_max_position_embeddings"
    scaling[key] = integer(
        {**rope, **{k: v for k, v in config.items() if k == key and v is not None}},
        key,
        config.get("max_position_embeddings", 2048),
    )
    return theta, scaling


def check_adapted(config, layers):
    """The policies that the model was trained for, as the config lists them."""
    out = []
    for entry in config.get("speed_adapted", []):
        if (
            not isinstance(entry, dict)
            or set(entry) - {"policy", "k", "bos"}
            or entry.get("policy") not in ("full", "speed", "pop", "swiftkv", "share")
        ):
            raise Failure(f"config: speed_adapted: {entry!r} is no policy with k and bos; repair the config")
        if entry.get("k") is not None and (type(entry["k"]) is not int or not 1 <= entry["k"] <= layers):
            raise Failure(f"config: speed_adapted: k is {entry['k']!r}, expected 1 to {layers}; repair the config")
        out.append({"policy": entry["policy"], "k": entry.get("k"), "bos": bool(entry.get("bos", True))})
    return out


def parse_adapted(text):
    """The entry of speed_adapted that --adapted POLICY[:K][:no-bos] stands for. K is left out for "any K"."""
    policy, *rest = text.split(":")
    bos = "no-bos" not in rest
    rest = [part for part in rest if part != "no-bos"]
    if len(rest) > 1 or not all(part.isdecimal() for part in rest):
        raise Failure(f"--adapted {text}: no POLICY[:K][:no-bos]; write for example speed:20, or speed for any K", 2)
    return {"policy": policy, "k": int(rest[0]) if rest else None, "bos": bos}


def check_config(config, generation, name, tokenizer=None, notes=None):
    """The exported config, which has every key. A key that config.json lacks gets the default of transformers'
    LlamaConfig, but for the BoS and EoS ids other files of the checkpoint are asked first. A feature that the engine
    lacks is refused by name. What is left out or assumed is added to `notes`."""
    notes = [] if notes is None else notes
    if config.get("model_type", "llama") not in ("llama", "llama_swiftkv"):
        raise unsupported(f"the architecture {config['model_type']!r}")
    for architecture in config.get("architectures") or []:
        if architecture not in ("LlamaForCausalLM", "LlamaSwiftKVForCausalLM"):
            raise unsupported(f"the architecture {architecture!r}")
    for feature in ("attention_bias", "mlp_bias", "quantization_config", "sliding_window", "use_sliding_window"):
        if config.get(feature):
            raise unsupported(feature)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise unsupported(f"the activation {config['hidden_act']!r}")
    for kind in config.get("layer_types") or []:
        if kind != "full_attention":
            raise unsupported(f"layers of type {kind!r}")
    check_unknown_keys(config, notes)

    layers = integer(config, "num_hidden_layers", 32, high=4096)
    hidden = integer(config, "hidden_size", 4096, high=1 << 17)
    heads = integer(config, "num_attention_heads", 32, high=4096)
    vocab = integer(config, "vocab_size", 32000, high=MOST_TOKENS)
    kv_heads = integer(config, "num_key_value_heads", heads, high=4096)
    if heads % kv_heads:
        raise Failure(f"config: {heads} attention heads do not divide among {kv_heads} key heads; repair the config")
    if config.get("head_dim") is None and hidden % heads:
        raise Failure(f"config: hidden_size {hidden} is no multiple of {heads} heads; repair the config")
    head_dim = integer(config, "head_dim", hidden // heads, high=1024)
    if head_dim % 2:
        raise Failure(f"config: head_dim is {head_dim}, RoPE needs an even number; repair the config")
    theta, scaling = check_rope(config)
    adapted = check_adapted(config, layers)
    swiftkv = None
    k = integer(config, "num_key_value_layers", layers, high=layers)
    if k < layers:
        group = integer(config, "key_value_group_size", 1, high=layers)
        swiftkv = {"num_key_value_layers": k, "key_value_group_size": group, "original_projections": True}
        adapted.append({"policy": "swiftkv", "k": k, "bos": True})
    return {
        "name": name,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": integer(config, "intermediate_size", 11008, high=1 << 20),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": number(config, "rms_norm_eps", 1e-6, 1e-30, 1),
        "max_position_embeddings": integer(config, "max_position_embeddings", 2048),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "bos_token_id": first_id(config, generation, tokenizer, vocab, 1, notes),
        "eos_token_id": stop_ids(config, generation, tokenizer, vocab, 2, notes),
        "swiftkv": swiftkv,
        "adapted": adapted,
    }


def tokenizer_config(config, generation, tokenizer, name, notes):
    """The config keys of a file without weights."""
    vocab = integer(config, "vocab_size", tokenizer.size(), high=MOST_TOKENS)
    return {
        "name": name,
        "vocab_size": vocab,
        "bos_token_id": first_id(config, generation, tokenizer, vocab, None, notes),
        "eos_token_id": stop_ids(config, generation, tokenizer, vocab, None, notes),
        "tokenizer_only": True,
    }


def expected_tensors(config):
    """name -> shape of every weight, in the order of the forward pass. Also the names of the ordinary projections in
    the upper layers of a SwiftKV model: a checkpoint has all of those or none."""
    d, f = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    swiftkv = config["swiftkv"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    originals = []
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        above = i - swiftkv["num_key_value_layers"] if swiftkv else -1
        if above == 0:
            shapes["model.norm_swiftkv.weight"] = (d,)
        shapes[layer + "input_layernorm.weight"] = (d,)
        for p, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[layer + f"self_attn.{p}_proj.weight"] = (rows, d)
            if above >= 0:
                originals.append(layer + f"self_attn.{p}_proj.weight")
                if p == "q" or above % swiftkv["key_value_group_size"] == 0:
                    shapes[layer + f"self_attn.{p}_proj_swiftkv.weight"] = (rows, d)
        shapes[layer + "self_attn.o_proj.weight"] = (d, q)
        shapes[layer + "post_attention_layernorm.weight"] = (d,)
        shapes[layer + "mlp.gate_proj.weight"] = (f, d)
        shapes[layer + "mlp.up_proj.weight"] = (f, d)
        shapes[layer + "mlp.down_proj.weight"] = (d, f)
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return shapes, originals
