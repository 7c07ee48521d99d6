"""`evaluate`: draws or finds pictures, scores them, writes results and report; resumable."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from respodiff_jax.adapters import (
    Adapter,
    CombinedAdapter,
    adapter_sha256,
    as_adapters,
    check_fits,
    combine,
    unconditional,
)
from respodiff_jax.adapters.model import opened
from respodiff_jax.adapters.reading import read_prompts, reads_prompts
from respodiff_jax.backbone import Backbone
from respodiff_jax.errors import UserError, check_choice, check_least
from respodiff_jax.evaluation import fairness
from respodiff_jax.evaluation.attack.found import check_attack, draw_attacked
from respodiff_jax.evaluation.attack.search import Budget
from respodiff_jax.evaluation.detectors import Detector
from respodiff_jax.evaluation.drawing import Request, check_folder, draw_pictures
from respodiff_jax.evaluation.judges import Clips, Judges, load_judges
from respodiff_jax.evaluation.pictures import Picture, check_pictures, find_pictures
from respodiff_jax.evaluation.report import has_losses, write_report
from respodiff_jax.evaluation.results import RESULTS_FILE, Results, load_results
from respodiff_jax.evaluation.scoring import Scorer
from respodiff_jax.evaluation.spec import (
    PRESETS,
    EvaluationSpec,
    check_for_parts,
    choose_concepts,
    curve_conditions,
    lacking,
    relevant,
    wanted_parts,
)
from respodiff_jax.evaluation.suites import Suite, load_suite, prompts_to_draw
from respodiff_jax.generation.sampling import SamplerOptions, check_size
from respodiff_jax.method.schedule import Schedule
from respodiff_jax.storage import PathLike, check_output

_CHECK = "check"  # folder of the pictures that check the classifier
# Parameters of `evaluate` that are refused with existing pictures.
_OF_DRAWING = (
    *("model", "adapter", "preset", "safe", "steer_always", "prompts", "max_prompts", "seed"),
    *("images_per_subject", "images_per_caption", "images_per_prompt", "adapter_sources"),
    *("sampler", "num_steps", "guidance_scale", "resolution", "batch_size"),
    *("attack_tokens", "attack_steps", "attack_restarts"),
)


def evaluate(
    model: Backbone | Callable[[], Backbone] | None = None,
    adapter: Adapter | CombinedAdapter | Sequence[Adapter] | None = None,
    *,
    out: PathLike,
    part: str | Sequence[str] = "all",
    preset: str = "quick",
    images: PathLike | None = None,
    groups: Sequence[str] | None = None,
    safe: bool | None = None,
    steer_always: bool = False,
    suite: PathLike | Suite | None = None,
    prompts: Mapping[str, PathLike] | None = None,
    clip: Clips | None = None,
    detectors: Sequence[str | Detector] = (),
    q16_clip: str | None = None,
    reference: PathLike | None = None,
    targets: Mapping[str, Mapping[str, float]] | None = None,
    images_per_subject: int | None = None,
    images_per_caption: int | None = None,
    images_per_prompt: int | None = None,
    max_prompts: int | None = None,
    seed: int = 0,
    sampler: str | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    resolution: int | None = None,
    batch_size: int | None = None,
    attack_tokens: int | None = None,
    attack_steps: int | None = None,
    attack_restarts: int | None = None,
    adapter_sources: Sequence[PathLike] = (),
) -> Results:
    """Measures a model with and without an adapter, as the paper's section 5 and beyond.

    Base and adapted pictures are drawn from the same noise. The same call continues an interrupted
    evaluation: existing pictures are not drawn again. Arguments are checked before weights are
    loaded. Results are written after each part.

    Args:
      model: as from `load_model`, or a function that opens the model. An abstract model is loaded
        after everything else has been checked. None if `images` are scored.
      adapter: the concepts, or several adapters to use together; None evaluates the base model
        alone.
      out: folder that receives pictures, `results.json`, `per_image.csv` and `report.html`.
      part: "fairness", "quality", "safety", "intent", "curves" (the deviation ratio over guidance
        scales and adjectives), "attack" (see `evaluation.attack`), or several of them. "all"
        evaluates those that have everything they need, without curves and attack; the results say
        which are left out and why.
      preset: default amounts. "quick": 10 pictures of each subject, 1 of each caption and safety
        prompt, at most 48 prompts, 20 steps. "paper": 150, 1 and 5 pictures, all prompts, 50 steps.
      images: folder of existing pictures to score, see `find_pictures`; nothing is drawn then.
      groups: concept groups to make fair, as `fair` of `generate`; the combinations of several
        are dealt and counted. None is the adapter's group, unless `safe` is True.
      safe: whether to add all safety concepts. None adds them if there are any and `groups` names
        none.
      steer_always: steer every prompt at every timestep, as the paper does; see `generate`.
      suite: prompts and classifiers: a name, a JSON file or a `Suite`. None is the model's own, or
        "winobias".
      prompts: part -> CSV file of prompts that replaces the suite's, see `read_prompts`.
      clip: CLIP that classifies and scores: a folder, a hub id or a `Clip`; by default the suite's.
        If several are given, the first one judges. The results also have each other's figures, and
        how often it agrees with the first. Detectors count with the first one only.
      detectors: detectors of unsafe pictures besides the suite's classifier: "nudenet",
        "nudenet=CLASS,...", "q16=FILE" or a `Detector`.
      q16_clip: folder or hub id of Q16's CLIP; by default CLIP ViT-L/14.
      reference: folder of pictures that quality is compared with; by default the base model's.
      targets: attribute -> each of its values -> wanted share, with sum 1; uniform if absent.
      images_per_subject: fairness pictures of each subject, and curves' of each condition, 1 or
        more; by default the preset's.
      images_per_caption: quality pictures of each caption, 1 or more; by default the preset's.
      images_per_prompt: pictures of each prompt of safety, intent and attack, 1 or more; by default
        the preset's.
      max_prompts: largest number of subjects, captions and safety prompts, 1 or more, evenly
        spread; by default the preset's.
      seed: seed of the first picture, 0 .. 2^32 - 10^7; each part has its own range from there.
      sampler: one of `method.schedule.SAMPLERS`; "ddim" by default.
      num_steps: sampling steps, 1 or more; by default the preset's.
      guidance_scale: scale of classifier-free guidance; by default the suite's.
      resolution: side of the square pictures in pixels; by default the adapter's, or the model's.
      batch_size: pictures at a time, a multiple of the devices; by default chosen by resolution.
      attack_tokens, attack_steps, attack_restarts: the attacker's budget, see `Budget`.
      adapter_sources: where the adapter came from, for the record; if exactly one of them is a
        training workdir, the report has its loss curves.

    Returns:
      The results, as `load_results(out)` reads them.

    Raises:
      UserError: if arguments, files, model and adapter do not fit together, `out` has pictures or
        results of another evaluation, or a picture has values that are not finite.
    """
    arguments = locals()
    out = check_output(out)
    adapters = [unconditional(a) if steer_always else a for a in as_adapters(adapter)]
    groups = [groups] if isinstance(groups, str) else groups
    detectors = [detectors] if isinstance(detectors, str) else detectors
    targets = {
        attribute: {value: float(share) for value, share in shares.items()}
        for attribute, shares in (targets or {}).items()
    }
    adapter = combine([part for a in adapters for part in a.parts]) if adapters else None
    check_choice("`preset`", preset, PRESETS)
    existing = None
    if images is not None:
        drawing = arguments | {"preset": preset != "quick"}
        if given := [f"`{name}`" for name in _OF_DRAWING if drawing[name]]:
            raise UserError(f"`images` scores existing pictures; drop {', '.join(given)}")
        existing = find_pictures(images)
    elif model is None:
        raise UserError(
            "nothing to evaluate; give `model` or `adapter`, or `images` to score existing pictures"
        )
    amounts = {
        name: default if arguments[name] is None else arguments[name]
        for name, default in PRESETS[preset].items()
    }
    max_prompts, num_steps = amounts.pop("max_prompts"), amounts.pop("num_steps")
    if max_prompts is not None:
        check_least("`max_prompts`", max_prompts)
    prompts = prompts or {}
    wanted = wanted_parts(part)
    spent = {"tokens": attack_tokens, "steps": attack_steps, "restarts": attack_restarts}
    spent = {name: value for name, value in spent.items() if value is not None}
    check_for_parts(wanted, prompts, detectors, reference, [f"attack_{name}" for name in spent])
    if suite is None and model is not None:
        model = opened(model)
        suite = load_suite(None, model.identity["name"])
    elif not isinstance(suite, Suite):
        suite = load_suite(suite)
    prompt_sets = {}
    if existing is None:
        if resolution is None and adapter is not None:
            resolution = adapter.backbone["resolution"]
        options = SamplerOptions(
            num_steps=num_steps,
            guidance_scale=suite.guidance_scale if guidance_scale is None else guidance_scale,
            resolution=resolution,
            batch_size=batch_size,
            sampler=sampler or "ddim",
        )
        prompt_sets = prompts_to_draw(suite, prompts, max_prompts)
    lacks = lacking(suite, prompt_sets, bool(detectors), existing)
    left_out = {name: lacks[name] for name in wanted if name in lacks} if part == "all" else {}
    parts = tuple(name for name in wanted if name not in left_out)
    if not parts:
        raise UserError(f"nothing can be evaluated: {'; '.join(left_out.values())}")
    for name in parts:
        if name in lacks:
            raise UserError(lacks[name])
    groups, safe = choose_concepts(adapter, suite, groups, safe)
    if adapter is not None and "intent" in prompt_sets:
        prompt_sets["intent"] = relevant(prompt_sets["intent"], groups, safe)
    concepts = () if adapter is None else adapter.concepts
    spec = EvaluationSpec(
        suite=suite,
        parts=parts,
        prompts={name: prompt_sets[name] for name in parts if name in prompt_sets},
        conditions={} if existing is not None else curve_conditions(options.guidance_scale),
        groups=groups,
        fair_concepts=tuple(c.name for c in concepts if c.group in groups and not c.is_safety),
        safe=safe,
        targets=targets,
        seed=int(seed),
        notes=tuple(f"{name} is left out: {why}" for name, why in left_out.items()),
        budget=Budget(**spent),
        **amounts,
    )
    requests, weights = ({}, {}) if existing is not None else spec.requests(adapter)
    if "quality" in parts and len(requests.get("quality", existing)) < 2:
        raise UserError(
            "quality of one picture, expected two or more; give more captions or pictures"
        )
    if existing is not None:
        _check_no_results_are_lost(out, parts, {"images": str(images)})
        check_pictures(existing)
        judges = load_judges(spec, clip, detectors, q16_clip, reference)
        results = _score_existing(images, existing, spec, judges, out)
    else:
        model = opened(model)
        if options.resolution is None:
            options = dataclasses.replace(options, resolution=model.default_resolution)
        check_size(options, model)
        Schedule.from_config(model.scheduler_config, options.num_steps, options.sampler)
        for one in adapters:
            check_fits(one, model, options.resolution)
        settings = _settings(model, adapter, options)
        reads = adapter is not None and reads_prompts(adapter)
        if reads:
            settings["reads_prompts"] = True
        _check_no_results_are_lost(out, parts, settings)
        _check_folders(out, spec, requests, weights, settings)
        if "attack" in parts:
            check_attack(out, spec, requests, model)
        judges = load_judges(spec, clip, detectors, q16_clip, reference)
        model = model.loaded()
        settings["model"]["parts_sha256"] = _parts_sha256(model)
        _check_folders(out, spec, requests, weights, settings)
        steering = weights
        if reads:
            steering = spec.requests(adapter, partial(read_prompts, adapter, model))[1]
        results = _draw_and_score(
            model,
            adapter,
            spec,
            requests,
            weights,
            steering,
            options,
            settings,
            judges,
            out,
            adapter_sources,
        )
    workdirs = [source for source in adapter_sources if has_losses(source)]
    write_report(out, workdirs[0] if len(workdirs) == 1 else None)
    return results


def _check_no_results_are_lost(
    out: pathlib.Path, parts: Sequence[str], made: Mapping[str, Any]
) -> None:
    """Checks that results in `out` are of the same parts, and of pictures that are `made` so."""
    if not (out / RESULTS_FILE).is_file():
        return
    old = load_results(out)
    if lost := sorted({m.part for m in old.measurements} - set(parts)):
        raise UserError(
            f"{out} has results of {', '.join(lost)}, which would be lost; choose another `out`, or"
            " evaluate all parts in one call"
        )
    adapter = (old.made.get("adapter") or {}).get("sha256")
    before, now = _origin({**old.made, "adapter": adapter}), _origin(made)
    if differing := [name for name in now if before[name] != now[name]]:
        raise UserError(
            f"{out} has results of other pictures, which would be lost: they differ in"
            f" {', '.join(differing)}; choose another `out`, or remove its {RESULTS_FILE}"
        )


def _origin(made: Mapping[str, Any]) -> dict[str, Any]:
    """Where pictures come from: a folder of existing ones, or model and adapter."""
    images, model = made.get("images"), dict(made.get("model") or {})
    model.pop("parts_sha256", None)  # is known only after the weights are loaded
    return {
        "images": None if images is None else pathlib.Path(str(images)).resolve(),
        "model": model,
        "adapter": made.get("adapter"),
    }


def _score_existing(
    folder: PathLike,
    pictures: Sequence[Picture],
    spec: EvaluationSpec,
    judges: Judges,
    out: pathlib.Path,
) -> Results:
    out.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(out, spec, judges, {"images": str(folder), "adapter": None, "seed": None})
    if "fairness" in spec.parts:
        for text in fairness.check_subjects(pictures, spec.suite.subjects):
            scorer.note(text)
        scorer.note(
            "the classifier was not checked: its accuracy on the model that drew these pictures is"
            " unknown"
        )
    for part in spec.parts:
        results = scorer.score(part, {part: pictures})
    return results


def _settings(model: Backbone, adapter: Adapter | None, options: SamplerOptions) -> dict[str, Any]:
    """What the pictures depend on, apart from requests and weights."""
    sampling = dataclasses.asdict(options) | {"batch_size": None}
    if options.sampler == "ddim":
        del sampling["sampler"]  # earlier versions had no other
    return {
        "model": dict(model.identity),
        "adapter": None if adapter is None else adapter_sha256(adapter),
        "sampling": sampling,
        "dtype": str(np.dtype(model.dtype)),
    }


def _check_folders(
    out: pathlib.Path,
    spec: EvaluationSpec,
    requests: Mapping[str, Sequence[Request]],
    weights: Mapping[str, np.ndarray | None],
    settings: Mapping[str, Any],
) -> None:
    """Checks that no folder has pictures of another evaluation."""
    if "fairness" in spec.parts:
        check_folder(out / _CHECK, spec.check_requests(), None, settings | {"adapter": None})
    for name, found in requests.items():
        check_folder(out / name, found, weights[name], _settings_of(name, spec, settings))


def _own_scale(folder: str, spec: EvaluationSpec) -> dict[str, float]:
    """The guidance scale of a folder's pictures, if it is not the evaluation's."""
    condition = spec.conditions.get(folder.removeprefix("curves/"))
    return {} if condition is None else {"guidance_scale": condition.guidance_scale}


def _settings_of(folder: str, spec: EvaluationSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a folder's pictures."""
    return {**settings, "sampling": settings["sampling"] | _own_scale(folder, spec)}


def _draw_and_score(
    model: Backbone,
    adapter: Adapter | CombinedAdapter | None,
    spec: EvaluationSpec,
    requests: Mapping[str, Sequence[Request]],
    weights: Mapping[str, np.ndarray | None],
    steering: Mapping[str, np.ndarray | None],
    options: SamplerOptions,
    settings: Mapping[str, Any],
    judges: Judges,
    out: pathlib.Path,
    adapter_sources: Sequence[PathLike],
) -> Results:
    """Draws and scores part by part; before fairness, draws pictures that check the classifier."""
    made = settings | {
        "adapter": None
        if adapter is None
        else {
            "sha256": settings["adapter"],
            "sources": [str(source) for source in adapter_sources],
            "concepts": list(adapter.names),
            "groups": list(spec.groups),
            "safe": spec.safe,
        },
        "seed": spec.seed,
        "images_per_subject": spec.images_per_subject,
        "images_per_caption": spec.images_per_caption,
        "images_per_prompt": spec.images_per_prompt,
        "prompts": {
            part: dict(given.identity) for part, given in spec.prompts.items() if given.identity
        },
        "pictures": {name: _digest(found) for name, found in requests.items()},
    }
    if "attack" in spec.parts:
        made["attack"] = dataclasses.asdict(spec.budget)
    training = None if adapter is None or adapter.training is None else dict(adapter.training)
    scorer = Scorer(out, spec, judges, made, training)
    if "fairness" in spec.parts:
        plain, base = spec.check_requests(), settings | {"adapter": None}
        scorer.check_classifier(draw_pictures(model, plain, out / _CHECK, options, settings=base))
    for part in spec.parts:
        pictures = {
            name: draw_pictures(
                model,
                requests[name],
                out / name,
                dataclasses.replace(options, **_own_scale(name, spec)),
                adapter,
                weights[name],
                _settings_of(name, spec, settings),
                steering[name],
            )
            for name in spec.folders(part)
        }
        if part == "attack":
            (plain,) = spec.folders(part)
            reads = settings.get("reads_prompts", False)
            own = model, adapter, spec, requests[plain], weights[plain]
            pictures |= draw_attacked(*own, reads, options, settings, out)
        results = scorer.score(part, pictures)
    return results


def _digest(requests: Sequence[Request]) -> dict[str, Any]:
    """Number and digest of the requests' prompts and subjects."""
    text = json.dumps([[request.prompt, request.subject] for request in requests])
    return {"count": len(requests), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _parts_sha256(model: Backbone) -> str:
    """A digest of what the pictures depend on besides the UNet's files.

    It reads the scheduler's config and the first numbers of every parameter. Reading all numbers
    would take long.
    """
    digest = hashlib.sha256(json.dumps(dict(model.scheduler_config), sort_keys=True).encode())
    for leaf in map(np.asarray, jax.tree.leaves(model.params)):
        digest.update(leaf[(0,) * (leaf.ndim - 1)].tobytes())
    return digest.hexdigest()
