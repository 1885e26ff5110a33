"""The table of inverse problems: it goes on where it was, and its plain methods."""

import json

import pytest
import torch
from torch.nn import functional

from benchmarks import inverse
from genmodels.sampling.operators import named_operator
from tests.helpers.paths import ROOT


def test_the_table_goes_on_and_makes_no_row_twice(tmp_path, capsys, monkeypatch):
    some = torch.rand(3, 1, 8, 8) * 2 - 1, torch.zeros(3, dtype=torch.int64)
    monkeypatch.setattr(inverse, "held_out", lambda *_: some)
    (tmp_path / "a.png").write_bytes(b"")  # a figure that is there is not drawn
    words = ["digits", "num=2", "samples=1", f"out={tmp_path / 'a.json'}"]
    words += [f"figure={tmp_path / 'a.png'}", f"models={ROOT / 'pretrained/edm_digits'}"]
    assert inverse.main([*words, "solvers=diffpir", "steps=1"]) == 0
    assert inverse.main([*words, "solvers=diffpir,pigdm", "steps=1"]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    keys = [inverse.key_of(row) for row in rows]
    assert len(set(keys)) == len(keys) == 3 * 3  # plain and two solvers for each operator
    assert len(capsys.readouterr().out.splitlines()) == 9
    table = (tmp_path / "a.md").read_text()
    assert "| `blur:1` | `edm_digits`, pigdm | 1 |" in table and "| bicubic |" in table
    assert inverse.main([*words, "seed=3"]) == 2  # rows of another command
    assert inverse.main(["letters"]) == 2


def test_plain_methods():
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    half, small, blur = (named_operator(w, (1, 8, 8)) for w in ("inpaint", "bicubic:2", "blur:1"))
    filled = inverse.plain(half(x), half, x.shape, 0.05)
    assert torch.equal(filled, torch.cat([x[..., :4], x[..., 3:4].expand(-1, -1, -1, 4)], -1))
    large = inverse.plain(small(x), small, x.shape, 0.05)
    torch.testing.assert_close(large, functional.interpolate(small(x), (8, 8), mode="bicubic"))
    # Wiener's filter: each frequency by h / (|h|^2 + noise / signal).
    h = torch.fft.fft2(blur(functional.pad(torch.ones(1, 1, 1, 1), (0, 7, 0, 7))))
    expected = torch.fft.ifft2(torch.fft.fft2(x) * h.conj() / (h.abs() ** 2 + 0.01)).real
    torch.testing.assert_close(inverse.plain(x, blur, x.shape, 0.05), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", inverse.OPERATORS)
def test_operators_are_words_of_the_command(name):
    side = 8 if name == "digits" else 28
    for word in inverse.OPERATORS[name]:
        assert named_operator(word, (1, side, side))
