"""Reads a checkpoint: a Hugging Face folder or a GGUF file. Its author is unknown, so nothing in it is trusted.

Both readers, folder.py and gguf_file.py, return a Checkpoint (files.py).

Read the files in this order: failure.py, files.py, config.py, pattern.py, tokenizer.py, chat.py, folder.py,
gguf_file.py, adapter.py. An error that they expect is a Failure, which names what is wrong. A value of a type that no
checkpoint has there raises one of Python's own errors. export_weights.main reports both in one line.
"""
