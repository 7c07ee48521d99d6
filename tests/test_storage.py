"""Reading text and JSON: every wrong file is a UserError that names file and position."""

import pytest

from respodiff_jax.errors import UserError
from respodiff_jax.storage import read_json, read_json_lines, read_text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b": }', r"a\.json is not JSON: line 2, column 7: Expecting value; fix the"),
        (b"", r"a\.json is not JSON: column 1: "),
        (b"a\xff", r"a\.json cannot be read as UTF-8: invalid start byte at byte 1"),
        (b"[" * 10**5, r"a\.json is not JSON that can be read: it is nested too deep"),
        (b"1" * 5000, r"the number 1{20} has 5000 digits, expected 18 at most"),
        (b"1" * 400, r"the number 1{20} has 400 digits, expected 18 at most"),
        (b"[NaN]", r"the number NaN is not finite"),
        (b"[1e999]", r"the number 1e999 is not finite"),
        (b'["\\ud800"]', r"it has half of a surrogate pair"),
        (b'[{"a": 1, "b": 2, "a": 3}]', r"an object has the keys \['a'\] more than once"),
        (None, r"a\.json cannot be read: .*No such file"),
    ],
)
def test_wrong_json_is_named_with_its_position(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=f"^settings /.*{message}"):
        read_json(tmp_path / "a.json", "settings")


def test_text_keeps_line_ends_and_drops_the_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a":\r\n[1]}')
    assert read_text(tmp_path / "a.json", "settings") == '{"a":\r\n[1]}'
    assert read_json(tmp_path / "a.json", "settings") == {"a": [1]}


def test_unfinished_last_line_of_a_log_is_left_out(tmp_path):
    log = tmp_path / "a.jsonl"
    log.write_text('{"step": 1, "note": "a\u2028b"}\n{"step": 2}\n{"st', encoding="utf-8")
    assert read_json_lines(log) == [{"step": 1, "note": "a\u2028b"}, {"step": 2}]
    log.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"^log /.*a\.jsonl, line 2 is not JSON: column 2: "):
        read_json_lines(log)
