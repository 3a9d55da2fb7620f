"""The examples of README.md run as they stand there, one after the other."""

import re

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_examples(smollm2, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "hf" / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {"MODEL": str(smollm2)}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102
    assert "Shakespeare" in capsys.readouterr().out
    assert names["again"].shape[1] > names["ids"].shape[1]
    assert 0 < names["loss"].item() < 20
