"""The page "Write a reward" runs as it stands, block by block in one session."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "write-a-reward.md"


def test_every_block_of_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    session = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), session)
    output, reward = session["output"], session["reward"]
    torch.testing.assert_close(output.rewards[0], reward.score(output.texts[0]), rtol=0, atol=1e-4)
    assert capsys.readouterr().out.count("tensor(") >= 5
