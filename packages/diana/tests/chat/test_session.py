"""diana-index and diana-chat, as a user meets them."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diana import load_diana
from diana.chat.questions import QUESTIONS
from diana.cli import chat_main, index_main
from diana.data import PROMPT_POOL, build_eval_transform, render_dialogue
from diana.search import diana_fingerprint
from diana.search_options import MEAN, STD
from diana.tokenizer import encode
from tbps_common.images import read_image
from tbps_common.search.gallery import list_galleries

Typed = Callable[[str], None]


@pytest.fixture(scope="session")
def pictures(world: Path) -> Path:
    return world / "ChatPedes" / "imgs"


@pytest.fixture(scope="session")
def index(pretrained: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Index of all pictures, with attributes."""
    out = tmp_path_factory.mktemp("index") / "people.lance"
    flags = ["--pretrained", str(pretrained), "--images", str(pictures), "--out", str(out), "--mode", "all"]
    assert index_main([*flags, "--batch_size", "8"]) == 0
    return out


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """`typed(text)`: what the user will type."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def stored(out: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Paths and features of the only gallery of a database."""
    (gallery,) = list_galleries(out)
    rows = gallery.table.search().where("problem IS NULL").to_arrow()
    features = {one.name: torch.tensor(rows[one.name].to_pylist()).view(-1, *one.shape) for one in gallery.features}
    return [gallery.file(path) for path in rows["path"].to_pylist()], features


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_the_index_holds_features_paths_and_the_models_mark(index: Path, pretrained: Path, pictures: Path) -> None:
    paths, features = stored(index)
    assert set(features) == {"feature", "attributes"}
    assert paths == sorted(str(path) for path in pictures.rglob("*.png"))
    assert list_galleries(index)[0].fingerprint == diana_fingerprint(pretrained, "all")
    model, _ = load_diana(pretrained)
    transform = build_eval_transform((64, 32), MEAN, STD)
    with torch.no_grad():
        embeds, tokens = model.encode_image(torch.stack([transform(read_image(path)) for path in paths[:3]]))
        attributes = model.refine(tokens)
    assert torch.allclose(features["feature"][:3], torch.nn.functional.normalize(embeds, dim=1), atol=1e-5)
    assert torch.allclose(features["attributes"][:3], torch.nn.functional.normalize(attributes, dim=2), atol=1e-5)


def test_an_index_is_completed_and_bad_images_are_left_out(
    pretrained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "own", tmp_path / "g.lance"
    files = sorted(pictures.rglob("*.png"))
    folder.mkdir()
    for number in range(3):
        shutil.copy(files[number], folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    flags = ["--pretrained", str(pretrained), "--images", str(folder), "--out", str(out)]
    assert index_main(flags) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "added 3, updated 0, removed 0, skipped 1, total 3"
    assert "broken.jpg" in said.err
    assert index_main(flags) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "added 0, updated 0, removed 0, skipped 1, total 3" and not said.err
    (folder / "broken.jpg").unlink()
    shutil.copy(files[4], folder / "a_new_one.png")
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(str(path) for path in sorted(folder.iterdir())), encoding="utf-8")
    assert index_main([*flags, "--images", str(listing)]) == 0
    assert last_line(capsys) == "added 1, updated 0, removed 0, skipped 0, total 4"
    # Another mode has other features: they stand beside the first ones.
    assert index_main([*flags, "--mode", "all"]) == 0
    assert last_line(capsys) == "added 4, updated 0, removed 0, skipped 0, total 4"
    assert len(list_galleries(out)) == 2


@pytest.fixture
def own(pictures: Path, tmp_path: Path) -> Path:
    """A folder of three pictures."""
    folder = tmp_path / "own"
    folder.mkdir()
    for number, file in enumerate(sorted(pictures.rglob("*.png"))[:3]):
        shutil.copy(file, folder / f"{number}.png")
    return folder


def test_an_index_follows_its_folder(
    pretrained: Path,
    own: Path,
    tmp_path: Path,
    typed: Typed,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A picture that is gone and one that is another now: the chat says so, and diana-index puts it right."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "g.lance"
    flags = ["--pretrained", str(pretrained), "--images", "own", "--out", str(out)]
    assert index_main(flags) == 0
    first = stored(out)[1]["feature"]
    (own / "0.png").unlink()
    shutil.copy(own / "2.png", own / "1.png")
    typed("quit\n")
    chat = ["--pretrained", str(pretrained), "--index", str(out), "--out_dir", str(tmp_path / "chat")]
    assert chat_main(chat) == 0
    assert f"1 of them are no longer where they were ({own / '0.png'})" in capsys.readouterr().err
    assert index_main(flags) == 0
    assert last_line(capsys) == "added 0, updated 1, removed 1, skipped 0, total 2"
    paths, features = stored(out)
    assert sorted(paths) == [str(own / "1.png"), str(own / "2.png")]
    assert torch.allclose(features["feature"], first[[2, 2]], atol=1e-5)
    (own / "1.png").unlink()
    assert index_main(flags) == 0
    assert last_line(capsys) == "added 0, updated 0, removed 1, skipped 0, total 1"


def test_the_mark_tells_two_trainings_apart(pretrained: Path, tmp_path: Path) -> None:
    """Same configuration, same sizes, other weights."""
    other = tmp_path / "other"
    shutil.copytree(pretrained, other)
    assert diana_fingerprint(other, "all") == diana_fingerprint(pretrained, "all")
    weights = load_file(pretrained / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    sizes = {(folder / "model.safetensors").stat().st_size for folder in (pretrained, other)}
    assert len(sizes) == 1
    assert diana_fingerprint(other, "all") != diana_fingerprint(pretrained, "all")


def test_strange_bytes_are_left_out_and_ctrl_c_keeps_the_dialogue(
    index: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            data = super().read1(-1 if size is None else size)
            if not data:
                raise KeyboardInterrupt
            return data

    typed = io.TextIOWrapper(Interrupted("A man in a café jacket.\n".encode("latin-1")), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    flags = ["--pretrained", str(pretrained), "--index", str(index), "--out_dir", str(tmp_path), "--topk", "1"]
    assert chat_main([*flags, "--questioner", "fixed"]) == 130
    saved = json.loads((tmp_path / "dialogue.json").read_text(encoding="utf-8"))
    assert [turn[1]["value"] for turn in saved] == ["A man in a caf jacket."]
    assert "interrupted" in capsys.readouterr().err


def test_a_scripted_conversation(
    index: Path, pretrained: Path, typed: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answer, answer, undo, another answer, reset, begin anew, quit."""
    out = tmp_path / "chat"
    flags = ["--pretrained", str(pretrained), "--index", str(index), "--topk", "4", "--out_dir", str(out)]
    typed("A woman in a red coat.\nBlue jeans.\nundo\nBlack trousers.\nreset\nundo\nA man.\nquit\n")
    assert chat_main(flags) == 0
    shown = capsys.readouterr().out
    questions = re.findall(r"^ASSISTANT: (.*)$", shown, re.MULTILINE)
    assert questions[0] == PROMPT_POOL[0]
    assert questions[3] == questions[1]  # asked again after undo
    assert [questions[place] for place in (5, 6)] == [PROMPT_POOL[0]] * 2
    assert questions[1] in {question.text for question in QUESTIONS}
    assert not any("upper body" in question or "a man or a woman" in question for question in questions[:5])
    assert "Taken back; 1 answer(s) left." in shown
    assert "There is no answer to take back." in shown
    assert len(re.findall(r"drawn in", shown)) == 4
    saved = json.loads((out / "dialogue.json").read_text(encoding="utf-8"))
    assert [[message["value"] for message in turn] for turn in saved] == [[PROMPT_POOL[0], "A man."]]
    assert sorted(path.name for path in out.glob("*.png")) == ["round_1.png", "round_2.png"]
    with Image.open(out / "round_1.png") as picture:
        assert min(picture.size) > 200

    # The first list is the ranking of the rendered dialogue by the sum of both similarities.
    model, tokenizer = load_diana(pretrained)
    paths, tensors = stored(index)
    rounds = [[{"from": "gpt", "value": PROMPT_POOL[0]}, {"from": "user", "value": "A woman in a red coat."}]]
    with torch.no_grad():
        tokens = encode(tokenizer, [render_dialogue(rounds)], 400, False)
        embed, dense = model.encode_text(**tokens)
        scores = (torch.nn.functional.normalize(embed, dim=1) @ tensors["feature"].T)[0]
        scores = scores + model.refine_sim(model.refine(dense, tokens["attention_mask"]), tensors["attributes"])[0]
    listed = re.findall(r"^ +(\d+) +(-?[\d.]+)  (.*\.png)$", shown, re.MULTILINE)[:4]
    best = scores.topk(4).indices.tolist()
    assert [path for _, _, path in listed] == [paths[place] for place in best]
    assert [float(score) for _, score, _ in listed] == pytest.approx(scores[best].tolist(), abs=2e-4)


def test_it_ends_with_the_rounds_or_the_input(
    index: Path, pretrained: Path, typed: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--pretrained", str(pretrained), "--index", str(index), "--out_dir", str(tmp_path), "--topk", "1"]
    typed("Somebody.\nI forgot.\nnever read\n")
    assert chat_main([*flags, "--rounds", "2", "--questioner", "fixed"]) == 0
    shown = capsys.readouterr().out
    assert "never read" not in shown
    assert QUESTIONS[0].text in shown
    typed("")
    assert chat_main(flags) == 0
    assert "ASSISTANT: " + PROMPT_POOL[0] in capsys.readouterr().out


def test_a_dialogue_that_is_too_long_is_told(
    index: Path, pretrained: Path, typed: Typed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed("Somebody with " + "very " * 80 + "long hair.\n")
    flags = ["--pretrained", str(pretrained), "--index", str(index), "--out_dir", str(tmp_path), "--rounds", "1"]
    assert chat_main([*flags, "--max_seq_length", "100"]) == 0
    assert "the model reads the first 100" in capsys.readouterr().out


def test_an_index_of_another_checkpoint_is_refused(
    index: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pretrained, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "note": 1}), encoding="utf-8")
    assert chat_main(["--pretrained", str(other), "--index", str(index)]) == 2
    assert "holds no features of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--index", "nothing.lance"], "nothing.lance does not exist"),
        (["--base_url", "http://127.0.0.1:9/v1"], "--base_url needs --model"),
        (["--model", "m"], "OPENAI_API_KEY"),
        (["--pretrained", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    more: list[str], message: str, index: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat_main(["--pretrained", str(pretrained), "--index", str(index), *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
