"""One reader of JSON lines: where a line ends, what is refused, and a log that a kill has torn."""

import gzip
import json
from pathlib import Path

import pytest

from anytoken.evaluation.tokenizers.card import read_curve
from anytoken.training.metrics import MetricsLog, read_metrics
from anytoken.utils.errors import DataError
from anytoken.utils.json_lines import (
    load_json,
    read_json_lines,
)

ODD = "a\u2028b\u2029c\u0085d\x0be\x1cf"


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    lines = [{"text": ODD}, {"text": "b"}]
    text = "\r\n\n".join(json.dumps(line, ensure_ascii=False).replace("\\u000b", "\\u000b") for line in lines)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(read_json_lines(path)) == lines
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_json_lines(packed)) == lines
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read completely"):
        list(read_json_lines(packed))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' appears twice"),
        (b'{"b": [{"a": 1, "a": 1}]}', "the key 'a' appears twice"),
        (b'{"a": "\\ud83d x"}', r"lone surrogate \\ud83d"),
        (b"\xff\xfe{}", "not UTF-8 at byte 1"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"a": ' + b"x" * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "line 2"),
    ],
)
def test_what_is_refused_is_named_with_file_and_line_and_without_the_payload(
    line: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "\\ud83d\\ude00"}\n' + line + b"\n")
    with pytest.raises(DataError, match=said) as error:
        list(read_json_lines(path))
    assert str(error.value).startswith(f"{path} line 2: ") and len(str(error.value)) < 300 + len(str(path))


def test_a_pair_of_surrogates_is_a_letter() -> None:
    assert load_json(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_a_torn_last_line_of_a_log_is_skipped_and_any_other_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [entry["step"] for entry in read_metrics(log)] == [1, 2]
    assert [entry["step"] for entry in read_curve(log)] == [1, 2]
    with pytest.raises(DataError, match="line 3"):
        list(read_json_lines(log))
    log.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(log)


def test_a_tokenizer_training_resumes_after_a_torn_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    MetricsLog(tmp_path / "metrics.jsonl").rewind_to_step(2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
