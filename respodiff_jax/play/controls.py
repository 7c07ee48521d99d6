"""The controls of the page, and the settings that they stand for."""

import secrets
from collections.abc import Callable

from nicegui import ui

from respodiff_jax.errors import UserError
from respodiff_jax.method.schedule import SAMPLERS, Schedule
from respodiff_jax.play.settings import MAX_SEED, Settings, signed
from respodiff_jax.play.studio import Studio

MAX_COUNT = 16
_MAX_STEPS = 100
_RANGE = 2.0  # of a concept's slider, to both sides
_OPEN_CONCEPTS = 8  # groups are folded if there are more


class Controls:
    """Builds the controls inside the current element.

    Args:
      studio: its concepts have the sliders.
      start: the settings to show first.
      on_change: is called with the new settings at each change.
    """

    def __init__(self, studio: Studio, start: Settings, on_change: Callable[[Settings], None]):
        self._studio, self._on_change = studio, on_change
        self._scales: dict[str, ui.slider] = {}
        self._shares: dict[str, ui.slider] = {}
        self._percents: dict[str, ui.label] = {}
        self._fair: dict[str, ui.switch] = {}
        self._safe: list[ui.switch] = []
        self._is_set = False
        self._build(start)
        self._is_set = True

    def _build(self, start: Settings) -> None:
        self._prompt = ui.textarea("Prompt", value=start.prompt).props(
            "autogrow outlined debounce=250"
        )
        self._prompt.on_value_change(self._changed).mark("prompt")
        groups = self._studio.groups
        is_open = sum(map(len, groups.values())) <= _OPEN_CONCEPTS
        for group, names in groups.items():
            self._group(group, names, start, is_open)
        self._count = self._slider("Pictures", 1, MAX_COUNT, 1, start.count)
        with ui.element("div").classes("line"):
            self._seed = ui.number(
                "Seed: change it for other pictures",
                value=start.seed,
                min=0,
                max=MAX_SEED,
                step=1,
                precision=0,
            ).props("debounce=300")
            self._seed.on_value_change(self._changed).mark("seed")
            ui.button(icon="casino", on_click=self._new_seed).props(
                'flat dense round aria-label="another seed"'
            )
        with ui.expansion("More").classes("more"):
            steps = "Steps: more are finer and slower"
            self._steps = self._slider(steps, 1, _MAX_STEPS, 1, start.num_steps)
            guidance = "Guidance: higher follows the prompt more"
            self._guidance = self._slider(guidance, 1, 20, 0.5, start.guidance_scale)
            self._sampler = ui.select(
                self._samplers(), value=start.sampler, label="Sampler: how the steps are computed"
            )
            self._sampler.on_value_change(self._changed).mark("sampler")
            self._negative = ui.input(
                "Negative prompt: what to avoid", value=start.negative_prompt
            ).props("debounce=250")
            self._negative.on_value_change(self._changed)
            self._always = ui.switch("Steer every prompt, also one that names a value", value=False)
            self._always.on_value_change(self._changed).mark("steer-always")

    def _group(self, group: str, names: list[str], start: Settings, is_open: bool) -> None:
        title = group.replace("_", " ")
        is_safety = group in self._studio.safety_groups
        with ui.element("fieldset"), ui.expansion(title, value=is_open).classes("group"):
            switch = None
            if is_safety:
                switch = ui.switch("Safe: makes every picture safer", value=start.safe).mark("safe")
                self._safe.append(switch)
            elif len(names) > 1:
                switch = ui.switch(
                    "Fair: each picture gets one of these", value=start.fair == group
                )
                switch.mark(f"fair {group}")
                self._fair[group] = switch
                with ui.element("div").bind_visibility_from(switch, "value"):
                    for name in names:
                        self._shares[name] = self._slider(
                            name, 0, 100, 1, round(100 / len(names)), None, f"share {name}"
                        )
                        self._shares[name].on_value_change(lambda: self._show_shares(names))
                    self._show_shares(names)
                    ui.label("Only the ratio of these counts.").classes("hint")
            with ui.element("div") as own:
                for name in names:
                    shown = self._studio.labels[name]
                    self._scales[name] = self._slider(
                        shown, -_RANGE, _RANGE, 0.05, 0, signed, f"scale {name}"
                    )
                hint = "Right is safer." if is_safety else "Right is towards it, left away from it."
                ui.label(hint).classes("hint")
            if switch is not None:
                own.bind_visibility_from(switch, "value", backward=lambda on: not on)
                switch.on_value_change(lambda event: self._switched(group, event.value))

    def _slider(
        self,
        label: str,
        low: float,
        high: float,
        step: float,
        value: float,
        style: Callable[[float], str] | None = "{:g}".format,
        mark: str = "",
    ) -> ui.slider:
        """A slider with its name and its value above it; without a style, a share in percent."""
        with ui.element("div").classes("slider"):
            with ui.element("div").classes("name"):
                ui.label(label)
                shown = ui.label().classes("value")
            slider = ui.slider(min=low, max=high, step=step, value=value)
            slider.props["aria-label"] = label
            if low < 0 < high:
                slider.props["selection-color"] = "transparent"  # not filled from the left end
            slider.mark(mark or label)
            if style is None:
                self._percents[label] = shown
            else:
                shown.bind_text_from(
                    slider, "value", backward=lambda found: style(found or 0).replace("-", "−")
                )
            slider.on_value_change(self._changed)
        return slider

    def _show_shares(self, names: list[str]) -> None:
        """Shows the shares of a group, which depend on all of its sliders."""
        shares = self._ratio(names) or dict.fromkeys(names, 1 / len(names))
        for name, share in shares.items():
            self._percents[name].set_text(f"{share:.0%}".replace("%", "\u00a0%"))

    def _samplers(self) -> list[str]:
        """The samplers that compute what the model's scheduler asks for."""
        found = []
        for sampler in SAMPLERS:
            try:
                Schedule.from_config(self._studio.painter.model.scheduler_config, 20, sampler)
            except UserError:
                continue
            found.append(sampler)
        return found

    def _switched(self, group: str, is_on: bool) -> None:
        """One group at a time can be fair."""
        if is_on and group in self._fair:
            for other, switch in self._fair.items():
                if other != group:
                    switch.set_value(False)
        self._changed()

    def _new_seed(self) -> None:
        self._seed.set_value(secrets.randbelow(10**6))

    def _changed(self, *_: object) -> None:
        if self._is_set:
            self._on_change(self.settings())

    def settings(self) -> Settings:
        """The settings that the controls show."""
        groups = self._studio.groups
        fair = next((group for group, switch in self._fair.items() if switch.value), None)
        safe = any(switch.value for switch in self._safe)
        hidden = set(groups.get(fair, ()))
        if safe:
            hidden |= {name for group in self._studio.safety_groups for name in groups[group]}
        return Settings(
            prompt=self._prompt.value or "",
            concepts={
                name: round(float(slider.value), 4)
                for name, slider in self._scales.items()
                if slider.value and name not in hidden
            },
            fair=fair,
            ratio=None if fair is None else self._ratio(groups[fair]),
            safe=safe,
            steer_always=self._always.value,
            count=int(self._count.value),
            seed=min(max(int(self._seed.value or 0), 0), MAX_SEED),
            num_steps=int(self._steps.value),
            sampler=self._sampler.value,
            guidance_scale=float(self._guidance.value),
            negative_prompt=self._negative.value or "",
        )

    def _ratio(self, names: list[str]) -> dict[str, float] | None:
        """The shares, whose sum is 1; None if they are equal, or all 0."""
        parts = {name: float(self._shares[name].value or 0) for name in names}
        total = sum(parts.values())
        if not total or len(set(parts.values())) == 1:
            return None
        return {name: round(part / total, 4) for name, part in parts.items()}
