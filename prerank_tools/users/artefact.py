"""The user model's folder: `config.json` says how a log is read, `model.safetensors` holds the weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file

from prerank_tools.errors import ContractError
from prerank_tools.users.backbone import Backbone, Training
from prerank_tools.users.llatte import LlatteConfig, UserModel
from prerank_tools.users.tokens import TokenSizes


class UserModelSpec(BaseModel):
    """All that is needed to rebuild the model and to read a log the way it was trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = "llatte_upstream"
    model: LlatteConfig
    content: int  # width of the item embeddings
    actions: tuple[str, ...]  # place 0 of the table is unknown, so the first of them has place 1
    surfaces: tuple[str, ...]
    heads: tuple[str, ...]
    backbone_layers: int
    backbone_width: int
    max_events: int
    lag: int

    @property
    def width(self) -> int:
        """Numbers in a user embedding."""
        return self.model.summaries * self.model.summary_width


def build(spec: UserModelSpec, *, head_weights: tuple[float, ...] = ()) -> Training:
    """The untrained model with its training-only backbone."""
    sizes = TokenSizes(
        content=spec.content,
        item_buckets=spec.model.item_buckets,
        actions=len(spec.actions) + 1,
        surfaces=len(spec.surfaces) + 1,
        part=spec.model.part,
    )
    user = UserModel(spec.model, sizes)
    backbone = Backbone(
        user,
        content=spec.content,
        part=spec.model.part,
        heads=len(spec.heads),
        layers=spec.backbone_layers,
        width=spec.backbone_width,
    )
    return Training(user, backbone, head_weights or (1.0,) * len(spec.heads))


def save(folder: Path, spec: UserModelSpec, model: Training) -> None:
    """Write the folder's two files; the run adds the manifest."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(spec.model_dump_json(indent=1) + "\n")


def load(folder: Path, *, device: str = "cpu") -> tuple[UserModelSpec, UserModel]:
    """The user model alone, in eval mode: heads and backbone stay behind."""
    spec = read_spec(folder)
    user = build(spec).user
    tensors = load_file(str(folder / "model.safetensors"))
    prefix = "user."
    user.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return spec, user.eval().to(torch.device(device))


def read_spec(folder: Path) -> UserModelSpec:
    """`config.json` of a user model; ContractError where the folder holds anything else."""
    hint = "name the folder that `prerank train user` wrote"
    try:
        return UserModelSpec.model_validate_json((folder / "config.json").read_text())
    except OSError as fault:
        raise ContractError(f"{folder}: not a model folder ({fault.strerror}: config.json)", hint) from fault
    except ValidationError as fault:
        raise ContractError(f"{folder}: config.json is not that of a user model", hint) from fault


def fingerprint(folder: Path) -> str:
    """sha256 over configuration and weights: equal models have equal ones, wherever they lie."""
    total = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        total.update((folder / name).read_bytes())
    return total.hexdigest()
