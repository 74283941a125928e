"""Models in several files, as llama.cpp splits them."""

from __future__ import annotations

from pathlib import Path

import gguf

from swarmcpp.models.gguf_header import read_header


def write_split(source: Path, directory: Path, count: int) -> list[Path]:
    """The llama model at `source` without its tokenizer, its tensors dealt out to `count` files."""
    reader = gguf.GGUFReader(source)
    paths = [directory / f"m-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for key, value in read_header(source).metadata.items():
                if key.startswith("llama.") and isinstance(value, int):
                    writer.add_uint32(key, value)
            writer.add_layer_norm_rms_eps(1e-6)
            writer.add_tokenizer_model("no_vocab")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths
