"""What the page of `tbps-page` shows, and what follows from every click, in Gradio's blocks.

Pictures travel inside the page and inside its requests, as data URIs, never as files that have an address: there is no path
that a visitor could ask for, and nothing of an upload stays.
"""

import base64
import html
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr
import pyarrow as pa
from PIL import Image, ImageDraw, ImageOps

from tbps_common.errors import DatasetError, InputError
from tbps_common.images import read_image
from tbps_common.report.pictures import Hit as Drawn
from tbps_common.report.pictures import RankedQuery, ranked_list
from tbps_common.search.commands import as_record
from tbps_common.search.gallery import Gallery, Hit, check_filter, explained, open_gallery, quoted
from tbps_common.search.retriever import KINDS, Query, Retriever, Round
from tbps_common.search.search import next_question, picture_of, search

MOST_HITS = 60
MOST_WORDS = 2000  # characters of a question
_CHOICES = 50  # a column with at most so many values becomes a list to choose from
_LAWFUL = "Searching for people is lawful only on a legal basis, such as their consent. Pictures and questions stay on this machine."


@dataclass
class Visit:
    """What one visitor has done so far.

    Attributes:
        question: the last one.
        answers: of each model, its hits, or why it has none.
        reference: picture that the next composed question starts from.
        chosen: the hit that is shown large.
        rounds: of the conversation.
        asked: the question that waits for an answer.
    """

    question: Query = field(default_factory=Query)
    answers: list[tuple[str, list[Hit] | str]] = field(default_factory=list)
    reference: Image.Image | None = None
    chosen: Hit | None = None
    rounds: list[Round] = field(default_factory=list)
    asked: str = ""


@dataclass(frozen=True)
class Filters:
    """Columns that become fields of the page: those with few values, with their values, and times."""

    choices: dict[str, list[str]]
    times: list[str]


def find_filters(galleries: Sequence[Gallery]) -> Filters:
    """Which columns of the metadata become fields."""
    choices: dict[str, set[Any]] = {}
    times: list[str] = []
    for gallery in galleries:
        names = [name for name, kind in gallery.columns.items() if not pa.types.is_floating(kind)]
        with explained(gallery.path):
            table = gallery.table.search().where("problem IS NULL").select(names or ["key"]).to_arrow()
        for name in names:
            if pa.types.is_timestamp(gallery.columns[name]):
                times += [name] if name not in times else []
            else:
                choices.setdefault(name, set()).update(table[name].unique().drop_null().to_pylist())
    few = {name: sorted(map(str, values)) for name, values in choices.items() if 0 < len(values) <= _CHOICES}
    return Filters(few, times)


def condition(
    gallery: Gallery, chosen: Mapping[str, Sequence[str]], between: Mapping[str, tuple[str, str]], where: str
) -> str | None:
    """The fields of the page as one condition on a gallery.

    Args:
        gallery: whose columns they are.
        chosen: values by column.
        between: earliest and latest time by column; empty for no limit.
        where: free SQL.

    Raises:
        InputError: a time is none, or `where` is no condition.
    """
    parts = []
    for name, values in chosen.items():
        if values:
            parts.append(f"CAST({name} AS string) IN ({', '.join(quoted(str(value)) for value in values)})")
    for name, limits in between.items():
        for mark, text in zip((">=", "<="), limits):
            if text.strip():
                try:
                    moment = datetime.fromisoformat(text.strip()).replace(tzinfo=None)
                except ValueError as error:
                    raise InputError(f"{text!r} is not a time: write it like 2026-05-01 08:30") from error
                parts.append(f"{name} {mark} timestamp '{moment.isoformat(sep=' ')}'")
    if where.strip():
        try:
            parts.append(str(check_filter(gallery, where)))
        except InputError as error:
            raise InputError(str(error).replace("--where", "The condition")) from error
    return " AND ".join(parts) or None


def read_upload(uri: object, most: int, folder: Path) -> Image.Image:
    """The picture that a browser sent as a data URI.

    Raises:
        InputError: it is too large, or not a picture.
    """
    encoded = uri.partition(";base64,")[2] if isinstance(uri, str) else ""
    if len(encoded) * 3 // 4 > most + 2:
        raise InputError(_too_large(most))
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            file.write(base64.b64decode(encoded, validate=True))
        except ValueError as error:
            raise InputError("This file did not arrive whole: choose it again.") from error
        file.flush()
        try:
            return read_image(file.name, as_shown=True)
        except DatasetError as error:
            reason = str(error).removeprefix("The image ").replace(file.name, "").strip()
            raise InputError(f"This file cannot be used as a picture: it {reason}") from error


def _too_large(most: int) -> str:
    return f"This file is larger than {most >> 20} MB: choose a smaller picture."


def answer(
    gallery: str,
    models: Mapping[str, Retriever],
    chosen: Sequence[str],
    query: Query,
    topk: int,
    conditions: Callable[[Gallery], str | None],
) -> list[tuple[str, list[Hit] | str]]:
    """Hits of each chosen model that takes the question, or of all that take it where no chosen one does.

    Raises:
        InputError: no model takes the question, or nothing is asked.
    """
    if query.kind == "text" and not query.text.strip():
        raise InputError("Describe the person to look for.")
    if len(query.text) > MOST_WORDS:
        raise InputError(f"That is longer than {MOST_WORDS} characters: say it in fewer words.")
    able = [name for name, model in models.items() if query.kind in model.queries]
    if not able:
        takes = sorted({KINDS[kind] for model in models.values() for kind in model.queries})
        hint = {
            "image": " Say what is different in the pictures to find.",
            "image+text": " Start the page with one that does, such as --model fafa:RUN.",
            "dialogue": " Start the page with one that does, such as --model diana:FOLDER.",
        }.get(query.kind, "")
        raise InputError(
            f"No model of this page can search with {KINDS[query.kind]}, only with {', '.join(takes)}.{hint}"
        )
    found: list[tuple[str, list[Hit] | str]] = []
    for name in [name for name in chosen if name in able] or able:
        try:
            opened = open_gallery(gallery, models[name])
            hits = search(opened, models[name], [query], topk=topk, where=conditions(opened))[0]
        except (InputError, OSError) as error:
            found.append((name, str(error)))
            continue
        if hits:
            found.append((name, hits))
        elif len(opened):
            found.append((name, "No picture fits the filters."))
        else:
            found.append(
                (name, f"Nothing is indexed: fill the gallery with tbps-index --model {name} --images FOLDER.")
            )
    return found


def shown_picture(hit: Hit, *, whole: bool = False) -> Image.Image | None:
    """The person of a hit, or the whole frame with the person's box; None if the file cannot be read any more.

    A file that has become a link since it was indexed is not followed.
    """
    try:
        if os.path.islink(hit.path):
            return None
        if not whole or hit.box is None:
            return picture_of(hit)
        frame = picture_of(replace(hit, box=None))
    except DatasetError:
        return None
    width = max(2, round(max(frame.size) / 250))
    draw = ImageDraw.Draw(frame)
    left, top, right, bottom = hit.box
    draw.rectangle((left - width, top - width, right + width, bottom + width), outline=(255, 255, 255), width=width)
    draw.rectangle((left, top, right, bottom), outline=(222, 96, 44), width=width)
    return frame


def _uri(picture: Image.Image, room: tuple[int, int]) -> str:
    file = io.BytesIO()
    ImageOps.contain(picture, room, Image.Resampling.LANCZOS).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _text(value: object) -> str:
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def _value(value: object) -> str:
    return _text(value.isoformat(" ").removesuffix(":00") if isinstance(value, datetime) else value)


def message_html(text: str) -> str:
    """A message instead of hits."""
    return f'<p class="message" role="status">{_text(text)}</p>'


def answers_html(visit: Visit) -> str:
    """The hits of all models, side by side."""
    columns = []
    for number, (name, hits) in enumerate(visit.answers):
        if isinstance(hits, str):
            body = message_html(hits)
        else:
            body = (
                '<ol class="hits">' + "".join(_hit_html(number, rank, hit) for rank, hit in enumerate(hits)) + "</ol>"
            )
        columns.append(f'<section class="answer"><h3>{_text(_short(name))}</h3>{body}</section>')
    return f'<div class="answers n{min(len(columns), 3)}">{"".join(columns)}</div>'


def _short(name: str) -> str:
    kind, _, place = name.partition(":")
    return f"{kind} · {os.path.basename(os.path.normpath(place)) if os.path.exists(place) else place}"


def _hit_html(number: int, rank: int, hit: Hit) -> str:
    picture = shown_picture(hit)
    shown = (
        f'<img src="{_uri(picture, (240, 480))}" alt="hit {rank + 1}">'
        if picture is not None
        else '<span class="gone">the picture is gone</span>'
    )
    facts = "".join(f"<span>{_value(value)}</span>" for value in list(hit.data.values())[:3] if value is not None)
    return (
        f'<li><button type="button" class="hit" data-hit="{number}:{rank}">{shown}'
        f'<span class="line"><b>{rank + 1}</b><i>{hit.score:.3f}</i></span><span class="facts">{facts}</span></button></li>'
    )


def detail_html(hit: Hit) -> str:
    """A hit, large, in its frame, with all that is known of it."""
    picture = shown_picture(hit, whole=True)
    shown = (
        f'<img src="{_uri(picture, (960, 420))}" alt="the hit in its frame">'
        if picture is not None
        else message_html("The picture file is gone or cannot be read: run tbps-index again.")
    )
    facts: dict[str, object] = {"score": f"{hit.score:.4f}", **hit.data}
    if hit.frame is not None:
        facts["frame"] = hit.frame
    if hit.box is not None:
        facts["box"] = ", ".join(map(str, hit.box))
    facts["file"] = hit.key
    rows = "".join(
        f"<dt>{_text(name)}</dt><dd>{_value(value)}</dd>" for name, value in facts.items() if value is not None
    )
    return f'<div class="detail">{shown}<dl>{rows}</dl></div>'


def chat_html(visit: Visit) -> str:
    """The conversation so far."""
    said = [(message["from"], message["value"]) for one in visit.rounds for message in one]
    said += [("gpt", visit.asked)] if visit.asked else []
    lines = "".join(f'<p class="{"asks" if who == "gpt" else "tells"}">{_text(text)}</p>' for who, text in said)
    return f'<div class="chat" role="log">{lines}</div>'


def preview_html(visit: Visit) -> str:
    """The reference picture above the field that it was dropped on."""
    if visit.reference is None:
        return ""
    return f'<img class="preview" src="{_uri(visit.reference, (200, 220))}" alt="your picture">'


@dataclass(frozen=True)
class Page:
    """What a page searches, and what follows from every click on it.

    Attributes:
        gallery: path of the gallery.
        models: by name.
        filters: columns that become fields.
        folder: for temporary files.
        most_upload: bytes of a picture that a visitor brings.
    """

    gallery: str
    models: Mapping[str, Retriever]
    filters: Filters
    folder: Path
    most_upload: int

    @property
    def talker(self) -> Retriever | None:
        """The model that asks questions in a conversation."""
        return next((model for model in self.models.values() if model.ask is not None), None)

    def ask(
        self, visit: Visit, query: Query, chosen: Sequence[str], topk: float, fields: Sequence[Any]
    ) -> tuple[Any, ...]:
        """What follows from a question: the visit, the hits, and whether there is something to download."""
        values = list(fields)
        where = values.pop() or ""
        picked = {name: values.pop(0) or [] for name in self.filters.choices}
        between = {name: (values.pop(0) or "", values.pop(0) or "") for name in self.filters.times}
        visit.question, visit.answers, visit.chosen = query, [], None
        try:
            visit.answers = answer(
                self.gallery,
                self.models,
                chosen or [],
                query,
                max(1, min(MOST_HITS, int(topk))),
                lambda opened: condition(opened, picked, between, where),
            )
            shown = answers_html(visit)
        except (InputError, OSError) as error:
            shown = message_html(str(error))
        some = any(not isinstance(hits, str) for _, hits in visit.answers)
        return visit, shown, gr.update(visible=some), gr.update(visible=False)

    def masthead(self, count: bool = True) -> str:
        """The title, with what the gallery holds now."""
        about = ""
        if count:
            try:
                most = max(len(open_gallery(self.gallery, model)) for model in self.models.values())
                about = f"{most:,} pictures in {os.path.basename(os.path.normpath(self.gallery))}"
            except (InputError, OSError) as error:
                about = str(error)
        return f"<header class='masthead'><h1>Find a person</h1><p>{_text(about)}</p></header>"

    def by_words(self, visit: Visit, text: str, chosen: list[str], topk: float, *fields: Any) -> Any:
        return self.ask(visit, Query(text or ""), chosen, topk, fields)

    def by_picture(self, visit: Visit, text: str, chosen: list[str], topk: float, *fields: Any) -> Any:
        if visit.reference is None:
            return visit, message_html("Drop a picture first, or click a hit."), gr.update(), gr.update()
        return self.ask(visit, Query(text or "", visit.reference), chosen, topk, fields)

    def like_this(self, visit: Visit, text: str, chosen: list[str], topk: float, *fields: Any) -> Any:
        picture = shown_picture(visit.chosen) if visit.chosen else None
        if picture is None:
            return visit, message_html("This picture cannot be read any more."), *[gr.update()] * 5
        visit.reference = picture
        asked = self.ask(visit, Query(text or "", picture), chosen, topk, fields)
        return *asked, preview_html(visit), text, gr.update(selected="picture")

    def take_upload(self, visit: Visit, event: gr.EventData) -> Any:
        sent = event._data or {}
        try:
            if sent.get("large"):
                raise InputError(_too_large(self.most_upload))
            visit.reference = read_upload(sent.get("uri"), self.most_upload, self.folder)
        except InputError as error:
            visit.reference = None
            return visit, message_html(str(error))
        return visit, preview_html(visit)

    def open_hit(self, visit: Visit, event: gr.EventData) -> Any:
        number, _, rank = str(event._data.get("hit", "")).partition(":")
        try:
            hits = visit.answers[int(number)][1]
            visit.chosen = hits[int(rank)] if not isinstance(hits, str) else None
        except (ValueError, IndexError):
            visit.chosen = None
        if visit.chosen is None:
            return visit, "", gr.update(visible=False)
        return visit, detail_html(visit.chosen), gr.update(visible=True)

    def first_question(self, visit: Visit) -> Any:
        visit.rounds, visit.asked = [], ""
        if self.talker is not None:
            try:
                visit.asked = next_question(open_gallery(self.gallery, self.talker), self.talker, []) or ""
            except (InputError, OSError) as error:
                return visit, message_html(str(error))
        return visit, chat_html(visit)

    def reply(self, visit: Visit, text: str, chosen: list[str], topk: float, *fields: Any) -> Any:
        if self.talker is None:
            note = (
                "No model of this page holds a conversation: start it with one that does, such as --model diana:FOLDER."
            )
            return visit, message_html(note), gr.update(), gr.update(), gr.update(), text
        if not (text or "").strip() or len(text) > MOST_WORDS:
            note = f"Answer the question in 1 to {MOST_WORDS} characters."
            return visit, message_html(note), gr.update(), gr.update(), gr.update(), text
        if visit.asked:
            said = [{"from": "gpt", "value": visit.asked}, {"from": "user", "value": text.strip()}]
            visit.rounds = [*visit.rounds, said]
        elif visit.rounds:  # nothing was left to ask, but the visitor has more to tell
            *before, last = visit.rounds
            visit.rounds = [*before, [*last[:-1], {"from": "user", "value": f"{last[-1]['value']} {text.strip()}"}]]
        shown = self.ask(visit, Query(dialogue=tuple(visit.rounds)), chosen, topk, fields)
        try:
            visit.asked = next_question(open_gallery(self.gallery, self.talker), self.talker, visit.rounds) or ""
        except (InputError, OSError):
            visit.asked = ""  # the hits' place says why
        return *shown, chat_html(visit), ""

    def as_json(self, visit: Visit) -> str:
        question = {"text": visit.question.text, "dialogue": list(visit.question.dialogue)}
        question = {name: value for name, value in question.items() if value}
        record = {
            "question": {**question, "picture": visit.question.image is not None},
            "answers": [
                {"model": name, "hits": [as_record(hit) for hit in hits]}
                for name, hits in visit.answers
                if not isinstance(hits, str)
            ],
        }
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        return "data:application/json;base64," + base64.b64encode(text.encode()).decode()

    def as_picture(self, visit: Visit) -> str:
        """The hits as a PNG file, one row per model, as a data URI."""
        rows = [
            RankedQuery(
                text=f"{_short(name)}: {visit.question.text or _told(visit.question.dialogue)}",
                image=visit.question.image,
                hits=[Drawn(shown_picture(hit) or Image.new("RGB", (1, 2), "white"), hit.score) for hit in hits],
            )
            for name, hits in visit.answers
            if not isinstance(hits, str)
        ]
        if not rows:
            return ""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            ranked_list(Path(place) / "hits.png", rows, columns=max(len(row.hits) for row in rows))
            return "data:image/png;base64," + base64.b64encode((Path(place) / "hits.png").read_bytes()).decode()


def _told(dialogue: Sequence[Round]) -> str:
    return " ".join(message["value"] for one in dialogue for message in one if message["from"] == "user")


def build(page: Page) -> gr.Blocks:
    """The page as Gradio's blocks."""
    names = list(page.models)
    with gr.Blocks(title="Find a person", analytics_enabled=False, fill_width=True) as blocks:
        visit = gr.State(Visit(), time_to_live=3600)
        masthead = gr.HTML(page.masthead(count=False))
        with gr.Row(elem_id="page", equal_height=False):
            with gr.Column(elem_id="ask", scale=0, min_width=340):
                with gr.Tabs(elem_id="ways") as ways:
                    with gr.Tab("Words", id="words"):
                        words = gr.Textbox(
                            label="Who are you looking for?",
                            placeholder="A woman with a red jacket, blue jeans and a backpack",
                            lines=1,
                            max_lines=6,
                            max_length=MOST_WORDS,
                            submit_btn=False,
                        )
                        find = gr.Button("Search", variant="primary", elem_id="find")
                    with gr.Tab("Picture and words", id="picture"):
                        drop = gr.HTML(_DROP, js_on_load=_DROP_SCRIPT.replace("MOST", str(page.most_upload)))
                        preview = gr.HTML("", elem_id="preview")
                        changes = gr.Textbox(
                            label="What is different?",
                            placeholder="The same person with a black coat",
                            lines=1,
                            max_lines=6,
                            max_length=MOST_WORDS,
                        )
                        compose = gr.Button("Search", variant="primary", elem_id="compose")
                    with gr.Tab("Chat", id="chat"):
                        chat = gr.HTML(chat_html(Visit()), elem_id="conversation")
                        told = gr.Textbox(label="Your answer", lines=1, max_lines=6, max_length=MOST_WORDS)
                        with gr.Row():
                            again = gr.Button("Start again", min_width=110)
                            tell = gr.Button("Answer", variant="primary", min_width=110)
                with gr.Accordion("Filters", open=bool(page.filters.choices or page.filters.times), elem_id="filters"):
                    fields = [
                        gr.Dropdown(values, label=name, multiselect=True, elem_id=f"filter-{name}")
                        for name, values in page.filters.choices.items()
                    ]
                    for name in page.filters.times:
                        with gr.Row():
                            fields += [
                                gr.Textbox(
                                    label=f"{name} {mark}", placeholder="2026-05-01 08:30", max_lines=1, min_width=120
                                )
                                for mark in ("from", "to")
                            ]
                    with gr.Accordion("SQL condition", open=False):
                        columns = ["path", *page.filters.choices, *page.filters.times]
                        where = gr.Textbox(
                            label="SQL condition",
                            show_label=False,
                            placeholder="path LIKE 'cam_a/%'",
                            info="Columns: " + ", ".join(columns),
                        )
                with gr.Accordion("Hits and models", open=len(names) > 1, elem_id="options"):
                    topk = gr.Slider(1, MOST_HITS, value=12, step=1, label="Number of hits")
                    chosen = gr.CheckboxGroup(
                        [(_short(name), name) for name in names], value=names, label="Models", visible=len(names) > 1
                    )
            with gr.Column(elem_id="found", min_width=320):
                with gr.Column(visible=False, elem_id="chosen") as panel:
                    detail = gr.HTML("")
                    with gr.Row(elem_id="like"):
                        but = gr.Textbox(
                            label="Like this one, but ...",
                            placeholder="with a blue shirt",
                            max_lines=1,
                            max_length=MOST_WORDS,
                            scale=4,
                        )
                        alike = gr.Button("Search", variant="primary", scale=1, min_width=90)
                        close = gr.Button("Close", scale=1, min_width=90)
                with gr.Row(visible=False, elem_id="downloads") as downloads:
                    save_json = gr.Button("Hits as JSON", size="sm", scale=0, min_width=130)
                    save_picture = gr.Button("Hits as a picture", size="sm", scale=0, min_width=130)
                hits = gr.HTML(_EMPTY, js_on_load=_HITS_SCRIPT, elem_id="hits")
        gr.HTML(f"<footer class='lawful'>{_text(_LAWFUL)}</footer>")
        file = gr.Textbox(visible=False)

        inputs = [chosen, topk, *fields, where]
        outputs = [visit, hits, downloads, panel]
        # One question at a time, whoever asks: the models share one processor.
        slow: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on(
            [words.submit, find.click], page.by_words, [visit, words, *inputs], outputs, **slow, show_progress_on=hits
        )
        gr.on(
            [changes.submit, compose.click],
            page.by_picture,
            [visit, changes, *inputs],
            outputs,
            **slow,
            show_progress_on=hits,
        )
        gr.on(
            [but.submit, alike.click],
            page.like_this,
            [visit, but, *inputs],
            [*outputs, preview, changes, ways],
            **slow,
            show_progress_on=hits,
        )
        gr.on(
            [told.submit, tell.click],
            page.reply,
            [visit, told, *inputs],
            [*outputs, chat, told],
            **slow,
            show_progress_on=hits,
        )
        gr.on([again.click, blocks.load], page.first_question, visit, [visit, chat], **quick)
        blocks.load(page.masthead, None, masthead, **quick)
        drop.upload(page.take_upload, visit, [visit, preview], **quick)
        hits.select(page.open_hit, visit, [visit, detail, panel], **quick).then(None, js=_TO_TOP)
        close.click(lambda: gr.update(visible=False), None, panel, **quick)
        for button, make, name in ((save_json, page.as_json, "hits.json"), (save_picture, page.as_picture, "hits.png")):
            button.click(make, visit, file, **quick).then(None, file, None, js=_SAVE.replace("NAME", name))
    return blocks.queue(max_size=100)


def theme() -> gr.themes.Base:
    """System fonts only: others would be fetched from the internet."""
    return gr.themes.Base(
        primary_hue="slate",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


_EMPTY = '<p class="empty">What you search for appears here.</p>'
_DROP = """<label class="drop"><input type="file" accept="image/*">
<span><b>Drop a picture here</b> or choose one</span></label>"""
_DROP_SCRIPT = """
const take = file => {
  if (!file) return;
  if (file.size > MOST) { trigger('upload', {large: true}); return; }
  const reader = new FileReader();
  reader.onload = () => trigger('upload', {uri: reader.result});
  reader.readAsDataURL(file);
};
element.addEventListener('change', event => { take(event.target.files[0]); event.target.value = ''; });
element.addEventListener('dragover', event => event.preventDefault());
element.addEventListener('drop', event => { event.preventDefault(); take(event.dataTransfer.files[0]); });
"""
_HITS_SCRIPT = """
element.addEventListener('click', event => {
  const hit = event.target.closest('[data-hit]');
  if (hit) trigger('select', {hit: hit.dataset.hit});
});
watch('value', () => { if (innerWidth < 900) element.scrollIntoView({behavior: 'smooth'}); });
"""
_TO_TOP = "() => { document.querySelector('#found')?.scrollIntoView({behavior: 'smooth', block: 'start'}); }"
_SAVE = """uri => {
  if (!uri) return;
  const link = document.createElement('a');
  link.href = uri; link.download = 'NAME'; link.click();
}"""
CSS = """
.gradio-container { background: #f6f7f9 !important; --block-background-fill: #fff; --body-background-fill: #f6f7f9;
  --block-border-width: 0px; --block-shadow: none; --block-label-text-size: 13px; }
.gradio-container > main, .gradio-container main.fillable { max-width: 1380px !important; margin: 0 auto; padding: 28px 28px 18px !important; }
.gradio-container footer:not(.lawful) { display: none !important; }
.masthead { display: flex; align-items: baseline; gap: 16px; flex-wrap: wrap; padding: 0 4px 6px; }
.masthead h1 { font-size: 24px; font-weight: 650; letter-spacing: -0.01em; margin: 0; color: #1b2430; }
.masthead p { margin: 0; color: #667085; font-size: 14px; }
.lawful { color: #667085; font-size: 13px; text-align: center; padding: 14px 0 4px; }
#page { gap: 28px; align-items: flex-start; }
#ask { gap: 12px; flex: 0 0 350px !important; width: 350px; background: #fff; border: 1px solid #e4e7ec; border-radius: 14px; padding: 14px; }
#ask .tabs, #ask .tabitem { border: 0; padding: 0; background: transparent; }
#ask .tabitem { padding-top: 12px; }
#ask .tab-container button { font-size: 14px; padding: 6px 10px; }
#ask .block { padding: 0; overflow: visible; }
#filters, #options { border: 0 !important; border-top: 1px solid #eef0f3 !important; border-radius: 0; padding: 10px 0 0 !important; }
#ask textarea, #ask input[type=text], #like textarea, #like input, #ask .wrap-inner { background: #fff; }
#ask textarea, #filters label input, #like textarea, #like input { border: 1px solid #d0d5dd !important; border-radius: 10px !important; font-size: 15px; }
button.primary { background: #1f3a5f !important; color: #fff !important; border: 0 !important; border-radius: 10px !important; }
button.primary:hover { background: #2a4c7b !important; }
button.secondary { background: #fff !important; border: 1px solid #d0d5dd !important; border-radius: 10px !important; }
#ask .block:has(> .html-container), #ask .html-container { padding: 0 !important; }
#ask .tab-container button { color: #667085; } #ask .tab-container button.selected { color: #1b2430; font-weight: 600; }
#ask .row, #like { gap: 10px; }
#filters .wrap { border: 1px solid #d0d5dd; border-radius: 10px; box-shadow: none; min-height: 42px; overflow: hidden; }
#filters .wrap input { border: 0 !important; }
#ask button.lg, #like button.lg { font-size: 15px; font-weight: 600; padding: 9px 14px; min-height: 42px; }
#ask .tabitem textarea { min-height: 72px; }
#hits { scroll-margin-top: 12px; }
#found { gap: 14px; scroll-margin-top: 10px; }
#chosen { background: #fff; border: 1px solid #e4e7ec; border-radius: 14px; padding: 16px; gap: 12px; }
#chosen .block, #like .block { padding: 0; }
#like { align-items: flex-end; }
#downloads { justify-content: flex-end; gap: 8px; }
.empty { color: #98a2b3; text-align: center; padding: 120px 20px; font-size: 15px; }
.message { background: #fff8eb; border: 1px solid #f3dfb5; color: #6b4e16; border-radius: 10px; padding: 10px 14px; margin: 0; font-size: 14px;
  overflow-wrap: anywhere; }
.answers { display: grid; gap: 26px; }
.answers.n2 { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.answers.n3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.answer h3 { font-size: 13px; font-weight: 600; color: #475467; margin: 0 0 10px; overflow-wrap: anywhere; }
.hits { list-style: none; margin: 0; padding: 0; display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); }
.hits li { margin: 0; }
.hit { display: flex; flex-direction: column; width: 100%; padding: 0 0 8px; text-align: left; cursor: pointer; background: #fff;
  border: 1px solid #e4e7ec; border-radius: 12px; overflow: hidden; transition: box-shadow .15s, border-color .15s; }
.hit:hover, .hit:focus-visible { border-color: #7d93b2; box-shadow: 0 4px 14px rgba(16, 24, 40, .10); outline: none; }
.hit img, .hit .gone { width: 100%; aspect-ratio: 1 / 2; object-fit: contain; background: #eef0f3; display: block; margin: 0; }
.hit .gone { display: grid; place-items: center; color: #98a2b3; font-size: 12px; }
.hit .line { display: flex; justify-content: space-between; padding: 7px 10px 0; font-size: 13px; color: #1b2430; }
.hit .line i { font-style: normal; color: #667085; font-variant-numeric: tabular-nums; }
.hit .facts, .hit .line { font-weight: 400; }
.hit .facts { display: flex; flex-direction: column; padding: 2px 10px 0; font-size: 12px; color: #667085; line-height: 1.45; }
.detail { display: flex; gap: 22px; flex-wrap: wrap; align-items: flex-start; }
.detail img { max-height: 380px; max-width: 100%; border-radius: 10px; margin: 0; }
.detail dl { display: grid; grid-template-columns: auto 1fr; gap: 6px 18px; margin: 4px 0 0; font-size: 14px; }
.detail dt { color: #667085; } .detail dd { margin: 0; color: #1b2430; overflow-wrap: anywhere; }
.drop { display: block; border: 1.5px dashed #c3cad5; border-radius: 12px; padding: 22px 12px; text-align: center; color: #667085; cursor: pointer;
  background: #fafbfc; font-size: 14px; }
.drop:hover, .drop:focus-within { border-color: #7d93b2; } .drop b { color: #1f3a5f; }
.drop input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.preview { max-height: 220px; border-radius: 10px; margin: 0 auto; display: block; }
.chat { display: flex; flex-direction: column; gap: 8px; max-height: 380px; overflow-y: auto; }
.chat p { margin: 0; padding: 8px 12px; border-radius: 12px; font-size: 14px; max-width: 88%; overflow-wrap: anywhere; }
.chat .asks { background: #eef2f7; color: #1b2430; align-self: flex-start; }
.chat .tells { background: #1f3a5f; color: #fff; align-self: flex-end; }
@media (max-width: 900px) {
  .gradio-container > main, .gradio-container main.fillable { padding: 14px 12px !important; }
  #page { flex-direction: column; gap: 16px; }
  #ask { width: 100%; flex: 1 1 auto !important; }
  #found { width: 100%; }
  .answers.n2, .answers.n3 { grid-template-columns: minmax(0, 1fr); }
  .hits { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 8px; }
  .empty { padding: 30px 10px; }
}
"""
