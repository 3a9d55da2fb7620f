"""Reads a checkpoint: a Hugging Face folder or a GGUF file, either of them a stranger's.

Both readers, folder.py and gguf_file.py, give (config, generation config, Tokenizer, tensors, extra). config: with the
keys of Hugging Face's config.json, still to be checked. tensors: name -> (shape, rows), under Hugging Face's names;
rows(a, b) gives rows a..b of the first dimension as float32, float16 or uint16 (bf16). extra: tensors copied as is.

In the order that reads best: failure.py, files.py, config.py, tokenizer.py, chat.py, folder.py, gguf_file.py. None of
them trusts what it reads: what is wrong with it in a foreseen way is a Failure, by name; a value of a kind that no
checkpoint has ends in one of Python's own errors, which export_weights.main reports in one line as well.
"""
