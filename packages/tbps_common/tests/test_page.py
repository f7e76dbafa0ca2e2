"""tbps-page in a real browser, with small models of random weights, and as a hostile visitor meets it."""

import base64
import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'tbps-common[page]'")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
CHROMIUM = "/usr/bin/chromium"
if not os.path.exists(CHROMIUM):
    # .ci/run installs it, and fails if it cannot.
    pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium", allow_module_level=True)

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WAIT = 20_000  # milliseconds; what is awaited takes one second on a machine with nothing else to do


@dataclass
class Site:
    """A running page."""

    port: int
    folder: Path
    process: "subprocess.Popen[str]"
    pictures: Path
    requests: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


def write_models(folder: Path) -> list[str]:
    """A CLIP, a FAFA and a DiaNA of random weights, by the names that --model takes."""
    import torch

    from diana import DiaNAModel
    from diana.model.config import DiaNAConfig
    from diana.tokenizer import load_tokenizer
    from fafa.checkpoint import official_state_dict
    from fafa.model import Blip2FAFACPR
    from tbps_world.cli import cmlfa_tiny_main, diana_tiny_main
    from tbps_world.tiny.fafa import TINY_MODEL, WORDS, write_tiny_model

    assert cmlfa_tiny_main(["--out", str(folder / "tiny.pt")]) == 0
    run = folder / "run"
    backbone = write_tiny_model(run, TINY_MODEL, WORDS)
    state = official_state_dict(Blip2FAFACPR.from_pretrained(str(backbone)))
    (run / "saved_models").mkdir()
    torch.save({"model": state}, run / "saved_models" / "tuned_last_recall_at1.pt")
    (run / "training_hyperparameters.json").write_text(json.dumps({"backbone": str(backbone)}), encoding="utf-8")
    tiny = folder / "tiny"
    assert diana_tiny_main(["--out", str(tiny), "--image_size", "64", "32"]) == 0
    settings = DiaNAConfig.from_file(tiny / "configs" / "config.json")
    DiaNAModel.from_backbones(settings, tiny / "swinv2-tiny", tiny / "llama-tiny").save_pretrained(folder / "talker")
    load_tokenizer(tiny / "llama-tiny").save_pretrained(str(folder / "talker"))
    return [f"clip:{folder / 'tiny.pt'}", f"fafa:{run}", f"diana:{folder / 'talker'}"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A page on a gallery of synthetic pedestrians of three cameras, indexed by three models."""
    from tbps_common.cli import index_main
    from tbps_world.cli import synth_main

    folder = tmp_path_factory.mktemp("page")
    flags = ["--preset", "tiny", "--ids", "20", "--views", "2", "--height", "96", "--workers", "1", "--layouts", "cuhk"]
    assert synth_main(["--out", str(folder / "world"), *flags]) == 0
    pictures = folder / "world" / "CUHK-PEDES" / "imgs"
    with open(folder / "cameras.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "camera", "time"])
        for number, path in enumerate(sorted(pictures.rglob("*.png"))):
            rows.writerow(
                [path.relative_to(pictures), f"cam_{'abc'[number % 3]}", f"2026-05-{number % 28 + 1:02d} 09:00"]
            )
    models = write_models(folder)
    out = folder / "people.lance"
    for model in models:
        flags = ["--model", model, "--images", str(pictures), "--out", str(out), "--device", "cpu"]
        assert index_main([*flags, "--metadata", str(folder / "cameras.csv")]) == 0
    with serve(folder, out, models, pictures) as running:
        yield running


@contextmanager
def serve(folder: Path, gallery: Path, models: list[str], pictures: Path) -> Iterator[Site]:
    """`tbps-page` in a process of its own, which leaves nothing behind."""
    working, temporary = folder / "working", folder / "temporary"
    working.mkdir()
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from tbps_common.cli import page_main; sys.exit(page_main())"]
        + ["--gallery", str(gallery), "--port", "0", "--max_upload", "1", "--device", "cpu"]
        + [word for model in models for word in ("--model", model)],
        cwd=working,
        # Settings that would open the page, and a proxy that answers nothing.
        env={
            **os.environ,
            "TMPDIR": str(temporary),
            "GRADIO_SHARE": "True",
            "GRADIO_ALLOWED_PATHS": "/",
            "GRADIO_SERVER_NAME": "0.0.0.0",
            "HTTP_PROXY": "http://127.0.0.1:9",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if found := re.match(r"page: http://127\.0\.0\.1:(\d+)/", line):
            break
    else:
        pytest.fail(said)
    yield Site(int(found[1]), folder, process, pictures)
    process.send_signal(signal.SIGTERM)
    with process.stdout as rest:
        assert process.wait(60) == 0, rest.read()
    assert list(temporary.iterdir()) == []
    assert list(working.iterdir()) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visitor(site: Site, browser: Any) -> Iterator[Callable[[], Any]]:
    """`visitor()`: the page, opened by somebody new; every request and every complaint of the browser is kept."""
    opened = []

    def visit() -> Any:
        context = browser.new_context(accept_downloads=True, viewport={"width": 1280, "height": 900})
        tab = context.new_page()
        complaints: list[str] = []
        tab.on("request", lambda request: site.requests.append(request.url))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.set_default_timeout(WAIT)
        tab.goto(site.address)
        tab.locator(".masthead", has_text="40 pictures in people.lance").wait_for()
        opened.append((context, complaints))
        return tab

    yield visit
    for context, complaints in opened:
        context.close()
        assert complaints == []
    outside = [url for url in site.requests if not url.startswith((site.address, "data:", "blob:"))]
    assert outside == []


def ask(tab: Any, text: str) -> None:
    tab.get_by_label("Who are you looking for?").fill(text)
    tab.locator("#find").click()


def hits(tab: Any, answer: int = 0) -> list[str]:
    """What stands below each hit of a model."""
    return tab.locator(".answer").nth(answer).locator(".hit").all_inner_texts()


def test_words_find_pictures_and_the_hits_can_be_taken_along(site: Site, visitor: Callable[[], Any]) -> None:
    tab = visitor()
    assert "legal basis" in tab.locator(".lawful").inner_text()
    ask(tab, "a man with a red jacket")
    tab.wait_for_selector(".hit")
    assert tab.locator(".answer h3").all_inner_texts() == ["clip · tiny.pt", "diana · talker"]  # fafa wants a picture
    assert len(hits(tab)) == 12 and len(hits(tab, 1)) == 12
    assert re.match(r"1\s+-?\d\.\d{3}\s+cam_[abc]\s+2026-05-\d\d 09:00", hits(tab)[0])
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Hits as JSON").click()
    record = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert record["question"] == {"text": "a man with a red jacket", "picture": False}
    assert [len(answer["hits"]) for answer in record["answers"]] == [12, 12]
    best = record["answers"][0]["hits"][0]
    assert Path(best["path"]).is_file() and f"{best['score']:.3f}" in hits(tab)[0]
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Hits as a picture").click()
    with Image.open(download.value.path()) as picture:
        assert picture.format == "PNG" and picture.width > 1200


def test_filters_narrow_what_is_found(visitor: Callable[[], Any]) -> None:
    tab = visitor()
    tab.get_by_label("camera").click()
    tab.get_by_role("option", name="cam_b").click()
    tab.keyboard.press("Escape")
    tab.get_by_label("time to").fill("2026-05-20")
    ask(tab, "a woman")
    tab.wait_for_selector(".hit")
    assert hits(tab) and all("cam_b" in hit and re.search(r"2026-05-([01]\d|20) ", hit) for hit in hits(tab))
    for where, words in {
        "path = 'nobody'": "No picture fits the filters",
        "1 = 1) OR (1 = 1": "The condition",
        "nothing = 1; DROP": "The condition",
        "camera = 'cam_c'": "No picture fits the filters",
    }.items():
        if not tab.get_by_placeholder("path LIKE").is_visible():
            tab.get_by_role("button", name="SQL condition").click()
        tab.get_by_placeholder("path LIKE").fill(where)
        ask(tab, "a woman")
        tab.locator(".answer .message", has_text=words).first.wait_for()
    tab.get_by_label("time to").fill("yesterday")
    ask(tab, "a woman")
    tab.locator(".message", has_text="'yesterday' is not a time").first.wait_for()
    ask(tab, " ")
    tab.locator(".message", has_text="Describe the person").wait_for()


def test_a_hit_becomes_the_next_question(visitor: Callable[[], Any]) -> None:
    tab = visitor()
    ask(tab, "a man with a red jacket")
    tab.locator(".hit").nth(3).click()
    tab.wait_for_selector(".detail img")
    assert "cam_" in tab.locator(".detail dl").inner_text()
    tab.get_by_label("Like this one, but").fill("with a blue coat")
    tab.locator("#like").get_by_role("button", name="Search").click()
    tab.locator(".answer h3", has_text="fafa").wait_for()
    assert tab.locator(".answer h3").all_inner_texts() == ["clip · tiny.pt", "fafa · run"]
    assert tab.locator(".preview").is_visible()
    assert tab.get_by_label("What is different?").input_value() == "with a blue coat"


def test_a_picture_is_dropped_and_something_else_is_refused(
    site: Site, visitor: Callable[[], Any], tmp_path: Path
) -> None:
    tab = visitor()
    tab.get_by_role("tab", name="Picture and words").click()
    tab.locator("#compose").click()
    tab.locator(".message", has_text="Drop a picture first").wait_for()
    bomb = io.BytesIO()
    Image.new("1", (12000, 8000)).save(bomb, "PNG")
    too_large = tmp_path / "large.png"
    too_large.write_bytes(bytes(3 << 20))
    for name, content, words in (
        ("notes.png", b"these are words", "not an image"),
        ("bomb.png", bomb.getvalue(), "more than 64,000,000 pixels"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "not an image"),
        ("large.png", too_large.read_bytes(), "larger than 1 MB"),
    ):
        tab.locator(".drop input").set_input_files({"name": name, "mimeType": "image/png", "buffer": content})
        tab.locator("#preview .message", has_text=words).wait_for()
    picture = sorted(site.pictures.rglob("*.png"))[0]
    tab.locator(".drop input").set_input_files(str(picture))
    tab.wait_for_selector(".preview")
    tab.locator("#compose").click()
    tab.wait_for_selector(".hit")
    # Without words only the CLIP can answer, and finds the very picture first.
    assert tab.locator(".answer h3").all_inner_texts() == ["clip · tiny.pt"]
    tab.locator(".hit").first.click()
    tab.locator(".detail dd", has_text=picture.name).wait_for()


def test_a_conversation_goes_on_and_two_visitors_have_each_their_own(visitor: Callable[[], Any]) -> None:
    one, other = visitor(), visitor()
    for tab in (one, other):
        tab.get_by_role("tab", name="Chat").click()
        tab.locator(".asks").wait_for()
    one.get_by_label("Your answer").fill("a woman in a blue shirt")
    other.get_by_label("Your answer").fill("a tall man")
    one.get_by_role("button", name="Answer", exact=True).click()
    other.get_by_role("button", name="Answer", exact=True).click()
    for tab, said in ((one, "a woman in a blue shirt"), (other, "a tall man")):
        tab.locator(".tells", has_text=said).wait_for()
        tab.wait_for_selector(".hit")
        assert tab.locator(".tells").count() == 1 and tab.locator(".asks").count() == 2
    assert hits(one) != hits(other)
    before = hits(one)
    one.get_by_label("Your answer").fill("black boots and a backpack")
    one.get_by_role("button", name="Answer", exact=True).click()
    one.locator(".tells").nth(1).wait_for()
    one.wait_for_timeout(500)
    assert hits(one) != before
    one.get_by_role("button", name="Start again").click()
    one.locator(".tells").first.wait_for(state="detached")
    assert other.locator(".tells").count() == 1


def test_persons_of_a_film_are_shown_in_their_frames_until_they_are_deleted(
    site: Site, browser: Any, detector: Path, tmp_path: Path
) -> None:
    av = pytest.importorskip("av")
    from tbps_common.cli import index_main

    film, gallery, model = tmp_path / "film.mkv", tmp_path / "film.lance", f"clip:{site.folder / 'tiny.pt'}"
    walkers = [Image.open(path) for path in sorted(site.pictures.rglob("*.png"))[:2]]
    with av.open(str(film), "w") as container:
        stream = container.add_stream("ffv1", rate=2)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "bgr0"
        for number in range(4):
            frame = Image.new("RGB", (320, 180), (150, 160, 165))
            for place, walker in enumerate(walkers):
                frame.paste(walker, (40 + 60 * number + 90 * place, 60))
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    (tmp_path / "films.txt").write_text(str(film), encoding="utf-8")
    flags = ["--images", str(tmp_path / "films.txt"), "--out", str(gallery), "--model", model, "--device", "cpu"]
    flags += ["--detect", str(detector), "--detect_score", "0", "--detect_min", "8", "--fps", "1"]
    assert index_main(flags) == 0
    with serve(tmp_path, gallery, [model], tmp_path) as running:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(WAIT)
        tab.goto(running.address)
        tab.locator(".masthead", has_text=re.compile(r"\d+ persons in film.lance")).wait_for()
        ask(tab, "a man with a red jacket")
        tab.locator(".hit").first.click()
        tab.wait_for_selector(".detail img")
        facts = dict(zip(tab.locator(".detail dt").all_inner_texts(), tab.locator(".detail dd").all_inner_texts()))
        assert facts["frame"] in ("0", "2") and facts["file"].startswith("film.mkv//")
        left, top, right, bottom = map(int, facts["box"].split(", "))
        uri = tab.locator(".detail img").get_attribute("src")
        shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        scale = shown.width / 320
        assert shown.height == round(180 * scale)  # the whole frame, with the person's box
        across, down = round(scale * (left + right) / 2), round(scale * top)
        edge = [shown.getpixel((across, row)) for row in range(max(0, down - 4), down + 5)]
        assert max(red - blue for red, _, blue in edge) > 90  # orange
        if "TBPS_SCREENSHOT" in os.environ:  # to be looked at
            tab.screenshot(path=os.environ["TBPS_SCREENSHOT"], full_page=True)
        assert index_main(["--delete", "--out", str(gallery), "--where", "frame >= 0"]) == 0
        ask(tab, "a man with a red jacket")
        tab.locator(
            ".message", has_text="Nothing is indexed: fill the gallery with tbps-index --model clip:"
        ).wait_for()
        shutil.rmtree(gallery)
        ask(tab, "a man with a red jacket")
        tab.locator(".message", has_text="does not exist; build it with tbps-index").wait_for()
        tab.close()


def test_names_of_files_are_shown_as_text(visitor: Callable[[], Any]) -> None:
    tab = visitor()
    tab.get_by_role("tab", name="Chat").click()
    tab.get_by_label("Your answer").fill("<img src=x onerror=document.title='owned'><b>bold</b>")
    tab.get_by_role("button", name="Answer", exact=True).click()
    tab.locator(".tells", has_text="<b>bold</b>").wait_for()
    assert tab.locator(".chat b").count() == 0 and tab.title() == "Find a person"


def send(
    site: Site, method: str, path: str, body: bytes = b"", *, headers: dict[str, str] | None = None
) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", site.port, timeout=60)
    connection.request(method, path, body or None, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    content = answer.read(1 << 20)
    connection.close()
    return answer.status, content


def test_no_path_leads_to_a_file(site: Site, tmp_path: Path) -> None:
    picture = sorted(site.pictures.rglob("*.png"))[0]
    (site.pictures / "secret.txt").write_text("secret", encoding="utf-8")
    places = [
        f"/gradio_api/file={picture}",
        f"/file={picture}",
        f"/gradio_api/file={site.pictures / 'secret.txt'}",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file%3D/etc/passwd",
        "/gradio_api/file=http://127.0.0.1:1/x",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:1/x",
        "/gradio_api/component_server",
        "/gradio_api/upload",
        "/gradio_api/vibe-code",
        "/gradio_api/info",
        "/gradio_api/runs",
        "/gradio_api/deep_link?session_hash=x",
        "/gradio_api/call/by_words",
        "/monitoring",
        "/docs",
        "/openapi.json",
        "/static/../../../../../../../../etc/passwd",
        "/static/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "/static//etc/passwd",
        "/static/%2fetc/passwd",
        "/assets//etc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/routes.py",
        "/svelte//etc/passwd",
        "//etc/passwd",
    ]
    for place in places:
        for method in ("GET", "POST"):
            status, content = send(site, method, place, b"{}" if method == "POST" else b"")
            assert status >= 400, (method, place, status)
            assert b"root:" not in content and b"secret" not in content and not content.startswith(b"\x89PNG")
    config = send(site, "GET", "/config")[1].decode()
    assert str(site.pictures) not in config


def test_requests_from_elsewhere_and_shapeless_ones_are_refused(site: Site) -> None:
    good = {"Host": f"127.0.0.1:{site.port}"}
    assert send(site, "GET", "/", headers=good)[0] == 200
    assert (
        send(site, "GET", "/", headers={"Host": f"evil.example:{site.port}"})[0] == 403
    )  # a name that was made to point here
    assert send(site, "DELETE", "/")[0] == 405
    join = "/gradio_api/queue/join"
    assert send(site, "POST", join, b"{}", headers={"Origin": "http://evil.example"})[0] == 403
    assert send(site, "POST", join, b"not json")[0] == 403
    assert send(site, "POST", join, b"[" * 100_000)[0] == 403
    assert send(site, "POST", join, b"{}", headers={"Content-Length": str(1 << 40)})[0] == 413
    for path in ("/etc/passwd", "http://127.0.0.1:1/x", str(sorted(site.pictures.rglob("*.png"))[0])):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [None, file], "fn_index": 0, "session_hash": "x"}
        assert send(site, "POST", join, json.dumps(body).encode())[0] == 403
        hidden = json.dumps(body).replace("path", "\\u0070ath")
        assert send(site, "POST", join, hidden.encode())[0] == 403
    with socket.create_connection(("127.0.0.1", site.port)) as raw:  # a body of unknown length
        raw.sendall(f"POST {join} HTTP/1.1\r\nHost: {good['Host']}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        assert b" 411 " in raw.recv(4096)


def test_a_picture_replaced_by_a_link_is_not_shown(site: Site, visitor: Callable[[], Any], tmp_path: Path) -> None:
    tab = visitor()
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8), "red").save(outside)
    picture = sorted(site.pictures.rglob("*.png"))[1]
    kept = picture.read_bytes()
    tab.get_by_role("tab", name="Picture and words").click()
    tab.locator(".drop input").set_input_files(str(picture))
    tab.wait_for_selector(".preview")
    picture.unlink()
    picture.symlink_to(outside)
    try:
        tab.locator("#compose").click()
        tab.wait_for_selector(".hit")
        assert tab.locator(".hit").first.locator("img").count() == 0
        assert "the picture is gone" in hits(tab)[0]
        tab.locator(".hit").first.click()
        tab.locator(".detail .message", has_text="gone or cannot be read").wait_for()
    finally:
        picture.unlink()
        picture.write_bytes(kept)


def test_what_is_missing_is_named_before_the_page_starts(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tbps_common.cli import index_main, page_main

    gallery = str(site.folder / "people.lance")
    clip = f"clip:{site.folder / 'tiny.pt'}"
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "as before")  # and so it will be again
    taken = ["--gallery", gallery, "--model", clip, "--port", str(site.port)]
    other = tmp_path / "other.lance"
    assert index_main(["--model", clip, "--images", str(site.pictures), "--out", str(other), "--device", "cpu"]) == 0
    fafa = f"fafa:{site.folder / 'run'}"
    for flags, words in (
        (["--gallery", str(tmp_path / "none.lance"), "--model", clip], "does not exist; build it with tbps-index"),
        (["--gallery", gallery, "--model", "clip:nowhere.pt"], "open_clip has no model 'nowhere.pt'"),
        (["--gallery", str(other), "--model", fafa, "--port", "0"], f"index with tbps-index --model {fafa}"),
        (taken, "choose another, or --port 0"),
    ):
        monkeypatch.setattr("tempfile.tempdir", None)  # the page before has left it where it was
        assert page_main([*flags]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "tbps_common.search.page_blocks", raising=False)
    assert page_main(["--gallery", gallery, "--model", clip, "--port", "0"]) == 2
    assert "pip install 'tbps-common[page]'" in capsys.readouterr().err
