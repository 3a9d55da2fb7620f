"""generate: batches, padding, splits, chunks, turns, beams, assistants; each against the plainest way to the same."""

import numpy as np
import pytest
import torch
from conftest import TOLERANCE, difference, engine_flags, random_tokens, run_engine
from transformers import StaticCache, TextIteratorStreamer, pipeline

from speed_llama import PolicyCache, SpeedLlamaForCausalLM, read_tokenizer

CASES = [{"policy": "full"}, {"policy": "speed", "k": 2}, {"policy": "speed", "k": 3, "bos": False},
         {"policy": "pop", "k": 3}, {"policy": "share", "keep": [0, 2, 3]}]  # fmt: skip
LENGTHS, STARTS = (40, 23, 31), (33, 20, 12)


def batch(side: str, seed=0, lengths=LENGTHS):
    """(ids, mask, the sequences): padded with token 3, which also occurs as a word."""
    sequences = [random_tokens(seed + i, n) for i, n in enumerate(lengths)]
    ids = torch.full((len(lengths), max(lengths)), 3)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(-len(sequence), None) if side == "left" else slice(len(sequence))
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    return ids, mask, sequences


def greedy_alone(model, tokens, start, count):
    """Token by token without a cache or padding, never an end of text, as `generated` has it."""
    tokens, ends = list(tokens), model.generation_config.eos_token_id
    for _ in range(count):
        with torch.no_grad():
            out = model(torch.tensor([tokens]), decode_start=[start], use_cache=False)
        tokens.append(int(out.logits[0, -1].index_fill(0, torch.tensor(ends), -torch.inf).argmax()))
    return tokens[-count:]


def generated(model, ids, mask, count=12, **kwargs):
    kwargs = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 3, **kwargs}
    return model.generate(ids, attention_mask=mask, **kwargs)


@pytest.mark.parametrize("policy", CASES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_batch_is_its_sequences_alone(wide, policy, side, implementation):
    model = wide.under(implementation, **policy)
    ids, mask, sequences = batch(side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, decode_start=list(STARTS)).logits
        for row, (sequence, start) in enumerate(zip(sequences, STARTS, strict=True)):
            alone = model(torch.tensor([sequence]), decode_start=[start]).logits[0, start:]
            assert difference(logits[row][mask[row].bool()][start:], alone) <= TOLERANCE
    out = generated(model, ids, mask, decode_start=list(STARTS))
    for row, (sequence, start) in enumerate(zip(sequences, STARTS, strict=True)):
        assert out[row, ids.shape[1] :].tolist() == greedy_alone(model, sequence, start, 12)


@pytest.mark.parametrize("fault", ["pad seen", "position", "split"])
@pytest.mark.parametrize("policy", CASES[:3], ids=str)
def test_batch_comparison_sees_faults(wide, policy, fault):
    model = wide.under(**policy)
    ids, mask, sequences = batch("left")
    right = model(torch.tensor([sequences[1]]), decode_start=STARTS[1]).logits[0, STARTS[1] :]
    starts, places = list(STARTS), {}
    if fault == "pad seen":
        mask[1, 5] = 1  # a column of padding taken for a token
        starts[1] += 1
    elif fault == "position":
        wrong = (mask.cumsum(1) - 1).clamp(min=0)
        wrong[1, -2:] += 1  # as one segment, where positions are free
        places = {"position_ids": wrong, "segment_ids": torch.zeros_like(mask), "segment_sees": torch.ones(3, 1, 1)}
    elif policy["policy"] == "full":
        return  # a split does not matter there
    else:
        starts[1] += 1
    out = model(ids, attention_mask=mask, decode_start=starts, **places).logits[1, -len(right) :]
    rows = slice(1, None) if fault == "split" else slice(None)
    assert difference(out[rows], right[rows]) > 50 * TOLERANCE


def test_marker_splits_each_row(wide):
    """The last marker of each row begins the answer; a row without one ends in its last token; pop takes the last
    token."""
    model = wide.under(policy="speed", k=3)
    ids, mask, sequences = batch("left")
    marker = [7, 8]
    for row, at in ((0, 10), (0, 30), (2, 21)):
        column = ids.shape[1] - len(sequences[row]) + at
        ids[row, column : column + 2] = torch.tensor(marker)
    model.config.decode_marker = marker
    by_marker = generated(model, ids, mask)
    assert torch.equal(by_marker, generated(model, ids, mask, decode_start=[30, 22, 21]))
    assert not torch.equal(by_marker, generated(model, ids, mask, decode_start=[29, 22, 21]))
    out = model(ids, attention_mask=mask).logits
    assert out[0, -10:].any() and not out[0, 1:-10].any()
    model.set_policy(policy="pop", num_key_value_layers=3)
    assert torch.equal(generated(model, ids, mask), generated(model, ids, mask, decode_start=[39, 22, 30]))


@pytest.mark.parametrize("policy", CASES, ids=str)
def test_chunks(wide, policy):
    model = wide.under(**policy)
    ids, mask, _ = batch("left")
    whole = generated(model, ids, mask, decode_start=list(STARTS), output_logits=True, return_dict_in_generate=True)
    other = generated(model, ids, mask, decode_start=[s - 1 for s in STARTS], prefill_chunk_size=7, output_logits=True,
                      return_dict_in_generate=True)  # fmt: skip
    moved = difference(other.logits[0], whole.logits[0])
    assert (moved > 50 * TOLERANCE) == (policy["policy"] in ("speed", "pop"))  # a split that is off shows
    for size in (1, 7, 16):
        parts = generated(model, ids, mask, decode_start=list(STARTS), prefill_chunk_size=size, output_logits=True,
                          return_dict_in_generate=True)  # fmt: skip
        assert torch.equal(parts.sequences, whole.sequences)
        assert max(difference(a, b) for a, b in zip(parts.logits, whole.logits, strict=True)) <= TOLERANCE
    assert torch.equal(whole.sequences, generated(model, ids, mask, decode_start=list(STARTS), use_cache=False))


@pytest.mark.parametrize("policy", CASES, ids=str)
def test_two_turns_with_one_cache(wide, policy):
    """The second turn on the first one's cache is the conversation afresh. Under pop it is not: its answers were
    computed at full depth and stay (the paper leaves it open)."""
    model, cache = wide.under(**policy), PolicyCache()
    ids, mask, _ = batch("left")
    first = generated(model, ids, mask, past_key_values=cache, decode_start=list(STARTS))
    more = torch.tensor([random_tokens(9 + i, 15)[1:] for i in range(3)])
    ids2 = torch.cat([first, more], 1)
    mask2 = torch.cat([mask, torch.ones(3, 12 + 14, dtype=torch.long)], 1)
    starts = (mask2.sum(1) - 4).tolist()
    second = generated(model, ids2, mask2, past_key_values=cache, decode_start=starts, output_logits=True,
                       return_dict_in_generate=True)  # fmt: skip
    afresh = generated(model, ids2, mask2, decode_start=starts, output_logits=True, return_dict_in_generate=True)
    error = difference(second.logits[0], afresh.logits[0])
    if policy["policy"] == "pop":
        assert error > 50 * TOLERANCE
        return
    assert torch.equal(second.sequences, afresh.sequences)
    assert max(difference(a, b) for a, b in zip(second.logits, afresh.logits, strict=True)) <= TOLERANCE
    if policy["policy"] == "speed":
        slots = 4 + 11 + policy.get("bos", True)
        assert cache.layers[-1].keys.shape[2] == slots
        model.config.keep_answers = True
        kept = PolicyCache()
        generated(model, ids, mask, past_key_values=kept, decode_start=list(STARTS))
        other = generated(model, ids2, mask2, past_key_values=kept, decode_start=starts, output_logits=True,
                          return_dict_in_generate=True)  # fmt: skip
        model.config.keep_answers = False
        assert difference(other.logits[0], afresh.logits[0]) > 50 * TOLERANCE


def test_turns_that_cannot_be(wide):
    model, cache = wide.under(policy="speed", k=3), PolicyCache()
    ids = torch.tensor([random_tokens(0, 20)])
    with torch.no_grad():
        model(ids, decode_start=[15], past_key_values=cache)
        with pytest.raises(ValueError, match="already holds"):
            model(torch.tensor([[5]]), decode_start=[16], past_key_values=cache)
        model.set_policy(num_key_value_layers=2)
        with pytest.raises(ValueError, match="filled under"):
            model(torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("policy", CASES[1:], ids=str)
def test_beams_and_samples(wide, policy, monkeypatch):
    """Beam search and sampling reorder and repeat the cache; without a cache they need none."""
    model = wide.under(**policy)
    ids, mask, _ = batch("left")
    settings = {"num_beams": 3, "num_return_sequences": 2, "decode_start": torch.tensor(STARTS)}
    assert torch.equal(
        generated(model, ids, mask, **settings), generated(model, ids, mask, use_cache=False, **settings)
    )
    with monkeypatch.context() as fault:
        fault.setattr(PolicyCache, "reorder_cache", lambda *_: None)
        assert not torch.equal(generated(model, ids, mask, **settings),
                               generated(model, ids, mask, use_cache=False, **settings))  # fmt: skip
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(generated(model, ids, mask, do_sample=True, num_return_sequences=3, top_k=20,
                                 decode_start=torch.tensor(STARTS), use_cache=use_cache))  # fmt: skip
    assert torch.equal(*results)


@pytest.mark.parametrize("policy", CASES, ids=str)
def test_assistants(wide, policy):
    """Assisted generation gives the target's own greedy text: guesses from the prompt, from a stock model, and from
    the same weights under another policy. Wrong guesses are cropped off the cache."""
    model = wide.under(**policy)
    ids = torch.tensor([random_tokens(0, 20) * 2])
    alone = generated(model, ids, None, decode_start=[35])
    for assistant in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": wide.reference[0]},
                      {"assistant_model": SpeedLlamaForCausalLM.from_pretrained(
                          wide.folder, policy="speed", num_key_value_layers=4, decode_marker=[1, 2])}):  # fmt: skip
        assert torch.equal(generated(model, ids, None, decode_start=[35], **assistant), alone)


def test_what_is_refused(wide):
    model = wide.under(policy="speed", k=3)
    ids, mask, _ = batch("left")
    with pytest.raises(ValueError, match="cache_implementation 'static'"):
        generated(model, ids, mask, cache_implementation="static")
    with pytest.raises(TypeError, match="StaticCache"):
        generated(model, ids, mask, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    with pytest.raises(ValueError, match="attention_mask"):
        generated(model, ids, None)
    with pytest.raises(ValueError, match="hidden_states"):
        model(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match="(?i)flash"):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(NotImplementedError, match="continuous"):
        model.generate_batch([[1, 2]])
    right, right_mask, _ = batch("right")
    with pytest.raises(ValueError, match="pad on the left"):
        generated(model, right, right_mask, prefill_chunk_size=8)


@pytest.mark.parametrize("policy", CASES, ids=str)
def test_a_split_outside_its_row_is_refused(wide, policy):
    """Without a decode-phase token there is nothing to answer from. It counts each row's own tokens, not columns."""
    model = wide.under(**policy)
    for side in ("left", "right"):
        ids, mask, _ = batch(side)
        for start, words in (([33, 23, 12], "row 1 is 23, expected 0 to 22"), ([33, 20, 99], "row 2 is 99.* 0 to 30"),
                             ([-1, 20, 12], "row 0 is -1, expected 0 to 39"), (23, "row 1 is 23"),
                             ([5, 6], "one position for each of 3 rows"),
                             ([[33, 20, 12]], "one position for each of 3 rows")):  # fmt: skip
            for use_cache in (True, False):
                with pytest.raises(ValueError, match=words):
                    generated(model, ids, mask, decode_start=start, use_cache=use_cache)
            with pytest.raises(ValueError, match=words):
                model(ids, attention_mask=mask, decode_start=start)
        assert generated(model, ids, mask, 1, decode_start=[39, 22, 30]).shape == (3, 41)


@pytest.mark.parametrize("policy", CASES, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_in_pieces(wide, policy, implementation):
    """The split may lie in a later piece. In one without padding or decode-phase tokens the anchor goes on alone, and
    sees nothing but itself."""
    model = wide.under(implementation, **policy)
    with torch.no_grad():
        tokens, cache = torch.tensor([random_tokens(4, 20)]), PolicyCache()
        model(tokens[:, :9], decode_start=15, past_key_values=cache)
        got = model(tokens[:, 9:], past_key_values=cache).logits[0, 6:]
        assert difference(got, model(tokens, decode_start=15).logits[0, 15:]) <= TOLERANCE


def test_packed_sequences_are_refused(wide):
    """Positions that start again once let a sequence see the one before it."""
    ids, mask, _ = batch("left")
    model = wide.under(policy="full")
    packed = torch.arange(40).remainder(20)[None].expand(3, -1)
    for places in (packed, torch.arange(40)[None] * 2):
        with pytest.raises(ValueError, match="position_ids are not consecutive.*attention_mask"):
            model(ids, position_ids=places)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    for filler in (0, 1):
        places = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
        assert torch.equal(model(ids, attention_mask=mask, position_ids=places).logits[mask.bool()], expected)
    model(ids, attention_mask=mask, position_ids=torch.arange(40)[None])


def test_a_marker_is_made_of_real_tokens(wide):
    """A row that ends with the marker's first token is not completed by its padding."""
    model = wide.under(policy="speed", k=3)
    ids, mask, sequences = batch("right")
    ids[1, 22], sequences[1][22] = 7, 7
    ids[1, 5:7] = torch.tensor([7, 3])
    model.config.decode_marker = [7, 3]  # 3 is the padding
    with torch.no_grad():
        found = model(ids, attention_mask=mask, packed=True).decode_columns
    assert found[1, :3].tolist() == [0, 5, 6]


def test_raw_errors_have_words(wide):
    model, cache = wide.under(policy="speed", k=3), PolicyCache()
    ids, mask, _ = batch("left")
    for length in (0, 40):
        empty = torch.zeros(3, length, dtype=torch.long)
        with pytest.raises(ValueError, match="row 0 of the prompt is empty"):
            generated(model, empty, torch.zeros_like(empty))
    with pytest.raises(ValueError, match="holds no token"):
        model(ids[:, :0])
    first = generated(model, ids, mask, past_key_values=cache)
    for rows in (1, 2):
        with pytest.raises(ValueError, match=f"holds 3 sequences, the batch has {rows}"):
            generated(model, first[:rows], None, past_key_values=cache, pad_token_id=None)
        with pytest.raises(ValueError, match=f"holds 3 sequences, the batch has {rows}"):
            model(ids[:rows, :1], past_key_values=cache)
    with pytest.raises(FileNotFoundError, match="/nosuch.safetensors: no such file"):
        SpeedLlamaForCausalLM.from_pretrained("/nosuch.safetensors")
    model.config.output_hidden_states = True
    try:
        with pytest.raises(ValueError, match="output_hidden_states"):
            model(ids)
    finally:
        model.config.output_hidden_states = False


def test_pipeline_and_streamer(wide):
    tokenizer = read_tokenizer(wide.file)
    model = wide.under(policy="speed", k=3)
    model.config.use_chat_template_of(tokenizer)
    assert tokenizer.decode(model.config.decode_marker) == "<|start_header_id|>assistant<|end_header_id|>\n\n"
    chats = [[{"role": "user", "content": text}] for text in ("Hello there", "and the sands of the other band?")]
    inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", padding=True,
                                           padding_side="left", return_dict=True)  # fmt: skip
    out = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert [pipe(chat, **settings)[0]["generated_text"][-1]["content"] for chat in chats] == texts
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    one = tokenizer.apply_chat_template(chats[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.generate(**one, **settings, streamer=streamer)
    assert "".join(streamer) == texts[0]


def test_from_embeddings(wide):
    """Without ids no marker can be found; a split that is given counts."""
    model = wide.under(policy="speed", k=3)
    ids, mask, _ = batch("left")
    embeds = model.get_input_embeddings()(ids)
    for split in ({"decode_start": list(STARTS)}, {}):
        by_ids = generated(model, ids, mask, **split)[:, ids.shape[1] :]
        out = model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, max_new_tokens=12,
                             min_new_tokens=12, pad_token_id=3, **split)  # fmt: skip
        assert torch.equal(out, by_ids)


@pytest.mark.slow
def test_smollm2_writes_the_engines_text(smollm2):
    tokenizer = read_tokenizer(smollm2)
    model = SpeedLlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model.config.use_chat_template_of(tokenizer)
    questions = ["What is the capital of France?", "Name three colours.", "Why is the sky blue? Two sentences."]
    for policy in ({"policy": "full"}, {"policy": "speed", "k": 24}, {"policy": "speed", "k": 24, "bos": False},
                   {"policy": "speed", "k": 15}, {"policy": "pop", "k": 20}):  # fmt: skip
        model.set_policy(policy=policy["policy"], num_key_value_layers=policy.get("k"), anchor=policy.get("bos", True))
        chats = [[{"role": "user", "content": question}] for question in questions]
        inputs = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_tensors="pt", padding=True,
                                               padding_side="left", return_dict=True)  # fmt: skip
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for question, ids in zip(questions, out, strict=True):
            expected = run_engine(
                "generate", "-m", smollm2, "--chat", "-p", question, "-n", 32, *engine_flags(**policy)
            )
            got = tokenizer.decode(ids, skip_special_tokens=True)
            assert got.strip() == expected.decode().strip(), (question, policy)
    assert np.isfinite(model(inputs["input_ids"]).logits.detach().numpy()).all()
