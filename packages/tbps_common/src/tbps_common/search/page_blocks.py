"""What the page of `tbps-page` shows, and what follows from every click, in Gradio's blocks.

Pictures travel inside the page and inside its requests, as data URIs, and nothing of an upload stays (`page_html`, `page_answers`).
"""

import base64
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from tbps_common.errors import InputError
from tbps_common.report.pictures import Hit as Drawn
from tbps_common.report.pictures import RankedQuery, ranked_list
from tbps_common.search.commands import as_record
from tbps_common.search.gallery import Hit, open_gallery
from tbps_common.search.page_answers import MOST_WORDS, Filters, answer, condition, read_upload, too_large
from tbps_common.search.page_html import (
    answers_html,
    chat_html,
    detail_html,
    escaped,
    message_html,
    preview_html,
    short_name,
    shown_picture,
)
from tbps_common.search.retriever import Query, Retriever, Round
from tbps_common.search.search import next_question

MOST_HITS = 60
CSS = Path(__file__).with_name("page.css").read_bytes().decode("utf-8")
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
            shown = answers_html(visit.answers)
        except (InputError, OSError) as error:
            shown = message_html(str(error))
        some = any(not isinstance(hits, str) for _, hits in visit.answers)
        return visit, shown, gr.update(visible=some), gr.update(visible=False)

    def masthead(self, count: bool = True) -> str:
        """The title, with what the gallery holds now."""
        about = ""
        if count:
            try:
                opened = [open_gallery(self.gallery, model) for model in self.models.values()]
                what = "persons" if any(gallery.detect for gallery in opened) else "pictures"
                about = f"{max(map(len, opened)):,} {what} in {os.path.basename(os.path.normpath(self.gallery))}"
            except (InputError, OSError) as error:
                about = str(error)
        return f"<header class='masthead'><h1>Find a person</h1><p>{escaped(about)}</p></header>"

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
        return *asked, preview_html(picture), text, gr.update(selected="picture")

    def take_upload(self, visit: Visit, event: gr.EventData) -> Any:
        sent = event._data or {}
        try:
            if sent.get("large"):
                raise InputError(too_large(self.most_upload))
            visit.reference = read_upload(sent.get("uri"), self.most_upload, self.folder)
        except InputError as error:
            visit.reference = None
            return visit, message_html(str(error))
        return visit, preview_html(visit.reference)

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
        return visit, chat_html(visit.rounds, visit.asked)

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
        return *shown, chat_html(visit.rounds, visit.asked), ""

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
                text=f"{short_name(name)}: {visit.question.text or _told(visit.question.dialogue)}",
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
                        chat = gr.HTML(chat_html([], ""), elem_id="conversation")
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
                        [(short_name(name), name) for name in names],
                        value=names,
                        label="Models",
                        visible=len(names) > 1,
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
        gr.HTML(f"<footer class='lawful'>{escaped(_LAWFUL)}</footer>")
        file = gr.Textbox(visible=False)

        inputs = [chosen, topk, *fields, where]
        outputs = [visit, hits, downloads, panel]
        # One question at a time, whoever asks: the models share one processor.
        slow: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "show_progress_on": hits}
        slow["api_visibility"] = "private"
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for asked, button, follow, more in (
            (words, find, page.by_words, []),
            (changes, compose, page.by_picture, []),
            (but, alike, page.like_this, [preview, changes, ways]),
            (told, tell, page.reply, [chat, told]),
        ):
            gr.on([asked.submit, button.click], follow, [visit, asked, *inputs], [*outputs, *more], **slow)
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
