"""Files of records, and several of them as one."""

import codecs
import json
import pathlib
import pickle

import pytest

from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.sources import JoinedSource, JsonSource
from videonsa_jax.data.visuals import VideoFile
from videonsa_jax.errors import UserError

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]


def llava(**fields) -> dict:
    return {"id": "1", "conversations": TURNS, **fields}


def test_jsonl_is_read_line_by_line(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [json.dumps(llava(video=f"{i}.mp4")) for i in range(3)]
    path.write_text(f"{lines[0]}\n\n{lines[1]}\n{{broken\n{lines[2]}")
    source = JsonSource(path)
    assert len(source) == 4
    assert source[3].visuals == (VideoFile(str(tmp_path / "2.mp4")),)
    assert source[1].name == f"{path}:3"
    with pytest.raises(BadSample, match=f"^{path}:4: not readable as JSON: "):
        source[2]


def test_json_array(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([llava(video="0.mp4"), llava(video="1.mp4")]))
    source = JsonSource(path, video_root="elsewhere")
    assert len(source) == 2
    assert source[1].visuals == (VideoFile("elsewhere/1.mp4"),)
    assert source[1].name == f"{path}[1]"


@pytest.mark.parametrize("indent", [None, 1])
def test_byte_order_mark_is_passed_over(tmp_path, indent):
    path = tmp_path / "d.json"
    records = [llava(video="0.mp4"), llava(video="1.mp4")]
    array = json.dumps(records, indent=indent).encode()
    lines = b"\n".join(json.dumps(record).encode() for record in records)
    mark = codecs.BOM_UTF8
    for data in (mark + array, mark + b"\r\n" + array, mark + lines, mark + lines + b"\n" + mark):
        path.write_bytes(data)
        source = JsonSource(path)
        assert [v.path for i in range(len(source)) for v in source[i].visuals] == [
            f"{tmp_path}/0.mp4",
            f"{tmp_path}/1.mp4",
        ]


def test_files_with_marks_can_be_put_together(tmp_path):
    path = tmp_path / "d.jsonl"
    line = json.dumps(llava(video="0.mp4")).encode() + b"\n"
    path.write_bytes((codecs.BOM_UTF8 + line) * 2)
    assert JsonSource(path)[1].visuals == (VideoFile(f"{tmp_path}/0.mp4"),)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused(tmp_path, encoding):
    path = tmp_path / "d.json"
    for text in (json.dumps([llava(video="0.mp4")]), json.dumps(llava(video="0.mp4"))):
        path.write_text(text, encoding=encoding)
        with pytest.raises(UserError, match=f"{path}: is UTF-16 or UTF-32"):
            JsonSource(path)


@pytest.mark.parametrize("line", [b'{"id": "caf\xe9"}', b"[" * 100_000 + b"]" * 100_000])
def test_line_that_no_parser_takes_is_a_bad_sample(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(llava(video="0.mp4")).encode() + b"\n" + line)
    source = JsonSource(path)
    assert source[0].visuals
    with pytest.raises(BadSample, match=":2: not readable as JSON"):
        source[1]


def test_unusable_files_are_named(tmp_path):
    path = tmp_path / "d.json"
    with pytest.raises(UserError, match=f"{path}: no such file"):
        JsonSource(path)
    path.write_text("")
    with pytest.raises(UserError, match=f"{path}: holds no record"):
        JsonSource(path)
    path.write_text('[{"video": ')
    with pytest.raises(UserError, match=f"{path}: not readable as a JSON array"):
        JsonSource(path)


def test_joined_sources_follow_each_other(tmp_path, write_jsonl):
    sizes = {"a": 2, "b": 1, "c": 3}
    parts = [
        JsonSource(write_jsonl(tmp_path / f"{name}.jsonl", [llava(video=f"{i}") for i in range(n)]))
        for name, n in sizes.items()
    ]
    source = pickle.loads(pickle.dumps(JoinedSource(parts)))  # workers get a copy
    names = [pathlib.Path(source[i].name).name for i in range(len(source))]
    assert names == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "c.jsonl:1", "c.jsonl:2", "c.jsonl:3"]
