"""Texts of a file, one a line."""

from __future__ import annotations

from hf_glu.checkpoint.loading import read_texts


def test_only_ends_of_lines_end_a_text(tmp_path):
    path = tmp_path / "texts.txt"
    texts = ["one\u2028text", "an\x0cother", "and\x85a third"]
    path.write_bytes("\r\n".join([*texts, "", "  "]).encode())
    assert read_texts(path) == texts
