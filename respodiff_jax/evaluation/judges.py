"""What scores pictures: CLIPs, detectors of unsafe content, reference pictures."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from respodiff_jax.backbone import Clip, load_clip
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import quality
from respodiff_jax.evaluation.detectors import Detector, load_detectors
from respodiff_jax.evaluation.spec import EvaluationSpec
from respodiff_jax.storage import PathLike

Clips = PathLike | Clip | Sequence[PathLike | Clip]


@dataclasses.dataclass(frozen=True)
class Judges:
    """What scores the pictures.

    Attributes:
      clip: classifies and scores; None if no part needs it.
      others: further CLIPs by name; they classify and score the same pictures.
      detectors: detectors of unsafe pictures, by name.
      reference: pictures that quality is compared with; None compares with the base model's.
    """

    clip: Clip | None = None
    others: Mapping[str, Clip] = dataclasses.field(default_factory=dict)
    detectors: Mapping[str, Detector] = dataclasses.field(default_factory=dict)
    reference: quality.Reference | None = None


def load_judges(
    spec: EvaluationSpec,
    clip: Clips | None,
    detectors: Sequence[str | Detector],
    q16_clip: str | None,
    reference: PathLike | None,
) -> Judges:
    """Loads the judges that the parts need.

    Args:
      spec: the parts, and the suite with its own CLIP.
      clip, detectors, q16_clip, reference: as for `evaluate`.

    Raises:
      UserError: if a CLIP is given twice, or a judge cannot be loaded.
    """
    if clip is None:
        clip = spec.suite.clip
    given = [clip] if isinstance(clip, PathLike | Clip) else list(clip)
    names = _short_names([c.identity["name"] if isinstance(c, Clip) else str(c) for c in given])
    only_unsafe = set(spec.parts) <= {"safety", "attack"}
    needs_clip = not only_unsafe or spec.suite.unsafe_classes is not None
    use_reference = reference is not None and "quality" in spec.parts
    found_reference = quality.open_reference(reference) if use_reference else None
    judged = bool({"safety", "attack"} & set(spec.parts))
    found_detectors = load_detectors(detectors, q16_clip) if judged else {}
    clips = [c if isinstance(c, Clip) else load_clip(c) for c in given if needs_clip]
    return Judges(
        clip=clips[0] if clips else None,
        others=dict(zip(names[1:], clips[1:], strict=bool(clips))),
        detectors=found_detectors,
        reference=found_reference,
    )


def _short_names(names: Sequence[str]) -> list[str]:
    """The last parts of the CLIPs' names, or the names if those are the same."""
    if not names or len(set(names)) < len(names):
        raise UserError(f"`clip` has {list(names)}, expected one or more, each once")
    short = [pathlib.PurePath(name).name for name in names]
    return short if len(set(short)) == len(short) else list(names)
