"""What all visitors of the page share: the model with its adapters, and what measures pictures."""

import functools
import warnings
from collections.abc import Sequence

from respodiff_jax.adapters import Adapter, as_adapters, check_fits, combine, load_adapter
from respodiff_jax.backbone import Backbone
from respodiff_jax.emoji import shipped
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation.suites import load_suite
from respodiff_jax.play.measuring import Judge
from respodiff_jax.play.painter import Painter
from respodiff_jax.play.settings import Settings, label, plan


class Studio:
    """A model and its adapters, ready to draw.

    Args:
      model: from `load_model`; its weights are read after everything else has been checked.
      adapters: their concepts are used together.
      sources: where the adapters are from, for command lines and metadata.
      resolution: in pixels; None is the adapter's, or the model's own.

    Attributes:
      painter: draws.
      name: of the model.
      about: what the model is, for a visitor.
      sources: as given.
      suite: professions and classifier prompts.
      hint: how to get an adapter, or None if there is one.

    Raises:
      UserError: if an adapter does not fit the model, or adapters do not fit each other.
    """

    def __init__(
        self,
        model: Backbone,
        adapters: Sequence[Adapter] = (),
        sources: Sequence[str] = (),
        resolution: int | None = None,
    ):
        parts = [part for adapter in as_adapters(list(adapters)) for part in adapter.parts]
        adapter = combine(parts) if parts else None
        size = resolution or (adapter.backbone["resolution"] if adapter else None)
        size = size or model.default_resolution
        if adapter is not None:
            check_fits(adapter, model, size)
        model.latent_shape(size)
        self.name, self.sources = model.identity["name"], sources
        self.suite = load_suite(None, self.name)
        self.about = f"The model is {self.name}."
        if self.name == shipped.MODEL:
            some = ", ".join(self.suite.subjects[:5])
            self.about = (
                f"The model is {self.name}. It draws emoji and knows few words: professions such as"
                f" {some}, and things such as a cat."
            )
        self.hint = None
        if adapter is None:
            self.hint = (
                "No adapter is loaded, so both pictures are the base model's. Train one with"
                " `respodiff train --config CONFIG --workdir DIR`, then start with --adapter DIR."
            )
        self._concepts = adapter.concepts if adapter else ()
        self.painter = Painter(model.loaded(), adapter, size)

    def warm_up(self) -> None:
        """Compiles, and draws what a new visitor sees first."""
        settings = self.start()
        try:
            chosen = plan(self.painter, settings)
        except UserError:  # the page shows it to the visitor
            return
        jobs = [job for pair in zip(chosen.base, chosen.adapted, strict=True) for job in pair]
        for _ in self.painter.draw(jobs, settings.options):
            pass

    @functools.cached_property
    def judge(self) -> Judge:
        """Counts pictures; its CLIP is opened at the first use."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Judge(self.suite)

    def warning(self, prompt: str) -> str:
        """What the model cannot read in a prompt; empty if it reads everything."""
        cut = "The prompt is too long for the model: its end is not read."
        found = (
            cut if self.painter.read(prompt).is_too_long else "",
            shipped.warning_of_unknown_words(self.painter.model, [prompt]),
        )
        return " ".join(filter(None, found))

    @property
    def groups(self) -> dict[str, list[str]]:
        """Group -> its concepts, those of safety last."""
        found: dict[str, list[str]] = {}
        for concept in sorted(self._concepts, key=lambda concept: concept.is_safety):
            found.setdefault(concept.group, []).append(concept.name)
        return found

    @property
    def labels(self) -> dict[str, str]:
        """Concept -> its name on the page."""
        return {concept.name: label(concept) for concept in self._concepts}

    @property
    def safety_groups(self) -> set[str]:
        return {concept.group for concept in self._concepts if concept.is_safety}

    def start(self) -> Settings:
        """The settings of a new visitor: the first group is fair, so that something is to see."""
        fair = [
            group
            for group, names in self.groups.items()
            if group not in self.safety_groups and len(names) > 1
        ]
        subject = "doctor" if "doctor" in self.suite.subjects else self.suite.subjects[0]
        return Settings(
            self.suite.prompts(subject)[0],
            fair=fair[0] if fair else None,
            safe=not fair and bool(self.safety_groups),
            # Large pictures take long.
            count=8 if self.painter.resolution <= 128 else 2,
            guidance_scale=self.suite.guidance_scale,
        )


def open_studio(
    model: Backbone,
    adapters: Sequence[Adapter],
    sources: Sequence[str],
    resolution: int | None = None,
) -> Studio:
    """A `Studio`; Emoji World without an adapter gets those of the package."""
    if not adapters and model.identity["name"] == shipped.MODEL:
        folders = shipped.adapter_folders()
        adapters, sources = [load_adapter(f) for f in folders], [str(f) for f in folders]
    return Studio(model, adapters, sources, resolution)


def check_library() -> None:
    """Checks that the library of the page is installed.

    Raises:
      UserError: if it is not.
    """
    try:
        import nicegui  # noqa: F401
    except ImportError as error:
        raise UserError(f"the page needs NiceGUI ({error}): pip install -e '.[play]'") from error
