"""FASTA and a table of labels become records; what does not match is named."""

import pytest

from anytoken.data.fasta import label_fasta
from anytoken.data.sources import read_records
from anytoken.utils.errors import RecordError

FASTA = ">one of them\nACGT\nAC\n>two\nGGG\n"


@pytest.fixture
def write(tmp_path):
    def write_(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_


def test_sequences_get_their_labels_and_other_columns(write, tmp_path):
    labels = write("labels.tsv", "name\tlabel\tsplit\ntwo\t0\ttest\none\t1\ttrain\n")
    path = label_fasta(write("a.fasta", FASTA), labels, tmp_path / "deep/set.jsonl")
    assert list(read_records(path)) == [
        {"name": "one", "label": "1", "split": "train", "dna": "ACGTAC"},
        {"name": "two", "label": "0", "split": "test", "dna": "GGG"},
    ]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("name,label\none,1\n", "the sequence 'two' has no label"),
        ("name,label\none,1\ntwo,0\nthree,1\n", "no sequence for 1 labels; the first: 'three'"),
        ("name,label\none,1\none,0\n", "'one' appears twice"),
        ("id,label\none,1\n", "needs the columns name and label; it has id, label"),
    ],
)
def test_what_does_not_match_is_named(write, tmp_path, labels, says):
    with pytest.raises(RecordError, match=says):
        label_fasta(write("a.fasta", FASTA), write("labels.csv", labels), tmp_path / "set.jsonl")
    assert not (tmp_path / "set.jsonl").exists()
