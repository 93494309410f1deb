"""What libraries do several times over while a GGUF file is read, done once, and theirs again afterwards."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from featherweight.checkpoint.patches import read_once
from tests.support.gguf_files import write_gguf


def test_a_header_is_parsed_once_and_so_is_the_map_of_names(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint)
    theirs = gguf.GGUFReader, gguf.get_tensor_name_map
    with pytest.raises(KeyError), read_once():
        with read_once():
            once = gguf.GGUFReader(file), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.GGUFReader(str(file)) is once[0]
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is once[1]
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3) is not once[1]
        raise KeyError
    assert theirs == (gguf.GGUFReader, gguf.get_tensor_name_map)
    assert gguf.GGUFReader(file) is not once[0]
