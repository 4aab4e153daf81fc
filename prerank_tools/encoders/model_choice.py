"""What the words of an `embed items` line come to: model folders, template and modalities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prerank_tools.encoders.loading import Modalities, Models, capabilities
from prerank_tools.encoders.model_folder import NAMED, Kind, find_model, kind_of, read_config
from prerank_tools.errors import UsageError

OWN_SMALL_MODELS = ("tfidf", "efficientnet_lite")


@dataclass(frozen=True)
class Slot:
    """One model: the word that named it, where it lies (None: to be fitted), what it holds.

    A model that the output must carry along (fitted, converted, or taken from such an output) is `stored`
    as `<output>/<role>`.
    """

    role: Literal["model", "image_model"]
    word: str
    path: Path | None
    kind: Kind
    stored: bool

    def folder(self, work: Path) -> Path:
        """Where the model is while the job runs."""
        if self.stored or self.path is None:
            return work / self.role
        return self.path

    @property
    def converts(self) -> bool:
        """Whether it is published weights that have yet to become a folder."""
        return self.path is not None and self.path.is_file()


@dataclass(frozen=True)
class Choice:
    """Slots, modalities and template, all resolved."""

    slots: tuple[Slot, ...]
    modalities: Modalities
    template: str

    def models(self, work: Path) -> Models:
        """Which folder does what."""
        by_kind = {slot.kind: slot.folder(work) for slot in self.slots}
        dual = by_kind.get("dual")
        return Models(
            text=by_kind.get("text") or by_kind.get("tfidf") or dual,
            image=by_kind.get("image") or dual,
            item=by_kind.get("item_encoder"),
            modalities=self.modalities,
            template=self.template,
        )


def choose_models(
    model: str | None,
    image_model: str | None,
    *,
    modalities: str,
    previous: Mapping[str, Any] | None,
    at: Path | None,
) -> tuple[Slot, ...]:
    """The models named, else those of the previous output (its params, its folder `at`), else TF-IDF."""
    if model is None and image_model is None and previous is not None and at is not None:
        return previous_slots(previous, at)
    slots = []
    if model is not None or image_model is None or modalities != "image":
        slots.append(slot_of("model", model or "tfidf"))
    if image_model is not None:
        slots.append(slot_of("image_model", image_model))
        if slots[-1].kind not in ("image", "dual"):
            raise UsageError(f"--image-model {image_model}: it reads no images", "name a vision model")
        if len(slots) == 2 and slots[0].kind not in ("text", "tfidf"):
            raise UsageError(f"--model {model}: it needs no --image-model", "leave --image-model out")
    return tuple(slots)


def previous_slots(params: Mapping[str, Any], at: Path) -> tuple[Slot, ...]:
    """The models that made an earlier output: those stored in it, or found again by name."""
    slots = []
    for role in ("model", "image_model"):
        word = params.get(role)
        if word is None:
            continue
        if (at / role).is_dir():
            slots.append(slot_of(role, str(at / role)))
        elif word in NAMED or "/" in word:
            slots.append(slot_of(role, word))
        else:
            flag = "--" + role.replace("_", "-")
            raise UsageError(f"{at}: made with a {word}, which it does not hold", f"name it with {flag}")
    return tuple(slots)


def slot_of(role: Any, word: str) -> Slot:
    """One word of the command line as a model."""
    if word == "tfidf" and not Path(word).exists():
        return Slot(role, word, None, "tfidf", stored=True)
    path = find_model(word)
    if path.is_file():
        return Slot(role, word, path, "image", stored=True)
    kind = kind_of(path)
    stored = read_config(path).get("prerank_model") in OWN_SMALL_MODELS
    # The same folder elsewhere is the same model: its path is no parameter, its digest is an input.
    named = word in NAMED or not Path(word).exists()
    return Slot(role, word if named else f"{kind} folder", path, kind, stored)


def choose_modalities(asked: str, slots: tuple[Slot, ...], *, has_text: bool, has_image: bool) -> Modalities:
    """What to encode: what is asked for, or all that both the models and the table have."""
    can: set[str] = set().union(*(capabilities(slot.kind, slot.path) for slot in slots))
    if asked == "auto":
        there = {name for name, has in (("text", has_text), ("image", has_image)) if has}
        found = can & there or can
        return "both" if len(found) == 2 else found.pop()  # type: ignore[return-value]
    missing = ({"text", "image"} if asked == "both" else {asked}) - can
    if missing:
        raise UsageError(
            f"--modalities {asked}: the model reads no {missing.pop()}",
            "add --image-model efficientnet-lite0, or name a dual encoder with --model",
        )
    return asked  # type: ignore[return-value]


def stored_template(slots: tuple[Slot, ...]) -> str | None:
    """The template that a TF-IDF model was fitted with, or an item encoder trained with."""
    for slot in slots:
        if slot.path is not None and slot.kind in ("tfidf", "item_encoder"):
            return read_config(slot.path).get("template")
    return None
