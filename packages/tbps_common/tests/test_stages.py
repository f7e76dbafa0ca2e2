import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tbps_common.errors import DatasetError, InputError
from tbps_common.pipeline.stages import Dropped, Shard, in_batches, manifest_path, read_stage, run_stage, shard

ITEMS = [{"id": number} for number in range(10)]


def key(record):
    return record["id"]


def square(batch):
    return [
        Dropped("a multiple of four", {"rest": item["id"] % 4})
        if item["id"] % 4 == 0
        else {"id": item["id"], "square": item["id"] ** 2}
        for item in batch
    ]


def stage(folder, items=ITEMS, process=square, settings=None, part=None, batch_size=1, **more):
    return run_stage(
        (part or Shard()).of(items),
        in_batches(process, batch_size),
        (part or Shard()).file(folder, "squares"),
        key=key,
        settings=settings or {"power": 2},
        **more,
    )


def test_records_drops_and_manifest(tmp_path):
    outcome = stage(tmp_path, batch_size=3, notes={"model": "none"})
    assert (outcome.kept, outcome.dropped, outcome.exit_status) == (7, {"a multiple of four": 3}, 0)
    assert [record["square"] for record in read_stage(tmp_path, "squares")] == [1, 4, 9, 25, 36, 49, 81]
    dropped = [json.loads(line) for line in (tmp_path / "squares.jsonl.dropped.jsonl").read_text().splitlines()]
    assert dropped[1] == {"id": 4, "rest": 0, "reason": "a multiple of four"}
    manifest = json.loads((tmp_path / "squares.jsonl.manifest.json").read_text())
    assert manifest["finished"] is True and manifest["model"] == "none"
    assert (manifest["items"], manifest["kept"], manifest["dropped"]) == (10, 7, {"a multiple of four": 3})
    assert "7 items kept, 3 dropped (a multiple of four: 3)" in outcome.sentence()


def test_a_second_run_does_only_what_is_missing(tmp_path):
    seen = []

    def failing(batch):
        if batch[0]["id"] >= 6:
            raise InputError("the sixth cannot be read")
        seen.extend(item["id"] for item in batch)
        return square(batch)

    with pytest.raises(InputError, match="sixth"):
        stage(tmp_path, process=failing, batch_size=2)
    with pytest.raises(DatasetError, match="not finished"):
        read_stage(tmp_path, "squares")
    again = []

    def noting(batch):
        again.extend(item["id"] for item in batch)
        return square(batch)

    outcome = stage(tmp_path, process=noting, batch_size=2)
    assert seen == [0, 1, 2, 3, 4, 5] and again == [6, 7, 8, 9] and outcome.before == 6
    assert len(read_stage(tmp_path, "squares")) == 7


def test_other_settings_are_refused(tmp_path):
    stage(tmp_path)
    with pytest.raises(InputError, match=r"begun with power=2, and this run has power=3"):
        stage(tmp_path, settings={"power": 3})
    manifest_path(tmp_path / "squares.jsonl").unlink()
    with pytest.raises(InputError, match="not from this command"):
        stage(tmp_path)


def test_a_refused_run_leaves_nothing(tmp_path):
    stage(tmp_path, items=[{"id": 1}])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="begun with"):
        stage(tmp_path, settings={"power": 3})
    assert sorted(tmp_path.iterdir()) == before and len(before) == 2


def test_a_run_without_a_record_binds_nobody(tmp_path):
    def failing(batch):
        raise InputError("no such model")

    with pytest.raises(InputError, match="no such model"):
        stage(tmp_path, process=failing)
    assert stage(tmp_path, settings={"power": 3}).kept == 7


def test_shards_together_are_the_whole(tmp_path):
    stage(tmp_path / "whole")
    parts = tmp_path / "parts"
    for index in (1, 2, 3):
        if index == 3:
            with pytest.raises(DatasetError, match="shard 3/3 is missing"):
                read_stage(parts, "squares")
        stage(parts, part=Shard(index, 3))
    by_id = sorted(read_stage(parts, "squares"), key=key)
    assert by_id == read_stage(tmp_path / "whole", "squares")
    stage(parts, part=Shard(1, 2))
    with pytest.raises(DatasetError, match="of 2 and 3"):
        read_stage(parts, "squares")


def test_shards_of_different_settings_do_not_join(tmp_path):
    stage(tmp_path, part=Shard(1, 2))
    stage(tmp_path, part=Shard(2, 2), settings={"power": 3})
    with pytest.raises(DatasetError, match=r"squares\.1-of-2\.jsonl was made with power=2 and .* with power=3"):
        read_stage(tmp_path, "squares")


def test_a_second_process_is_refused_before_it_touches_the_settings(tmp_path):
    def second(batch):
        with pytest.raises(InputError, match="is being written by another run"):
            stage(tmp_path, settings={"power": 3})
        return square(batch)

    stage(tmp_path, process=second, batch_size=100)
    assert json.loads(manifest_path(tmp_path / "squares.jsonl").read_text())["settings"] == {"power": 2}


def test_an_input_that_shrank_leaves_nothing_to_do(tmp_path):
    stage(tmp_path)
    assert "to do" not in stage(tmp_path, items=ITEMS[:3]).sentence()


def test_two_items_with_one_key(tmp_path):
    with pytest.raises(InputError, match="two items have the key 3"):
        stage(tmp_path, items=[*ITEMS, {"id": 3}])


def test_missing_and_damaged_inputs(tmp_path):
    with pytest.raises(DatasetError, match="run the stage that writes it first"):
        read_stage(tmp_path, "squares")
    (tmp_path / "squares.jsonl").write_text('{"id": 1}\n[2]\n')
    with pytest.raises(DatasetError, match="line 2: it is not a JSON object"):
        read_stage(tmp_path, "squares")


@pytest.mark.parametrize("text", ["", "2", "0/3", "4/3", "a/b", "1/0", "-1/2"])
def test_bad_shards(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not i/n"):
        shard(text)


def test_shard_flag():
    assert shard("2/8") == Shard(2, 8) and str(shard("2/8")) == "2/8"
    assert Shard(2, 3).of(range(8)) == [1, 4, 7]


SCRIPT = """
import sys, time
from tbps_common.pipeline.stages import in_batches, run_stage
def slow(batch):
    time.sleep(0.02)
    return [{"id": item["id"], "square": item["id"] ** 2} for item in batch]
work = in_batches(slow, 2)
out = run_stage([{"id": n} for n in range(60)], work, sys.argv[1], key=lambda r: r["id"], settings={})
sys.exit(out.exit_status)
"""


def test_kills_lose_and_repeat_nothing(tmp_path):
    output = tmp_path / "squares.jsonl"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(output)], stdout=subprocess.DEVNULL)
        before = output.stat().st_size if output.exists() else 0
        deadline = time.monotonic() + 60
        while (not output.exists() or output.stat().st_size <= before) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, number)
        status = process.wait(60)
        assert status == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert subprocess.run([sys.executable, "-c", SCRIPT, str(output)], stdout=subprocess.DEVNULL).returncode == 0
    assert [record["id"] for record in read_stage(tmp_path, "squares")] == list(range(60))
