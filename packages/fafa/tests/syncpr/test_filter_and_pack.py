"""fafa-syncpr filter and pack: scores against transformers' own, thresholds, questions, and the file that training reads."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fafa.cli import syncpr_main
from fafa.data import SynCPRDataset
from fafa.syncpr.pack import triplets
from fafa.syncpr.records import Quadruple, load_quadruples
from fafa.syncpr.scoring import PairScorer, square
from tbps_common.datasets import load_syncpr
from tbps_common.pipeline.stages import read_stage
from tbps_world.practice.server import PracticeServer

Flags = Callable[..., list[str]]


def manifest(path: Path) -> dict[str, Any]:
    return json.loads(Path(f"{path}.manifest.json").read_text(encoding="utf-8"))


def test_scores_are_the_librarys_cosines(pictured: Path, models: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    records = read_stage(pictured, "images")[:3]
    quadruples, _ = load_quadruples(pictured)
    pairs = [(pictured / record["left"], pictured / record["right"]) for record in records]
    texts = [quadruples[record["quadruple_id"]] for record in records]
    scorer = PairScorer(str(models / "clip"), torch.device("cpu"), torch.float32)
    with ThreadPoolExecutor(2) as readers:
        scored = scorer.score(pairs, [(text.caption_1, text.caption_2) for text in texts], readers)

    clip = CLIPModel.from_pretrained(models / "clip").eval()
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(models / "clip"),
        CLIPImageProcessor.from_pretrained(models / "clip"),
    )
    for pair, text, scores in zip(pairs, texts, scored):
        assert not isinstance(scores, str)
        tokens = tokenizer(
            [text.caption_1, text.caption_2], padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        pixels = processor(images=[square(Image.open(path)) for path in pair], return_tensors="pt")
        with torch.no_grad():
            output = clip(**tokens, **pixels)
        cosine = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        assert [scores.clip_left, scores.clip_right] == pytest.approx(cosine.tolist(), abs=2e-5)
        alike = torch.nn.functional.cosine_similarity(*output.image_embeds, dim=0)
        assert scores.identity == scores.pair_similarity == pytest.approx(float(alike), abs=2e-5)


def test_pictures_keep_head_and_feet_for_clip() -> None:
    padded = square(Image.new("RGB", (16, 32), "red"))
    assert padded.size == (32, 32)
    assert padded.getpixel((16, 0)) == padded.getpixel((16, 31)) == (255, 0, 0) != padded.getpixel((0, 0))


def test_thresholds_take_effect_without_models(
    copy_of_pictured: Path, filter_flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of_pictured
    command = ["filter", "--out", str(out), *filter_flags()]
    assert syncpr_main(command) == 0
    scores = read_stage(out, "scores")
    assert len(read_stage(out, "kept")) == len(scores) == 12
    assert all(set(record) >= {"clip_left", "clip_right", "identity", "pair_similarity", "vlm"} for record in scores)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the scores are there already")

    monkeypatch.setattr(PairScorer, "__init__", refuse)
    middle = sorted(record["clip_left"] for record in scores)[6]
    alike = sorted(record["pair_similarity"] for record in scores)[8]
    assert syncpr_main([*command, "--min-image-text", str(middle), "--max-pair-similarity", str(alike)]) == 0
    kept = read_stage(out, "kept")
    expected = [
        record
        for record in scores
        if min(record["clip_left"], record["clip_right"]) >= middle and record["pair_similarity"] <= alike
    ]
    assert kept == expected and 0 < len(kept) < 12
    written = manifest(out / "kept.jsonl")
    assert written["kept"] + sum(written["dropped"].values()) == 12 == written["items"]
    dropped = (out / "kept.jsonl.dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert Counter(json.loads(line)["reason"] for line in dropped) == written["dropped"]
    assert "12 pictures" not in capsys.readouterr().out
    assert syncpr_main([*command, "--min-identity", "1.5"]) == 0
    assert read_stage(out, "kept") == []
    assert syncpr_main(["pack", "--out", str(out)]) == 2
    assert "lower the thresholds" in capsys.readouterr().err and not (out / "SynCPR.json").exists()


def test_a_person_model_of_its_own_judges_identity(
    copy_of_pictured: Path, filter_flags: Flags, models: Path, tmp_path: Path
) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path / "person"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    assert syncpr_main(["filter", "--out", str(copy_of_pictured), *filter_flags("--person-model", str(folder))]) == 0
    records = read_stage(copy_of_pictured, "scores")
    assert all(record["identity"] != record["pair_similarity"] for record in records)


def test_pictures_that_cannot_be_read_are_dropped(copy_of_pictured: Path, filter_flags: Flags) -> None:
    records = read_stage(copy_of_pictured, "images")
    (copy_of_pictured / records[0]["left"]).unlink()
    (copy_of_pictured / records[5]["right"]).write_bytes(b"no picture")
    assert syncpr_main(["filter", "--out", str(copy_of_pictured), *filter_flags("--batch-size", "2")]) == 0
    assert manifest(copy_of_pictured / "kept.jsonl")["dropped"] == {"a picture cannot be read": 2}
    assert len(read_stage(copy_of_pictured, "kept")) == 10


def test_a_model_that_sees_is_asked_once_about_what_passes(
    copy_of_pictured: Path, filter_flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    out = copy_of_pictured
    assert syncpr_main(["filter", "--out", str(out), *filter_flags()]) == 0
    threshold = sorted(record["clip_left"] for record in read_stage(out, "scores"))[4]
    asked: list[str] = []

    def strict(messages: list[dict[str, Any]]) -> str:
        text, *pictures = messages[-1]["content"]
        assert len(pictures) == 2 and all(
            part["image_url"]["url"].startswith("data:image/jpeg;base64,") for part in pictures
        )
        asked.append(text["text"])
        verdict = {"one_person_each": True, "picture_1_fits": True, "picture_2_fits": True, "same_person": True}
        return json.dumps(verdict | {"same_person": len(asked) % 4 != 0})

    with PracticeServer(strict) as server:
        vlm = ["--vlm-model", "seer", "--vlm-base-url", server.url, "--min-image-text", str(threshold)]
        command = ["filter", "--out", str(out), *filter_flags(*vlm)]
        assert syncpr_main(command) == 0
        passing = [record for record in read_stage(out, "scores") if record["vlm"] is not None]
        assert len(asked) == len(passing) < 12
        refused = len(asked) // 4
        assert refused and manifest(out / "kept.jsonl")["dropped"]["the halves show different persons (VLM)"] == refused
        assert sum(record["vlm"] is False for record in passing) == refused
        assert [record["vlm"] for record in read_stage(out, "kept")] == [True] * (len(asked) - refused)
        before = len(asked)
        assert syncpr_main(command) == 0 and len(asked) == before
        # Lower thresholds let more pairs through, and only these are asked about.
        assert syncpr_main([*command, "--min-image-text", "-1"]) == 0 and len(asked) == 12


def test_answers_of_no_use_drop_the_pair_and_a_dead_server_stops_the_stage(
    copy_of_pictured: Path, filter_flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    out = copy_of_pictured
    with PracticeServer(lambda messages: "It depends.") as server:
        vlm = ["--vlm-model", "seer", "--vlm-base-url", server.url]
        assert syncpr_main(["filter", "--out", str(out), *filter_flags(*vlm)]) == 0
    assert manifest(out / "kept.jsonl")["dropped"] == {"no usable answer (VLM)": 12}
    # The server is gone now.
    assert syncpr_main(["filter", "--out", str(out), *filter_flags(*vlm, "--max-retries", "0")]) == 2
    assert "no answer" in capsys.readouterr().err and not manifest(out / "kept.jsonl")["finished"]
    assert syncpr_main(["pack", "--out", str(out)]) == 2
    assert "not finished" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [("identity", "identify"), ('"identity": ', '"identity": "x", "other": ')])
def test_damaged_scores_are_named(
    copy_of_pictured: Path, filter_flags: Flags, damage: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of_pictured
    assert syncpr_main(["filter", "--out", str(out), *filter_flags()]) == 0
    lines = (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    lines[3] = lines[3].replace(*damage)
    (out / "scores.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert syncpr_main(["filter", "--out", str(out), *filter_flags()]) == 2
    assert "line 4, has no identity" in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"a": 1}', '{"quadruple_id": [1], "variant": 0}', '{"quadruple_id": 0}'])
@pytest.mark.parametrize("file", ["scores", "vlm"])
def test_foreign_lines_are_named(
    copy_of_pictured: Path, filter_flags: Flags, file: str, line: str, server: PracticeServer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ["filter", "--out", str(copy_of_pictured), *filter_flags("--vlm-model", "seer")]
    assert syncpr_main(command) == 0
    with open(copy_of_pictured / f"{file}.jsonl", "a", encoding="utf-8") as journal:
        journal.write(line + "\n")
    assert syncpr_main(command) == 2
    shown = capsys.readouterr().err
    assert f"{file}.jsonl" in shown and "correct or delete it" in shown


def test_answers_that_were_damaged_are_named(
    copy_of_pictured: Path, filter_flags: Flags, server: PracticeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["filter", "--out", str(copy_of_pictured), *filter_flags("--vlm-model", "seer")]
    assert syncpr_main(command) == 0
    verdicts = copy_of_pictured / "vlm.jsonl"
    verdicts.write_text(verdicts.read_text(encoding="utf-8").replace("same_person", "same", 1), encoding="utf-8")
    assert syncpr_main(command) == 2
    assert "vlm.jsonl, line 1, has no answers" in capsys.readouterr().err


def test_the_practice_server_refuses_pairs_of_equal_halves(pictured: Path) -> None:
    from fafa.syncpr.filter import data_url
    from fafa.syncpr.prompts import question_messages, read_verdict
    from tbps_world.practice.syncpr import answer

    record = read_stage(pictured, "images")[0]
    left, right = data_url(pictured / record["left"]), data_url(pictured / record["right"])
    assert all(read_verdict(answer(question_messages("a", "b", [left, right]))).values())
    assert not any(read_verdict(answer(question_messages("a", "b", [left, left]))).values())


def test_shards_keep_what_one_machine_keeps(copy_of_pictured: Path, filter_flags: Flags, tmp_path: Path) -> None:
    one = Path(shutil.copytree(copy_of_pictured, tmp_path / "one"))
    for out, shards in ((one, ["1/1"]), (copy_of_pictured, ["1/3", "2/3", "3/3"])):
        for shard in shards:
            assert syncpr_main(["filter", "--out", str(out), *filter_flags("--shard", shard)]) == 0
        assert syncpr_main(["pack", "--out", str(out), "--both-directions"]) == 0
    assert (one / "SynCPR.json").read_bytes() == (copy_of_pictured / "SynCPR.json").read_bytes()


def test_pictures_of_quadruples_that_became_duplicates_are_dropped(
    copy_of_pictured: Path, filter_flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of_pictured
    command = ["filter", "--out", str(out), *filter_flags()]
    assert syncpr_main(command) == 0  # the scores of all are there
    lines = (out / "quadruples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "quadruples.jsonl").write_text("".join(lines[:4] + lines[5:]), encoding="utf-8")
    assert syncpr_main(command) == 0
    written = manifest(out / "kept.jsonl")
    assert (written["items"], written["kept"]) == (12, 10) and sum(written["dropped"].values()) == 2
    assert 4 not in {record["quadruple_id"] for record in read_stage(out, "kept")}
    assert syncpr_main(["pack", "--out", str(out)]) == 0
    foreign = json.loads(lines[0]) | {"id": 99}
    (out / "quadruples.jsonl").write_text(json.dumps(foreign) + "\n", encoding="utf-8")
    capsys.readouterr()
    assert syncpr_main(command) == 2
    assert "no picture of the quadruples" in capsys.readouterr().err


def test_what_an_earlier_run_kept_is_not_packed_after_a_kill(
    copy_of_pictured: Path, filter_flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of_pictured
    command = ["filter", "--out", str(out), *filter_flags()]
    assert syncpr_main(command) == 0

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fafa.syncpr.filter.write_kept", killed)
        assert syncpr_main([*command, "--min-identity", "1.5"]) == 130
    capsys.readouterr()
    assert syncpr_main(["pack", "--out", str(out)]) == 2
    assert "not finished" in capsys.readouterr().err
    assert syncpr_main(command) == 0 and syncpr_main(["pack", "--out", str(out)]) == 0


QUADRUPLE = Quadruple(4, "caption one", "caption two", "to two", "to one")


@pytest.mark.parametrize(
    ("both", "id_by", "ids"),
    [
        (False, "quadruple", [0, 0, 1]),
        (True, "quadruple", [0, 1, 0, 1, 2, 3]),
        (False, "image", [0, 1, 2]),
        (True, "image", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_directions_and_ids(both: bool, id_by: str, ids: list[int]) -> None:
    pairs = [
        {"quadruple_id": quadruple, "variant": variant, "left": f"l{variant}", "right": f"r{variant}"}
        for quadruple, variant in ((4, 0), (4, 1), (7, 0))
    ]
    made = list(triplets(pairs, {4: QUADRUPLE, 7: QUADRUPLE}, both_directions=both, id_by=id_by))
    assert [triplet["cpr_id"] for triplet in made] == ids
    assert made[0] == {
        "reference_caption": "caption one",
        "target_caption": "caption two",
        "reference_image_path": "l0",
        "target_image_path": "r0",
        "edit_caption": "to two",
        "cpr_id": 0,
    }
    if both:
        assert made[1] == {
            "reference_caption": "caption two",
            "target_caption": "caption one",
            "reference_image_path": "r0",
            "target_image_path": "l0",
            "edit_caption": "to one",
            "cpr_id": 1,
        }


def test_fafas_own_reader_takes_the_file(copy_of_pictured: Path, filter_flags: Flags) -> None:
    out = copy_of_pictured
    assert syncpr_main(["filter", "--out", str(out), *filter_flags()]) == 0
    assert syncpr_main(["pack", "--out", str(out), "--both-directions", "--id-by", "image"]) == 0
    records = load_syncpr(out)
    assert len(records) == 24 and sorted(record.cpr_id for record in records) == list(range(24))
    reference, target, caption, group = SynCPRDataset(out)[1]  # type: ignore[misc]
    assert reference.size == target.size == (16, 32) and group == 1
    quadruple = load_quadruples(out)[0][0]
    assert caption == quadruple.edit_2_to_1 and records[1].reference_caption == quadruple.caption_2
    assert manifest(out / "SynCPR.json")["triplets"] == 24


def test_pack_refuses_missing_pictures_and_foreign_paths(
    copy_of_pictured: Path, filter_flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of_pictured
    assert syncpr_main(["pack", "--out", str(out)]) == 2
    assert "kept.jsonl does not exist" in capsys.readouterr().err
    assert syncpr_main(["filter", "--out", str(out), *filter_flags()]) == 0
    record = read_stage(out, "kept")[0]
    (out / record["left"]).unlink()
    assert syncpr_main(["pack", "--out", str(out)]) == 2
    assert record["left"] in capsys.readouterr().err and not (out / "SynCPR.json").exists()
    (out / "kept.jsonl").write_text(json.dumps({**record, "left": "../../etc/passwd"}) + "\n", encoding="utf-8")
    assert syncpr_main(["pack", "--out", str(out)]) == 2
    assert "not a path inside the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--clip", "SD"], "--clip"),
        (["--clip", "./absent"], "--clip ./absent"),
        (["--person-model", "./absent"], "--person-model ./absent"),
        (["--vlm-base-url", "http://localhost:1/v1"], "--vlm-model"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_bad_flags_are_one_line(
    copy_of_pictured: Path, models: Path, filter_flags: Flags, flags: list[str], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = [str(models / "sd") if flag == "SD" else flag for flag in flags]
    assert syncpr_main(["filter", "--out", str(copy_of_pictured), *filter_flags(*flags)]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") <= 2 and "Traceback" not in shown
    assert not list(copy_of_pictured.glob("kept*"))
