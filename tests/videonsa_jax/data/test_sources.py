"""Records of both layouts, and what a broken one says."""

import json
import pathlib
import pickle

import pytest

from videonsa_jax.data import chat
from videonsa_jax.data.chat import Message
from videonsa_jax.data.errors import BadSample
from videonsa_jax.data.sources import JoinedSource, JsonSource, parse_record
from videonsa_jax.data.visuals import FrameFiles, ImageFile, VideoFile
from videonsa_jax.errors import UserError

ROOT = pathlib.Path("videos")
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]


def llava(**fields) -> dict:
    return {"id": "1", "conversations": TURNS, **fields}


def swift(text: str, **fields) -> dict:
    return {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Red."}],
        **fields,
    }


def parse(record: object):
    return parse_record(record, "d.jsonl:7", ROOT)


def test_llava_video():
    conversation = parse(llava(video="a/b.mp4"))
    assert conversation.visuals == (VideoFile("videos/a/b.mp4"),)
    assert conversation.messages == (
        Message("user", f"{chat.VIDEO}\nWhat?"),
        Message("assistant", "Red."),
    )


@pytest.mark.parametrize("field", ["video", "images"])
def test_llava_frames_of_one_video(field):
    conversation = parse(llava(**{field: ["0.jpg", "1.jpg"]}, fps=2))
    assert conversation.visuals == (FrameFiles(("videos/0.jpg", "videos/1.jpg"), 2.0),)
    assert chat.VIDEO in conversation.messages[0].text


def test_absolute_paths_stay():
    assert parse(llava(video="/data/b.mp4")).visuals == (VideoFile("/data/b.mp4"),)


def test_several_turns_and_a_system_turn():
    turns = [{"from": "system", "value": "Be brief."}, *TURNS, {"from": "human", "value": "Sure?"}]
    messages = parse({"video": "b.mp4", "conversations": turns}).messages
    assert [m.role for m in messages] == ["system", "user", "assistant", "user"]


def test_swift_images_are_one_tag_each():
    conversation = parse(swift("<image><image>What?", images=["0.jpg", "1.jpg"]))
    assert conversation.visuals == (ImageFile("videos/0.jpg"), ImageFile("videos/1.jpg"))
    assert conversation.messages[0].text == f"{chat.IMAGE}{chat.IMAGE}What?"


def test_swift_videos_and_images_in_the_order_of_the_text(tmp_path):
    for name in ("1.png", "0.png"):
        (tmp_path / name).touch()
    record = swift("<video>?<image>!<video>", images=["i.png"], videos=["v.mp4", str(tmp_path)])
    frames = FrameFiles((f"{tmp_path}/0.png", f"{tmp_path}/1.png"), None)
    visuals = parse(record).visuals
    assert visuals == (VideoFile("videos/v.mp4"), ImageFile("videos/i.png"), frames)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1, 2], "a record must be a JSON object, not list"),
        ({"video": "a.mp4"}, 'has neither "conversations" nor "messages"'),
        (llava(conversations=[]), "must be a list of at least one turn"),
        (llava(conversations=[{"from": "gpt"}]), 'an object with a text "value"'),
        (llava(conversations=[{"from": "cat", "value": "?"}]), "\"from\": 'cat' is not one of"),
        (llava(), "1 <image> and 0 <video> tags for 0 images and 0 videos"),
        (llava(videos=["a.mp4", "b.mp4"]), "1 <image> and 0 <video> tags for 0 images and 2"),
        (swift("What?", images=["a.png"]), "0 <image> and 0 <video> tags for 1 images"),
        (swift("<image>" * 3, images=["a.png"]), "3 <image> and 0 <video> tags for 1 images"),
        (llava(video=7), "7 is not the path of an image or video"),
        (llava(video=[]), "has zero frames"),
        (llava(video=["a.png"], fps=0), '"fps": 0 must be a number above 0'),
    ],
)
def test_broken_record_is_one_clear_line(record, reason):
    with pytest.raises(BadSample) as error:
        parse(record)
    assert str(error.value).startswith("d.jsonl:7: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


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
