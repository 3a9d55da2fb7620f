"""A Hugging Face folder, as save_pretrained writes it. Its files are not trusted. Its index may name other files."""

from pathlib import Path

from .failure import Failure, unsupported
from .files import Checkpoint, Safetensors, Weight, is_parameter, read_json
from .tokenizer import read_tokenizer


def folder_tensors(folder):
    """(name -> Weight, the names of the files read). model.safetensors beats an index, as in transformers. Without
    both, every .safetensors file is read, but an adapter."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    where = None
    if single.is_file():
        paths = [single]
    elif index.is_file():
        where = read_json(index)["weight_map"]
        if not all(Path(file).name == file for file in where.values()):
            raise Failure(f"{index}: weight_map names a file outside the folder; get the file again")
        paths = [folder / file for file in dict.fromkeys(where.values())]
    else:
        paths = sorted(path for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
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
            if stored.dtype not in ("F32", "F16", "BF16") and is_parameter(name):
                raise unsupported(f"the dtype {stored.dtype} in {name}", folder)
            tensors[name] = Weight(stored.shape, file.rows(name))
    for name in where or ():
        if name not in tensors:
            raise Failure(f"{folder}: {name} is not in {where[name]}, as the index says; get the whole checkpoint")
    return tensors, [path.name for path in paths]


def read_folder(folder, tokenizer_only):
    tokenizer, files = read_tokenizer(folder)
    config = read_json(folder / "config.json", required=not tokenizer_only)
    generation = read_json(folder / "generation_config.json", required=False)
    files += [name for name in ("config.json", "generation_config.json") if (folder / name).is_file()]
    tensors, weight_files = ({}, []) if tokenizer_only else folder_tensors(folder)
    return Checkpoint(config, generation, tokenizer, tensors, {}, [*weight_files, *files])
