"""`respodiff import`: makes adapters of checkpoints of the authors' code and of SDisc."""

from collections.abc import Sequence
from typing import Any

from respodiff_jax.adapters.adapter import Adapter
from respodiff_jax.adapters.combined import check_once
from respodiff_jax.backbone import load_backbone
from respodiff_jax.errors import UserError
from respodiff_jax.method.concepts import Concept
from respodiff_jax.method.modules import MidBlockModule
from respodiff_jax.method.paper import GENDER, RACE, SAFETY
from respodiff_jax.storage import PathLike, read_json


def import_checkpoint(
    checkpoint: PathLike,
    concepts: PathLike,
    *,
    only: Sequence[str] = (),
    model: str = "CompVis/stable-diffusion-v1-4",
    revision: str | None = None,
    variant: str | None = None,
    resolution: int | None = None,
) -> Adapter:
    """Makes an adapter of a checkpoint of the authors' code or of SDisc. Needs PyTorch.

    Args:
      checkpoint: an `unet.pth`; nothing that is pickled in it is run.
      concepts: the file of concept ids, see `read_concept_ids`.
      only: names of the concepts to take; () takes all.
      model: the model it was trained on, a diffusers folder or hub id.
      revision: branch, tag or commit of a hub id.
      variant: of the weight files, for example "fp16".
      resolution: of the training, in pixels; None is the model's own.

    Raises:
      UserError: if PyTorch is missing, or a file is damaged or does not fit the others.
    """
    try:
        from respodiff_jax.adapters.torch_checkpoint import read_checkpoint
    except ImportError as error:
        raise UserError("import reads PyTorch files: pip install -e '.[torch]'") from error
    concept_ids = read_concept_ids(concepts, only)
    backbone = load_backbone(model, revision=revision, variant=variant, abstract=True)
    resolution = backbone.default_resolution if resolution is None else resolution
    height, width, channels = backbone.mid_block_shape(resolution)
    ram, sam = read_checkpoint(checkpoint, (channels, height, width))
    for name, (number, _) in concept_ids.items():
        if number >= len(ram):
            raise UserError(
                f"concept {name!r} has id {number}, but the checkpoint holds ids 0 .."
                f" {len(ram) - 1}; take the file of concept ids that belongs to this checkpoint"
            )
    columns = [number for number, _ in concept_ids.values()]
    return Adapter(
        concepts=tuple(concept for _, concept in concept_ids.values()),
        module=MidBlockModule("constant", (height, width, channels)),
        ram={"constant": ram[columns].transpose(0, 2, 3, 1)},
        sam={"constant": sam[columns].transpose(0, 2, 3, 1)},
        backbone=backbone.trained_at(resolution),
    )


def read_concept_ids(file: PathLike, only: Sequence[str] = ()) -> dict[str, tuple[int, Concept]]:
    """Reads which concept has which id, its column in a checkpoint.

    Args:
      file: JSON, `{"a woman": 0, ...}` for the paper's concepts. Other concepts need the fields of
        `Concept`: `{"a wizard": {"id": 7, "group": ..., "neutral_prompts": [...],
        "target_prompt": ...}}`.
      only: names of the concepts to take; none means all.

    Returns:
      Id and concept by the name in the file.

    Raises:
      UserError: if the file is not such JSON, repeats a name, gives two concepts the same id, or
        names an unknown concept without its fields.
    """
    entries = read_json(file, "concept ids")
    check_once(only)
    if not isinstance(entries, dict) or not entries:
        raise UserError(f'concept ids {file}: expected JSON like {{"a woman": 0, "a man": 1}}')
    if unknown := [name for name in only if name not in entries]:
        raise UserError(f"concept ids {file} has no {unknown}, only {list(entries)}")
    chosen, seen = {}, {}
    for name in only or entries:
        number, concept = _entry(file, name, entries[name])
        if number in seen:
            raise UserError(
                f"concept ids {file}: {seen[number]!r} and {name!r} both have id {number}, but a"
                " checkpoint has one column for each id; name the trained concept in `only`, or"
                f" remove the other from {file}"
            )
        seen[number] = name
        chosen[name] = (number, concept)
    return chosen


def _entry(file: PathLike, name: str, value: Any) -> tuple[int, Concept]:
    """Id and concept of one entry."""
    fields = dict(value) if isinstance(value, dict) else {"id": value}
    number = fields.pop("id", None)
    if type(number) is not int or number < 0:
        raise UserError(f"concept ids {file}: {name!r} has id {number!r}, expected 0 or more")
    if fields:
        try:
            return number, Concept.from_dict({"name": name} | fields)
        except UserError as error:
            raise UserError(f"concept ids {file}: {error}") from error
    known = {c.name: c for group in (GENDER, RACE, SAFETY) for c in group.values()}
    for candidate in (name, f"a {name} person", f"an {name} person", f"anti-{name}"):
        if candidate in known:
            return number, known[candidate]
    raise UserError(
        f"concept ids {file}: {name!r} is not one of the paper's concepts ({', '.join(known)});"
        f' describe it: {{"{name}": {{"id": {number}, "group": ..., "neutral_prompts": [...],'
        ' "target_prompt": ...}}'
    )
