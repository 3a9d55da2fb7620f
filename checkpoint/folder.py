"""A Hugging Face folder, as save_pretrained writes it. Its files are not trusted. Its index may name other files."""

from pathlib import Path

from .failure import Failure, unsupported
from .files import Checkpoint, Safetensors, Weight, read_json
from .tokenizer import read_tokenizer


def folder_tensors(folder):
    """name -> Weight, from the files that the index names. Without an index, from model.safetensors; without that, from
    every .safetensors file."""
    index = folder / "model.safetensors.index.json"
    where = read_json(index)["weight_map"] if index.is_file() else None
    if where is not None:
        if not all(Path(file).name == file for file in where.values()):
            raise Failure(f"{index}: weight_map names a file outside the folder; get the file again")
        paths = [folder / file for file in dict.fromkeys(where.values())]
    elif (folder / "model.safetensors").is_file():
        paths = [folder / "model.safetensors"]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise Failure(f"{folder}: no .safetensors file; save the model with transformers' save_pretrained", 2)
    tensors = {}
    for path in paths:
        if not path.is_file():
            raise Failure(f"{path}: no such file, but the index names it; get the whole checkpoint")
        file = Safetensors(path)
        for name, stored in file.tensors.items():
            if where is not None and where.get(name) != path.name:
                continue
            if name in tensors:
                raise Failure(f"{folder}: {name} is in two files; keep one checkpoint in the folder", 2)
            if stored.dtype not in ("F32", "F16", "BF16"):
                raise unsupported(f"the dtype {stored.dtype} in {name}", folder)
            tensors[name] = Weight(stored.shape, file.rows(name))
    for name in where or ():
        if name not in tensors:
            raise Failure(f"{folder}: {name} is not in {where[name]}, as the index says; get the whole checkpoint")
    return tensors


def read_folder(folder, tokenizer_only):
    tokenizer = read_tokenizer(folder)
    config = read_json(folder / "config.json", required=not tokenizer_only)
    generation = read_json(folder / "generation_config.json", required=False)
    return Checkpoint(config, generation, tokenizer, {} if tokenizer_only else folder_tensors(folder), {})
