"""The page: controls on the left, pictures before and after on the right.

Each visitor has a `Page` of their own. Pictures are drawn in threads, which put what they have into
an inbox; a timer of the page empties it. Texts of visitors and of adapters are shown as text, never
as HTML.
"""

import asyncio
import base64
import importlib.resources
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from fastapi import FastAPI
from nicegui import background_tasks, run, ui
from PIL import Image

from respodiff_jax import images as images_lib
from respodiff_jax.errors import UserError
from respodiff_jax.play import measuring
from respodiff_jax.play.controls import MAX_COUNT, Controls
from respodiff_jax.play.settings import (
    STRIP,
    Settings,
    command_line,
    grid_file,
    picture_file,
    plan,
    signed,
    strip,
    strip_file,
)
from respodiff_jax.play.studio import Studio

_FAVICON = (
    '<svg viewBox="0 0 32 32" xmlns="http://www.w3.org/2000/svg">'
    '<path d="M2 2h28v28H2z" fill="#3d55c0"/><path d="M16 2h14v28H16z" fill="#b5520b"/></svg>'
)

TITLE = "RespoDiff playground"
_TICK = 0.1  # seconds between two looks into the inbox
_PAUSE = 0.1  # seconds without a change before pictures are drawn
_BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def mount(studio: Studio) -> FastAPI:
    """The server of the page; a process has one."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @ui.page("/")
    def index():
        Page(studio).build()

    ui.run_with(app, title=TITLE, dark=None, tailwind=False, favicon=_FAVICON)
    return app


def _style() -> str:
    """The page's style sheet, with the report's colours, and the report's own for its charts.

    Nested, the report's rules touch nothing else: the page's library uses some of their names.
    """
    package = importlib.resources.files("respodiff_jax")
    report = (package / "evaluation" / "report" / "report.css").read_text(encoding="utf-8")
    own = (package / "play" / "play.css").read_text(encoding="utf-8")
    colours, _, _ = report.partition("* {")
    return f"{colours}\n{own}\n.measure {{\n{report}\n}}\n"


def _show_picture(element: ui.element, picture: np.ndarray | None) -> None:
    """Shows a picture in an `img`, or none."""
    source = _BLANK
    if picture is not None:
        content = images_lib.to_png(Image.fromarray(picture))
        source = "data:image/png;base64," + base64.b64encode(content).decode()
    element.props["src"] = source
    element.update()


class Work:
    """A drawing under way, shared by its thread and the page.

    Attributes:
      stop: set to stop it.
      progress: steps done and in total.
      doing: what is under way, in words.
    """

    def __init__(self):
        self.stop = threading.Event()
        self.progress, self.doing = (0, 0), ""

    def on_step(self, done: int, total: int) -> None:
        self.progress, self.doing = (done, total), f"step {done} of {total}"

    def on_count(self, counted: int, total: int) -> None:
        self.doing = f"counting picture {counted + 1} of {total}"


class Page:
    """The page of one visitor."""

    def __init__(self, studio: Studio):
        self._studio = studio
        self._inbox: deque[tuple[Work, Callable[[], None]]] = deque()
        self._work = Work()
        self._plan, self._settings = None, studio.start()
        self._pictures: dict[int, np.ndarray] = {}
        self._strip: list[np.ndarray | None] = []
        self._tab = "Pictures"

    def build(self) -> None:
        """Builds the page and starts the first drawing."""
        ui.add_css(_style())
        ui.colors(primary="#3d55c0", secondary="#625d56", accent="#c8102e")
        client = ui.context.client
        client.on_disconnect(lambda: self._work.stop.set())
        with ui.element("div").classes("play"):
            with ui.element("header"):
                ui.label("RespoDiff playground").classes("kicker")
                ui.label("Before and after steering").classes("headline")
                ui.label(
                    "Left: what the model draws. Right: what it draws from the same noise when the"
                    " controls steer it. Other details may change, too."
                    f" {self._studio.about}"
                ).classes("note")
                if self._studio.hint:
                    ui.label(self._studio.hint).classes("warnings").props("role=note")
            with ui.element("div").classes("columns"):
                with ui.element("form").classes("controls") as form:
                    form.on("submit.prevent", lambda: None)
                    self._controls = Controls(self._studio, self._settings, self._changed)
                with ui.element("div").classes("results"):
                    self._build_results()
        ui.timer(_TICK, self._tick)
        ui.timer(0.0, self._redraw, once=True)

    def _build_results(self) -> None:
        with ui.tabs().props("no-caps align=left inline-label") as tabs:
            ui.tab("Pictures")
            ui.tab("Measure this")
            ui.tab("Explore")
        self._bar = ui.linear_progress(0, show_value=False).props("aria-label=progress")
        with ui.element("div").classes("status").props("role=status aria-live=polite"):
            self._status = ui.label("").mark("status")
            self._cancel = ui.button("Cancel", on_click=self._cancelled).props("flat dense no-caps")
        self._alert = ui.label("").classes("warnings").props("role=alert").mark("alert")
        with ui.tab_panels(tabs, value="Pictures", animated=False, keep_alive=True):
            with ui.tab_panel("Pictures"):
                self._build_pictures()
            with ui.tab_panel("Measure this"):
                self._build_measure()
            with ui.tab_panel("Explore"):
                self._build_explore()
        tabs.on_value_change(lambda event: self._shown(event.value))

    # Pictures

    def _build_pictures(self) -> None:
        self._cards = []
        with ui.element("div").classes("cards"):
            for i in range(MAX_COUNT):
                with ui.element("article").classes("pair") as card:
                    sides = [self._side(i, name) for name in ("before", "after")]
                    reason = ui.label("").classes("reason").mark("reason")
                card.set_visibility(i < self._settings.count)
                self._cards.append((card, *sides, reason))
        with ui.element("div").classes("downloads"):
            ui.button("Download all as one picture", icon="grid_on", on_click=self._download_grid)
            ui.button("Download the command", icon="terminal", on_click=self._download_command)
        ui.label("The same pictures from the command line:").classes("note")
        self._command = ui.label("").classes("command").mark("command")

    def _side(self, index: int, name: str) -> Any:
        with ui.element("figure"):
            picture = ui.element("img").props(f'src="{_BLANK}" alt="{name} {index}"')
            with ui.element("figcaption"):
                ui.label(name)
                ui.button(icon="download", on_click=lambda: self._download(index, name)).props(
                    f'flat dense round size=sm aria-label="download {name} {index}"'
                )
        return picture

    def _changed(self, settings: Settings) -> None:
        """A control was moved: what is under way stops, and pictures are drawn after a pause."""
        self._settings = settings
        for element in (self._chart, self._strip_box):
            element.classes("stale")
        if self._tab == "Pictures":
            self._start(self._redraw)
        else:
            self._work.stop.set()
            self._finish("The settings changed. Press the button to draw with them.")

    def _shown(self, tab: str) -> None:
        self._tab = tab
        self._work.stop.set()
        self._finish("")
        if tab == "Pictures":
            self._start(self._redraw)

    def _start(self, what: Callable[[], Any]) -> None:
        self._work.stop.set()
        background_tasks.create(what())

    async def _redraw(self) -> None:
        work, settings = self._begin("waiting …"), self._settings
        for card, *_ in self._cards:
            card.classes("stale")
        await asyncio.sleep(_PAUSE)
        await self._in_thread(work, lambda: self._draw(work, settings))

    def _draw(self, work: Work, settings: Settings) -> Iterable[Callable[[], None]]:
        studio = self._studio
        if not settings.prompt.strip():
            raise UserError("the prompt is empty: write what the pictures are to show")
        chosen = plan(studio.painter, settings)
        warning = studio.warning(settings.prompt)
        yield lambda: self._prepare(settings, chosen, warning)
        jobs = [job for pair in zip(chosen.base, chosen.adapted, strict=True) for job in pair]
        for i, picture in studio.painter.draw(
            jobs, settings.options, work.stop.is_set, work.on_step
        ):
            yield lambda i=i, picture=picture: self._show(i, picture)

    def _prepare(self, settings: Settings, chosen: Any, warning: str) -> None:
        self._drawn, self._plan, self._pictures = settings, chosen, {}
        for i, (card, _, _, reason) in enumerate(self._cards):
            card.set_visibility(i < settings.count)
            if i < settings.count:
                reason.set_text(f"Seed {settings.seed + i}. {chosen.reasons[i]}")
        self._command.set_text(command_line(self._studio.painter, settings, self._studio.sources))
        self._warn(warning)

    def _show(self, i: int, picture: np.ndarray) -> None:
        self._pictures[i] = picture
        card, before, after, _ = self._cards[i // 2]
        _show_picture((before, after)[i % 2], picture)
        if {i // 2 * 2, i // 2 * 2 + 1} <= self._pictures.keys():
            card.classes(remove="stale")

    def _download(self, index: int, name: str) -> None:
        place = 2 * index + (name == "after")
        if place not in self._pictures:
            ui.notify("This picture is not drawn yet.")
            return
        job = (self._plan.adapted if name == "after" else self._plan.base)[index]
        content = picture_file(
            self._studio.painter,
            self._drawn,
            job,
            self._pictures[place],
            self._studio.sources,
            self._plan.decisions,
        )
        ui.download.content(content, f"{name}-{job.seed}.png", "image/png")

    def _download_grid(self) -> None:
        if self._plan is None or len(self._pictures) < 2 * len(self._plan.base):
            ui.notify("The pictures are not drawn yet.")
            return
        ordered = [self._pictures[i] for i in range(len(self._pictures))]
        content = grid_file(self._drawn, ordered[::2], ordered[1::2])
        ui.download.content(content, "grid.png", "image/png")

    def _download_command(self) -> None:
        ui.download.content(f"{self._command.text}\n", "pictures.sh", "text/x-shellscript")

    # Measure this

    def _build_measure(self) -> None:
        suite = self._studio.suite
        ui.label(
            f"{measuring.PICTURES} pictures of a profession, before (base) and after (adapted),"
            " with these settings but its own prompts. A classifier (CLIP) counts them. The"
            " deviation ratio is 0 if the shares meet the target, and 1 if they are as far from it"
            " as possible. Lines and brackets are 95 % intervals."
        ).classes("note")
        with ui.element("div").classes("line"):
            subjects = {subject: subject for subject in suite.subjects}
            subject = ui.select(subjects, value=suite.subjects[0], label="Profession").mark(
                "subject"
            )
            ui.button(
                "Measure this", on_click=lambda: self._start(lambda: self._measure(subject.value))
            )
        self._chart = ui.html("", sanitize=False).classes("measure").mark("chart")

    async def _measure(self, subject: str) -> None:
        work, settings = self._begin("counting …"), self._settings
        self._chart.set_content("")
        self._chart.classes(remove="stale")

        def draw():
            studio = self._studio
            for chart in measuring.measure(
                studio.painter,
                settings,
                studio.suite,
                subject,
                studio.judge,
                work.stop.is_set,
                work.on_step,
                work.on_count,
            ):
                yield lambda chart=chart: self._chart.set_content(chart)

        await self._in_thread(work, draw)

    # Explore

    def _build_explore(self) -> None:
        ui.label(
            "One picture at seven strengths of a concept: from −1, away from it, to +1, towards"
            " it. At 0 it is the picture before. Other concepts are off."
        ).classes("note")
        labels = self._studio.labels
        names = [name for group in self._studio.groups.values() for name in group]
        with ui.element("div").classes("line"):
            concept = ui.select(
                {name: labels[name] for name in names},
                value=next(iter(names), None),
                label="Concept",
            ).mark("concept")
            button = ui.button(
                "Draw the strip", on_click=lambda: self._start(lambda: self._explore(concept.value))
            )
            button.set_enabled(bool(names))
        with ui.element("div").classes("strip") as self._strip_box:
            self._tiles = []
            for scale in np.linspace(-1, 1, STRIP):
                with ui.element("figure"):
                    self._tiles.append(
                        ui.element("img").props(f'src="{_BLANK}" alt="scale {scale:+.2f}"')
                    )
                    ui.label(signed(scale).replace("-", "−"))
        self._strip_reason = ui.label("").classes("reason")
        ui.button("Download the strip", icon="grid_on", on_click=self._download_strip)

    async def _explore(self, concept: str) -> None:
        work, settings = self._begin("drawing …"), self._settings
        self._strip, self._strip_title = [None] * STRIP, f"{settings.prompt}: {concept}"
        self._strip_box.classes(remove="stale")
        for tile in self._tiles:
            _show_picture(tile, None)

        def draw():
            painter = self._studio.painter
            jobs, reason = strip(painter, settings, concept)
            yield lambda: self._strip_reason.set_text(reason)
            for i, picture in painter.draw(jobs, settings.options, work.stop.is_set, work.on_step):
                yield lambda i=i, picture=picture: self._show_tile(i, picture)

        await self._in_thread(work, draw)

    def _show_tile(self, i: int, picture: np.ndarray) -> None:
        self._strip[i] = picture
        _show_picture(self._tiles[i], picture)

    def _download_strip(self) -> None:
        if not self._strip or any(picture is None for picture in self._strip):
            ui.notify("The strip is not drawn yet.")
            return
        ui.download.content(strip_file(self._strip_title, self._strip), "strip.png", "image/png")

    # Work under way

    def _begin(self, status: str) -> Work:
        self._work.stop.set()
        self._work = Work()
        self._warn("")
        self._status.set_text(status)
        self._bar.classes(remove="done")
        self._cancel.set_visibility(True)
        return self._work

    async def _in_thread(
        self, work: Work, draw: Callable[[], Iterable[Callable[[], None]]]
    ) -> None:
        """Runs a drawing, whose results are functions that show them on the page."""

        def all_of_it():
            for show in draw():
                self._inbox.append((work, show))

        if work.stop.is_set():
            return
        problem = "This failed; the terminal of the page says why."
        try:
            await run.io_bound(all_of_it)
            problem = ""
        except UserError as error:
            problem = str(error).replace("`", "")
        finally:
            if work is self._work and not work.stop.is_set():
                self._tick()
                self._warn(problem or self._alert.text)
                self._finish("" if problem else "done")

    def _cancelled(self) -> None:
        self._work.stop.set()
        self._finish("cancelled")

    def _finish(self, status: str) -> None:
        self._status.set_text(status)
        self._bar.classes("done")
        self._cancel.set_visibility(False)

    def _warn(self, text: str) -> None:
        self._alert.set_text(text)
        self._alert.set_visibility(bool(text))

    def _tick(self) -> None:
        """Shows what the thread has drawn; what was stopped is dropped."""
        while self._inbox:
            work, show = self._inbox.popleft()
            if work is self._work and not work.stop.is_set():
                show()
        if self._work.stop.is_set() or not self._cancel.visible:
            return
        done, total = self._work.progress
        if total:
            self._bar.set_value(done / total)
            self._status.set_text(self._work.doing)
            self._bar.props(remove="indeterminate")
        else:
            is_first = not self._studio.painter.compiled
            self._status.set_text("preparing, once …" if is_first else "waiting …")
            self._bar.props("indeterminate")
